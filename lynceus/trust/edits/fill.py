"""Holes filled smoothly: averages pulled up a pyramid of scales and pushed down again, then a few steps of diffusion.

After Burt's hole filling as told by Gortler et al., "The Lumigraph", SIGGRAPH 1996 (pull-push).
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

STEPS = 12  # of diffusion per scale of at most 48 pixels, a third of it above: there the surface is smooth already


def diffused(
    values: Float[np.ndarray, "h w c"],
    known: Bool[np.ndarray, "h w"],
    *,
    wanted: Bool[np.ndarray, "h w"] | None = None,
) -> Float[np.ndarray, "h w c"]:
    """The values, with those that are not known filled by a nearly harmonic surface. Known ones are bit-equal.

    wanted: the pixels whose filling matters; other unknown ones get any value. Default: all.
    """
    if known.all():
        return values
    if not known.any():
        return np.zeros_like(values)
    x = torch.from_numpy(np.ascontiguousarray(values.transpose(2, 0, 1)))[None].float()
    weight = torch.from_numpy(known.astype(np.float32))[None, None]
    made = _scale(x * weight, weight)[0].permute(1, 2, 0).numpy()
    hole = ~known if wanted is None else wanted & ~known
    out = values.copy()
    out[hole] = made[hole]
    return out


def _scale(x: Tensor, weight: Tensor) -> Tensor:
    """x (1, c, h, w) is zero where weight (1, 1, h, w) is; returns it filled."""
    hole = weight == 0
    h, w = x.shape[-2:]
    if not bool(hole.any()):
        return x
    if max(h, w) <= 2:
        mean = x.sum((2, 3), keepdim=True) / weight.sum().clamp_min(1e-6)
        return torch.where(hole, mean, x)
    total = F.avg_pool2d(weight, 2, ceil_mode=True, count_include_pad=False)
    coarse = F.avg_pool2d(x, 2, ceil_mode=True, count_include_pad=False) / total.clamp_min(1e-6)
    there = (total > 0).float()
    filled = _scale(coarse * there, there)
    rough = F.interpolate(filled, scale_factor=2, mode="bilinear", align_corners=False)[..., :h, :w]
    x = torch.where(hole, rough, x)
    for _ in range(STEPS if max(h, w) <= 48 else STEPS // 3):
        y = F.pad(x, (1, 1, 1, 1), mode="replicate")
        mean = (y[..., :-2, 1:-1] + y[..., 2:, 1:-1] + y[..., 1:-1, :-2] + y[..., 1:-1, 2:]) / 4
        x = torch.where(hole, mean, x)
    return x


def blurred_known(
    values: Float[np.ndarray, "h w c"], known: Bool[np.ndarray, "h w"], sigma: float
) -> Float[np.ndarray, "h w c"]:
    """Gaussian means over known pixels alone; zero where none is near."""
    from scipy.ndimage import gaussian_filter1d

    weight = np.concatenate([values * known[..., None], known[..., None]], axis=2).astype(np.float32)
    for axis in (0, 1):
        weight = gaussian_filter1d(weight, sigma, axis=axis, mode="nearest", truncate=2.5)
    out: np.ndarray = weight[..., :-1] / np.maximum(weight[..., -1:], 1e-6)
    return out
