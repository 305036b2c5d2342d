"""A small vision-language model and its world: scenes of coloured shapes, "where is the red square?" -> row, column.

The decoder is plain torch (RoPE, RMS norms, gated perceptrons) and keeps the protocol of `lynceus.rewrite.vlm_tokens`:
layers in `layers`, each called with position_embeddings, attention_mask and past_key_values. Question words enter as
pictures: the colour as a patch filled with it, the shape as a white patch, through the same patch embedding.
"""

from __future__ import annotations

import hashlib
import inspect
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lynceus.core.rng import borrowed, generator

KEPT = Path(tempfile.gettempdir()) / f"lynceus-bench-{os.getuid()}"
SIDE, PATCH = 12, 4  # the scene is a grid of 12 x 12 patches of 4 x 4 pixels
COLOURS = torch.tensor(
    [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0], [1.0, 1.0, 0.0], [1.0, 0.0, 1.0], [0.0, 1.0, 1.0]]
)
SHAPES = torch.tensor(
    [
        [[1, 1, 1, 1], [1, 0, 0, 1], [1, 0, 0, 1], [1, 1, 1, 1]],  # square
        [[0, 1, 1, 0], [1, 1, 1, 1], [1, 1, 1, 1], [0, 1, 1, 0]],  # disk
        [[1, 0, 0, 1], [0, 1, 1, 0], [0, 1, 1, 0], [1, 0, 0, 1]],  # cross
        [[0, 0, 0, 1], [0, 0, 1, 1], [0, 1, 1, 1], [1, 1, 1, 1]],  # triangle
    ]
).float()
MOST = 12  # objects in a scene


def scenes(
    count: int,
    draw: torch.Generator,
    *,
    cells: Tensor | None = None,
    fewest: int = 1,
    most: int = MOST,
    questions: int = 1,
) -> tuple[Tensor, Tensor, Tensor]:
    """(patches (n, 144, 48), questions (n, q, 2, 48), places (n, q, 2) row and column): `fewest` to `most` objects, no
    two of the same colour and shape; each question asks for one of them. cells: numbers of the patches that objects
    may stand on; None: all."""
    order = torch.rand(count, SIDE * SIDE if cells is None else len(cells), generator=draw).argsort(1)
    cells = (order if cells is None else cells[order])[:, :MOST]
    cells = F.pad(cells, (0, MOST - cells.shape[1]))
    kinds = torch.rand(count, 24, generator=draw).argsort(1)[:, :MOST]
    objects = torch.randint(fewest, most + 1, (count, 1), generator=draw)
    there = torch.arange(MOST)[None] < objects
    colours, shapes = kinds // 4, kinds % 4
    drawn = (SHAPES[shapes][:, :, None] * COLOURS[colours][..., None, None]).flatten(2)
    patches = 0.1 * torch.randn(count, SIDE * SIDE, 3 * PATCH * PATCH, generator=draw)
    patches.scatter_add_(1, cells[..., None].expand(-1, -1, 48), drawn * there[..., None])
    asked = (torch.rand(count, questions, generator=draw) * objects).long()
    colours, shapes, cells = colours.gather(1, asked), shapes.gather(1, asked), cells.gather(1, asked)
    colour = 0.6 * COLOURS[colours][..., None].expand(-1, -1, -1, PATCH * PATCH).flatten(2)
    shape = SHAPES[shapes].flatten(2)[:, :, None].expand(-1, -1, 3, -1).flatten(2)
    return patches, torch.stack([colour, shape], 2), torch.stack([cells // SIDE, cells % SIDE], 2)


# ---- the decoder -----------------------------------------------------------------------------------------------------
class Norm(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], self.weight, 1e-6)


class Attention(nn.Module):
    def __init__(self, width: int, heads: int, index: int):
        super().__init__()
        self.heads, self.index = heads, index
        self.q_proj, self.k_proj = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)
        self.v_proj, self.o_proj = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)

    def queries(self, x: Tensor) -> Tensor:
        return self.q_proj(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def keys(self, x: Tensor) -> Tensor:
        return self.k_proj(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], mask: Tensor | None, cache: Any) -> Tensor:
        v = self.v_proj(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        q, k = rotated(self.queries(x), rope), rotated(self.keys(x), rope)
        if cache is not None:
            k, v = cache.update(k, v, self.index)
        causal = mask is None and q.shape[-2] > 1
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
        return self.o_proj(out.transpose(1, 2).flatten(2))


class Layer(nn.Module):
    def __init__(self, width: int, heads: int, index: int):
        super().__init__()
        self.input_layernorm, self.after = Norm(width), Norm(width)
        self.self_attn = Attention(width, heads, index)
        self.gate, self.up = nn.Linear(width, 2 * width, bias=False), nn.Linear(width, 2 * width, bias=False)
        self.down = nn.Linear(2 * width, width, bias=False)

    def forward(
        self,
        x: Tensor,
        *,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
    ) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), position_embeddings, attention_mask, past_key_values)
        y = self.after(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class Decoder(nn.Module):
    """(b, n, width) embeddings -> (b, n, width); positions count on from what the cache has seen."""

    def __init__(self, width: int, depth: int, heads: int):
        super().__init__()
        self.layers = nn.ModuleList([Layer(width, heads, i) for i in range(depth)])
        self.norm = Norm(width)
        self.angle = width // heads // 2

    def forward(
        self,
        inputs_embeds: Tensor,
        *,
        attention_mask: Tensor | None = None,
        places: Tensor | None = None,
        past_key_values: Any = None,
        **passed: Any,
    ) -> Tensor:
        x, seen = inputs_embeds, 0 if past_key_values is None else past_key_values.get_seq_length()
        places = torch.arange(seen, seen + x.shape[1], device=x.device) if places is None else places
        turn = places[:, None] * 10_000.0 ** -(torch.arange(self.angle, device=x.device) / self.angle)
        turn = torch.cat([turn, turn], 1)[None].to(x.dtype)
        rope = (turn.cos(), turn.sin())
        for layer in self.layers:
            x = layer(
                x,
                position_embeddings=rope,
                attention_mask=attention_mask,
                past_key_values=past_key_values,
                **passed,
            )
        return self.norm(x)


def rotated(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    cos, sin = (r[:, None] for r in rope)
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat([-b, a], -1) * sin


class SceneVLM(nn.Module):
    """<start> 144 patches <where> colour shape -> row; and with the row's word behind it -> column."""

    def __init__(self, width: int = 64, depth: int = 8, heads: int = 4):
        super().__init__()
        self.patch = nn.Linear(3 * PATCH * PATCH, width)
        self.rows, self.columns = nn.Embedding(SIDE, width), nn.Embedding(SIDE, width)
        self.words = nn.Embedding(2 + SIDE, width)  # start, where, and the rows as answers
        self.kinds = nn.Embedding(2, width)  # colour, shape
        self.decoder = Decoder(width, depth, heads)
        nn.init.normal_(self.patch.weight, std=0.2)
        for table in (self.words, self.kinds):
            nn.init.normal_(table.weight, std=0.3)
        places = nn.init.orthogonal_(torch.empty(2 * SIDE, width)) * 0.3 * width**0.5
        self.rows.weight.data, self.columns.weight.data = places[:SIDE].clone(), places[SIDE:].clone()
        for layer in self.decoder.layers:  # attention begins as likeness that copies, which shortens the plateau
            attention = layer.self_attn
            nn.init.normal_(attention.q_proj.weight, std=0.1)
            attention.k_proj.weight.data.copy_(attention.q_proj.weight.data)
            nn.init.orthogonal_(attention.v_proj.weight, gain=0.5)
            attention.o_proj.weight.data.copy_(attention.v_proj.weight.data.T)

    def answers(self, row: Tensor, column: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (..., 12) from the decoder's outputs at the two answers: likeness to the places' own embeddings."""
        return row @ self.rows.weight.T, column @ self.columns.weight.T

    def image(self, patches: Tensor, cells: Tensor | None = None) -> Tensor:
        """The start and the patches, (n, 145, width), or those of them whose numbers are `cells`."""
        place = torch.arange(SIDE * SIDE, device=patches.device) if cells is None else cells
        image = self.patch(patches[:, place]) + self.rows(place // SIDE) + self.columns(place % SIDE)
        return torch.cat([self.words.weight[0].expand(len(patches), 1, -1), image], 1)

    def question(self, question: Tensor) -> Tensor:
        """<where> colour shape, (n, 3, width)."""
        where = self.words.weight[1].expand(len(question), 1, -1)
        return torch.cat([where, self.patch(question) + self.kinds.weight], 1)

    def prompt(self, patches: Tensor, question: Tensor) -> tuple[Tensor, Tensor]:
        """Embeddings (n, 148, width) of a prompt and where its image is, (n, 148) bool."""
        x = torch.cat([self.image(patches), self.question(question)], 1)
        seen = torch.zeros(x.shape[:2], dtype=torch.bool, device=x.device)
        seen[:, 1 : 1 + SIDE * SIDE] = True
        return x, seen

    def forward(
        self, patches: Tensor, questions: Tensor, rows: Tensor, cells: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Logits (n, q, 12) of rows, and of columns when the rows are told. The questions do not see each other: each
        stands right behind the picture."""
        n, q = questions.shape[:2]
        image = self.image(patches, cells)
        asked = torch.cat([self.question(questions.flatten(0, 1)), self.words(2 + rows).flatten(0, 1)[:, None]], 1)
        x = torch.cat([image, asked.unflatten(0, (n, q)).flatten(1, 2)], 1)
        start = image.shape[1]
        places = torch.cat([torch.arange(start), start + torch.arange(4).repeat(q)])
        own = torch.cat([torch.full((start,), -1), torch.arange(q).repeat_interleave(4)])
        mask = (places[None] <= places[:, None]) & ((own[None] == -1) | (own[None] == own[:, None]))
        out = self.decoder(x, attention_mask=mask, places=places)[:, start:].unflatten(1, (q, 4))
        return self.answers(out[:, :, 2], out[:, :, 3])


# side of the part of the scene that is seen, and most objects in it
LEVELS = ((3, 1), (3, 2), (4, 3), (4, 5), (5, 6), (6, 8), (7, 10), (8, 12), (10, 12), (12, 12))


def scene_vlm(*, seed: int = 0, steps: int = 1400, lr: float = 2e-3, log: bool = False) -> SceneVLM:
    """`SceneVLM` trained on fresh scenes, kept in a folder of the temporary files; a change of the model, the scenes or
    the options trains it anew. It first sees windows of 3 x 3 patches, and larger ones when four fifths of its answers
    are right; many questions are asked of each scene. Without, attention by colour and shape has a long plateau."""
    sources = "".join(inspect.getsource(o) for o in (scenes, Attention, Layer, Decoder, SceneVLM))
    recipe = sources + repr((LEVELS, seed, steps, lr))
    path = KEPT / f"scene-vlm-{hashlib.blake2b(recipe.encode(), digest_size=6).hexdigest()}.safetensors"
    with borrowed(seed, "scene vlm"):
        net = SceneVLM()
    if path.is_file():
        net.load_state_dict(load_file(path))
        return net.eval()
    draw = generator(seed, "scenes")
    optimizer = torch.optim.AdamW(net.parameters(), lr, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    start, level, known = time.perf_counter(), 0, 0.0
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr * min(1.0, (step + 1) / 50, 1.02 - step / 2000)
        side, most = LEVELS[level]
        questions = min(8, most)
        batch = max(8, min(64, 1400 // (side * side + 1 + 4 * questions)))  # as many tokens in every step
        top, left = torch.randint(0, SIDE - side + 1, (2,), generator=draw).tolist()
        cells = (torch.arange(top, top + side)[:, None] * SIDE + torch.arange(left, left + side)).flatten()
        patches, asked, places = scenes(batch, draw, cells=cells, most=most, questions=questions)
        row, column = net(patches, asked, places[..., 0], cells)
        loss = F.cross_entropy(row.flatten(0, 1), places[..., 0].flatten())
        loss = loss + F.cross_entropy(column.flatten(0, 1), places[..., 1].flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        right = (torch.stack([row.argmax(-1), column.argmax(-1)], -1) == places).all(-1).float().mean().item()
        known = 0.9 * known + 0.1 * right
        if known > 0.8 and level < len(LEVELS) - 1:
            level, known = level + 1, 0.0
        if log and step % 50 == 0:
            seconds = time.perf_counter() - start
            print(f"{step} level {level}: loss {loss.item():.3f}, right {known:.2f}, {seconds:.0f} s", flush=True)
    KEPT.mkdir(parents=True, exist_ok=True)
    save_file(net.state_dict(), path)
    return net.eval()
