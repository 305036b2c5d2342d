"""Moving a Sample: crop, resize and flip its picture together with its boxes, masks, segments, depth and flow."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from lynceus.core.types import Sample

PER_BOX = ("iscrowd", "area", "difficult", "keypoints", "polygons", "truncated")  # entries of extra, one per box
LEAST_LEFT = 0.1  # boxes of which a crop leaves a smaller share are dropped


def resized_crop(sample: Sample, top: int, left: int, height: int, width: int, size: tuple[int, int]) -> Sample:
    """The window (top, left, height, width) of the sample, resized to `size` (h, w).

    The window may reach outside; what is outside is black, unlabelled (255) or invalid (nan). Boxes keep their part in
    the window, those with less than a tenth of their area left are dropped; a picture may end without any.
    """
    if not any(_has(sample)):
        return replace(sample, image=_picture(sample.image, (top, left, height, width), size))
    window = (top, left, height, width)
    out = replace(sample, image=_picture(sample.image, window, size))
    h, w = size
    scale = torch.tensor([w / width, h / height] * 2)
    if sample.masks is not None:
        out.masks = _nearest(sample.masks.to(torch.uint8), window, size).bool()
    if sample.segments is not None:
        out.segments = _outside(sample.segments, window, size, 255)
    if sample.depth is not None:
        out.depth = _outside(sample.depth, window, size, float("nan"))
    if sample.flow is not None:
        out.flow = _nearest(sample.flow, window, size) * scale[:2, None, None]
    if sample.boxes is not None:
        boxes = (sample.boxes - torch.tensor([left, top, left, top], dtype=torch.float32)) * scale
        clipped = boxes.clone()
        clipped[:, 0::2] = boxes[:, 0::2].clamp(0, w)
        clipped[:, 1::2] = boxes[:, 1::2].clamp(0, h)
        keep = area(clipped) >= LEAST_LEFT * area(boxes).clamp_min(1e-6)
        _choose(out, clipped, keep, scale)
        if "keypoints" in out.extra:
            points = out.extra["keypoints"].clone()
            points[..., :2] = (points[..., :2] - torch.tensor([left, top], dtype=torch.float32)) * scale[:2]
            inside = (points[..., :2] >= 0).all(-1) & (points[..., 0] < w) & (points[..., 1] < h)
            points[..., 2] = torch.where(inside, points[..., 2], torch.zeros_like(points[..., 2]))
            out.extra["keypoints"] = points
    return out


def resized(sample: Sample, size: tuple[int, int]) -> Sample:
    """The whole sample at another size (h, w)."""
    h, w = sample.image.shape[-2:]
    return sample if (h, w) == tuple(size) else resized_crop(sample, 0, 0, h, w, size)


def flipped(sample: Sample) -> Sample:
    """The sample mirrored left to right."""
    out = replace(sample, image=sample.image.flip(-1))
    w = sample.image.shape[-1]
    for name in ("masks", "segments", "depth"):
        value = getattr(sample, name)
        if value is not None:
            setattr(out, name, value.flip(-1))
    if sample.flow is not None:
        out.flow = sample.flow.flip(-1) * sample.flow.new_tensor([-1.0, 1.0])[:, None, None]
    if sample.boxes is not None:
        out.boxes = torch.stack(
            [w - sample.boxes[:, 2], sample.boxes[:, 1], w - sample.boxes[:, 0], sample.boxes[:, 3]], dim=1
        )
    if "keypoints" in sample.extra:
        points = sample.extra["keypoints"].clone()
        points[..., 0] = w - points[..., 0]
        out.extra = sample.extra | {"keypoints": points}
    if "polygons" in sample.extra:
        turned = [[_mirror(p, w) for p in polygons] for polygons in sample.extra["polygons"]]
        out.extra = out.extra | {"polygons": turned}
    return out


def area(boxes: Float[Tensor, "k 4"]) -> Float[Tensor, " k"]:
    return (boxes[:, 2] - boxes[:, 0]).clamp_min(0) * (boxes[:, 3] - boxes[:, 1]).clamp_min(0)


def has_geometry(sample: Sample) -> bool:
    """Whether something besides the picture must move with it."""
    return any(_has(sample))


def _has(sample: Sample) -> tuple[bool, ...]:
    fields = (sample.boxes, sample.masks, sample.segments, sample.depth, sample.flow)
    return tuple(f is not None for f in fields)


def _picture(image: Tensor, window: tuple[int, int, int, int], size: tuple[int, int]) -> Tensor:
    top, left, height, width = window
    inside = top >= 0 and left >= 0 and top + height <= image.shape[-2] and left + width <= image.shape[-1]
    if not inside:
        moved: Tensor = F.resized_crop(image, *window, list(size), antialias=True)
        return moved
    cut = image[:, top : top + height, left : left + width]
    if (height, width) == tuple(size):
        return cut
    # what F.resized_crop does, without its dispatch
    return torch.nn.functional.interpolate(cut[None], size, mode="bilinear", antialias=True)[0]


def _nearest(maps: Tensor, window: tuple[int, int, int, int], size: tuple[int, int]) -> Tensor:
    moved: Tensor = F.resized_crop(maps, *window, list(size), interpolation=InterpolationMode.NEAREST, antialias=False)
    return moved


def _outside(values: Tensor, window: tuple[int, int, int, int], size: tuple[int, int], fill: int | float) -> Tensor:
    top, left, height, width = window
    h, w = values.shape
    out = _nearest(values[None], window, size)[0]
    if top >= 0 and left >= 0 and top + height <= h and left + width <= w:
        return out
    known = _nearest(torch.ones((1, h, w), dtype=torch.uint8), window, size)[0].bool()
    return torch.where(known, out, torch.full_like(out, fill))


def _choose(sample: Sample, boxes: Tensor, keep: Bool[Tensor, " k"], scale: Tensor) -> None:
    sample.boxes = boxes[keep]
    if sample.classes is not None:
        sample.classes = sample.classes[keep]
    if sample.masks is not None:
        sample.masks = sample.masks[keep]
    if any(k in sample.extra for k in PER_BOX):
        chosen: dict[str, Any] = dict(sample.extra)
        for key in PER_BOX:
            if isinstance(chosen.get(key), Tensor):
                chosen[key] = chosen[key][keep]
        if "area" in chosen:
            chosen["area"] = chosen["area"] * (scale[0] * scale[1])
        chosen.pop("polygons", None)  # clipped outlines are in the masks
        sample.extra = chosen


def _mirror(polygon: Tensor, width: int) -> Tensor:
    out = polygon.clone()
    out[:, 0] = width - out[:, 0]
    return out
