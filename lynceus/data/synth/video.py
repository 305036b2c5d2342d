"""Shapes that move in straight lines and bounce off the border, with the flow between frames."""

from __future__ import annotations

import functools

import numpy as np
import torch

from lynceus.core.types import Sample
from lynceus.data.dataset import Dataset
from lynceus.data.synth.generated import KINDS, generated, ground, outline, vivid


def moving_shapes(
    count: int = 1000, *, size: int = 64, frames: int = 8, objects: tuple[int, int] = (1, 3), seed: int = 0
) -> Dataset:
    """Videos of `frames` frames; `image` is the first.

    extra: "video" uint8 (t, 3, h, w), "owner" int64 (t, h, w) with 0 for the ground, "velocity" (k, 2) y, x in pixels
    per frame at the start. flow: x, y from the first frame to the second, 0 on the ground. classes: the kinds.
    """
    make = functools.partial(_video, size=size, frames=frames, objects=objects)
    return generated("moving_shapes", count, seed, make, classes=KINDS)


def _video(rng: np.random.Generator, index: int, *, size: int, frames: int, objects: tuple[int, int]) -> Sample:
    number = int(rng.integers(objects[0], objects[1] + 1))
    kinds = rng.integers(len(KINDS), size=number)
    radius = rng.uniform(0.1, 0.2, number) * size
    start = np.stack([rng.uniform(r, size - r, 2) for r in radius])
    velocity = rng.uniform(-0.06, 0.06, (number, 2)) * size
    colours, angles = [vivid(rng) for _ in range(number)], rng.uniform(0, 2 * np.pi, number)
    back = ground(rng, (size, size))
    video = np.repeat(back[None], frames, axis=0)
    owner = np.zeros((frames, size, size), dtype=np.int64)
    places = [_bounce(start + t * velocity, radius[:, None], size) for t in range(frames)]
    for t in range(frames):
        for k in range(number):
            cy, cx = places[t][k].tolist()
            inside = outline(KINDS[kinds[k]], cy, cx, float(radius[k]), float(angles[k]), (size, size))
            video[t][inside], owner[t][inside] = colours[k], k + 1
    flow = np.zeros((2, size, size), dtype=np.float32)
    if frames > 1:
        step = places[1] - places[0]
        moved = np.concatenate([np.zeros((1, 2)), step])[owner[0]]
        flow = np.ascontiguousarray(moved[..., ::-1].transpose(2, 0, 1)).astype(np.float32)
    pixels = torch.from_numpy(video).permute(0, 3, 1, 2).contiguous()
    return Sample(
        image=pixels[0].clone(),
        classes=torch.from_numpy(kinds),
        masks=torch.from_numpy(owner[0][None] == np.arange(1, number + 1)[:, None, None]),
        flow=torch.from_numpy(flow),
        extra={"video": pixels, "owner": torch.from_numpy(owner), "velocity": torch.from_numpy(velocity).float()},
    )


def _bounce(place: np.ndarray, radius: np.ndarray, size: int) -> np.ndarray:
    """Places folded back into the picture as if the border were a mirror."""
    room = size - 2 * radius
    folded = np.mod(place - radius, 2 * room)
    out: np.ndarray = radius + np.where(folded > room, 2 * room - folded, folded)
    return out
