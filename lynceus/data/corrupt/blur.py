"""Blur: defocus, glass, motion, zoom, gaussian.

Hendrycks and Dietterich, ICLR 2019, arXiv 1903.12261; hendrycks/robustness (Apache-2.0). Motion blur follows
ImageMagick's kernel (one-sided Gaussian along a line, whole pixels), which the authors called.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from lynceus.data.corrupt.draws import Draws
from lynceus.data.corrupt.filters import SLACK, clipped_zoom, correlate, disk, gaussian, levels, line_blur


def gaussian_blur(x: Tensor, sigma: float) -> Tensor:
    return gaussian(x, sigma)


def defocus_blur(x: Tensor, constants: tuple[float, float]) -> Tensor:
    return correlate(x, disk(*constants))


def zoom_blur(x: Tensor, constants: tuple[float, float]) -> Tensor:
    """Mean of the picture and its centre enlarged from 1 on."""
    end, step = constants
    factors = np.arange(1, end, step).tolist()
    total = x.clone()
    for factor in factors:
        total += clipped_zoom(x, factor)
    return total / (len(factors) + 1)


def motion_blur(x: Tensor, constants: tuple[int, float], draws: Draws) -> Tensor:
    radius, sigma = constants
    return line_blur(x, radius, sigma, draws.uniform().cpu() * 90 - 45)


def glass_blur(x: Tensor, constants: tuple[float, int, int], draws: Draws, *, swap: bool = False) -> Tensor:
    """Blur, pixels taken from up to `reach` away, blur.

    The authors mean to swap pixels from bottom right to top left, but their assignment through views copies: each
    pixel takes its neighbour's value, which stays where it was. swap=True really exchanges them.
    """
    sigma, reach, rounds = constants
    b, c, h, w = x.shape
    if sigma < 0.5:
        # hardly blurred, flat places stay whole grey levels: float64 decides how these are truncated, as the authors'
        x = levels(x)
    soft = gaussian(x, sigma).mul(255).add_(0 if sigma < 0.5 else SLACK).floor_().clamp_(0, 255)
    rows, columns = h - 2 * reach, w - 2 * reach
    source = torch.arange(h * w, device=x.device).expand(b, h * w)
    for _ in range(rounds if rows > 0 and columns > 0 else 0):
        # draws stand in the order of the walk: rows from the bottom, columns from the right, (across, down)
        offset = draws.integers(-reach, reach, rows * columns, 2).view(b, rows, columns, 2).flip(1, 2)
        source = source.gather(1, (_swapped if swap else _taken)(offset, reach, h, w))
    soft = soft.reshape(b, c, h * w).gather(2, source[:, None].expand(b, c, h * w)).view(b, c, h, w)
    return gaussian(soft / 255, sigma)


def _taken(offset: Tensor, reach: int, h: int, w: int) -> Tensor:
    """Which original pixel each pixel ends up with, (b, h * w), when each in its turn copies its neighbour.

    A neighbour whose turn was before has another's value by then. The chains of copies are followed all at once, by
    pointers that double their length: pixel p after its turn is p, before it is ~p.
    """
    b = len(offset)
    here = torch.arange(b * h * w, device=offset.device).view(b, h, w)
    pointer = ~here
    rows, columns = slice(reach + 1, h - reach + 1), slice(reach + 1, w - reach + 1)
    down = here[0, rows, :1] // w + offset[..., 1]
    across = here[0, 0, columns] + offset[..., 0]
    inner = here[:, rows, columns]
    target = inner + offset[..., 1] * w + offset[..., 0]
    moved = (target > inner) & (down > reach) & (down <= h - reach) & (across > reach) & (across <= w - reach)
    pointer[:, rows, columns] = torch.where(moved, target, ~target)
    pointer = pointer.flatten()
    open_ = (pointer >= 0).nonzero()[:, 0]
    while len(open_):
        further = pointer.index_select(0, pointer.index_select(0, open_))
        pointer[open_] = further
        open_ = open_[further >= 0]
    return (~pointer).view(b, h * w) - here[:, 0, :1]


def _swapped(offset: Tensor, reach: int, h: int, w: int) -> Tensor:
    """Which original pixel each pixel ends up with, (b, h * w), when each in its turn changes places.

    Pixels on one slanted line are further apart than any exchange reaches, so a whole line changes places at once.
    """
    b, rows, columns, _ = offset.shape
    content = torch.arange(h * w, device=offset.device).expand(b, h * w).clone()
    k, m = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")  # from the bottom, from the right
    turn = ((2 * reach + 1) * k + m).flatten()
    order = torch.argsort(turn, stable=True)
    ends = torch.bincount(turn).cumsum(0).tolist()
    at = ((h - reach - k) * w + (w - reach - m)).flatten().to(offset.device)
    move = offset.flip(1, 2).reshape(b, rows * columns, 2)
    start = 0
    for end in ends:
        some = order[start:end].to(offset.device)
        start = end
        if not len(some):
            continue
        one = at[some].expand(b, -1)
        two = one + move[:, some, 1] * w + move[:, some, 0]
        first, second = content.gather(1, one), content.gather(1, two)
        content.scatter_(1, two, first).scatter_(1, one, second)
    return content
