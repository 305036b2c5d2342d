"""Spatter: drops of water or splashes of mud on the lens.

Hendrycks and Dietterich, ICLR 2019, arXiv 1903.12261; hendrycks/robustness (Apache-2.0). The shading of drops is made
of OpenCV's Canny edges, chamfer distance and histogram equalisation, written here on batches with its integer rules.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from torch import Tensor

from lynceus.data.corrupt.draws import Draws
from lynceus.data.corrupt.filters import gaussian, pad

WATER = (175 / 255, 238 / 255, 238 / 255)
MUD = (63 / 255, 42 / 255, 20 / 255)
# the chamfer norm of a 5x5 mask, in 1/65536 of a pixel, one octant pair of each length
_LENGTHS = ((1, 0, 65536), (1, 1, 91750), (2, 1, 143976))
FAR = 20  # distances are cut there
SPARSE = 5 << 16  # few pixels are further from an edge


def spatter(x: Tensor, constants: tuple[float, ...], draws: Draws) -> Tensor:
    mean, deviation, sigma, threshold, last, mud = constants
    h, w = x.shape[-2:]
    layer = gaussian(draws.normal(h, w)[:, None] * deviation + mean, sigma)
    if mud:
        splash = gaussian((layer > threshold).to(x), last)
        splash = splash.masked_fill(splash < 0.8, 0.0)
        return x * (1 - splash) + splash * torch.tensor(MUD).to(x)[:, None, None]
    layer = layer.masked_fill(layer < threshold, 0.0).mul_(255).floor_().clamp_(0, 255)
    drops = layer * _shading(layer)
    brightest = drops.amax((1, 2, 3), keepdim=True)
    drops = drops / brightest.clamp(min=1e-6) * last
    return x + drops * torch.tensor(WATER).to(x)[:, None, None]


def _shading(layer: Tensor) -> Tensor:
    """Light on the drops, (b, 1, h, w) in 0..255, from the distance to their edges."""
    distance = chamfer(canny(layer, 50, 150)).clamp_(max=FAR)
    distance = equalise(_box3(distance).floor_())
    kernel = ((-2, -1, 0), (-1, 1, 1), (0, 1, 2))
    y = pad(distance, (1, 1, 1, 1), "mirror")
    h, w = layer.shape[-2:]
    embossed = torch.zeros_like(layer)
    for i in range(3):
        for j in range(3):
            if kernel[i][j]:
                embossed.add_(y[:, :, i : i + h, j : j + w], alpha=kernel[i][j])
    return _box3(embossed.clamp_(0, 255)).round_()


def _box3(x: Tensor) -> Tensor:
    y = pad(x, (1, 1, 1, 1), "mirror")
    y = (y[..., :-2] + y[..., 1:-1]).add_(y[..., 2:])
    return (y[:, :, :-2] + y[:, :, 1:-1]).add_(y[:, :, 2:]).div_(9)


def canny(image: Tensor, low: float, high: float) -> Tensor:
    """Canny edges (b, 1, h, w) bool of whole grey levels 0..255: Sobel, |dx| + |dy|, OpenCV's order of comparisons.

    On the CPU: pictures with a border lie in one row of small numbers, and a neighbour is a shift of the row.
    """
    b, _, h, w = image.shape
    wide = w + 2
    y = pad(image, (1, 1, 1, 1), "nearest").to(torch.int16).cpu().numpy().reshape(-1)
    edge, n = wide + 1, len(y)
    rows = y[: -2 * wide] + y[2 * wide :] + 2 * y[wide:-wide]
    columns = y[:-2] + y[2:] + 2 * y[1:-1]
    dx, dy = rows[2:] - rows[:-2], columns[2 * wide :] - columns[: -2 * wide]
    x_, y_ = np.abs(dx), np.abs(dy)
    size = np.zeros(n, dtype=np.int16)
    np.add(x_, y_, out=size[edge:-edge])
    border = size.reshape(b, h + 2, wide)
    border[:, 0] = border[:, -1] = border[:, :, 0] = border[:, :, -1] = 0
    here = size[edge:-edge]

    def beside(down: int, across: int) -> np.ndarray:
        step = down * wide + across
        return size[edge + step : n - edge + step]

    y_ = np.left_shift(y_, 15, dtype=np.int32)
    tangent = np.multiply(x_, 13573, dtype=np.int32)  # of 22.5 degrees, in 1/32768
    flat = y_ < tangent
    tangent += np.left_shift(x_, 16, dtype=np.int32)
    steep = y_ > tangent
    level = (here > beside(0, -1)) & (here >= beside(0, 1))
    upright = (here > beside(-1, 0)) & (here >= beside(1, 0))
    falling = (dx ^ dy) < 0
    rising = (here > beside(-1, -1)) & (here > beside(1, 1)) & ~falling
    falling &= (here > beside(-1, 1)) & (here > beside(1, -1))
    peak = ((flat & level) | (steep & upright) | ((falling | rising) & ~(flat | steep))) & (here > low)
    kept = np.zeros(n, dtype=bool)
    strong = np.logical_and(peak, here > high, out=kept[edge:-edge])
    _connect(kept, np.flatnonzero(peak & ~strong) + edge, wide)
    return torch.from_numpy(kept.reshape(b, 1, h + 2, wide)[:, :, 1:-1, 1:-1]).to(image.device)


def _connect(kept: np.ndarray, weak: np.ndarray, wide: int) -> None:
    """Adds the weak places that hang together, by eight neighbours, with a kept one."""
    around = np.array([i * wide + j for i in (-1, 0, 1) for j in (-1, 0, 1)])[:, None]
    while len(weak):
        reached = kept.take(weak + around).any(0)
        if not reached.any():
            break
        kept[weak[reached]] = True
        weak = weak[~reached]


def chamfer(edges: Tensor) -> Tensor:
    """Distance (b, 1, h, w) to the nearest edge pixel, right up to FAR pixels, in steps of a 5x5 mask (1, 1.4, 2.1969).

    Every shortest path uses two neighbouring directions, in any order: jumps of 1, 2, 4, ... steps in every direction
    are enough, the short ones first, and the long ones only where the distance is still as long. On the CPU: pictures
    lie in one row of numbers, with so much room between lines that no short path leads across.
    """
    b, _, h, w = edges.shape
    high, wide = h + FAR, w + FAR
    maps = np.full((b, high, wide), 1 << 24, dtype=np.int32)
    inner = maps[:, :h, :w]
    np.copyto(inner, 0, where=edges[:, 0].cpu().numpy())
    line = maps.reshape(-1)
    room = np.empty_like(line)
    steps = [(cost, down * wide + across) for cost, across, down in _jumps() if abs(down) < h and abs(across) < w]
    for cost, step in steps:
        if cost < SPARSE:
            n = len(line) - abs(step)
            here, there = line[max(0, step) :][:n], line[max(0, -step) :][:n]
            np.minimum(here, np.add(there, cost, out=room[:n]), out=here)
    rest = np.flatnonzero(line > SPARSE)
    rest = rest[(rest % wide < w) & (rest // wide % high < h)]
    for cost, step in steps:
        if cost >= SPARSE:
            rest = rest[line.take(rest) > cost]
            line[rest] = np.minimum(line.take(rest), line.take(rest - step, mode="wrap") + cost)
    return torch.from_numpy(inner[:, None]).to(edges.device, torch.float32).div_(65536)


@cache
def _jumps() -> tuple[tuple[int, int, int], ...]:
    """(cost, across, down) of 1, 2, 4, ... steps to all sides up to FAR pixels, the shortest first."""
    out = set()
    for a, b, length in _LENGTHS:
        for i, j in ((a, b), (b, a)):
            count = 1
            while count * length < FAR << 16:
                out |= {(count * length, s * i * count, t * j * count) for s in (1, -1) for t in (1, -1)}
                count *= 2
    return tuple(sorted(out))


def equalise(image: Tensor) -> Tensor:
    """Histogram equalisation of grey levels 0..255 (b, 1, h, w), as OpenCV does it."""
    b = len(image)
    flat = image.flatten(1).to(torch.int32)
    total = flat.shape[1]
    first = flat.amin(1, keepdim=True).long()
    flat += torch.arange(0, 256 * b, 256, dtype=torch.int32, device=flat.device)[:, None]
    counts = torch.bincount(flat.flatten(), minlength=256 * b).view(b, 256)
    least = counts.gather(1, first)
    scale = 255.0 / (total - least).clamp(min=1).float()
    table = ((counts.cumsum(1) - least).clamp(min=0).float() * scale).round_().clamp_(0, 255)
    table = torch.where(least == total, first.float(), table)  # one grey level only: as it is
    return table.flatten().index_select(0, flat.flatten()).view_as(image)
