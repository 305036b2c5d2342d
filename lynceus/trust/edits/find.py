"""Masks for pictures that have none: GrabCut from a centred box, or what differs from the border's colour.

GrabCut: Rother et al., SIGGRAPH 2004, by OpenCV. Both are guesses; reports say so.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from jaxtyping import Bool, UInt8

from lynceus.core.errors import missing_extra, unknown

Finder = Literal["grabcut", "threshold"]
FINDERS = ("grabcut", "threshold")
BOX = 0.8  # share of each side that the centred box takes
SIDE = 256  # GrabCut runs at most at this side


def find_mask(image: UInt8[np.ndarray, "h w 3"], finder: Finder = "grabcut") -> Bool[np.ndarray, "h w"]:
    """The object's pixels as `finder` guesses them; empty where it finds nothing."""
    if finder not in FINDERS:
        raise unknown("way to find a mask", str(finder), FINDERS)
    return _grabcut(image) if finder == "grabcut" else _threshold(image)


def _grabcut(image: np.ndarray) -> np.ndarray:
    try:
        import cv2
    except ImportError:
        raise missing_extra("opencv-python-headless", "trust", use="GrabCut") from None
    h, w = image.shape[:2]
    scale = min(1.0, SIDE / max(h, w))
    small = image
    if scale < 1:
        small = cv2.resize(image, (max(1, round(w * scale)), max(1, round(h * scale))), interpolation=cv2.INTER_AREA)
    sh, sw = small.shape[:2]
    box = (int(sw * (1 - BOX) / 2), int(sh * (1 - BOX) / 2), max(1, int(sw * BOX)), max(1, int(sh * BOX)))
    found = np.zeros((sh, sw), dtype=np.uint8)
    cv2.setRNGSeed(0)
    try:
        cv2.grabCut(small[..., ::-1].copy(), found, box, np.zeros((1, 65)), np.zeros((1, 65)), 4, cv2.GC_INIT_WITH_RECT)
    except cv2.error:  # too few colours for its mixtures
        return np.zeros((h, w), dtype=bool)
    solid = ((found == cv2.GC_FGD) | (found == cv2.GC_PR_FGD)).astype(np.uint8)
    solid = cv2.morphologyEx(solid, cv2.MORPH_OPEN, np.ones((3, 3), np.uint8))
    if scale < 1:
        solid = (cv2.resize(solid * 255, (w, h), interpolation=cv2.INTER_LINEAR) > 127).astype(np.uint8)
    mask: np.ndarray = solid > 0
    return mask


def _threshold(image: np.ndarray) -> np.ndarray:
    """Otsu's threshold on the distance to the median colour of the border."""
    border = np.concatenate([image[0], image[-1], image[:, 0], image[:, -1]])
    far = np.abs(image.astype(np.float32) - np.median(border, axis=0)).max(2)
    levels = np.bincount(far.astype(int).ravel(), minlength=256)[:256].astype(float)
    weight = np.cumsum(levels)
    mean = np.cumsum(levels * np.arange(256))
    low, high = weight, weight[-1] - weight
    split = (mean[-1] * low / weight[-1] - mean) ** 2 / np.maximum(low * high, 1e-9)
    found: np.ndarray = far > int(split.argmax())
    return found
