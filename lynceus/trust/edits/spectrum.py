"""How busy a background is: the mean modulus of its Fourier transform, and backgrounds made busier or calmer.

ImageNet-E, CVPR 2023, arXiv 2303.17096: the guidance of its diffusion model pushes this number up ("hard") or down.
Here the spectrum itself is changed until the number has changed by the wanted share.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, UInt8
from scipy import fft

TOLERANCE = 0.01  # relative; the search stops this close to the wanted complexity
STEPS = 24


def complexity(image: Float[np.ndarray, "c h w"] | UInt8[np.ndarray, "c h w"]) -> float:
    """Mean modulus over channels and frequencies of the 2-D Fourier transform of an image in [0, 1] (8-bit: / 255)."""
    pixels = image / 255 if image.dtype == np.uint8 else image
    return _mean_modulus(fft.rfft2(pixels, axes=(-2, -1)), image.shape[-1])


def _mean_modulus(half: np.ndarray, width: int) -> float:
    """The mean over all frequencies from the half of them that a real image needs."""
    size = np.abs(half)
    columns = size.sum((0, 1))
    inner = columns[1 : (width + 1) // 2].sum()  # columns that have a mirrored twin
    return float((columns.sum() + inner) / (size.shape[0] * size.shape[1] * width))


def lowpass(image: Float[np.ndarray, "c h w"], limit: float) -> Float[np.ndarray, "c h w"]:
    """Keeps the frequencies below `limit` cycles per pixel along both axes."""
    h, w = image.shape[-2:]
    keep = (np.abs(fft.fftfreq(h)) < limit)[:, None] & (fft.rfftfreq(w) < limit)[None]
    out: np.ndarray = fft.irfft2(fft.rfft2(image, axes=(-2, -1)) * keep, s=(h, w), axes=(-2, -1))
    return out


@dataclass(frozen=True, slots=True)
class Reached:
    """A changed background (h, w, 3), and its complexity over the old one's: wanted and reached."""

    image: UInt8[np.ndarray, "h w 3"]
    wanted: float
    ratio: float


def visible_complexity(image: UInt8[np.ndarray, "h w 3"], hidden: Bool[np.ndarray, "h w"] | None) -> float:
    """Complexity of what is not `hidden`: hidden pixels take the mean colour of the others first."""
    planes = np.ascontiguousarray(image.transpose(2, 0, 1)).astype(np.float32) / 255
    if hidden is not None and hidden.any() and not hidden.all():
        seen = ~hidden
        for plane in planes:
            plane[hidden] = (plane * seen).sum() / seen.sum()
    return complexity(planes)


def change(
    background: UInt8[np.ndarray, "h w 3"],
    share: float,
    *,
    hidden: Bool[np.ndarray, "h w"] | None = None,
    donor: UInt8[np.ndarray, "h w 3"] | None = None,
) -> Reached:
    """The background with `share` more (> 0) or less (-1 < share < 0) complexity outside `hidden`.

    Less: frequencies above a cut-off are dropped. More: phases stay, and amplitudes go towards those of `donor` (a busy
    image; default: the image's own spectrum flattened). The cut-off or mixture is found by bisection on the 8-bit
    result; where the wanted value lies outside what can be reached, the nearest one is returned and `ratio` says so.
    """
    wanted, start = 1 + share, visible_complexity(background, hidden)
    if share == 0 or start == 0:
        return Reached(background, wanted, 1.0)
    half = fft.rfft2(background.astype(np.float32).transpose(2, 0, 1) / 255, axes=(-2, -1))
    make = _calmer(half, background.shape[1]) if share < 0 else _busier(half, background, donor)
    return _search(make, start, wanted, hidden)


def _search(make: Callable[[float], np.ndarray], start: float, wanted: float, hidden: np.ndarray | None) -> Reached:
    """Bisection (by secants where they help) on a knob in 0..1 that raises complexity."""
    low, high = 0.0, 1.0
    ends: dict[float, float] = {}
    best: Reached | None = None
    knob = 0.5
    for step in range(STEPS):
        image = make(knob)
        ratio = visible_complexity(image, hidden) / start
        if best is None or abs(ratio - wanted) < abs(best.ratio - wanted):
            best = Reached(image, wanted, ratio)
        if abs(ratio - wanted) <= TOLERANCE * wanted:
            break
        ends[knob] = ratio
        low, high = (knob, high) if ratio < wanted else (low, knob)
        knob = (low + high) / 2
        if low in ends and high in ends and step % 3:
            at = (wanted - ends[low]) / (ends[high] - ends[low])
            knob = low + (high - low) * min(max(at, 0.05), 0.95)
    assert best is not None
    return best


def _calmer(half: np.ndarray, width: int) -> Callable[[float], np.ndarray]:
    """knob -> image with the lowest frequencies that together hold that share of all moduli; the last ring in part."""
    h = half.shape[1]
    radius = np.hypot(fft.fftfreq(h)[:, None], fft.rfftfreq(width)[None])
    size = np.abs(half).sum(0)
    size[:, 1 : (width + 1) // 2] *= 2
    rings = np.round(radius * max(h, width)).astype(int)
    held = np.cumsum(np.bincount(rings.ravel(), weights=size.ravel()))
    held = held / held[-1]

    def make(knob: float) -> np.ndarray:
        last = int(np.searchsorted(held, knob))
        below = held[last - 1] if last else 0.0
        part = (knob - below) / max(held[last] - below, 1e-12)
        gain = np.where(rings < last, 1.0, np.where(rings == last, part, 0.0)).astype(np.float32)
        gain[0, 0] = 1.0  # the mean colour stays
        return _pixels(half * gain, width)

    return make


def _busier(half: np.ndarray, background: np.ndarray, donor: np.ndarray | None) -> Callable[[float], np.ndarray]:
    """knob -> image whose amplitudes are mixed with the donor's; from one half on the donor's are raised as well."""
    size = np.abs(half)
    phase = np.where(size > 0, half / np.maximum(size, 1e-12), 1)
    if donor is None:
        other = np.broadcast_to(np.sqrt((size**2).mean((1, 2), keepdims=True)), size.shape)
    else:
        other = np.abs(fft.rfft2(donor.astype(np.float32).transpose(2, 0, 1) / 255, axes=(-2, -1)))
    # a donor calmer than the background cannot raise it: its amplitudes are brought above
    other = other * max(1.0, 2 * float(size.mean()) / max(float(other.mean()), 1e-12))

    def make(knob: float) -> np.ndarray:
        share, gain = min(2 * knob, 1.0), 1 + 7 * max(2 * knob - 1, 0.0)
        mixed = (1 - share) * size + share * gain * other
        mixed[:, 0, 0] = size[:, 0, 0]
        return _pixels(mixed * phase, background.shape[1])

    return make


def _pixels(half: np.ndarray, width: int) -> np.ndarray:
    image = fft.irfft2(half, s=(half.shape[1], width), axes=(-2, -1))
    return (image * 255).round().clip(0, 255).astype(np.uint8).transpose(1, 2, 0)
