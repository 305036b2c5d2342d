"""An object put onto a ground: alpha feathered inwards (its interior stays bit-equal), or Poisson blending by OpenCV.

Poisson: Perez et al., "Poisson image editing", SIGGRAPH 2003.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from jaxtyping import Bool, Float, UInt8
from scipy import ndimage

from lynceus.core.errors import missing_extra, unknown
from lynceus.trust.edits.remove import grown, window_of

Blend = Literal["feather", "poisson", "paste"]
BLENDS = ("feather", "poisson", "paste")
FEATHER = 2  # pixels inside the mask over which the object fades into the ground, in pictures of 256 px


def compose(
    ground: UInt8[np.ndarray, "h w 3"],
    layer: UInt8[np.ndarray, "h w 3"],
    mask: Bool[np.ndarray, "h w"],
    *,
    blend: Blend = "feather",
) -> tuple[UInt8[np.ndarray, "h w 3"], str]:
    """The ground with the layer's pixels inside the mask; ground outside the mask stays bit-equal.

    "feather" fades over 2 px inside the mask (fewer in pictures smaller than 256 px), "paste" cuts hard, "poisson"
    carries the layer's gradients over (its colours change) and falls back to feathering where the mask touches the
    border. Returns what was done, too.
    """
    if blend not in BLENDS:
        raise unknown("way to blend", str(blend), BLENDS)
    out = ground.copy()
    if not mask.any():
        return out, blend
    if blend == "poisson" and not touches(mask):
        return _poisson(ground, layer, mask), "poisson"
    if blend == "paste":
        out[mask] = layer[mask]
        return out, "paste"
    place = window_of(mask, 1)
    inner = mask[place]
    width = min(FEATHER, max(1, round(FEATHER * min(mask.shape) / 256))) if min(mask.shape) >= 32 else 0
    alpha = feathered(inner, width)[..., None]
    mixed = layer[place] * alpha + ground[place] * (1 - alpha)
    out[place][inner] = mixed[inner].round().astype(np.uint8)
    return out, "feather"


def feathered(mask: Bool[np.ndarray, "h w"], width: int = FEATHER) -> Float[np.ndarray, "h w"]:
    """0 outside the mask, 1 at more than `width` pixels from its edge, a smooth ramp between. The frame is no edge.

    The ramp follows the mask blurred, which rounds the steps of a hard edge; objects thinner than it get even steps.
    """
    padded = np.pad(mask, 1, mode="edge")
    depth = np.zeros(padded.shape, dtype=np.float32)
    outside = ~padded
    for _ in range(width + 1):
        depth += ~outside
        outside = _wider(outside)
    steps: np.ndarray = depth[1:-1, 1:-1] / (width + 1)
    deep = steps == 1
    if width == 0 or not deep.any():
        return steps
    soft = ndimage.gaussian_filter(mask.astype(np.float32), width / 2, mode="nearest")
    alpha: np.ndarray = np.where(deep, np.float32(1), (2 * soft - 1).clip(0, 1) * mask)
    return alpha


def _wider(mask: np.ndarray) -> np.ndarray:
    """By one pixel along rows and columns."""
    out = mask.copy()
    out[1:] |= mask[:-1]
    out[:-1] |= mask[1:]
    out[:, 1:] |= mask[:, :-1]
    out[:, :-1] |= mask[:, 1:]
    return out


def touches(mask: Bool[np.ndarray, "h w"]) -> bool:
    """Whether the mask reaches the image's border."""
    return bool(mask[0].any() or mask[-1].any() or mask[:, 0].any() or mask[:, -1].any())


def soft_edge(
    image: UInt8[np.ndarray, "h w 3"], ground: UInt8[np.ndarray, "h w 3"], mask: Bool[np.ndarray, "h w"]
) -> float:
    """How much of the object is still seen in the pixels just outside its mask: 0 nothing, 1 all.

    Each of them is explained as a mixture of the ground there and the object's nearest colour; the median share.
    Hard-edged masks give about 0, masks of photographs that cut through a blurred edge a third and more.
    """
    place = window_of(mask, 4)
    inner = mask[place]
    ring = grown(inner, 1) & ~inner
    if not ring.any():
        return 0.0
    core = ndimage.binary_erosion(inner, iterations=2, border_value=1)
    core = core if core.any() else inner
    nearest = ndimage.distance_transform_edt(~core, return_distances=False, return_indices=True)
    here, there = (x[place].astype(np.float32) for x in (image, ground))
    colour = here[nearest[0], nearest[1]]
    span, seen = (colour - there)[ring], (here - there)[ring]
    weight = (span**2).sum(1)
    clear = weight > 3 * 12.0**2  # colours that hardly differ say nothing
    if not clear.any():
        return 0.0
    return float(np.median((seen * span).sum(1)[clear] / weight[clear]))


def _poisson(ground: np.ndarray, layer: np.ndarray, mask: np.ndarray) -> np.ndarray:
    try:
        import cv2
    except ImportError:
        raise missing_extra("opencv-python-headless", "trust", use="Poisson blending") from None
    rows, columns = window_of(mask, 0)
    # seamlessClone puts the centre of the mask's box at the point given
    centre = (columns.start + (columns.stop - columns.start) // 2, rows.start + (rows.stop - rows.start) // 2)
    cover = mask.astype(np.uint8) * 255
    made: np.ndarray = cv2.seamlessClone(layer, ground, cover, centre, cv2.NORMAL_CLONE)
    out = ground.copy()
    out[mask] = made[mask]
    return out
