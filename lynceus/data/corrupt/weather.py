"""Weather: snow, frost, fog.

Hendrycks and Dietterich, ICLR 2019, arXiv 1903.12261; hendrycks/robustness (Apache-2.0). The authors lay crops of five
frost photographs over the picture; here the frost is made: no photograph is shipped.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lynceus.data.corrupt.draws import Draws
from lynceus.data.corrupt.filters import clipped_zoom, grey, line_blur


def fog(x: Tensor, constants: tuple[float, float], draws: Draws, *, least: int) -> Tensor:
    """Adds a height map, and scales so that the brightest value stays."""
    strength, decay = constants
    h, w = x.shape[-2:]
    brightest = x.amax((1, 2, 3), keepdim=True)
    side = max(least, 1 << (max(h, w) - 1).bit_length())
    mist = plasma(side, decay, draws)[:, None, :h, :w]
    return (x + strength * mist) * (brightest / (brightest + strength))


def plasma(side: int, decay: float, draws: Draws) -> Tensor:
    """Diamond-square height maps (b, side, side) in [0, 1]; side is a power of two."""
    step, wobble = side, 100.0
    b = len(draws.generators) or 1
    height = torch.zeros(b, side, side, device=draws.device)

    def jitter(total: Tensor) -> Tensor:
        noise = draws.uniform(*total.shape[1:]).mul_(2).sub_(1)
        return (total / 4).add_(noise, alpha=wobble * wobble)

    while step >= 2:
        half = step // 2
        corner = height[:, ::step, ::step]
        pair = corner + corner.roll(-1, 1)
        centre = jitter(pair + pair.roll(-1, 2))
        height[:, half::step, half::step] = centre
        across = centre + centre.roll(1, 1) + (corner + corner.roll(-1, 2))
        height[:, ::step, half::step] = jitter(across)
        down = centre + centre.roll(1, 2) + (corner + corner.roll(-1, 1))
        height[:, half::step, ::step] = jitter(down)
        step, wobble = half, wobble / decay
    height -= height.amin((1, 2), keepdim=True)
    return height / height.amax((1, 2), keepdim=True).clamp(min=1e-12)


def snow(x: Tensor, constants: tuple[float, ...], draws: Draws) -> Tensor:
    """Flakes blurred by their fall, over a whitened picture."""
    mean, deviation, zoom, threshold, radius, sigma, weight = constants
    h, w = x.shape[-2:]
    flakes = clipped_zoom(draws.normal(h, w)[:, None] * deviation + mean, zoom)
    flakes = flakes.masked_fill(flakes < threshold, 0.0).clamp_(0, 1).mul_(255).floor_().div_(255)
    flakes = line_blur(flakes, int(radius), sigma, draws.uniform().cpu() * 90 - 135)
    flakes = flakes.mul_(255).round_().div_(255)
    white = torch.maximum(x, grey(x) * 1.5 + 0.5)
    return torch.lerp(white, x, weight) + flakes + flakes.rot90(2, (-2, -1))


def frost(x: Tensor, constants: tuple[float, float], draws: Draws, *, size: float) -> Tensor:
    """A weighted sum of the picture and a made frost."""
    picture, ice = constants
    h, w = x.shape[-2:]
    return picture * x + ice * frost_texture(h, w, draws, size=size)


def frost_texture(h: int, w: int, draws: Draws, *, size: float = 1.0) -> Tensor:
    """Frost on glass, (b, 3, h, w) in [0, 1]: bright needles that branch off random cells, thicker towards one side.

    size: of the crystals; 1 is for pictures of a few hundred pixels.
    """
    clear = _clouds(h, w, draws, cell=120 * size, octaves=2)
    needles = torch.zeros_like(clear)
    for cell, amount in ((48 * size, 0.5), (24 * size, 0.3), (11 * size, 0.2)):
        ridge = 1 - (2 * _clouds(h, w, draws, cell=cell, octaves=3) - 1).abs() * 3
        needles = needles + amount * ridge.clamp_(0, 1)
    lean = draws.uniform(2).to(clear) * 2 - 1
    slope = torch.linspace(-0.5, 0.5, h).to(clear)[:, None] * lean[:, 0, None, None]
    slope = slope + torch.linspace(-0.5, 0.5, w).to(clear) * lean[:, 1, None, None]
    ice = (0.25 + 0.5 * clear + 0.5 * slope).clamp_(0, 1) * (0.35 + 1.1 * needles)
    tint = torch.tensor([0.82, 0.95, 1.0]).to(ice)[None, :, None, None]
    return (ice[:, None] * tint).clamp_(0, 1)


def _clouds(h: int, w: int, draws: Draws, *, cell: float, octaves: int) -> Tensor:
    """Smooth noise (b, h, w) in [0, 1] with details of about `cell` pixels, each octave half as large and strong."""
    total, weight, out = 0.0, 1.0, None
    for _ in range(octaves):
        rows, columns = max(2, round(h / cell) + 2), max(2, round(w / cell) + 2)
        layer = F.interpolate(draws.uniform(1, rows, columns), (h, w), mode="bicubic", align_corners=True)
        out = layer * weight if out is None else out + layer * weight
        total, weight, cell = total + weight, weight / 2, max(1.0, cell / 2)
    assert out is not None
    return (out[:, 0] / total).clamp_(0, 1)
