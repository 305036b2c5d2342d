"""Which image tokens stay: scores from the last text token's attention, and the sets made of them.

FEATHER: Feather the Throttle, ICCV 2025, arXiv 2412.13180, code markendo/FEATHER (MIT). FastV: An Image is Worth 1/2
Tokens After Layer 2, ECCV 2024, arXiv 2403.06764, code pkunlp-icler/FastV. Everything is batched: rows of a
batch may hold different numbers of image tokens.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from lynceus.core.errors import AdviceError

Tile = tuple[int, int] | tuple[int, int, int]


@dataclass(frozen=True, kw_only=True)
class Look:
    """What a criterion sees: the input of the layer before the pruned one, on the tokens still there.

    layer, index: that layer, and its number K-1. hidden: its input (b, m, d). image: which tokens are the image's.
    last: column of each row's last token. rope: cosines and sines (..., m, head dim) at the tokens' own positions.
    columns: where each token stood in the prompt (with what the cache held before it).
    """

    layer: nn.Module
    index: int
    hidden: Float[Tensor, "b m d"]
    image: Bool[Tensor, "b m"]
    last: Int[Tensor, " b"]
    rope: tuple[Tensor, Tensor] | None
    columns: Int[Tensor, "b m"]


Criterion = Callable[[Look], Tensor]  # scores (b, m); those of text tokens are not read


def image_attention(
    q: Float[Tensor, "b h d"], k: Float[Tensor, "b g m d"], image: Bool[Tensor, "b m"], *, scale: float | None = None
) -> Float[Tensor, "b m"]:
    """Attention of one query per row to the image's keys: softmax over those alone, in float32, averaged over heads.

    q: the last token's, h heads. k: g heads, g divides h. scale: default 1 / sqrt(d). Other tokens score 0."""
    b, h, d = q.shape
    g = k.shape[1]
    if h % g:
        raise AdviceError(f"{h} query heads cannot share {g} key heads; h must be a multiple of g.")
    grouped = q.reshape(b, g, h // g, d)
    logits = (grouped @ k.transpose(-1, -2)).float() * (d**-0.5 if scale is None else scale)
    logits = logits.masked_fill(~image[:, None, None], -math.inf)
    return logits.softmax(-1).nan_to_num(0.0).mean((1, 2))


def last_attention(look: Look, *, rope: bool) -> Float[Tensor, "b m"]:
    """The criterion of FastV (rope=True) and of FEATHER (rope=False), with the layer's own norm and projections."""
    q, k, scale = queries_and_keys(look, rope=rope)
    return image_attention(q, k, look.image, scale=scale)


def queries_and_keys(look: Look, *, rope: bool) -> tuple[Tensor, Tensor, float]:
    """(q (b, h, d) of the last tokens, k (b, g, m, d) of all, scale) of `look.layer`, rotated when `rope`."""
    attention: Any = look.layer.self_attn
    x = look.layer.input_layernorm(look.hidden)  # type: ignore[operator]
    end = x[torch.arange(len(x), device=x.device), look.last][:, None]
    if hasattr(attention, "queries"):
        q, k = attention.queries(end), attention.keys(x)
    else:
        q, k = _projected(attention, "q", end), _projected(attention, "k", x)
    if rope:
        if look.rope is None:
            raise AdviceError(
                f"Layer {look.index} gets no position_embeddings, so FastV's rotated criterion cannot be computed; "
                "method='fastv_norope' and 'feather' do without."
            )
        turn = _rotation(attention)
        cos, sin = (r if r.shape[-3] == len(x) else r.expand(*r.shape[:-3], len(x), -1, -1) for r in look.rope)
        index = look.last.view(-1, 1, 1).expand(-1, 1, cos.shape[-1])
        at_end = [r.gather(-2, index.expand(*r.shape[:-3], -1, -1, -1)) for r in (cos, sin)]
        q, k = turn(q, *at_end), turn(k, cos, sin)
    return q[:, :, 0], k, float(getattr(attention, "scaling", q.shape[-1] ** -0.5))


def _projected(attention: Any, name: str, x: Tensor) -> Tensor:
    """(b, heads, n, d), with the norm per head that Qwen3 and others have."""
    out = getattr(attention, f"{name}_proj")(x).unflatten(-1, (-1, attention.head_dim))
    norm = getattr(attention, f"{name}_norm", None)
    return (norm(out) if norm is not None else out).transpose(1, 2)


def _rotation(attention: Any) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """The rotary embedding of the attention's own file, as (x, cos, sin) -> x; that of Llama where it has none."""
    own = getattr(sys.modules.get(type(attention).__module__), "apply_rotary_pos_emb", None)
    if own is None:
        return rotated
    return lambda x, cos, sin: own(x, x, cos, sin)[0]


def rotated(
    x: Float[Tensor, "b h n d"], cos: Float[Tensor, "#b n d"], sin: Float[Tensor, "#b n d"]
) -> Float[Tensor, "b h n d"]:
    """RoPE with the halves of each head as partners (Llama's)."""
    a, b = x.chunk(2, -1)
    return x * cos[:, None] + torch.cat([-b, a], -1) * sin[:, None]


# ---- sets ------------------------------------------------------------------------------------------------------------
def top(scores: Float[Tensor, "b m"], among: Bool[Tensor, "b m"], counts: Int[Tensor, " b"]) -> Bool[Tensor, "b m"]:
    """The `counts` highest scores of each row among the tokens marked; of equal ones the first."""
    order = scores.masked_fill(~among, -math.inf).argsort(dim=-1, descending=True, stable=True)
    place = torch.arange(scores.shape[1], device=scores.device).expand_as(order)
    rank = torch.empty_like(order).scatter_(1, order, place)
    return (rank < counts[:, None]) & among


def share(counts: Int[Tensor, " b"], part: float) -> Int[Tensor, " b"]:
    """int(count * part), as the reference computes it (in double precision, cut towards zero)."""
    return torch.tensor([int(c * part) for c in counts.tolist()], dtype=torch.long, device=counts.device)


def on_grid(tiles: Sequence[Tile], stride: int) -> Bool[Tensor, " n"]:
    """True for the tokens on rows and columns 0, stride, 2 stride, ... of each tile, tile after tile.

    A tile is (rows, columns), or (rows, columns, extra): so many tokens more at the end of each row (newlines), never
    on the grid."""
    parts = []
    for rows, columns, *rest in tiles:
        extra = rest[0] if rest else 0
        mark = torch.zeros(rows, columns + extra, dtype=torch.bool)
        mark[::stride, :columns:stride] = True
        parts.append(mark.flatten())
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.bool)


def length(tiles: Sequence[Tile]) -> int:
    """Tokens of all tiles together."""
    return sum(t[0] * (t[1] + (t[2] if len(t) > 2 else 0)) for t in tiles)


def final_share(counts: Sequence[int], part: float) -> Bool[Tensor, " n"]:
    """True for the last `part` of each image's tokens: from int(count * (1 - part)) on, as the reference does."""
    marks = [torch.arange(c) >= int(c * (1 - part)) for c in counts]
    return torch.cat(marks) if marks else torch.zeros(0, dtype=torch.bool)
