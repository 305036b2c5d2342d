"""One object per picture on textured ground, with everything planted and known: for checks that edit scenes.

After the attributes of ImageNet-E (CVPR 2023, arXiv 2303.17096): size, position, direction, background.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float

from lynceus.core.errors import AdviceError, unknown
from lynceus.core.types import Sample
from lynceus.data.dataset import Dataset
from lynceus.data.synth.generated import generated, grid, tight, vivid

# bars (left, top, right, bottom) in a square from -1 to 1; no glyph is a turned other one
GLYPHS: dict[str, tuple[tuple[float, float, float, float], ...]] = {
    "T": ((-1, -1, 1, -0.35), (-0.35, -1, 0.35, 1)),
    "L": ((-1, -1, -0.3, 1), (-1, 0.3, 1, 1)),
    "U": ((-1, -1, -0.4, 1), (0.4, -1, 1, 1), (-1, 0.4, 1, 1)),
    "Z": ((-1, -1, 0.35, -0.2), (-0.35, -1, 0.35, 1), (-0.35, 0.2, 1, 1)),
    "plus": ((-0.35, -1, 0.35, 1), (-1, -0.35, 1, 0.35)),
    "E": ((-1, -1, -0.4, 1), (-1, -1, 1, -0.5), (-1, -0.25, 0.7, 0.25), (-1, 0.5, 1, 1)),
}
GROUNDS = ("gradient", "clouds", "stripes", "checks", "grain", "waves")
SMOOTH = ("gradient", "clouds")
NIGHT = "night"  # a seventh ground, dark and nearly flat; drawn only where asked for


def objects(
    count: int = 1000,
    *,
    size: int = 64,
    rates: tuple[float, float] = (0.15, 0.25),
    turn: float = 0.0,
    centred: bool = True,
    grounds: Sequence[str] = GROUNDS,
    agree: float | None = None,
    seed: int = 0,
) -> Dataset:
    """Pictures of size x size with one coloured glyph each; its class is the label, and all are equally many.

    rates: least and most share of the pixels. turn: at most this many degrees either way. centred: False puts it
    anywhere inside. grounds: which of GROUNDS (or "night") to draw from. agree: this share of the pictures stands on
    the ground whose position in `grounds` is that of the class (as many grounds as classes), the others on any.
    masks (1, h, w), boxes, classes. extra: "ground" (3, h, w) without the object, "family", "rate", "angle".
    """
    for name in grounds:
        if name not in (*GROUNDS, NIGHT):
            raise unknown("ground", name, (*GROUNDS, NIGHT))
    if not 0 < rates[0] <= rates[1] < 0.6:
        raise AdviceError(f"rates is (least, most) share of the pixels, below 0.6; got {rates}.")
    if agree is not None and len(grounds) != len(GLYPHS):
        raise AdviceError(f"agree needs as many grounds as classes ({len(GLYPHS)}); here are {len(grounds)}.")
    make = functools.partial(
        _object, size=size, rates=rates, turn=turn, centred=centred, grounds=tuple(grounds), agree=agree
    )
    return generated("objects", count, seed, make, classes=list(GLYPHS), labels=np.arange(count) % len(GLYPHS))


def _object(
    rng: np.random.Generator,
    index: int,
    *,
    size: int,
    rates: tuple[float, float],
    turn: float,
    centred: bool,
    grounds: tuple[str, ...],
    agree: float | None,
) -> Sample:
    label = index % len(GLYPHS)
    family = grounds[label] if agree is not None and rng.random() < agree else str(rng.choice(grounds))
    ground = texture(rng, family, (size, size))
    rate, angle = float(rng.uniform(*rates)), float(rng.uniform(-turn, turn))
    name = list(GLYPHS)[label]
    half = math.sqrt(rate * size * size / _share(name)) / 2
    reach = half * (abs(math.cos(math.radians(angle))) + abs(math.sin(math.radians(angle))))
    room = max(size / 2 - reach - 1, 0.0)
    cy, cx = (size / 2 + (rng.uniform(-1, 1, 2) * room if not centred else np.zeros(2))).tolist()
    mask = glyph(name, cy, cx, half, angle, (size, size))
    y, x = grid(size, size)
    light = 0.85 + 0.15 * np.cos((y - cy + x - cx) / max(half, 1))[..., None]
    paint = vivid(rng) * light + rng.normal(0, 4, (size, size, 3))
    image = np.where(mask[..., None], paint.clip(0, 255), ground).astype(np.uint8)
    return Sample(
        image=torch.from_numpy(image).permute(2, 0, 1).contiguous(),
        label=label,
        boxes=torch.from_numpy(tight(mask)[None]),
        classes=torch.tensor([label]),
        masks=torch.from_numpy(mask[None]),
        extra={
            "ground": torch.from_numpy(ground.astype(np.uint8)).permute(2, 0, 1).contiguous(),
            "family": family,
            "rate": float(mask.mean()),
            "angle": angle,
        },
    )


@functools.cache
def _share(name: str) -> float:
    """How much of its square a glyph fills."""
    return float(glyph(name, 100, 100, 100, 0.0, (200, 200)).mean())


def glyph(
    name: str, cy: float, cx: float, half: float, degrees: float, size: tuple[int, int]
) -> Bool[np.ndarray, "h w"]:
    """The pixels whose centre lies in a glyph of half side `half`, turned counter-clockwise."""
    y, x = grid(*size)
    y, x = (y - cy) / half, (x - cx) / half
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    u, v = x * cos - y * sin, x * sin + y * cos
    out = np.zeros(size, dtype=bool)
    for left, top, right, bottom in GLYPHS[name]:
        out |= (u >= left) & (u < right) & (v >= top) & (v < bottom)
    return out


def texture(rng: np.random.Generator, family: str, size: tuple[int, int]) -> Float[np.ndarray, "h w 3"]:
    """A ground of one family, 0..255: muted colours, uneven light, a pattern and a little grain."""
    h, w = size
    y, x = (a / max(h, w) for a in grid(h, w))
    base, other = rng.uniform(*((4, 24) if family == NIGHT else (40, 170)), (2, 3))
    angle = rng.uniform(0, 2 * math.pi)
    along = x * math.cos(angle) + y * math.sin(angle)
    across = -x * math.sin(angle) + y * math.cos(angle)
    share = along - along.min()
    out = base + (other - base) * (share / max(float(share.max()), 1e-6))[..., None]
    period = rng.uniform(0.09, 0.16)
    swing = rng.uniform(14, 26) * rng.choice([-1, 1])
    grain = 1.5
    if family == "clouds":
        for _ in range(4):
            fy, fx = rng.uniform(-1.2, 1.2, 2)
            out = out + 12 * np.cos(2 * math.pi * (fy * y + fx * x) + rng.uniform(0, 2 * math.pi))[..., None]
    elif family == "stripes":
        out = out + swing * np.sign(np.sin(2 * math.pi * along / period))[..., None]
    elif family == "checks":
        cells = np.sign(np.sin(2 * math.pi * along / (1.4 * period)) * np.sin(2 * math.pi * across / (1.4 * period)))
        out = out + swing * cells[..., None]
    elif family == "grain":
        grain = 8.0
    elif family == "waves":
        out = out + swing * np.sin(2 * math.pi * (along / period + 0.3 * np.sin(2 * math.pi * across * 2)))[..., None]
    return (out + rng.normal(0, grain, (h, w, 3))).clip(0, 255)
