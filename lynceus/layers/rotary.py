"""Rotary positions on a grid: neighbouring channels turn by angles of row and column (EVA-02, arXiv 2303.11331)."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def rotary_tables(
    size: tuple[int, int], dim: int, *, made_for: int, like: Tensor
) -> tuple[Float[Tensor, "n d"], Float[Tensor, "n d"]]:
    """Cosines and sines of the places of a grid, row by row: half of the channels turn with the row, half with the
    column. made_for: side of the map whose places are whole numbers; other maps are stretched over it."""
    half = dim // 2
    kind = torch.promote_types(like.dtype, torch.float32)
    rates = 10000.0 ** (-torch.arange(0, half, 2, device=like.device, dtype=kind)[: half // 2] / half)
    angles = []
    for side in size:
        place = torch.arange(side, device=like.device, dtype=kind) / side * made_for
        angles.append((place[:, None] * rates).repeat_interleave(2, 1))
    rows = angles[0][:, None].expand(-1, size[1], -1)
    columns = angles[1][None].expand(size[0], -1, -1)
    both = torch.cat([rows, columns], -1).flatten(0, 1)
    return both.cos().to(like.dtype), both.sin().to(like.dtype)


def rotate_pairs(
    x: Float[Tensor, "b n d"], tables: tuple[Float[Tensor, "n d"], Float[Tensor, "n d"]]
) -> Float[Tensor, "b n d"]:
    """Channels 2i and 2i + 1 as the coordinates of a point, turned by the angle of their place."""
    cos, sin = tables
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    return x * cos + torch.stack((-b, a), -1).flatten(-2) * sin
