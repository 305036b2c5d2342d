"""Tables of another size: position grids bicubic with extra tokens kept, relative-bias tables per head, spectra."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def resize_positions(
    table: Tensor, grid: tuple[int, int], old: tuple[int, int] | None = None, *, antialias: bool = True
) -> Tensor:
    """(1, prefix + h0 w0, c) -> (1, prefix + h w, c): the grid bicubic (align_corners off), prefix entries kept.

    old: the stored grid; None takes the largest square that leaves the fewest prefix entries.
    """
    count = table.shape[1]
    if old is None:
        side = math.isqrt(count)
        old = (side, side)
    extra = count - old[0] * old[1]
    prefix, cells = table[:, :extra], table[:, extra:]
    image = cells.float().reshape(1, *old, -1).permute(0, 3, 1, 2)
    image = F.interpolate(image, size=grid, mode="bicubic", antialias=antialias, align_corners=False)
    cells = image.permute(0, 2, 3, 1).reshape(1, grid[0] * grid[1], -1).to(table.dtype)
    return torch.cat([prefix, cells], dim=1)


def resize_rel_bias(table: Tensor, count: int) -> Tensor:
    """((2M-1)^2, heads) -> (count, heads), bicubic on the square of offsets (align_corners off)."""
    old, new = math.isqrt(table.shape[0]), math.isqrt(count)
    image = table.float().T.reshape(1, -1, old, old)
    image = F.interpolate(image, size=(new, new), mode="bicubic", align_corners=False)
    return image.reshape(-1, count).T.to(table.dtype)


def resize_spectrum(table: Tensor, size: tuple[int, int]) -> Tensor:
    """(c, h, w, 2) -> (c, *size, 2): bilinear with corners aligned, real and imaginary part apart (HorNet's rule)."""
    planes = F.interpolate(table.permute(3, 0, 1, 2), size=size, mode="bilinear", align_corners=True)
    return planes.permute(1, 2, 3, 0)


def resize_table(value: Tensor, name: str, target: Tensor, model: nn.Module) -> tuple[Tensor, str] | None:
    """(resized value, what was done), or None when the two are not tables of one kind.

    A model whose table has its own order says how by a method `resize_own_table(value, name)`, with the same result.
    """
    own = getattr(model, "resize_own_table", None)
    if own is not None and (made := own(value, name)) is not None and made[0].shape == target.shape:
        resized: tuple[Tensor, str] = made
        return resized
    have, want = tuple(value.shape), tuple(target.shape)
    if len(have) == 2 and len(want) == 2 and have[1] == want[1] and "bias_table" in name:
        if math.isqrt(have[0]) ** 2 != have[0] or math.isqrt(want[0]) ** 2 != want[0]:
            return None
        a, b = math.isqrt(have[0]), math.isqrt(want[0])
        done = f"resize_rel_bias {a}x{a} -> {b}x{b}"
        return resize_rel_bias(value, want[0]), done
    if len(have) == 2 and len(want) == 2 and have[0] == want[0] and name.endswith("attention_biases"):
        a, b = math.isqrt(have[1]), math.isqrt(want[1])
        if a * a != have[1] or b * b != want[1]:
            return None
        return resize_rel_bias(value.T, want[1]).T, f"resize_rel_bias {a}x{a} -> {b}x{b}"
    if name.endswith("complex_weight") and len(have) == len(want) == 4:
        if have[0] != want[0] or have[3] != want[3]:
            return None
        done = f"resize_spectrum {have[1]}x{have[2]} -> {want[1]}x{want[2]} (bilinear, corners aligned)"
        return resize_spectrum(value, want[1:3]).contiguous(), done
    if len(have) == 4 and len(want) == 4 and have[:2] == want[:2]:
        image = F.interpolate(value.float(), size=want[2:], mode="bicubic", align_corners=False).to(value.dtype)
        return image, f"resize_positions {have[2]}x{have[3]} -> {want[2]}x{want[3]}"
    if len(have) == 3 and len(want) == 3 and have[0] == want[0] == 1 and have[2] == want[2]:
        extra, grid = _grid(want[1], model)
        side = math.isqrt(have[1] - extra) if have[1] > extra else 0
        if grid is None or side == 0 or side * side != have[1] - extra:
            return None
        smooth = getattr(model, "antialias_positions", True)
        how = "bicubic, antialias" if smooth else "bicubic"
        done = f"resize_positions {side}x{side} -> {grid[0]}x{grid[1]} ({how}, {extra} extra tokens kept)"
        return resize_positions(value, grid, (side, side), antialias=smooth), done
    return None


def _grid(count: int, model: Any) -> tuple[int, tuple[int, int] | None]:
    """(extra tokens, grid) of the model's own table: from its configuration, or the square that fits."""
    config = getattr(model, "config", None)
    size, patch = getattr(config, "image_size", None), getattr(config, "patch_size", None)
    if size is not None and patch is not None:
        size = (size, size) if isinstance(size, int) else size
        patch = (patch, patch) if isinstance(patch, int) else patch
        grid = (size[0] // patch[0], size[1] // patch[1])
        if 0 <= count - grid[0] * grid[1] <= 16:
            return count - grid[0] * grid[1], grid
    for extra in range(17):
        side = math.isqrt(count - extra) if count > extra else 0
        if side > 0 and side * side == count - extra:
            return extra, (side, side)
    return 0, None
