"""An object taken out of its picture: the hole is filled smoothly and given the texture of what surrounds it.

The reference fills holes with a network (TFill, CVPR 2022, arXiv 2104.00845). Here the hole takes the pixels of the
best matching place of the same picture, moved as a whole, and a smooth surface takes up what differs at the rim;
what no move covers is filled smoothly with noise like the ring's. `telea`: Telea, "An image inpainting technique based
on the fast marching method", 2004, coarse to fine, by OpenCV. `ring`: the ring's mean colour and deviation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, UInt8
from scipy import fft, ndimage

from lynceus.core.errors import missing_extra, unknown
from lynceus.trust.edits.fill import blurred_known, diffused

Method = Literal["moved", "telea", "ring"]
METHODS = ("moved", "telea", "ring")
SIDE = 128  # moves are searched on pictures of about this side
ROUNDS = 4  # moves that may cover one hole
NOISIER = 3.0  # a move whose misfit exceeds the ring's own residual by this factor is not used
RIM = 2.0  # pixels over which the rim's colours are averaged before they are carried into the hole


@dataclass(frozen=True, slots=True)
class Ground:
    """A picture without its object. hole: which pixels were made up. moved: the share of them copied from elsewhere."""

    image: UInt8[np.ndarray, "h w 3"]
    hole: Bool[np.ndarray, "h w"]
    moved: float


def grown(mask: Bool[np.ndarray, "h w"], radius: int) -> Bool[np.ndarray, "h w"]:
    """The mask and everything within `radius` pixels along rows, columns and diagonals."""
    out = mask.copy()
    for axis in (0, 1):
        reach = 0
        while reach < radius:  # doubling: what is within r, moved by up to r + 1, is within 2 r + 1
            step = min(reach + 1, radius - reach)
            lower, upper = (slice(step, None), slice(None, -step)) if step < out.shape[axis] else (slice(0, 0),) * 2
            a, b = (lower, slice(None)) if axis == 0 else (slice(None), lower), None
            b = (upper, slice(None)) if axis == 0 else (slice(None), upper)
            before = out.copy()
            out[a] |= before[b]
            out[b] |= before[a]
            reach += step
    return out


def window_of(mask: Bool[np.ndarray, "h w"], space: int) -> tuple[slice, slice]:
    """The rows and columns of the mask's box and `space` pixels around it."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return (
        slice(max(int(rows[0]) - space, 0), int(rows[-1]) + 1 + space),
        slice(max(int(columns[0]) - space, 0), int(columns[-1]) + 1 + space),
    )


def margin(size: tuple[int, int]) -> int:
    """How far holes reach beyond masks: 2 % of the shorter side, at least a pixel."""
    return max(1, round(0.02 * min(size)))


def remove(
    image: UInt8[np.ndarray, "h w 3"],
    hole: Bool[np.ndarray, "h w"],
    *,
    method: Method = "moved",
    rng: np.random.Generator | None = None,
) -> Ground:
    """The picture with `hole` filled; other pixels are bit-equal."""
    if method not in METHODS:
        raise unknown("way to fill a hole", str(method), METHODS)
    rng = rng if rng is not None else np.random.default_rng(0)
    if not hole.any():
        return Ground(image, hole, 0.0)
    if hole.all():
        return Ground(np.full_like(image, 127), hole, 0.0)
    if method == "ring":
        return Ground(_noisy(_ring_mean(image, hole), image, hole, rng), hole, 0.0)
    if method == "telea":
        return Ground(_noisy(_telea(image, hole), image, hole, rng), hole, 0.0)
    return _moved(image, hole, rng)


def _moved(image: np.ndarray, hole: np.ndarray, rng: np.random.Generator) -> Ground:
    out, left = image.astype(np.float32), hole.copy()
    band = max(3, margin(hole.shape) + 2)
    around = window_of(hole, band + 6)
    own = _own_residual(out[around], hole[around], band)
    for _ in range(ROUNDS):
        found = _best_move(out, ~left, left, most=NOISIER * own + 1.0)
        if found is None:
            break
        rows, columns, covered = found
        place = window_of(covered, 9)
        source, there = _window_shifted(out, ~left, place, rows, columns)
        inner = covered[place]
        near = grown(inner, 3) & ~left[place] & there
        misfit = blurred_known(out[place] - source, near, RIM)
        bridge = diffused(misfit, near, wanted=inner)
        out[place][inner] = (source + bridge)[inner]
        left &= ~covered
        if not left.any():
            break
    moved = 1 - float(left.sum() / hole.sum())
    filled = image.copy()
    filled[hole] = out[hole].round().clip(0, 255).astype(np.uint8)
    if left.any():
        place = window_of(left, band + 6)
        known = ~left[place]
        calm = blurred_known(out[place], known, RIM)
        smooth = diffused(calm, known)
        filled[place] = _noisy(smooth, filled[place], left[place], rng)
    return Ground(filled, hole, moved)


def _own_residual(image: np.ndarray, hole: np.ndarray, band: int) -> float:
    """What blurring takes from the rim around the hole, as a variance."""
    rim = grown(hole, band) & ~hole
    return float(((image - blurred_known(image, ~hole, RIM))[rim] ** 2).mean()) if rim.any() else 0.0


def _window_shifted(
    image: np.ndarray, known: np.ndarray, place: tuple[slice, slice], rows: int, columns: int
) -> tuple[np.ndarray, np.ndarray]:
    """image[p - (rows, columns)] for p in the window, and whether that is a known pixel."""
    h, w = known.shape
    r = np.arange(*place[0].indices(h)) - rows
    c = np.arange(*place[1].indices(w)) - columns
    inside = ((r >= 0) & (r < h))[:, None] & ((c >= 0) & (c < w))[None]
    r, c = r.clip(0, h - 1), c.clip(0, w - 1)
    return image[r[:, None], c[None]], known[r[:, None], c[None]] & inside


def _shifted(values: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """values[p - (rows, columns)]; zero (False) where that lies outside."""
    out = np.zeros_like(values)
    h, w = values.shape[:2]
    to = (slice(max(rows, 0), h + min(rows, 0)), slice(max(columns, 0), w + min(columns, 0)))
    of = (slice(max(-rows, 0), h + min(-rows, 0)), slice(max(-columns, 0), w + min(-columns, 0)))
    out[to] = values[of]
    return out


def _best_move(
    image: np.ndarray, known: np.ndarray, hole: np.ndarray, *, most: float
) -> tuple[int, int, np.ndarray] | None:
    """The move (rows, columns) whose picture fits the hole's ring best (up to a constant), and what it covers."""
    step = max(1, round(max(hole.shape) / SIDE))
    grey = (image[..., 0] + image[..., 1] + image[..., 2]) / 3
    if step > 1:
        grey, known_small, hole_small = _coarse(grey, known, hole, step)
    else:
        known_small, hole_small = known, hole
    ring = grown(hole_small, 3) & known_small
    if not ring.any():
        return None
    costs, shares = _misfits(grey, known_small, hole_small, ring)
    score = costs + most * (1 - shares)  # what stays uncovered is as bad as the worst move allowed
    score[shares < 0.25] = np.inf
    at = np.unravel_index(int(score.argmin()), score.shape)
    if not np.isfinite(score[at]):
        return None
    h, w = hole_small.shape
    rows, columns = (int(v) if v < s else int(v) - t for v, s, t in zip(at, (h, w), score.shape))
    best: tuple[float, int, int] | None = None
    fine_ring = np.nonzero(grown(hole, 2 * step) & known)
    reach = range(-step + 1, step) if step > 1 else range(1)
    for down in reach:
        for right in reach:
            cost = _misfit(image, known, fine_ring, rows * step + down, columns * step + right)
            if best is None or cost < best[0]:
                best = (cost, rows * step + down, columns * step + right)
    assert best is not None
    if best[0] > most:
        return None
    covered = hole & _shifted(known, best[1], best[2])
    return (best[1], best[2], covered) if covered.any() else None


def _coarse(
    grey: np.ndarray, known: np.ndarray, hole: np.ndarray, step: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Means over known pixels; a cell is known when all of it is, and a hole when any of it is."""
    x = torch.from_numpy(np.stack([grey * known, known, hole]).astype(np.float32))[None]
    cells = F.avg_pool2d(x, step, ceil_mode=True, count_include_pad=False)[0].numpy()
    return cells[0] / np.maximum(cells[1], 1e-6), cells[1] > 0.999, cells[2] > 0


def _misfits(grey: np.ndarray, known: np.ndarray, hole: np.ndarray, ring: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For every move: the variance of the difference over the ring, and the share of the hole that it covers."""
    h, w = grey.shape
    size = (fft.next_fast_len(2 * h - 1, real=True), fft.next_fast_len(2 * w - 1, real=True))
    g = (grey - grey[known].mean()) * known
    r = g * ring

    def spectrum(x: np.ndarray) -> np.ndarray:
        out: np.ndarray = fft.rfft2(x.astype(np.float32), s=size)
        return out

    def back(x: np.ndarray) -> np.ndarray:
        out: np.ndarray = fft.irfft2(x, s=size)
        return out

    of_known, of_grey, of_square = (np.conj(spectrum(x)) for x in (known, g, g * g))
    of_ring, of_hole = spectrum(ring), spectrum(hole)
    count = np.maximum(back(of_ring * of_known), 0.5)
    square = back(spectrum(r * g) * of_known + of_ring * of_square - 2 * spectrum(r) * of_grey)
    mean = back(spectrum(r) * of_known - of_ring * of_grey) / count
    cost = np.maximum(square / count - mean * mean, 0)
    enough = count >= 0.6 * ring.sum()
    share = back(of_hole * of_known) / hole.sum()
    return np.where(enough, cost, np.inf), share


def _misfit(image: np.ndarray, known: np.ndarray, at: tuple[np.ndarray, ...], rows: int, columns: int) -> float:
    r, c = at[0] - rows, at[1] - columns
    h, w = known.shape
    fits = (r >= 0) & (r < h) & (c >= 0) & (c < w)
    r, c = r[fits], c[fits]
    good = known[r, c]
    if good.sum() < 0.5 * len(at[0]):
        return float("inf")
    here = image[at[0][fits][good], at[1][fits][good]]
    return float((here - image[r[good], c[good]]).T.copy().var(1).mean())


def _ring_mean(image: np.ndarray, hole: np.ndarray) -> np.ndarray:
    ring = grown(hole, max(3, 2 * margin(hole.shape))) & ~hole
    out = image.astype(np.float32)
    out[hole] = out[ring].mean(0) if ring.any() else 127
    return out


def _telea(image: np.ndarray, hole: np.ndarray) -> np.ndarray:
    """Telea's filling on a quarter, a half and the whole: the coarse result fills the inside, Telea each new rim."""
    try:
        import cv2
    except ImportError:
        raise missing_extra("opencv-python-headless", "trust", use="Filling holes by Telea's method") from None
    h, w = hole.shape
    coarse: np.ndarray | None = None
    for scale in (4, 2, 1):
        size = (max(1, w // scale), max(1, h // scale))
        if min(size) < 8 and scale > 1:
            continue
        x = cv2.resize(image, size, interpolation=cv2.INTER_AREA) if scale > 1 else image
        m = cv2.resize(hole.astype(np.uint8), size, interpolation=cv2.INTER_AREA if scale > 1 else 0)
        m = (m > 0).astype(np.uint8)
        if coarse is None:
            coarse = cv2.inpaint(x, m, 5, cv2.INPAINT_TELEA)
            continue
        inner = ndimage.binary_erosion(m > 0, iterations=3)
        x = np.where(inner[..., None], cv2.resize(coarse, size, interpolation=cv2.INTER_LINEAR), x)
        coarse = cv2.inpaint(x, ((m > 0) & ~inner).astype(np.uint8), 5, cv2.INPAINT_TELEA)
    assert coarse is not None
    return coarse.astype(np.float32)


def _noisy(
    smooth: Float[np.ndarray, "h w 3"], image: np.ndarray, hole: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """A smooth filling with noise: as strong, per channel, as what blurring takes from the ring around the hole."""
    known = ~hole
    ring = grown(hole, max(3, 2 * margin(hole.shape))) & known
    out = image.copy()
    values = np.asarray(smooth, dtype=np.float32)[hole]
    if ring.any():
        # photographs: medians, so that an edge that crosses the ring does not count as grain
        residual = (image.astype(np.float32) - blurred_known(image.astype(np.float32), known, 1.0))[ring]
        spread = 1.4826 * np.median(np.abs(residual - np.median(residual, axis=0)), axis=0)
        values = values + rng.standard_normal(values.shape).astype(np.float32) * spread
    out[hole] = values.round().clip(0, 255).astype(np.uint8)
    return out
