"""Learned position tables that follow the image: resized to whatever grid of patches there is."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def resize_position(
    table: Float[Tensor, "1 n d"],
    old: tuple[int, int],
    new: tuple[int, int],
    *,
    prefix: int = 0,
    antialias: bool = True,
    linear: bool = False,
) -> Float[Tensor, "1 m d"]:
    """The table (1, prefix + oh*ow, d) for a grid `new`: bicubic in float32, the `prefix` rows kept.

    linear: bilinear instead, never widened, in the table's own dtype if that is float64.

    antialias: cubic kernel a = -0.5, widened when shrinking (timm); else a = -0.75, never widened (older code).
    The same table comes back when nothing changes. Under export, where the grid is free, the resize is two products
    with matrices made on the spot, which every runtime computes alike.
    """
    exporting = torch.compiler.is_exporting()
    if not exporting and tuple(new) == tuple(old):
        return table
    head, grid = table[:, :prefix], table[:, prefix:]
    grid = grid.reshape(1, old[0], old[1], -1)
    grid = grid.to(torch.promote_types(grid.dtype, torch.float32)) if linear else grid.float()
    if exporting:
        rows, columns = (
            linear_matrix(o, n, device=table.device).to(grid.dtype)
            if linear
            else cubic_matrix(o, n, antialias=antialias, device=table.device)
            for o, n in zip(old, new)
        )
        # explicit batches: a broadcasting product would merge axes and so tie the free sizes to each other
        grid = torch.bmm(columns.expand(old[0], -1, -1), grid[0])  # oh W d
        grid = torch.bmm(rows.expand(new[1], -1, -1), grid.transpose(0, 1)).transpose(0, 1)
    else:
        mode, smooth = ("bilinear", False) if linear else ("bicubic", antialias)
        grid = F.interpolate(grid.permute(0, 3, 1, 2), new, mode=mode, antialias=smooth, align_corners=False)
        grid = grid.permute(0, 2, 3, 1)
    grid = grid.reshape(1, new[0] * new[1], table.shape[-1]).to(table.dtype)
    return torch.cat([head, grid], dim=1)


def cubic_matrix(
    old: int, new: int, *, antialias: bool = True, device: torch.device | None = None
) -> Float[Tensor, "new old"]:
    """Resizes a line of `old` samples to `new` by product, as F.interpolate(mode="bicubic") does in float32.

    antialias: cubic convolution with a = -0.5, widened when shrinking; else a = -0.75, edge samples repeated.
    """
    step = old / new
    width: Any = torch.sym_max(step, 1.0) if antialias else 1.0
    centre = (torch.arange(new, device=device, dtype=torch.float32) + 0.5) * step - 0.5
    beyond = 0 if antialias else 2  # samples that the kernel may read on either side of the line
    place = torch.arange(-beyond, old + beyond, device=device, dtype=torch.float32)
    t = ((place - centre[:, None]) / width).abs()
    a = -0.5 if antialias else -0.75
    near = ((a + 2.0) * t - (a + 3.0)) * t * t + 1.0
    far = ((a * t - 5.0 * a) * t + 8.0 * a) * t - 4.0 * a
    weight = torch.where(t < 1.0, near, torch.where(t < 2.0, far, torch.zeros_like(t)))
    if antialias:
        return weight / weight.sum(dim=1, keepdim=True)
    edge = torch.arange(old, device=device)
    left, right = weight[:, :2].sum(1, keepdim=True), weight[:, -2:].sum(1, keepdim=True)
    return weight[:, 2:-2] + left * (edge == 0) + right * (edge == old - 1)


def linear_matrix(old: int, new: int, *, device: torch.device | None = None) -> Float[Tensor, "new old"]:
    """Resizes a line of `old` samples to `new` by product, as F.interpolate(mode="bilinear") does."""
    centre = (torch.arange(new, device=device, dtype=torch.float32) + 0.5) * (old / new) - 0.5
    place = torch.arange(old, device=device, dtype=torch.float32)
    return (1.0 - (place - centre.clamp(0, old - 1)[:, None]).abs()).clamp(min=0.0)


def sincos_table(height: int, width: int, dim: int) -> Float[Tensor, "1 n d"]:
    """Fixed positions of a grid, row by row: sines and cosines of the column, then of the row (MoCo v3, MAE)."""
    quarter = -(-dim // 4)
    rates = 10000.0 ** (-torch.arange(quarter, dtype=torch.float32) / quarter)
    parts = []
    for place in torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")[::-1]:
        angles = place.flatten()[:, None] * rates
        parts += [angles.sin(), angles.cos()]
    return torch.cat(parts, 1)[None, :, :dim]
