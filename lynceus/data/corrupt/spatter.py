"""Spatter: drops of water or splashes of mud on the lens.

Hendrycks and Dietterich, ICLR 2019, arXiv 1903.12261; hendrycks/robustness (Apache-2.0). The shading of drops is made
of OpenCV's Canny edges, chamfer distance and histogram equalisation, written here on batches with its integer rules.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lynceus.data.corrupt.draws import Draws
from lynceus.data.corrupt.filters import gaussian, pad

WATER = (175 / 255, 238 / 255, 238 / 255)
MUD = (63 / 255, 42 / 255, 20 / 255)
# the chamfer norm of a 5x5 mask, in 1/65536 of a pixel, one octant pair of each length
_LENGTHS = ((1, 0, 65536), (1, 1, 91750), (2, 1, 143976))
FAR = 20  # distances are cut there


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
    return F.avg_pool2d(pad(x, (1, 1, 1, 1), "mirror"), 3, 1)


def canny(image: Tensor, low: float, high: float) -> Tensor:
    """Canny edges (b, 1, h, w) bool of grey levels 0..255: Sobel, |dx| + |dy|, OpenCV's order of comparisons."""
    h, w = image.shape[-2:]
    y = pad(image, (1, 1, 1, 1), "nearest")
    rows = y[:, :, :-2] + 2 * y[:, :, 1:-1] + y[:, :, 2:]
    columns = y[..., :-2] + 2 * y[..., 1:-1] + y[..., 2:]
    dx, dy = rows[..., 2:] - rows[..., :-2], columns[:, :, 2:] - columns[:, :, :-2]
    size = dx.abs() + dy.abs()
    m = F.pad(size, (1, 1, 1, 1))

    def at(i: int, j: int) -> Tensor:
        return m[:, :, 1 + i : 1 + i + h, 1 + j : 1 + j + w]

    x_, y_ = dx.abs().int(), dy.abs().int() << 15
    flat = x_ * 13573  # tan 22.5 degrees in 1/32768
    steep = flat + (x_ << 16)
    falling = (dx < 0) ^ (dy < 0)
    level = (size > at(0, -1)) & (size >= at(0, 1))
    upright = (size > at(-1, 0)) & (size >= at(1, 0))
    slanted = torch.where(falling, (size > at(-1, 1)) & (size > at(1, -1)), (size > at(-1, -1)) & (size > at(1, 1)))
    peak = torch.where(y_ < flat, level, torch.where(y_ > steep, upright, slanted)) & (size > low)
    return _connected(peak, peak & (size > high))


def _connected(weak: Tensor, strong: Tensor) -> Tensor:
    """The weak pixels that hang together, by eight neighbours, with a strong one."""
    from scipy.ndimage import label

    structure = np.zeros((3, 3, 3), dtype=bool)
    structure[1] = True
    pieces, count = label(weak[:, 0].cpu().numpy(), structure)
    keep = np.zeros(count + 1, dtype=bool)
    keep[pieces[strong[:, 0].cpu().numpy()]] = True
    keep[0] = False
    return torch.from_numpy(keep[pieces]).to(weak.device)[:, None]


def chamfer(edges: Tensor) -> Tensor:
    """Distance (b, 1, h, w) to the nearest edge pixel, right up to FAR pixels, in steps of a 5x5 mask (1, 1.4, 2.1969).

    Every shortest path uses two neighbouring directions, so one sweep per direction, doubling its reach, is enough.
    """
    top = 1 << 24
    h, w = edges.shape[-2:]
    distance = torch.where(edges, 0, top).to(torch.int32)
    for across, down, length in _directions():
        count, cost = 1, length
        while (count - 1) * length < FAR << 16:
            i, j = down * count, across * count
            if abs(i) >= h or abs(j) >= w:
                break
            here = distance[:, :, max(0, i) : h + min(0, i), max(0, j) : w + min(0, j)]
            there = distance[:, :, max(0, -i) : h + min(0, -i), max(0, -j) : w + min(0, -j)]
            torch.minimum(here, there + cost, out=here)
            count, cost = 2 * count, 2 * cost
    return distance.to(torch.float32) / 65536


def _directions() -> list[tuple[int, int, int]]:
    out = set()
    for a, b, length in _LENGTHS:
        for i, j in ((a, b), (b, a)):
            out |= {(s * i, t * j, length) for s in (1, -1) for t in (1, -1)}
    return sorted(out)


def equalise(image: Tensor) -> Tensor:
    """Histogram equalisation of grey levels 0..255 (b, 1, h, w), as OpenCV does it."""
    flat = image.flatten(1).long()
    total = flat.shape[1]
    counts = torch.zeros(len(flat), 256, dtype=torch.long, device=flat.device)
    counts.scatter_add_(1, flat, torch.ones_like(flat))
    first = flat.amin(1, keepdim=True)
    least = counts.gather(1, first)
    scale = 255.0 / (total - least).clamp(min=1).float()
    table = ((counts.cumsum(1) - least).clamp(min=0).float() * scale).round_().clamp_(0, 255)
    table = torch.where(least == total, first.float(), table)  # one grey level only: as it is
    return table.gather(1, flat).view_as(image)
