"""Spatter: drops of water or splashes of mud on the lens.

Hendrycks and Dietterich, ICLR 2019, arXiv 1903.12261; hendrycks/robustness (Apache-2.0). The shading of drops is made
of OpenCV's Canny edges, chamfer distance and histogram equalisation, written here on batches with its integer rules.
"""

from __future__ import annotations

from functools import cache

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
    y = pad(x, (1, 1, 1, 1), "mirror")
    y = (y[..., :-2] + y[..., 1:-1]).add_(y[..., 2:])
    return (y[:, :, :-2] + y[:, :, 1:-1]).add_(y[:, :, 2:]).div_(9)


def canny(image: Tensor, low: float, high: float) -> Tensor:
    """Canny edges (b, 1, h, w) bool of grey levels 0..255: Sobel, |dx| + |dy|, OpenCV's order of comparisons."""
    b, _, h, w = image.shape
    y = pad(image, (1, 1, 1, 1), "nearest")
    rows = (y[:, :, :-2] + y[:, :, 2:]).add_(y[:, :, 1:-1], alpha=2)
    columns = (y[..., :-2] + y[..., 2:]).add_(y[..., 1:-1], alpha=2)
    dx, dy = rows[..., 2:] - rows[..., :-2], columns[:, :, 2:] - columns[:, :, :-2]
    size = dx.abs().add_(dy.abs())

    # only where the picture changes: places in `size`, and the same in it with a border
    at = (size.flatten() > low).nonzero()[:, 0]
    line = at.div(w, rounding_mode="floor")
    place = at + line * 2 + line.div(h, rounding_mode="floor").mul_(2 * (w + 2)).add_(w + 3)
    around = F.pad(size, (1, 1, 1, 1)).flatten()
    here = around.index_select(0, place)

    def beside(down: int, across: int) -> Tensor:
        return around.index_select(0, place + (down * (w + 2) + across))

    dx, dy = dx.flatten().index_select(0, at), dy.flatten().index_select(0, at)
    x_, y_ = dx.abs().int(), dy.abs().int() << 15
    flat = x_ * 13573  # tan 22.5 degrees in 1/32768
    steep = flat + (x_ << 16)
    slant = torch.where((dx < 0) ^ (dy < 0), -1, 1)
    level = (here > beside(0, -1)) & (here >= beside(0, 1))
    upright = (here > beside(-1, 0)) & (here >= beside(1, 0))
    above = around.index_select(0, place - (w + 2) - slant)
    below = around.index_select(0, place + (w + 2) + slant)
    peak = torch.where(y_ < flat, level, torch.where(y_ > steep, upright, (here > above) & (here > below)))
    keep = _connected(around.numel(), place[peak], here[peak] > high, w + 2)
    return keep.view(b, 1, h + 2, w + 2)[:, :, 1:-1, 1:-1]


def _connected(count: int, weak: Tensor, strong: Tensor, stride: int) -> Tensor:
    """Which of `count` places are weak ones (n,) that hang together, by eight neighbours, with a strong one."""
    kept = torch.zeros(count, dtype=torch.bool, device=weak.device)
    kept[weak[strong]] = True
    open_ = weak[~strong]
    steps = torch.tensor([i * stride + j for i in (-1, 0, 1) for j in (-1, 0, 1)], device=weak.device)
    while len(open_):
        reached = kept.take(open_[:, None] + steps).any(1)
        if not bool(reached.any()):
            break
        kept[open_[reached]] = True
        open_ = open_[~reached]
    return kept


def chamfer(edges: Tensor) -> Tensor:
    """Distance (b, 1, h, w) to the nearest edge pixel, right up to FAR pixels, in steps of a 5x5 mask (1, 1.4, 2.1969).

    Every shortest path uses two neighbouring directions, in any order: steps of 1, 2, 4, ... pixels in every direction
    are enough. Pictures lie in one row of numbers, with so much room between lines that no short path leads across.
    """
    b, _, h, w = edges.shape
    high, wide = h + FAR, w + FAR
    distance = torch.full((b, high, wide), 1 << 24, dtype=torch.int32, device=edges.device)
    inner = distance[:, :h, :w]
    inner.masked_fill_(edges[:, 0], 0)
    line, room = distance.flatten(), torch.empty(b * high * wide, dtype=torch.int32, device=edges.device)
    count, far = 1, FAR << 16
    while count * 65536 < far:
        for across, down, length in _directions():
            step = (down * wide + across) * count
            if count * length >= far or not 0 < abs(step) < len(line):
                continue  # no distance left that such a long path could shorten
            n = len(line) - abs(step)
            here, there = line.narrow(0, max(0, step), n), line.narrow(0, max(0, -step), n)
            torch.minimum(here, torch.add(there, count * length, out=room.narrow(0, 0, n)), out=here)
        count, far = 2 * count, min(far, int(inner.amax()))
    return inner[:, None].to(torch.float32) / 65536


@cache
def _directions() -> tuple[tuple[int, int, int], ...]:
    """(across, down, length), to all sides."""
    out = set()
    for a, b, length in _LENGTHS:
        for i, j in ((a, b), (b, a)):
            out |= {(s * i, t * j, length) for s in (1, -1) for t in (1, -1)}
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
