"""Mix-token: CutMix on the tokens of a batch with itself in reverse order (token labeling, arXiv 2104.10858).

A box is (top, left, bottom, right) in cells of the coarsest grid; rows top .. bottom - 1 are in it. Swapping the same
box twice gives back what was there.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

Box = tuple[int, int, int, int]
NO_BOX: Box = (0, 0, 0, 0)


def cut_box(height: int, width: int, keep: float, row: int, column: int) -> Box:
    """The box that leaves about the share `keep` of a grid, centred on a cell and clipped at the border."""
    share = math.sqrt(1.0 - keep)
    high, wide = int(height * share), int(width * share)
    top, bottom = (min(max(row + d, 0), height) for d in (-(high // 2), high // 2))
    left, right = (min(max(column + d, 0), width) for d in (-(wide // 2), wide // 2))
    return top, left, bottom, right


def draw_box(height: int, width: int, generator: torch.Generator, *, beta: float = 1.0) -> Box:
    """A random box: the share kept from Beta(beta, beta), its centre any cell of the grid."""
    draws = np.random.default_rng(int(torch.randint(0, 2**62, (), generator=generator)))
    keep = float(draws.beta(beta, beta))
    return cut_box(height, width, keep, int(draws.integers(height)), int(draws.integers(width)))


def swap_box(x: Float[Tensor, "b h w c"], box: Box, *, scale: int = 1) -> Float[Tensor, "b h w c"]:
    """The map with the box, `scale` cells per cell of the grid it was drawn on, taken from the batch in reverse."""
    top, left, bottom, right = (scale * edge for edge in box)
    if top >= bottom or left >= right:
        return x
    mixed = x.clone()
    mixed[:, top:bottom, left:right] = x.flip(0)[:, top:bottom, left:right]
    return mixed


def kept_share(box: Box, cells: int) -> float:
    """Share of `cells` outside the box."""
    return 1.0 - (box[2] - box[0]) * (box[3] - box[1]) / cells
