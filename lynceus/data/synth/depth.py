"""Textured planes in front of a pin-hole camera, with the exact depth of every pixel."""

from __future__ import annotations

import functools

import numpy as np
import torch

from lynceus.core.types import Sample
from lynceus.data.dataset import Dataset
from lynceus.data.synth.generated import generated, grid, outline, vivid


def depth_planes(
    count: int = 1000, *, size: int = 64, planes: tuple[int, int] = (2, 5), holes: float = 0.0, seed: int = 0
) -> Dataset:
    """A slanted back wall and planes[0] .. planes[1] tilted patches before it, nearer ones in front.

    depth: metres, 1 .. 20; a share `holes` of the pixels is nan, as of a sensor. extra["focal"]: pixels. Inverse
    depth is linear in the pixel, as for true planes, and distant planes are hazier, so that depth can be learned.
    """
    make = functools.partial(_planes, size=size, planes=planes, holes=holes)
    return generated("depth_planes", count, seed, make)


def _planes(rng: np.random.Generator, index: int, *, size: int, planes: tuple[int, int], holes: float) -> Sample:
    y, x = grid(size, size)
    y, x = y / size - 0.5, x / size - 0.5
    nearness = _plane(rng, rng.uniform(8, 16), x, y)
    image = _texture(rng, x, y, size)
    for _ in range(int(rng.integers(planes[0], planes[1] + 1))):
        patch = _plane(rng, rng.uniform(1.5, 8), x, y)
        cy, cx = rng.uniform(0, size, 2)
        inside = outline("square", cy, cx, rng.uniform(0.2, 0.5) * size, rng.uniform(0, np.pi), (size, size))
        inside &= patch > nearness
        nearness = np.where(inside, patch, nearness)
        image = np.where(inside[..., None], _texture(rng, x, y, size), image)
    depth = (1 / nearness).astype(np.float32)
    haze = np.exp(-depth / 8)[..., None]
    image = image * haze + 200 * (1 - haze) + rng.normal(0, 3, image.shape)
    if holes:
        depth[rng.random(depth.shape) < holes] = np.nan
    return Sample(
        image=torch.from_numpy(image.clip(0, 255).astype(np.uint8)).permute(2, 0, 1).contiguous(),
        depth=torch.from_numpy(depth),
        extra={"focal": float(size)},
    )


def _plane(rng: np.random.Generator, metres: float, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Inverse depth of a plane `metres` away at the centre, within 1 .. 20 metres."""
    tilt_x, tilt_y = rng.uniform(-0.5, 0.5, 2)
    out: np.ndarray = ((1 + tilt_x * x + tilt_y * y) / metres).clip(1 / 20, 1)
    return out


def _texture(rng: np.random.Generator, x: np.ndarray, y: np.ndarray, size: int) -> np.ndarray:
    angle, period = rng.uniform(0, np.pi), rng.uniform(0.06, 0.25)
    wave = np.sin(2 * np.pi * (x * np.cos(angle) + y * np.sin(angle)) / period)
    out: np.ndarray = vivid(rng).astype(np.float32) * (0.75 + 0.25 * np.sign(wave))[..., None]
    return out
