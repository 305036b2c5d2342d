"""What every network must beat: raw pixels, oriented gradients, histograms of colour. Features without weights.

HOG: Dalal and Triggs, CVPR 2005. Each is a Subject whose features are a fixed function of the pixels.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from lynceus.core.subject import Subject


def pixels(image: Float[Tensor, "b 3 h w"], side: int = 16) -> Float[Tensor, "b n"]:
    """The picture itself, at side x side."""
    return F.interpolate(image, (side, side), mode="bilinear", antialias=True, align_corners=False).flatten(1)


def hog(image: Float[Tensor, "b 3 h w"], side: int = 32, cell: int = 8, bins: int = 9) -> Float[Tensor, "b n"]:
    """Histograms of unsigned gradient directions in cells, voted linearly between bins, unit length per 2 x 2 block."""
    x = F.interpolate(image, (side, side), mode="bilinear", antialias=True, align_corners=False)
    padded = F.pad(x, (1, 1, 1, 1), mode="replicate")
    dx = padded[..., 1:-1, 2:] - padded[..., 1:-1, :-2]
    dy = padded[..., 2:, 1:-1] - padded[..., :-2, 1:-1]
    size, which = (dx * dx + dy * dy).sqrt().max(1)  # the steepest of the three colours
    angle = torch.atan2(dy, dx).gather(1, which[:, None])[:, 0] % math.pi
    place = angle / math.pi * bins - 0.5
    low = place.floor()
    high_share = place - low
    votes = torch.zeros(len(x), bins, side, side, dtype=x.dtype)
    votes.scatter_add_(1, (low.long() % bins)[:, None], (size * (1 - high_share))[:, None])
    votes.scatter_add_(1, ((low.long() + 1) % bins)[:, None], (size * high_share)[:, None])
    cells = F.avg_pool2d(votes, cell)
    blocks = cells.unfold(2, 2, 1).unfold(3, 2, 1).permute(0, 2, 3, 4, 5, 1).flatten(3)
    return F.normalize(blocks, dim=-1, eps=1e-3).flatten(1)


def colours(image: Float[Tensor, "b 3 h w"], bins: int = 4) -> Float[Tensor, "b n"]:
    """Share of the pixels in each of bins^3 boxes of the colour cube, for the whole picture and its four quarters."""
    step = (image * bins).long().clamp(0, bins - 1)
    box = (step[:, 0] * bins + step[:, 1]) * bins + step[:, 2]
    h, w = box.shape[-2] // 2, box.shape[-1] // 2
    parts = [box, box[:, :h, :w], box[:, :h, w:], box[:, h:, :w], box[:, h:, w:]]
    return torch.cat([_shares(p.flatten(1), bins**3) for p in parts], 1)


def _shares(index: Tensor, count: int) -> Tensor:
    out = torch.zeros(len(index), count)
    return out.scatter_add_(1, index, torch.ones(index.shape)) / index.shape[1]


FUNCTIONS = {"raw pixels": pixels, "HOG": hog, "colour histogram": colours}


def _as_list(function: Callable[[Tensor], Tensor], image: Tensor) -> list[Tensor]:
    return [function(image)]


def baseline(name: str) -> Subject:
    """The subject of one of FUNCTIONS; it can be sent to other processes."""
    function = FUNCTIONS[name]
    return Subject(function, features=partial(_as_list, function), name=name)


def baselines() -> list[Subject]:
    """All three."""
    return [baseline(name) for name in FUNCTIONS]
