"""A dataset whose samples are made when asked for, and the drawing that its makers share."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, UInt8
from torch import Tensor

from lynceus.core.errors import AdviceError
from lynceus.core.rng import numpy_generator
from lynceus.core.types import Sample
from lynceus.data.dataset import Dataset

KINDS = ("circle", "square", "triangle")


class Generated:
    """make(generator, index) -> Sample, with a numpy generator seeded by (seed, name, index). The last few are kept."""

    rich = True

    def __init__(self, name: str, count: int, seed: int, make: Callable[[np.random.Generator, int], Sample]):
        if count < 1:
            raise AdviceError(f"{name}: count must be at least 1; got {count}.")
        self.name, self.count, self.seed, self.make = name, count, seed, make
        self._kept: dict[int, Sample] = {}

    def __len__(self) -> int:
        return self.count

    def sample(self, row: int) -> Sample:
        if row not in self._kept:
            if len(self._kept) >= 8:
                self._kept.pop(next(iter(self._kept)))
            self._kept[row] = self.make(numpy_generator(self.seed, self.name, row), row)
        return self._kept[row]

    def read(self, row: int) -> Tensor:
        return self.sample(row).image.clone()

    def raw(self, row: int) -> bytes:
        return self.sample(row).image.numpy().tobytes()

    def id(self, row: int) -> str:
        return f"{self.name}-{self.seed}-{row:06d}"

    def path(self, row: int) -> str | None:
        return None

    def target(self, row: int, *, size: tuple[int, int] | None = None, maps: bool = True) -> dict[str, Any]:
        made = self.sample(row)
        skipped = {"image", "label", "id", "path"} | (set() if maps else {"masks", "segments", "depth", "flow"})
        known = {f.name: getattr(made, f.name) for f in fields(made) if f.name not in skipped}
        known["extra"] = dict(known["extra"])
        return {k: v.clone() if isinstance(v, Tensor) else v for k, v in known.items() if v is not None}

    def stamp(self, row: int) -> str:
        return self.id(row)


def generated(
    name: str,
    count: int,
    seed: int,
    make: Callable[[np.random.Generator, int], Sample],
    *,
    classes: Sequence[str] | None = None,
    labels: Sequence[int] | np.ndarray | None = None,
) -> Dataset:
    """The dataset of `count` samples that `make` gives. labels: theirs, where known beforehand."""
    source = Generated(name, count, seed, make)
    origin = f"generated: {name}, seed {seed}"
    return Dataset(source, name=name, origin=origin, classes=classes, labels=labels, layout="synth")


@functools.lru_cache(maxsize=8)
def grid(height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """y and x of the pixel centres, each (h, w)."""
    y, x = np.mgrid[:height, :width].astype(np.float32) + 0.5
    return y, x


def outline(
    kind: str, cy: float, cx: float, radius: float, angle: float, size: tuple[int, int]
) -> Bool[np.ndarray, "h w"]:
    """The pixels whose centre lies in a circle, square or triangle of circumradius `radius`, turned by `angle`."""
    y, x = grid(*size)
    y, x = y - cy, x - cx
    if kind == "circle":
        return x * x + y * y <= radius * radius
    sides = 4 if kind == "square" else 3
    inner = radius * np.cos(np.pi / sides)
    inside = np.ones(size, dtype=bool)
    for k in range(sides):
        normal = angle + 2 * np.pi * k / sides
        inside &= x * np.cos(normal) + y * np.sin(normal) <= inner
    return inside


def ground(rng: np.random.Generator, size: tuple[int, int]) -> UInt8[np.ndarray, "h w 3"]:
    """A background: a gradient between two dark colours with some noise."""
    y, x = grid(*size)
    angle = rng.uniform(0, 2 * np.pi)
    share = (x * np.cos(angle) / size[1] + y * np.sin(angle) / size[0])[..., None] % 1.0
    low, high = rng.uniform(0, 110, (2, 3))
    values = low * (1 - share) + high * share + rng.normal(0, 6, (*size, 3))
    pixels: np.ndarray = values.clip(0, 255).astype(np.uint8)
    return pixels


def vivid(rng: np.random.Generator) -> UInt8[np.ndarray, " 3"]:
    """A bright colour: one channel high, one low, one between."""
    return rng.permutation([rng.uniform(190, 255), rng.uniform(60, 190), rng.uniform(0, 80)]).astype(np.uint8)


def tight(mask: Bool[np.ndarray, "h w"]) -> Float[np.ndarray, " 4"]:
    """The xyxy box of a mask that is not empty."""
    ys, xs = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return np.array([xs[0], ys[0], xs[-1] + 1, ys[-1] + 1], dtype=np.float32)
