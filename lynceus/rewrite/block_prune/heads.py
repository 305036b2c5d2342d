"""Attention heads that block pruning emptied are taken out for real; the outputs stay what they were.

A head whose values have lost all weights gives the same vector, its value bias, whatever it attends to: that goes into
the bias of the projection. A head whose columns of the projection are all gone is not read at all.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


def attentions(model: nn.Module) -> list[tuple[str, Any]]:
    """Attention of ours and timm's whose `qkv` packs [3, heads, head_dim] and whose heads meet in `proj` alone."""
    ours = ("lynceus.layers.attention.Attention", "lynceus.layers.attention.MapAttention")
    theirs = ("timm.layers.attention.Attention", "timm.models.vision_transformer.Attention")
    found = []
    for name, module in model.named_modules():
        if f"{type(module).__module__}.{type(module).__name__}" not in ours + theirs:
            continue
        m: Any = module
        plain = type(m.norm) is nn.Identity and getattr(m, "gate", None) is None
        if plain and type(m.qkv) is nn.Linear and type(m.proj) is nn.Linear:
            found.append((name, m))
    return found


def dead(qkv: np.ndarray, proj: np.ndarray, *, heads: int, head_dim: int, rows: int, columns: int) -> list[int]:
    """Numbers of the heads that can go, given the kept blocks of both layers; at least one head stays.

    rows, columns: height of the blocks of qkv and width of those of proj. Only groups of heads whose edges are edges of
    blocks in both layers go."""
    group = math.lcm(rows // math.gcd(rows, head_dim), columns // math.gcd(columns, head_dim))
    if heads % group:
        return []
    width = group * head_dim
    out: list[int] = []
    offset = 2 * heads * head_dim  # where the values begin
    for first in range(0, heads, group):
        a = first * head_dim
        values = qkv[(offset + a) // rows : (offset + a + width) // rows]
        read = proj[:, a // columns : (a + width) // columns]
        if not values.any() or not read.any():
            out += range(first, first + group)
    return out[group:] if len(out) == heads else out


@torch.no_grad()
def drop(attention: Any, gone: list[int], qkv: np.ndarray, proj: np.ndarray, block: tuple[int, int]) -> Any:
    """Takes the heads out of the (still dense) attention; gives the kept blocks of its two layers that remain."""
    heads = count(attention)
    head_dim = int(attention.head_dim)
    stay = [h for h in range(heads) if h not in gone]
    features = torch.cat([torch.arange(h * head_dim, (h + 1) * head_dim) for h in stay])
    lost = torch.cat([torch.arange(h * head_dim, (h + 1) * head_dim) for h in gone])
    rows = torch.cat([features + part * heads * head_dim for part in range(3)])
    old, out = attention.qkv, attention.proj
    shift = out.bias
    if old.bias is not None:
        # only what the pruned projection still reads of the lost heads
        read = torch.from_numpy(np.repeat(np.repeat(proj, block[0], 0), block[1], 1))
        read = read[: out.out_features, : out.in_features].to(out.weight)
        constant = old.bias[2 * heads * head_dim :].clone()
        for h in range(heads):
            if _values(qkv, h, heads, head_dim, block[0]).any():
                constant[h * head_dim : (h + 1) * head_dim] = 0
        moved = (out.weight * read)[:, lost] @ constant[lost]
        shift = moved if shift is None else shift + moved
    attention.qkv = _linear(old.weight[rows], None if old.bias is None else old.bias[rows])
    attention.proj = _linear(out.weight[:, features], shift)
    if hasattr(attention, "num_heads"):
        attention.num_heads, attention.attn_dim = len(stay), len(stay) * head_dim
    else:
        attention.heads = len(stay)
    kept_rows = np.unique(rows.numpy() // block[0])
    kept_columns = np.unique(features.numpy() // block[1])
    return qkv[kept_rows], proj[:, kept_columns]


def count(attention: Any) -> int:
    """How many heads it has."""
    return int(attention.num_heads if hasattr(attention, "num_heads") else attention.heads)


def _values(qkv: np.ndarray, head: int, heads: int, head_dim: int, rows: int) -> np.ndarray:
    start = (2 * heads + head) * head_dim
    return qkv[start // rows : -(-(start + head_dim) // rows)]


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, dtype=weight.dtype, device=weight.device)
    made.weight.copy_(weight)
    if bias is not None:
        made.bias.copy_(bias)
    return made
