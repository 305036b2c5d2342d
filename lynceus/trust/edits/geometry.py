"""Where an object is and how it moves: its box and rate, and an object cut out, resized, turned and put elsewhere.

ImageNet-E: Benchmarking Neural Network Robustness via Attribute Editing, CVPR 2023, arXiv 2303.17096. The whole-scene
resizing (`rescale_scene`, `largest_scene`) behaves as resize_obj.py of alibaba/easyrobust (Apache-2.0), for comparison;
edits use `Cutout`, which moves the object alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, UInt8

from lynceus.core.errors import AdviceError

Box = tuple[int, int, int, int]  # x, y, width, height in pixels


def object_box(mask: Bool[np.ndarray, "h w"]) -> Box | None:
    """The box of the main object: of the 8-connected piece whose box (not whose area) is largest. None if empty."""
    from scipy import ndimage

    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if len(rows) == 0:
        return None
    window = (slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1))
    pieces, _ = ndimage.label(mask[window], structure=np.ones((3, 3), dtype=bool))
    boxes = [
        (int(columns[0]) + c.start, int(rows[0]) + r.start, c.stop - c.start, r.stop - r.start)
        for r, c in ndimage.find_objects(pieces)
    ]
    return max(boxes, key=lambda b: b[2] * b[3])


def inside(mask: Bool[np.ndarray, "h w"], box: Box) -> Bool[np.ndarray, "h w"]:
    """The mask within the box alone."""
    x, y, w, h = box
    out = np.zeros_like(mask)
    out[y : y + h, x : x + w] = mask[y : y + h, x : x + w]
    return out


def box_and_rate(mask: UInt8[np.ndarray, "h w"] | Bool[np.ndarray, "h w"]) -> tuple[Box | None, float]:
    """The main object's box, and the share of all pixels that the mask covers inside it. 8-bit masks are cut at 127."""
    solid = mask if mask.dtype == bool else mask > 127
    box = object_box(solid)
    if box is None:
        return None, 0.0
    x, y, w, h = box
    return box, float(solid[y : y + h, x : x + w].sum() / mask.shape[0] / mask.shape[1])


def resize8(image: UInt8[np.ndarray, "h w *c"], size: tuple[int, int]) -> UInt8[np.ndarray, "_ _ *c"]:
    """8-bit bilinear resizing to (h, w), sampled at pixel centres without smoothing before (as OpenCV does it)."""
    channels = torch.from_numpy(np.ascontiguousarray(image)).reshape(*image.shape[:2], -1).permute(2, 0, 1)[None]
    out = F.interpolate(channels.float(), size, mode="bilinear", align_corners=False)[0]
    return out.round_().clamp_(0, 255).to(torch.uint8).permute(1, 2, 0).reshape(*size, *image.shape[2:]).numpy()


def rescale_scene(
    image: UInt8[np.ndarray, "h w 3"], mask: UInt8[np.ndarray, "h w"], rate: float, *, rounds: int = 50
) -> tuple[UInt8[np.ndarray, "h w 3"], UInt8[np.ndarray, "h w"]] | None:
    """The reference's resizing: the scene is cropped (larger object) or stands on an enlarged copy of itself (smaller).

    Repeated until the object's rate is within .015 of `rate`, or both agree in whole percents. None where the rate
    moves the wrong way, the object is lost, or `rounds` did not suffice.
    """
    box, have = box_and_rate(mask)
    for _ in range(rounds + 1):
        if box is None:
            return None
        if math.floor(have * 100) == rate * 100 or abs(have - rate) <= 0.015:
            return image, mask
        grow = math.floor(have * 100) < rate * 100
        image, mask = _scene_step(image, mask, box, math.sqrt(rate / have))
        before, (box, have) = have, box_and_rate(mask)
        if have < before if grow else have > before:
            return None
    return None


def _scene_step(image: np.ndarray, mask: np.ndarray, box: Box, factor: float) -> tuple[np.ndarray, np.ndarray]:
    x, y, w, h = box
    height, width = mask.shape
    size = (int(height / factor), int(width / factor))
    if factor < 1:
        top, left = int((y + h / 2) * (1 / factor - 1)), int((x + w / 2) * (1 / factor - 1))
        canvas, cover = resize8(image, size), np.zeros(size, dtype=np.uint8)
        window = (slice(top, top + height), slice(left, left + width))
        canvas[window] = image[: size[0] - top, : size[1] - left]
        cover[window] = mask[: size[0] - top, : size[1] - left]
    else:
        top, left = int((y + h / 2) * (1 - 1 / factor)), int((x + w / 2) * (1 - 1 / factor))
        window = (slice(top, top + size[0]), slice(left, left + size[1]))
        canvas, cover = image[window], mask[window]
    return resize8(canvas, (height, width)), resize8(cover, (height, width))


def largest_scene(
    image: UInt8[np.ndarray, "h w 3"], mask: UInt8[np.ndarray, "h w"]
) -> tuple[UInt8[np.ndarray, "h w 3"], UInt8[np.ndarray, "h w"]] | None:
    """The reference's "full" size: the crop to the object's box, resized to the whole image. None without an object.

    The reference means to keep the image's proportions, but scales the box's own side instead of the image's, so that
    its crop is the box plus at most what lies beside it; it is stretched.
    """
    box, _ = box_and_rate(mask)
    if box is None:
        return None
    x, y, w, h = box
    height, width = mask.shape
    left, right, top, bottom = float(x), float(x + w), float(y), float(y + h)
    if height / h < width / w:
        side, centre = w / height * h, x + w // 2
        left = centre - side * centre / width
        right = left + side
    else:
        side, centre = h / width * w, y + h // 2
        top = centre - side * centre / height
        bottom = top + side
    window = (
        slice(max(min(y, int(top)), 0), max(int(bottom), y + h)),
        slice(max(min(x, int(left)), 0), max(int(right), x + w)),
    )
    return resize8(image[window], (height, width)), resize8(mask[window], (height, width))


@dataclass(frozen=True, slots=True)
class Cutout:
    """An object by itself: its pixels and mask, and where their upper left corner is in the scene.

    image: (h, w, 3) uint8. mask: (h, w) uint8, 0..255, hard masks 0 or 255. top, left: may lie outside the scene.
    """

    image: UInt8[np.ndarray, "h w 3"]
    mask: UInt8[np.ndarray, "h w"]
    top: int
    left: int

    @property
    def solid(self) -> Bool[np.ndarray, "h w"]:
        return self.mask > 127


def cut(image: UInt8[np.ndarray, "h w 3"], mask: Bool[np.ndarray, "h w"], *, margin: int = 2) -> Cutout:
    """The main object of a mask with `margin` pixels around it, so that resizing and turning have neighbours."""
    box = object_box(mask)
    if box is None:
        raise AdviceError("The mask has no pixel; an edit needs an object. Leave the sample out or mend its mask.")
    x, y, w, h = box
    top, left = max(y - margin, 0), max(x - margin, 0)
    window = (slice(top, y + h + margin), slice(left, x + w + margin))
    return Cutout(image[window], inside(mask, box)[window].astype(np.uint8) * 255, top, left)


def resized(piece: Cutout, factor: float, anchor: tuple[float, float]) -> Cutout:
    """The object larger or smaller by `factor` about the scene's point `anchor` (row, column), smoothed if smaller."""
    h, w = piece.mask.shape
    size = (max(1, round(h * factor)), max(1, round(w * factor)))
    stack = np.concatenate([piece.image, piece.mask[..., None]], axis=2)
    channels = torch.from_numpy(stack).permute(2, 0, 1)[None].float()
    if factor > 1:  # a hard mask would keep its steps, enlarged
        cover = F.pad(channels[:, 3:], (1, 1, 1, 1), mode="replicate")
        channels[:, 3:] = F.avg_pool2d(F.avg_pool2d(cover, 2, 1), 2, 1)
    small = F.interpolate(channels, size, mode="bilinear", align_corners=False, antialias=factor < 1)[0]
    out = small.round_().clamp_(0, 255).to(torch.uint8).permute(1, 2, 0).numpy()
    top = round(anchor[0] + (piece.top - anchor[0]) * size[0] / h)
    left = round(anchor[1] + (piece.left - anchor[1]) * size[1] / w)
    return Cutout(np.ascontiguousarray(out[..., :3]), np.ascontiguousarray(out[..., 3]), top, left)


def turned(piece: Cutout, degrees: float, centre: tuple[float, float]) -> Cutout:
    """The object turned counter-clockwise by `degrees` about the scene's point `centre` (row, column), bilinear."""
    angle = math.radians(degrees)
    cos, sin = math.cos(angle), math.sin(angle)
    h, w = piece.mask.shape
    top, left = piece.top - centre[0], piece.left - centre[1]
    corners = np.array([(y, x) for y in (top, top + h - 1) for x in (left, left + w - 1)])
    # rows grow downwards: counter-clockwise to the eye is (y, x) -> (y cos - x sin, y sin + x cos)
    moved = corners @ np.array([[cos, sin], [-sin, cos]])
    first = np.floor(moved.min(0) + np.array(centre)).astype(int)
    last = np.ceil(moved.max(0) + np.array(centre)).astype(int)
    rows, columns = np.mgrid[first[0] : last[0] + 1, first[1] : last[1] + 1].astype(np.float32)
    rows, columns = rows - centre[0], columns - centre[1]
    source_row = rows * cos + columns * sin - top
    source_column = -rows * sin + columns * cos - left
    grid = np.stack([source_column * (2 / max(w - 1, 1)) - 1, source_row * (2 / max(h - 1, 1)) - 1], axis=-1)
    field = torch.from_numpy(grid.astype(np.float32))[None]
    picture = torch.from_numpy(np.ascontiguousarray(piece.image)).permute(2, 0, 1)[None].float()
    cover = torch.from_numpy(np.ascontiguousarray(piece.mask))[None, None].float()
    image = F.grid_sample(picture, field, mode="bilinear", padding_mode="border", align_corners=True)[0]
    mask = F.grid_sample(cover, field, mode="bilinear", padding_mode="zeros", align_corners=True)[0, 0]
    return Cutout(
        image.round_().clamp_(0, 255).to(torch.uint8).permute(1, 2, 0).contiguous().numpy(),
        mask.round_().clamp_(0, 255).to(torch.uint8).numpy(),
        int(first[0]),
        int(first[1]),
    )


def shifted(piece: Cutout, rows: int, columns: int) -> Cutout:
    return Cutout(piece.image, piece.mask, piece.top + rows, piece.left + columns)


def centroid(piece: Cutout) -> tuple[float, float]:
    """Row and column of the mask's centre of mass in the scene."""
    rows, columns = np.nonzero(piece.solid)
    return piece.top + float(rows.mean()), piece.left + float(columns.mean())


def scene_box(piece: Cutout) -> Box:
    """The box of all of the object's pixels in the scene; parts of it may lie outside."""
    solid = piece.solid
    rows, columns = np.flatnonzero(solid.any(1)), np.flatnonzero(solid.any(0))
    return (
        piece.left + int(columns[0]),
        piece.top + int(rows[0]),
        int(columns[-1] - columns[0] + 1),
        int(rows[-1] - rows[0] + 1),
    )


def placed(
    piece: Cutout, size: tuple[int, int], under: UInt8[np.ndarray, "h w 3"]
) -> tuple[UInt8[np.ndarray, "h w 3"], Bool[np.ndarray, "h w"]]:
    """A layer of the scene's size that shows the object's pixels, `under` elsewhere, and the object's mask there."""
    layer, mask = under.copy(), np.zeros(size, dtype=bool)
    h, w = piece.mask.shape
    top, left = max(piece.top, 0), max(piece.left, 0)
    bottom, right = min(piece.top + h, size[0]), min(piece.left + w, size[1])
    if bottom > top and right > left:
        part = (slice(top - piece.top, bottom - piece.top), slice(left - piece.left, right - piece.left))
        layer[top:bottom, left:right] = piece.image[part]
        mask[top:bottom, left:right] = piece.mask[part] > 127
    return layer, mask
