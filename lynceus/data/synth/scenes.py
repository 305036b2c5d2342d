"""Scenes of simple shapes: `shapes` for detection and segmentation, `sprites` for learning objects without labels.

Sprites follow the idea of Multi-dSprites (Burgess et al., "MONet", 2019, arXiv 1901.11390): coloured sprites on black
that may hide one another, with the factors that made them.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch

from lynceus.core.errors import AdviceError
from lynceus.core.types import Sample
from lynceus.data.dataset import Dataset
from lynceus.data.synth.generated import KINDS, generated, ground, outline, tight, vivid

LEAST_SEEN = 0.4  # share of an object that others must leave visible


def shapes(count: int = 1000, *, size: int = 64, objects: tuple[int, int] = (0, 4), seed: int = 0) -> Dataset:
    """Pictures of size x size with objects[0] .. objects[1] circles, squares and triangles on a noisy ground.

    boxes (tight around what is visible), classes, masks (visible parts, disjoint), segments (0 ground, class + 1).
    """
    if not 0 <= objects[0] <= objects[1]:
        raise AdviceError(f"objects is (least, most) per picture; got {objects}.")
    return generated("shapes", count, seed, functools.partial(_shapes, size=size, objects=objects), classes=KINDS)


def _shapes(rng: np.random.Generator, index: int, *, size: int, objects: tuple[int, int]) -> Sample:
    image = ground(rng, (size, size))
    wanted = int(rng.integers(objects[0], objects[1] + 1))
    kinds, wholes, colours = [], [], []
    for _ in range(wanted):
        kind = int(rng.integers(len(KINDS)))
        radius = rng.uniform(0.1, 0.24) * size
        cy, cx = rng.uniform(0.6 * radius, size - 0.6 * radius, 2)
        kinds.append(kind)
        wholes.append(outline(KINDS[kind], cy, cx, radius, rng.uniform(0, 2 * np.pi), (size, size)))
        colours.append(vivid(rng))
    kept: list[int] = []
    for k in reversed(range(wanted)):  # the last lies on top; what it would hide too much of is left out
        above = np.any([wholes[j] for j in kept], axis=0) if kept else np.zeros((size, size), dtype=bool)
        if (wholes[k] & ~above).sum() >= max(LEAST_SEEN * wholes[k].sum(), 9):
            kept.append(k)
    kept.sort()
    owner = np.full((size, size), -1)
    for k in kept:
        owner[wholes[k]] = k
        image[wholes[k]] = colours[k]
    masks = [owner == k for k in kept]
    classes = torch.tensor([kinds[k] for k in kept], dtype=torch.long)
    segments = np.zeros((size, size), dtype=np.int64)
    for k, mask in zip(kept, masks):
        segments[mask] = kinds[k] + 1
    return Sample(
        image=torch.from_numpy(image).permute(2, 0, 1).contiguous(),
        boxes=torch.from_numpy(np.array([tight(m) for m in masks], dtype=np.float32).reshape(-1, 4)),
        classes=classes,
        masks=torch.from_numpy(np.array(masks, dtype=bool).reshape(-1, size, size)),
        segments=torch.from_numpy(segments),
    )


def sprites(count: int = 1000, *, size: int = 64, objects: tuple[int, int] = (1, 4), seed: int = 0) -> Dataset:
    """Coloured sprites on black. segments: 0 ground, then 1 .. n, later ones on top; masks: visible parts.

    extra: "kind", "position" (y, x in 0..1), "scale" (share of the side), "angle" (rad), "colour" (0..1), each per
    sprite.
    """
    return generated("sprites", count, seed, functools.partial(_sprites, size=size, objects=objects), classes=KINDS)


def _sprites(rng: np.random.Generator, index: int, *, size: int, objects: tuple[int, int]) -> Sample:
    wanted = int(rng.integers(objects[0], objects[1] + 1))
    image = np.zeros((size, size, 3), dtype=np.uint8)
    owner = np.zeros((size, size), dtype=np.int64)
    made: dict[str, list[Any]] = {"kind": [], "position": [], "scale": [], "angle": [], "colour": []}
    for k in range(wanted):
        kind, scale, angle = int(rng.integers(len(KINDS))), rng.uniform(0.1, 0.2), rng.uniform(0, 2 * np.pi)
        place, colour = rng.uniform(scale, 1 - scale, 2), vivid(rng)
        cy, cx = (place * size).tolist()
        inside = outline(KINDS[kind], cy, cx, scale * size, angle, (size, size))
        image[inside], owner[inside] = colour, k + 1
        for name, value in zip(made, (kind, place, scale, angle, colour / 255)):
            made[name].append(value)
    masks = owner[None] == np.arange(1, wanted + 1)[:, None, None]
    boxes = [tight(m) if m.any() else np.zeros(4, np.float32) for m in masks]
    return Sample(
        image=torch.from_numpy(image).permute(2, 0, 1).contiguous(),
        boxes=torch.from_numpy(np.array(boxes, dtype=np.float32).reshape(-1, 4)),
        classes=torch.tensor(made["kind"], dtype=torch.long),
        masks=torch.from_numpy(masks),
        segments=torch.from_numpy(owner),
        extra={k: torch.tensor(np.array(v), dtype=torch.float32) for k, v in made.items()},
    )
