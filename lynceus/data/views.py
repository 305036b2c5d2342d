"""What a model sees of a sample in training and in evaluation: torchvision v2 on uint8, random numbers from a
generator.

`TrainView` crops and resizes at random and flips, with RandAugment if wanted (Cubuk et al., "RandAugment: Practical
automated data augmentation with a reduced search space", NeurIPS 2020, arXiv 1909.13719). `EvalView` resizes and
takes the centre. `crop_flip` is the whole-batch augmentation of small pictures in memory (pad, crop, mirror).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from jaxtyping import Shaped
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from lynceus.core.errors import AdviceError
from lynceus.core.types import Batch, Sample
from lynceus.data.geometry import flipped, has_geometry, resized, resized_crop


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalView:
    """Shorter side to floor(size / crop), then the centre of size x size; boxes, masks and maps move along.

    size: side of the square in pixels, or (h, w). crop: share of the resized picture that is kept, 0.875 as usual.
    """

    size: int | tuple[int, int] = 224
    crop: float = 0.875

    def __post_init__(self) -> None:
        if not 0 < self.crop <= 1:
            raise AdviceError(f"crop is the share of the resized picture that is kept, in 0..1; got {self.crop}.")

    def __call__(self, sample: Sample, generator: torch.Generator | None = None) -> Sample:
        h, w = _pair(self.size)
        height, width = sample.image.shape[-2:]
        tall, wide = math.floor(h / self.crop), math.floor(w / self.crop)
        if tall * width >= wide * height:
            wide = max(wide, int(tall * width / height))
        else:
            tall = max(tall, int(wide * height / width))
        out = resized(sample, (tall, wide))
        return resized_crop(out, round((tall - h) / 2), round((wide - w) / 2), h, w, (h, w))


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainView:
    """A random window of the picture, resized, mirrored half the time.

    size: side in pixels, or (h, w). scale: least and greatest share of the area. ratio: least and greatest width over
    height. flip: chance to mirror. ops, magnitude: RandAugment operations per picture (0 for none) and their strength
    of 0..30; with boxes or maps only those operations are drawn that move no pixel. With no generator, the `EvalView`.
    """

    size: int | tuple[int, int] = 224
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5
    ops: int = 0
    magnitude: int = 9

    def __post_init__(self) -> None:
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise AdviceError(f"scale is (least, greatest) share of the area within 0..1; got {self.scale}.")
        if not 0 <= self.magnitude <= 30:
            raise AdviceError(f"magnitude lies in 0..30; got {self.magnitude}.")

    def __call__(self, sample: Sample, generator: torch.Generator | None = None) -> Sample:
        if generator is None:
            return EvalView(size=self.size)(sample)
        h, w = sample.image.shape[-2:]
        window = random_window(h, w, self.scale, self.ratio, generator)
        out = resized_crop(sample, *window, _pair(self.size))
        if self.flip and float(torch.rand((), generator=generator)) < self.flip:
            out = flipped(out)
        if self.ops:
            image = rand_augment(
                out.image, self.ops, self.magnitude, generator=generator, still=has_geometry(out) or bool(out.extra)
            )
            out = replace(out, image=image)
        return out


@dataclass(frozen=True, slots=True, kw_only=True)
class CropFlip:
    """`crop_flip` as a transform of the loader; it works on whole batches."""

    pad: int = 4
    batched: ClassVar[bool] = True

    def __call__(self, batch: Batch, generator: torch.Generator | None = None) -> Batch:
        if generator is None:
            return batch
        return replace(batch, image=crop_flip(batch.image, self.pad, generator))


def crop_flip(
    images: Shaped[Tensor, "b c h w"], pad: int, generator: torch.Generator, *, flip: float = 0.5
) -> Shaped[Tensor, "b c h w"]:
    """Each picture padded with `pad` zeros all round, cut at random to its old size and mirrored with chance `flip`."""
    b, _, h, w = images.shape
    where = generator.device
    top = torch.randint(2 * pad + 1, (b,), generator=generator, device=where)
    left = torch.randint(2 * pad + 1, (b,), generator=generator, device=where)
    mirror = torch.rand(b, generator=generator, device=where) < flip
    top, left, mirror = (t.to(images.device) for t in (top, left, mirror))
    padded = torch.nn.functional.pad(images, (pad, pad, pad, pad))
    rows = top[:, None] + torch.arange(h, device=images.device)
    along = torch.arange(w, device=images.device)
    columns = left[:, None] + torch.where(mirror[:, None], w - 1 - along, along)
    wide = padded.shape[-1]
    flat = (rows[:, :, None] * wide + columns[:, None, :]).reshape(b, 1, h * w)
    picked = padded.flatten(2).gather(2, flat.expand(-1, images.shape[1], -1))
    return picked.view(b, -1, h, w)


def random_window(
    height: int, width: int, scale: tuple[float, float], ratio: tuple[float, float], generator: torch.Generator
) -> tuple[int, int, int, int]:
    """(top, left, height, width) of a random share of the area and shape; the centre when ten do not fit."""
    draws = torch.rand((10, 2), generator=generator).tolist()
    low, high = math.log(ratio[0]), math.log(ratio[1])
    for a, r in draws:
        target = height * width * (scale[0] + a * (scale[1] - scale[0]))
        shape = math.exp(low + r * (high - low))
        w, h = round(math.sqrt(target * shape)), round(math.sqrt(target / shape))
        if 0 < w <= width and 0 < h <= height:
            y, x = torch.rand(2, generator=generator).tolist()
            return int(y * (height - h + 1)), int(x * (width - w + 1)), h, w
    shape = min(max(width / height, ratio[0]), ratio[1])
    h, w = min(height, round(width / shape)), min(width, round(height * shape))
    return (height - h) // 2, (width - w) // 2, max(1, h), max(1, w)


def rand_augment(
    image: Shaped[Tensor, "3 h w"], ops: int, magnitude: int, *, generator: torch.Generator, still: bool = False
) -> Shaped[Tensor, "3 h w"]:
    """`ops` operations drawn with replacement, each at strength magnitude / 30 and random sign.

    still: draw only from those that leave every pixel in its place.
    """
    pool = _STILL if still else _STILL + _MOVING
    for _ in range(ops):
        pick, sign = torch.rand(2, generator=generator).tolist()
        strength = magnitude / 30
        image = pool[int(pick * len(pool))](image, strength, 1.0 if sign < 0.5 else -1.0)
    return image


def _affine(
    image: Tensor, *, angle: float = 0.0, x: float = 0.0, y: float = 0.0, sx: float = 0.0, sy: float = 0.0
) -> Tensor:
    shift = [round(x * image.shape[-1]), round(y * image.shape[-2])]
    moved: Tensor = F.affine(
        image, angle=angle, translate=shift, scale=1.0, shear=[math.degrees(sx), math.degrees(sy)], fill=[127]
    )
    return moved


_Operation = Callable[[Tensor, float, float], Tensor]
_STILL: tuple[_Operation, ...] = (
    lambda i, m, s: i,
    lambda i, m, s: F.autocontrast(i),
    lambda i, m, s: F.equalize(i),
    lambda i, m, s: F.posterize(i, 8 - round(4 * m)),
    lambda i, m, s: F.solarize(i, 255 * (1 - m) if i.dtype == torch.uint8 else 1 - m),
    lambda i, m, s: F.adjust_brightness(i, 1 + 0.9 * m * s),
    lambda i, m, s: F.adjust_saturation(i, 1 + 0.9 * m * s),
    lambda i, m, s: F.adjust_contrast(i, 1 + 0.9 * m * s),
    lambda i, m, s: F.adjust_sharpness(i, 1 + 0.9 * m * s),
)
_MOVING: tuple[_Operation, ...] = (
    lambda i, m, s: _affine(i, angle=30 * m * s),
    lambda i, m, s: _affine(i, sx=0.3 * m * s),
    lambda i, m, s: _affine(i, sy=0.3 * m * s),
    lambda i, m, s: _affine(i, x=0.45 * m * s),
    lambda i, m, s: _affine(i, y=0.45 * m * s),
)


def _pair(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else size
