"""Digital: brightness, contrast, saturate, elastic transform, pixelate, JPEG.

Hendrycks and Dietterich, ICLR 2019, arXiv 1903.12261; hendrycks/robustness (Apache-2.0). Brightness acts
on the value of HSV: with hue and saturation kept that is one factor per pixel.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lynceus.data.corrupt.draws import Draws
from lynceus.data.corrupt.filters import gaussian, levels


def brightness(x: Tensor, amount: float) -> Tensor:
    """HSV value plus `amount`."""
    value = x.amax(1, keepdim=True)
    new = (value + amount).clamp_(max=1)
    return torch.where(value > 0, x * (new / value.clamp(min=1e-6)), new)


def contrast(x: Tensor, amount: float) -> Tensor:
    """Differences from each channel's mean times `amount`."""
    mean = x.mean((2, 3), keepdim=True)
    return torch.lerp(mean, x, amount)


def saturate(x: Tensor, constants: tuple[float, float]) -> Tensor:
    """HSV saturation times a plus b; grey pixels have hue 0 (red).

    Doubled saturation is a whole grey level for most pixels, and the result is truncated: what float64 makes of it
    decides. So this goes through HSV in float64, in the order of scikit-image.
    """
    times, plus = constants
    x = levels(x)
    r, g, b = x.unbind(1)
    value = x.amax(1)
    delta = value - x.amin(1)
    grey = delta == 0
    over = delta.masked_fill(grey, 1.0)
    hue = torch.where(b == value, 4 + (r - g) / over, torch.where(g == value, 2 + (b - r) / over, (g - b) / over))
    sixth = torch.remainder(hue / 6, 1).masked_fill_(grey, 0.0) * 6
    depth = (delta / value.masked_fill(value == 0, 1.0) * times + plus).clamp_(0, 1)
    sector = sixth.floor()
    part = sixth - sector
    low = value * (1 - depth)
    fall = value * (1 - part * depth)
    rise = value * (1 - (1 - part) * depth)
    sector = torch.remainder(sector, 6)
    two, four = (sector == 1) | (sector == 2), (sector == 3) | (sector == 4)

    def channel(top: Tensor, falls: float, rises: float) -> Tensor:
        return torch.where(top, value, torch.where(sector == falls, fall, torch.where(sector == rises, rise, low)))

    red = channel((sector == 0) | (sector == 5), 1, 4)
    return torch.stack([red, channel(two, 3, 0), channel(four, 5, 2)], 1)


def elastic_transform(x: Tensor, constants: tuple[float, float, float], draws: Draws) -> Tensor:
    """A random affine move of three points (mirrored borders), then a smooth random displacement of each pixel."""
    strength, sigma, reach = constants
    b, _, h, w = x.shape
    centre = torch.tensor([w // 2, h // 2], dtype=torch.float64)
    third = min(h, w) // 3
    corners = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
    before = centre + third * corners
    after = before + (draws.uniform(3, 2).double().cpu() * 2 - 1) * reach
    one = torch.ones(3, 1, dtype=torch.float64)
    back = torch.eye(2, 3, dtype=torch.float64).expand(b, 2, 3)  # pixels (x, y, 1) of the result -> where to read
    if third:
        back = torch.linalg.solve(torch.cat([after, one.expand(b, 3, 1)], 2), before.expand(b, 3, 2)).transpose(1, 2)
    back = back.to(x)
    across, down = torch.arange(w).to(x), torch.arange(h).to(x)[:, None]

    def affine(row: int) -> Tensor:
        a, b_, c = (back[:, row, i, None, None] for i in range(3))
        return a * across + b_ * down + c

    x = _sample(x, affine(0), affine(1), mirror=True)
    if strength == 0:
        return x
    dx = gaussian(draws.uniform(1, h, w) * 2 - 1, sigma, border="reflect", truncate=3)[:, 0] * strength
    dy = gaussian(draws.uniform(1, h, w) * 2 - 1, sigma, border="reflect", truncate=3)[:, 0] * strength
    return _sample(x, across + dx, down + dy, mirror=False)


def _sample(x: Tensor, across: Tensor, down: Tensor, *, mirror: bool) -> Tensor:
    """x read bilinearly at pixel places (b, h, w). mirror: around the border pixels; else with them."""
    h, w = x.shape[-2:]
    if mirror:
        grid = torch.stack([across * (2 / max(w - 1, 1)) - 1, down * (2 / max(h - 1, 1)) - 1], -1)
    else:
        grid = torch.stack([(across * 2 + 1) / w - 1, (down * 2 + 1) / h - 1], -1)
    return F.grid_sample(x, grid, mode="bilinear", padding_mode="reflection", align_corners=mirror)


def pixelate(x: Tensor, share: float) -> Tensor:
    """Box-averaged down to a share of the side by Pillow, and up again. x: (b, 3, h, w) uint8.

    Up, Pillow's box holds one pixel: whole rows and columns are repeated.
    """
    from PIL.Image import Resampling

    h, w = x.shape[-2:]
    high, wide = max(1, int(h * share)), max(1, int(w * share))
    rows, columns = _nearest(high, h), _nearest(wide, w)

    def through(image: Any) -> np.ndarray:
        small = np.asarray(image.resize((wide, high), Resampling.BOX))
        return small.transpose(2, 0, 1).take(columns, 2).take(rows, 1)

    return _each(x, through)


@lru_cache(maxsize=64)
def _nearest(small: int, large: int) -> np.ndarray:
    """The small pixel that each of the large ones lies in."""
    return ((np.arange(large) + 0.5) * (small / large)).astype(np.int64)


def jpeg_compression(x: Tensor, quality: int) -> Tensor:
    """Written as JPEG and read again, by Pillow. x: (b, 3, h, w) uint8."""
    from PIL import Image

    h, w = x.shape[-2:]

    def through(image: Any) -> np.ndarray:
        file = io.BytesIO()
        image.save(file, "JPEG", quality=quality)
        # size and mode are known: no headers
        read = Image.frombytes("RGB", (w, h), file.getvalue(), "jpeg", "RGB", "")
        return np.stack([np.frombuffer(read.tobytes("raw", band), dtype=np.uint8).reshape(h, w) for band in "RGB"])

    return _each(x, through)


def _each(x: Tensor, change: Callable[[Any], np.ndarray]) -> Tensor:
    """Every picture of a batch as a PIL image, changed to (3, h, w)."""
    from PIL import Image

    made = [
        change(Image.merge("RGB", [Image.fromarray(np.ascontiguousarray(plane)) for plane in picture]))
        for picture in x.cpu().numpy()
    ]
    return torch.from_numpy(made[0][None] if len(made) == 1 else np.stack(made)).to(x.device)
