"""Weather: snow, frost, fog.

Hendrycks and Dietterich, ICLR 2019, arXiv 1903.12261; hendrycks/robustness (Apache-2.0). The authors lay crops of five
frost photographs over the picture; here the frost is made: no photograph is shipped.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from lynceus.data.corrupt.draws import Draws
from lynceus.data.corrupt.filters import clipped_zoom, gaussian, grey, line_blur


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
    return frost_texture(h, w, draws, size=size).mul_(ice).add_(x * picture)


# mean colour and deviation of five kinds of frost, from thin and blue to thick and white
_KINDS = (
    (0.31, 0.58, 0.65, 0.08),
    (0.79, 0.80, 0.84, 0.085),
    (0.79, 0.80, 0.84, 0.085),
    (0.54, 0.60, 0.65, 0.11),
    (0.44, 0.48, 0.53, 0.17),
)
_WAYS = 5  # directions in which needles grow


def frost_texture(h: int, w: int, draws: Draws, *, size: float = 1.0) -> Tensor:
    """Frost on glass, (b, 3, h, w) in [0, 1]: fields of needles, each field in its own direction, over soft clouds.

    size: of the crystals; 1 is for pictures of a few hundred pixels.
    """
    kind = torch.tensor([_KINDS[k] for k in draws.integers(0, len(_KINDS)).tolist()], device=draws.device)
    turn = draws.uniform().cpu() * 180
    length = max(1, round(14 * size))
    margin = 2 * length + 1
    seeds = draws.normal(1, h + 2 * margin, w + 2 * margin)
    needles, total = torch.zeros(2, len(kind), 1, h, w, device=draws.device)
    for way in range(_WAYS):
        # where this direction reigns: a high power of smooth noise
        here = smooth_noise(h, w, draws, cell=40 * size).mul_(7).exp_()
        line = line_blur(seeds, length, 0.6 * length, turn + way * 180 / _WAYS, margin=margin)
        needles += line.mul_(here)
        total += here
    clouds = torch.zeros_like(total)
    for cell, weight in ((90, 1.0), (30, 0.6), (10, 0.4)):
        clouds.add_(smooth_noise(h, w, draws, cell=cell * size), alpha=weight)
    needles = _standard(gaussian(needles.div_(total), 0.6)).mul_(0.75)
    ice = _standard(needles.add_(_standard(clouds).mul_(0.65)))
    ice.add_((ice * ice).sub_(1).mul_(0.15))  # more bright needles than dark gaps
    return torch.add(kind[:, :3, None, None], ice.mul_(kind[:, 3:, None, None])).clamp_(0, 1)


def _standard(x: Tensor) -> Tensor:
    """Mean 0 and deviation 1 per picture."""
    x = x - x.mean((2, 3), keepdim=True)
    return x.div_(x.pow(2).mean((2, 3), keepdim=True).sqrt_().clamp_(min=1e-6))


def smooth_noise(h: int, w: int, draws: Draws, *, cell: float) -> Tensor:
    """Cubic B-splines on a grid of random values, (b, 1, h, w) in [0, 1], with details of about `cell` pixels."""
    rows, columns = _spline(h, cell), _spline(w, cell)
    knots = draws.uniform(1, rows.shape[1], columns.shape[1])
    return rows.to(knots) @ knots @ columns.T.to(knots)


@lru_cache(maxsize=64)
def _spline(n: int, cell: float) -> Tensor:
    """Weights (n, knots) of cubic B-splines whose knots lie `cell` pixels apart."""
    place = torch.arange(n, dtype=torch.float64) / max(cell, 1.0) + 1
    far = (place[:, None] - torch.arange(int(place[-1]) + 3)).abs()
    near = 2 / 3 - far**2 + far**3 / 2
    return torch.where(far < 1, near, (2 - far).clamp(min=0) ** 3 / 6).float()
