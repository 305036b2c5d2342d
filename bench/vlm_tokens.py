"""Token pruning inside vision-language models: prefill time beside FLOPs, RoPE's bias, and a small model's accuracy.

python -m bench.vlm_tokens [time] [criteria] [scenes]; scenes trains three small models (`bench/_scenes.py`, kept in a
folder of the temporary files: three processor minutes each) and prunes them in five ways.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench._scenes import SIDE, SceneVLM, scene_vlm, scenes
from lynceus.core.report import environment
from lynceus.core.rng import generator
from lynceus.core.rows import text_table
from lynceus.rewrite.vlm_tokens import image_attention, prune, watch
from lynceus.rewrite.vlm_tokens.choose import on_grid, rotated, share, top
from lynceus.rewrite.vlm_tokens.flops import Shape, reduction
from lynceus.rewrite.vlm_tokens.measure import measure

WAYS: dict[str, dict[str, Any]] = {
    "feather": {"method": "feather"},
    "fastv": {"method": "fastv"},
    "fastv without RoPE": {"method": "fastv_norope"},
    "uniform": {"method": "uniform"},
}


# ---- time ------------------------------------------------------------------------------------------------------------
def llava(width: int, layers: int = 32, heads: int = 4) -> Any:
    """Plain LLaVA of random weights: 27 x 27 image tokens."""
    import transformers

    torch.manual_seed(0)
    sight = transformers.CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, image_size=189, patch_size=7
    )
    words = transformers.LlamaConfig(
        hidden_size=width,
        intermediate_size=int(2.75 * width),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        vocab_size=200,
        max_position_embeddings=1024,
    )
    config = transformers.LlavaConfig(vision_config=sight, text_config=words, image_token_id=199)
    return transformers.LlavaForConditionalGeneration(config).eval()


def time_rows(repeats: int = 9) -> list[dict[str, Any]]:
    rows = []
    for width, heads in ((64, 4), (256, 4), (512, 8)):
        model = llava(width, heads=heads)
        draw = torch.Generator().manual_seed(0)
        words = torch.randint(3, 190, (1, 30), generator=draw)
        ids = torch.cat([words[:, :5], torch.full((1, 729), 199), words[:, 5:]], 1)
        inputs = {"input_ids": ids, "pixel_values": torch.rand(1, 3, 189, 189, generator=draw)}
        for name, way in WAYS.items():
            if width > 64 and name not in ("feather", "fastv"):
                continue
            report = measure(model, prune(model, **way), inputs, repeats=max(3, repeats * 64 // width))
            dense, short = report.rows
            rows.append(
                {
                    "width": width,
                    "way": name,
                    "dense ms": dense["decoder ms"],
                    "pruned ms": short["decoder ms"],
                    "time ratio": 1 - report.summary["prefill time saved"],
                    "FLOPs ratio": short["MACs"] / dense["MACs"],
                    "saved time/FLOPs": report.summary["time saved / FLOPs saved"],
                    "model error": report.summary["model error"],
                }
            )
    return rows


# ---- criteria without weights ----------------------------------------------------------------------------------------
def rope(positions: Any) -> tuple[Tensor, Tensor]:
    angle = torch.as_tensor(positions, dtype=torch.float32)[:, None] * 10_000.0 ** -(torch.arange(32) / 32)
    angle = torch.cat([angle, angle], 1)[None]
    return angle.cos(), angle.sin()


def scores(q: Tensor, k: Tensor, turned: bool) -> Tensor:
    n = k.shape[2]
    if turned:
        q, k = rotated(q[:, :, None], *rope([n + 7]))[:, :, 0], rotated(k, *rope(range(n)))
    return image_attention(q, k, torch.ones(len(q), n, dtype=torch.bool))


def criteria_rows(count: int = 1500) -> list[dict[str, Any]]:
    """Where the kept quarter lies, and how often a token that shares a direction with the query is kept.

    Both directions, what all tokens have in common and what the target adds, are drawn anew for every target; at
    12 x 12 also once for 300 targets, five times, since the figure depends on them."""
    rows = []
    for side, once in ((24, None), (12, None), *((12, k) for k in range(5))):
        n, draw = side * side, torch.Generator().manual_seed(once or 0)
        every, grid = torch.ones(1, n, dtype=torch.bool), on_grid([(side, side)], 3)[None]
        thirds: dict[str, list[Tensor]] = {"fastv": [], "fastv without RoPE": []}
        kept: dict[str, list[bool]] = {"fastv": [], "fastv without RoPE": [], "feather": []}
        at = torch.eye(n)[..., None]
        target = torch.randint(0, n, (count if once is None else 300,), generator=draw).tolist()
        pair = None if once is None else torch.randn(2, 1, 4, 1, 64, generator=draw)
        for t in target:
            common, along = (torch.randn(2, 1, 4, 1, 64, generator=draw) if pair is None else pair).unbind(0)
            early, late = (
                (
                    (common + 0.5 * torch.randn(1, 4, 1, 64, generator=draw) + strength * along)[:, :, 0],
                    common + 0.5 * torch.randn(1, 4, n, 64, generator=draw) + strength * along * at[t],
                )
                for strength in (0.3, 1.0)
            )
            for name, turned in (("fastv", True), ("fastv without RoPE", False)):
                marks = top(scores(*early, turned), every, torch.tensor([n // 4]))[0]
                thirds[name].append(marks.view(3, -1).sum(1) / marks.sum())
                kept[name].append(bool(marks[t]))
            there = top(scores(*early, False), every, share(torch.tensor([n]), 1 - 0.7)) | grid
            there = top(scores(*late, False), there, share(there.sum(1), (1 - 0.7) ** 2))
            kept["feather"].append(bool(there[0, t]))
        upper = np.array(target) < n // 2
        for name, found in kept.items():
            hit = np.array(found)
            row: dict[str, Any] = {
                "grid": f"{side} x {side}",
                "directions": "new" if once is None else once,
                "way": name,
            }
            if name in thirds:
                parts = torch.stack(thirds[name]).mean(0).tolist()
                row |= {"top third": parts[0], "middle": parts[1], "bottom": parts[2]}
            rows.append(
                {**row, "target kept": hit.mean(), "top half": hit[upper].mean(), "bottom half": hit[~upper].mean()}
            )
    return rows


# ---- a small model, trained ------------------------------------------------------------------------------------------
class Cache:
    """Keys and values of each layer, as a plain decoder needs them."""

    def __init__(self) -> None:
        self.entries: dict[int, tuple[Tensor, Tensor]] = {}

    def update(self, k: Tensor, v: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        if layer in self.entries:
            old = self.entries[layer]
            k, v = torch.cat([old[0], k], 2), torch.cat([old[1], v], 2)
        self.entries[layer] = (k, v)
        return k, v

    def get_seq_length(self, layer: int = 0) -> int:
        return self.entries[layer][0].shape[2] if layer in self.entries else 0


@torch.no_grad()
def answered(net: SceneVLM, decoder: Any, patches: Tensor, question: Tensor, pruned: bool) -> tuple[Tensor, Any]:
    """Rows and columns (n, 2), greedily: the row from the prompt, the column from the row's word and the cache."""
    x, image = net.prompt(patches, question)
    cache = Cache()
    with watch() as seen:
        out = decoder(x, past_key_values=cache, **({"image_tokens": image} if pruned else {}))
    row = net.answers(out[:, -1], out[:, -1])[0].argmax(-1)
    out = decoder(net.words(2 + row)[:, None], past_key_values=cache)
    return torch.stack([row, net.answers(out[:, -1], out[:, -1])[1].argmax(-1)], 1), seen[0] if seen else None


def scene_rows(seeds: tuple[int, ...] = (0, 1, 2), count: int = 600) -> list[dict[str, Any]]:
    """Accuracy (row and column right) on scenes of 6 to 12 objects never trained on, per third of the image."""
    ways: dict[str, dict[str, Any] | None] = {
        "dense": None,
        "fastv": {"method": "fastv", "layers": (1,)},
        "fastv without RoPE": {"method": "fastv_norope", "layers": (1,)},
        "uniform": {"method": "uniform", "layers": (1,)},
        "feather": {"method": "feather", "layers": (2, 4)},
        "feather, as early as fastv": {"method": "feather", "layers": (1, 4)},
        "fastv, later and harder": {"method": "fastv", "layers": (2,), "ratio": 0.87},
        "no RoPE, later and harder": {"method": "fastv_norope", "layers": (2,), "ratio": 0.87},
        "uniform, later and harder": {"method": "uniform", "layers": (2,), "stride": 3},
    }
    rows = []
    for seed in seeds:
        net = scene_vlm(seed=seed)
        patches, questions, places = scenes(count, generator(seed, "test scenes"), fewest=6)
        place = places[:, 0]
        full = SIDE * SIDE + 4
        for name, way in ways.items():
            decoder = net.decoder if way is None else prune(net.decoder, **way).eval()
            parts = [
                answered(net, decoder, p, q[:, 0], way is not None)
                for p, q in zip(patches.split(250), questions.split(250))
            ]
            right = (torch.cat([p[0] for p in parts]) == place).all(1).double()
            row: dict[str, Any] = {"seed": seed, "way": name, "exact": right.mean().item()}
            for i, third in enumerate(("top third", "middle", "bottom")):
                row[third] = right[place[:, 0] // (SIDE // 3) == i].mean().item()
            if way is not None:
                tokens = np.mean([k.counts(8, r) for _, k in parts for r in range(len(k.image))], 0).tolist()
                row["FLOPs"] = 1 - reduction(Shape(width=64, hidden=128), tokens, full)
                row["image tokens"] = (np.mean(tokens) - 4) / (full - 4)
                # rows differ in length, so this is the mean over the batch, not the padded width
            rows.append(row)
    for name in ways:
        mine = [r for r in rows if r["way"] == name]
        mean = {k: float(np.mean([r[k] for r in mine])) for k in mine[0] if k not in ("seed", "way")}
        rows.append({"seed": "mean", "way": name, **mean})
    return rows


def main() -> None:
    wanted = sys.argv[1:] or ["time", "criteria", "scenes"]
    torch.set_num_threads(1)
    made: dict[str, Any] = {"environment": environment(0)}
    for name, run in (("time", time_rows), ("criteria", criteria_rows), ("scenes", scene_rows)):
        if name in wanted:
            made[name] = run()
            print(f"\n{name}\n{text_table(made[name], width=160)}", flush=True)
    print(json.dumps(made, default=str))


if __name__ == "__main__":
    main()
