"""Filters on batches (b, c, h, w) that give scipy's and OpenCV's numbers: Gaussians, correlations, zooms, lines.

Borders: "nearest" repeats the last pixel, "reflect" mirrors with it (scipy's name), "mirror" mirrors around it
(OpenCV's reflect-101). Any size, also smaller than the kernel.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

Border = Literal["nearest", "reflect", "mirror"]
SLACK = 1e-3  # of a grey level: float32 must not fall below the whole number that float64 reaches
_NUMPY = {"nearest": "edge", "reflect": "symmetric", "mirror": "reflect"}


@lru_cache(maxsize=256)
def _border_index(n: int, before: int, after: int, border: Border) -> Tensor:
    return torch.from_numpy(np.pad(np.arange(n), (before, after), mode=_NUMPY[border]))  # type: ignore[call-overload]


def pad(x: Tensor, amount: tuple[int, int, int, int], border: Border) -> Tensor:
    """x with (top, bottom, left, right) more pixels."""
    top, bottom, left, right = amount
    h, w = x.shape[-2:]
    if border == "nearest":
        return F.pad(x, (left, right, top, bottom), mode="replicate")
    if border == "mirror" and max(top, bottom) < h and max(left, right) < w:
        return F.pad(x, (left, right, top, bottom), mode="reflect")
    x = x.index_select(-2, _border_index(h, top, bottom, border).to(x.device))
    return x.index_select(-1, _border_index(w, left, right, border).to(x.device))


@lru_cache(maxsize=64)
def _taps(sigma: float, truncate: float) -> tuple[float, ...]:
    radius = int(truncate * sigma + 0.5)
    i = np.arange(-radius, radius + 1)
    k = np.exp(-0.5 / (sigma * sigma) * i**2)
    return tuple((k / k.sum()).tolist())


def gaussian(x: Tensor, sigma: float, *, border: Border = "nearest", truncate: float = 4.0) -> Tensor:
    """Separable Gaussian of each channel, cut at `truncate` sigmas. sigma 0 gives x itself."""
    if sigma <= 1e-15 or int(truncate * sigma + 0.5) == 0:
        return x
    taps = _taps(float(sigma), truncate)
    radius = len(taps) // 2
    h, w = x.shape[-2:]
    if radius >= min(h, w) // 2 and radius > 2:  # the borders are folded into one matrix per axis
        rows, columns = _matrix(h, taps, border).to(x), _matrix(w, taps, border).to(x)
        return rows @ (x @ columns.T)
    if radius <= 4:
        y = pad(x, (radius,) * 4, border)
        return _along(_along(y, taps, -2, h), taps, -1, w)
    side = max(16, min(96, 2 * radius))
    return _tiled(x, taps, side, border)


def _along(y: Tensor, taps: Sequence[float], axis: int, n: int) -> Tensor:
    """Symmetric taps along an axis of a padded map; n values are left."""
    r = len(taps) // 2
    out = y.narrow(axis, r, n) * taps[r]
    for i in range(r):
        pair = y.narrow(axis, i, n) + y.narrow(axis, 2 * r - i, n)
        if y.dtype == torch.float64:  # product and sum rounded one after the other, as scipy does
            out += pair.mul_(taps[i])
        else:
            out.add_(pair, alpha=taps[i])
    return out


@lru_cache(maxsize=64)
def _matrix(n: int, taps: tuple[float, ...], border: Border) -> Tensor:
    radius = len(taps) // 2
    index = _border_index(n, radius, radius, border)
    out = torch.zeros(n, n, dtype=torch.float64)
    at = torch.arange(n)
    for j, tap in enumerate(taps):
        out.index_put_((at, index[j : j + n]), torch.tensor(tap, dtype=torch.float64), accumulate=True)
    return out.float()


@lru_cache(maxsize=64)
def _toeplitz(side: int, taps: tuple[float, ...]) -> Tensor:
    out = torch.zeros(side, side + len(taps) - 1)
    for i in range(side):
        out[i, i : i + len(taps)] = torch.tensor(taps)
    return out


def _tiled(x: Tensor, taps: tuple[float, ...], side: int, border: Border) -> Tensor:
    """Many taps as small matrix products: strips of `side` outputs from `side + 2 * radius` inputs."""
    b, c, h, w = x.shape
    r = len(taps) // 2
    high, wide = -(-h // side) * side, -(-w // side) * side
    matrix = _toeplitz(side, taps).to(x)
    y = pad(x, (r, r + high - h, r, r + wide - w), border)
    y = (y.unfold(3, side + 2 * r, side).reshape(-1, side + 2 * r) @ matrix.T).view(b, c, high + 2 * r, wide)
    y = torch.matmul(matrix, y.unfold(2, side + 2 * r, side).transpose(3, 4)).reshape(b, c, high, wide)
    return y[:, :, :h, :w]


def correlate(x: Tensor, kernel: Tensor, *, border: Border = "mirror") -> Tensor:
    """Each channel correlated with one kernel (odd, odd)."""
    used = kernel.abs() > 0
    reach = max(
        1,
        int((torch.nonzero(used.any(1)).flatten() - kernel.shape[0] // 2).abs().max()),
        int((torch.nonzero(used.any(0)).flatten() - kernel.shape[1] // 2).abs().max()),
    )
    top, left = kernel.shape[0] // 2, kernel.shape[1] // 2
    kernel = kernel[max(0, top - reach) : top + reach + 1, max(0, left - reach) : left + reach + 1]
    kh, kw = kernel.shape
    h, w = x.shape[-2:]
    if kh * kw <= 25:
        # so few taps leave many whole grey levels, which are truncated later: exact sums
        y = pad(levels(x), (kh // 2, kh // 2, kw // 2, kw // 2), border)
        out = torch.zeros_like(y[:, :, :h, :w])
        for i in range(kh):
            for j in range(kw):
                weight = float(kernel[i, j])
                if weight:
                    out += y[:, :, i : i + h, j : j + w] * weight
        return out
    y = pad(x, (kh // 2, kh // 2, kw // 2, kw // 2), border)
    size = (_smooth(y.shape[-2]), _smooth(y.shape[-1]))
    spectrum = torch.fft.rfft2(kernel.to(y), s=size).conj()
    return torch.fft.irfft2(torch.fft.rfft2(y, s=size) * spectrum, s=size)[:, :, :h, :w]


@lru_cache(maxsize=512)
def _smooth(n: int) -> int:
    """The least even number from n on that has no prime factor above 5: a quick length for the Fourier transform."""
    while True:
        m = n
        for p in (2, 3, 5):
            while m % p == 0:
                m //= p
        if m == 1 and n % 2 == 0:
            return n
        n += 1


def levels(x: Tensor) -> Tensor:
    """Values in [0, 1] as float64 on the 256 levels of a picture, k / 255."""
    return (x.double() * 255).round_().div_(255)


def disk(radius: float, sigma: float) -> Tensor:
    """A disk of weight one on a grid of at least -8..8, softened by a 3x3 (radius above 8: 5x5) Gaussian."""
    half = 8 if radius <= 8 else int(radius)
    i = torch.arange(-half, half + 1)
    out = ((i[:, None] ** 2 + i**2) <= radius**2).float()
    out /= out.sum()
    near = 1 if radius <= 8 else 2
    j = torch.arange(-near, near + 1).double()
    tap = torch.exp(-0.5 * (j / sigma) ** 2)
    taps = (tap / tap.sum()).tolist()
    n = 2 * half + 1
    y = pad(out[None, None], (near,) * 4, "mirror")
    return _along(_along(y, taps, -2, n), taps, -1, n)[0, 0]


def clipped_zoom(x: Tensor, factor: float) -> Tensor:
    """The centre enlarged `factor` times, bilinear, cut to the size of x."""
    h, w = x.shape[-2:]
    ch, cw = math.ceil(h / factor), math.ceil(w / factor)
    top, left = (h - ch) // 2, (w - cw) // 2
    crop = x[..., top : top + ch, left : left + cw]
    size = (round(ch * factor), round(cw * factor))
    if size != (ch, cw):
        crop = F.interpolate(crop, size, mode="bilinear", align_corners=True)
    top, left = (crop.shape[-2] - h) // 2, (crop.shape[-1] - w) // 2
    return crop[..., top : top + h, left : left + w]


def line_blur(x: Tensor, radius: int, sigma: float, angle: Tensor, *, margin: int = 0) -> Tensor:
    """One-sided Gaussian of 2 * radius + 1 taps along a line; angle: (b,) in degrees, whole pixels, edges repeated.

    margin: that many pixels of each side are read, but left out of the result.
    """
    taps = _half_taps(2 * radius + 1, float(sigma))
    c, h, w = x.shape[1], x.shape[2] - 2 * margin, x.shape[3] - 2 * margin
    out = x.new_zeros(len(x), c, h, w)
    for y, total, degrees in zip(x.split(1), out.unbind(), angle.tolist()):
        sine, cosine = math.sin(math.radians(degrees)), math.cos(math.radians(degrees))
        down = [math.ceil(i * sine - 0.5) + margin for i in range(len(taps))]
        right = [math.ceil(i * cosine - 0.5) + margin for i in range(len(taps))]
        above, below = max(0, -min(down)), max(0, max(down) - 2 * margin)
        before, after = max(0, -min(right)), max(0, max(right) - 2 * margin)
        if above or below or before or after:
            y = pad(y, (above, below, before, after), "nearest")
        y = y[0]
        stride = y.stride()
        start = y.storage_offset() + above * stride[1] + before * stride[2]
        for top, left, weight in zip(down, right, taps):
            total.add_(y.as_strided((c, h, w), stride, start + top * stride[1] + left * stride[2]), alpha=weight)
    return out


@lru_cache(maxsize=64)
def _half_taps(count: int, sigma: float) -> tuple[float, ...]:
    taps = np.exp(-0.5 * (np.arange(count) / sigma) ** 2)
    return tuple((taps / taps.sum()).tolist())


def grey(x: Tensor) -> Tensor:
    """Luma of RGB, (b, 1, h, w)."""
    r, g, b = x.unbind(1)
    return (0.299 * r + 0.587 * g + 0.114 * b).unsqueeze(1)
