"""Where an image is structured: SIFT keypoints, the saliency of pixels that they give, and whose each pixel is.

Feature-Guided Black-Box Safety Testing of Deep Neural Networks, TACAS 2018, arXiv 1710.07859. Reference code:
VeriDeep/DLV-experimental-package (no licence named; written from the paper and from measured outputs).
Keypoints: Distinctive Image Features from Scale-Invariant Keypoints, IJCV 2004; OpenCV's SIFT (Apache 2.0) where it is
installed, else extrema of differences of Gaussians found here.

A keypoint is a row (row, column, size, response) of a float64 array; OpenCV's own points are (column, row).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int, Num
from torch import Tensor

from lynceus.core.errors import AdviceError, missing_extra, unknown
from lynceus.core.rng import numpy_generator

Form = Literal["code", "paper"]
Detector = Literal["auto", "sift", "gaussians"]
SMALL = 100  # images whose longer side is below this are enlarged before detection
ENLARGED = 64  # ... until it is at least this long, and at least twice
CONTRASTS = (0.04, 0.02, 0.01, 0.004)  # tried in turn until there are keypoints; the first is SIFT's own
FEW = 1  # keypoints that satisfy
CHUNK = 4_000_000  # densities held at once


@dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """Keypoints of one image: `points` (n, 4) rows of (row, column, size, response); `how` they were found."""

    points: np.ndarray
    how: str


def detect(
    image: Num[Tensor, "c h w"],
    *,
    detector: Detector = "auto",
    enlarge: int | None = None,
    limit: int | None = None,
) -> Found:
    """Keypoints of an image in its own pixel coordinates, strongest first; there is always at least one.

    image: uint8 or [0, 1], one or three channels. detector: "sift" (OpenCV's), "gaussians" (extrema of differences of
      Gaussians, needs nothing), "auto": SIFT where OpenCV is installed. enlarge: whole factor before detection; None:
      small images until 64 pixels and at least twofold, others not. limit: keep the strongest.
    The contrast threshold is lowered until something is found; a flat image is one feature as wide as itself.
    """
    if detector not in ("auto", "sift", "gaussians"):
        raise unknown("detector", str(detector), ("auto", "sift", "gaussians"))
    if image.shape[0] not in (1, 3) or 0 in image.shape:
        raise AdviceError(f"Keypoints are looked for in an image (3, h, w) or (1, h, w), not {tuple(image.shape)}.")
    if enlarge is not None and enlarge < 1:
        raise AdviceError(f"An image is enlarged by a whole factor of at least 1 before detection, not {enlarge}.")
    grey = _grey(image)
    long = max(grey.shape)
    factor = enlarge or (max(2, math.ceil(ENLARGED / long)) if long < SMALL else 1)
    big = _resized(grey, factor)
    find, name = _finder(detector)
    for contrast in CONTRASTS:
        raw = find(big, contrast)
        if len(raw) >= FEW:
            points = raw.copy()
            points[:, :2] = (raw[:, :2] + 0.5) / factor - 0.5  # centres of pixels, not their corners
            points[:, 2] = raw[:, 2] / factor
            points[:, :2] = points[:, :2].clip(0, np.array(grey.shape) - 1)
            order = np.lexsort((points[:, 2], points[:, 1], points[:, 0], -points[:, 3]))
            lowered = f", contrast threshold lowered to {contrast:g}" if contrast != CONTRASTS[0] else ""
            times = f" on the x{factor} enlargement" if factor > 1 else ""
            return Found(points=points[order][:limit], how=f"{name}{times}{lowered}")
    h, w = grey.shape
    whole = np.array([[(h - 1) / 2, (w - 1) / 2, max(h, w) / 2, 1.0]])
    return Found(points=whole, how=f"{name} finds nothing: one feature as wide as the image")


def log_densities(
    points: Float[np.ndarray, "n 4"], size: tuple[int, int], *, form: Form = "code"
) -> Float[np.ndarray, "n p"]:
    """log N(pixel; keypoint, size) of every keypoint at every pixel (rows first).

    form: "code": the 1-D normal density of the radial distance, "paper": the product of the densities along both axes;
    standard deviation = the keypoint's size. Finite wherever the size is positive, however far the pixel.
    """
    points = _checked(points)
    if form not in ("code", "paper"):
        raise unknown("form of the saliency", str(form), ("code", "paper"))
    rows, cols = np.arange(size[0], dtype=np.float64), np.arange(size[1], dtype=np.float64)
    spread = points[:, 2, None, None]
    down = (rows - points[:, 0, None]) / points[:, 2, None]
    across = (cols - points[:, 1, None]) / points[:, 2, None]
    square = down[:, :, None] ** 2 + across[:, None, :] ** 2
    axes = 1 if form == "code" else 2
    log = -0.5 * square - axes * (np.log(spread) + 0.5 * math.log(2 * math.pi))
    return np.asarray(log.reshape(len(points), -1))


def saliency(
    points: Float[np.ndarray, "n 4"], size: tuple[int, int], *, form: Form = "code"
) -> Float[np.ndarray, "h w"]:
    """A probability over pixels: the densities of all keypoints weighted by their responses; it sums to 1."""
    points = _checked(points)
    response = points[:, 3] if points[:, 3].sum() > 0 else np.ones(len(points))
    with np.errstate(divide="ignore"):
        weight = np.log(response)[:, None]
    total = np.full(size[0] * size[1], -np.inf)
    step = max(1, CHUNK // max(1, total.size))
    for start in range(0, len(points), step):
        log = log_densities(points[start : start + step], size, form=form) + weight[start : start + step]
        top = np.maximum(log.max(0), total)
        safe = np.where(np.isfinite(top), top, 0.0)
        with np.errstate(divide="ignore"):
            total = safe + np.log(np.exp(log - safe).sum(0) + np.exp(total - safe))
    share = np.exp(total - total.max())
    return np.asarray((share / share.sum()).reshape(size))


def owners(
    points: Float[np.ndarray, "n 4"], size: tuple[int, int], *, form: Form = "code", underflow: bool = False
) -> Int[np.ndarray, "h w"]:
    """Whose each pixel is: the 0-based index of the keypoint with the greatest density there, the first of equals.

    Responses play no part. underflow: compare the densities themselves, as the authors' code does, and give -1 where
    all of them are zero in float64; otherwise their logarithms are compared and every pixel has an owner.
    """
    points = _checked(points)
    best = np.full(size[0] * size[1], -np.inf)
    owner = np.full(best.size, -1)
    step = max(1, CHUNK // max(1, best.size))
    for start in range(0, len(points), step):
        chosen = points[start : start + step]
        part = _densities(chosen, size, form) if underflow else log_densities(chosen, size, form=form)
        winner = part.argmax(0)
        value = part[winner, np.arange(best.size)]
        better = value > best
        best[better] = value[better]
        owner[better] = winner[better] + start
    return owner.reshape(size)


def partition(
    points: Float[np.ndarray, "n 4"], size: tuple[int, int], *, limit: int | None = None, seed: int = 0
) -> tuple[np.ndarray, list[np.ndarray]]:
    """Features of the game: (indices of the keypoints that own pixels, the flat pixels of each, ascending).

    limit: at most this many pixels per feature, drawn at random from `seed`.
    """
    owner = owners(points, size).reshape(-1)
    draw = numpy_generator(seed, "partition")
    kept, pixels = [], []
    for i in range(len(points)):
        mine = np.flatnonzero(owner == i)
        if limit is not None and len(mine) > limit:
            mine = np.sort(draw.choice(mine, limit, replace=False))
        if len(mine):
            kept.append(i)
            pixels.append(mine)
    return np.array(kept), pixels


def _densities(points: np.ndarray, size: tuple[int, int], form: Form) -> np.ndarray:
    """Densities themselves, -inf where they are zero; rounded step by step as scipy's normal density of a distance."""
    rows, cols = np.arange(size[0], dtype=np.float64), np.arange(size[1], dtype=np.float64)
    away = np.hypot(rows[:, None] - points[:, 0, None, None], cols - points[:, 1, None, None])
    spread = points[:, 2, None, None]
    value = np.exp(-((away / spread) ** 2) / 2) / math.sqrt(2 * math.pi) / spread
    if form == "paper":
        value = value / math.sqrt(2 * math.pi) / spread
    return np.where(value > 0, value, -np.inf).reshape(len(points), -1)


def _checked(points: np.ndarray) -> np.ndarray:
    points = np.asarray(points, dtype=np.float64)
    if points.ndim != 2 or points.shape[1] != 4 or len(points) == 0:
        raise AdviceError(
            f"Keypoints are rows of (row, column, size, response), at least one; this array is {points.shape}. "
            "detect(image).points gives them."
        )
    wrong = ~np.isfinite(points).all(1) | (points[:, 2] <= 0) | (points[:, 3] < 0)
    if wrong.any():
        i = int(np.flatnonzero(wrong)[0])
        raise AdviceError(
            f"Keypoint {i} is {points[i].tolist()}; its size must be positive, its response not negative."
        )
    return points


def _grey(image: Tensor) -> np.ndarray:
    """8-bit luma."""
    x = image.detach().cpu()
    x = x.double() if x.dtype == torch.uint8 else x.double().clamp(0, 1) * 255
    weights = torch.tensor([0.299, 0.587, 0.114] if len(x) == 3 else [1.0], dtype=torch.float64)
    return np.asarray((x * weights[:, None, None]).sum(0).round().to(torch.uint8).numpy())


def _resized(grey: np.ndarray, factor: int) -> np.ndarray:
    from PIL import Image

    if factor == 1:
        return grey
    h, w = grey.shape
    return np.asarray(Image.fromarray(grey).resize((w * factor, h * factor), Image.Resampling.BILINEAR))


def _finder(detector: Detector) -> tuple[Callable[[np.ndarray, float], np.ndarray], str]:
    if detector == "gaussians":
        return _gaussians, "differences of Gaussians"
    try:
        import cv2
    except ImportError:
        if detector == "sift":
            raise missing_extra("opencv-python-headless", "trust", use='detector="sift"') from None
        return _gaussians, "differences of Gaussians (OpenCV is not installed)"

    make: Any = vars(cv2)["SIFT_create"]  # its stubs do not know it

    def sift(grey: np.ndarray, contrast: float) -> np.ndarray:
        found = make(contrastThreshold=contrast).detect(np.ascontiguousarray(grey), None)
        rows = [(p.pt[1], p.pt[0], p.size, p.response) for p in found]
        return np.array(sorted(set(rows)), dtype=np.float64).reshape(-1, 4)

    return sift, "SIFT"


def _gaussians(grey: np.ndarray, contrast: float) -> np.ndarray:
    """Extrema in space and scale of differences of Gaussians, three scales per octave, edges dropped."""
    from scipy.ndimage import gaussian_filter, maximum_filter, minimum_filter

    scales, base = 3, 1.6
    image = gaussian_filter(grey.astype(np.float64) / 255, math.sqrt(base**2 - 0.5**2), mode="nearest")
    found: list[np.ndarray] = []
    stride = 1
    while min(image.shape) >= 8:
        levels = [image]
        for i in range(1, scales + 3):
            before, after = base * 2 ** ((i - 1) / scales), base * 2 ** (i / scales)
            levels.append(gaussian_filter(levels[-1], math.sqrt(after**2 - before**2), mode="nearest"))
        stack = np.diff(np.stack(levels), axis=0)
        extreme = (stack == maximum_filter(stack, 3, mode="nearest")) & (stack > 0)
        extreme |= (stack == minimum_filter(stack, 3, mode="nearest")) & (stack < 0)
        extreme &= np.abs(stack) > contrast / scales
        extreme[[0, -1]] = False
        extreme[:, [0, -1]] = extreme[:, :, [0, -1]] = False
        s, r, c = np.nonzero(extreme)
        rr = stack[s, r + 1, c] + stack[s, r - 1, c] - 2 * stack[s, r, c]
        cc = stack[s, r, c + 1] + stack[s, r, c - 1] - 2 * stack[s, r, c]
        rc = (stack[s, r + 1, c + 1] - stack[s, r + 1, c - 1] - stack[s, r - 1, c + 1] + stack[s, r - 1, c - 1]) / 4
        blob = (rr * cc - rc**2) * 11**2 > (rr + cc) ** 2 * 10  # an edge bends in one direction only
        s, r, c = s[blob], r[blob], c[blob]
        size = 2 * base * 2 ** (s / scales) * stride  # a diameter, as OpenCV gives it
        found.append(np.stack([r * stride, c * stride, size, np.abs(stack[s, r, c])], 1))
        image, stride = levels[scales][::2, ::2], stride * 2
    return np.concatenate(found) if found else np.zeros((0, 4))
