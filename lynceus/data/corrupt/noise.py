"""Noise: gaussian, shot, impulse, speckle. Each value of the picture on its own.

Hendrycks and Dietterich, ICLR 2019, arXiv 1903.12261; hendrycks/robustness (Apache-2.0).
"""

from __future__ import annotations

import torch
from torch import Tensor

from lynceus.data.corrupt.draws import Draws


def gaussian_noise(x: Tensor, deviation: float, draws: Draws) -> Tensor:
    return x + draws.normal(*x.shape[1:]).mul_(deviation)


def shot_noise(x: Tensor, photons: float, draws: Draws) -> Tensor:
    return draws.poisson(x, photons).div_(photons)


def impulse_noise(x: Tensor, amount: float, draws: Draws) -> Tensor:
    """Salt and pepper in equal parts, per value (not per pixel)."""
    u = draws.uniform(*x.shape[1:])
    return torch.where(u < amount, (u < amount / 2).to(x.dtype), x)


def speckle_noise(x: Tensor, deviation: float, draws: Draws) -> Tensor:
    return torch.addcmul(x, x, draws.normal(*x.shape[1:]), value=deviation)
