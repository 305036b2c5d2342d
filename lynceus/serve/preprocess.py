"""From a decoded picture to what the model is given: the size of the model, by the rule of `tasks.classify.resized`.

exact: the very pixels of `lynceus predict`, in float32. Otherwise resized in 8 bits (half a level of rounding), which
is several times faster and makes a quarter of the bytes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lynceus.core.types import as_float
from lynceus.tasks.classify import resized

MANY = 1 << 20  # pixels from which bands pay
ROWS = 64


def prepare(image: Tensor, size: tuple[int, int] | None, policy: str, *, exact: bool) -> Tensor:
    """One picture (3, h, w), or many of one size (b, 3, h, w), at `size`; as it is where size is None."""
    if size is None or tuple(image.shape[-2:]) == tuple(size):
        return image
    if image.dtype == torch.uint8 and not exact:
        return resized_in_8_bits(image, size, policy)
    if image.dtype == torch.uint8 and image.ndim == 3 and image.shape[-1] * image.shape[-2] >= MANY:
        return resized_in_bands(image, size, policy)
    return resized(image, size, policy)


def resized_in_bands(image: Tensor, size: tuple[int, int], policy: str) -> Tensor:
    """The very numbers of `resized` for one large picture in uint8, in less than half the time: its floats are made and
    narrowed some rows at a time, so that they stay in cache."""
    h, w = int(image.shape[-2]), int(image.shape[-1])
    middle = size
    if policy == "crop" and h * size[1] != w * size[0]:
        scale = max(size[0] / h, size[1] / w)
        middle = (max(size[0], round(h * scale)), max(size[1], round(w * scale)))
    narrow = image.new_empty((1, image.shape[0], h, middle[1]), dtype=torch.float32)
    for row in range(0, h, ROWS):
        band = as_float(image[None, :, row : row + ROWS]).contiguous()
        narrow[:, :, row : row + ROWS] = F.interpolate(
            band, (band.shape[-2], middle[1]), mode="bilinear", antialias=True, align_corners=False
        )
    flat = F.interpolate(narrow, middle, mode="bilinear", antialias=True, align_corners=False)
    top, left = (middle[0] - size[0]) // 2, (middle[1] - size[1]) // 2
    return flat[0, :, top : top + size[0], left : left + size[1]]


def resized_in_8_bits(image: Tensor, size: tuple[int, int], policy: str) -> Tensor:
    """As `resized`, rounded to 8 bits after each of the two directions."""
    h, w = int(image.shape[-2]), int(image.shape[-1])
    middle = size
    if policy == "crop" and h * size[1] != w * size[0]:
        scale = max(size[0] / h, size[1] / w)
        middle = (max(size[0], round(h * scale)), max(size[1], round(w * scale)))
    flat = image.reshape(-1, *image.shape[-3:]) if image.ndim != 4 else image
    flat = flat.contiguous(memory_format=torch.channels_last)
    flat = F.interpolate(flat, middle, mode="bilinear", antialias=True, align_corners=False)
    top, left = (middle[0] - size[0]) // 2, (middle[1] - size[1]) // 2
    flat = flat[..., top : top + size[0], left : left + size[1]]
    return flat.reshape(*image.shape[:-2], *size) if image.ndim != 4 else flat


def collate(images: list[Tensor]) -> Tensor:
    """Pictures of one shape as one batch (b, 3, h, w), as they are stored."""
    return images[0][None] if len(images) == 1 else torch.stack(images)


def pixels(batch: Tensor) -> Tensor:
    """The batch as float in [0, 1], in ordinary memory order."""
    return as_float(batch).contiguous()
