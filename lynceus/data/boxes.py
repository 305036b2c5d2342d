"""Boxes, outlines and masks of a whole dataset in flat arrays, so that 50,000 pictures cost no 50,000 objects."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any, SupportsFloat

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lynceus.data.cache import pack, unpack


class Annotations:
    """Rows of boxes; row i gives the fields of a Sample.

    boxes: (N, 4) xyxy in pixels, or in shares of width and height when `relative`. classes: (N,). starts: (n + 1,), row
    i owns boxes starts[i] .. starts[i + 1]. sizes: (n, 2) height and width, 0 where unknown. extra: name -> (N, ...).
    points, rings, ring_starts: polygon outlines, ring r of box b for ring_starts[b] <= r < ring_starts[b + 1] is
    points[rings[r] : rings[r + 1]]. rle: COCO run lengths as JSON per box, "" for none.
    """

    def __init__(self, *, relative: bool = False):
        self.relative = relative
        self._boxes: list[Sequence[SupportsFloat]] = []
        self._classes: list[int] = []
        self._starts = [0]
        self._sizes: list[tuple[int, int]] = []
        self._extra: dict[str, list[Any]] = {}
        self._points: list[np.ndarray] = []
        self._rings = [0]
        self._ring_starts = [0]
        self._rle: list[str] = []
        self.size_of: Callable[[int], tuple[int, int]] | None = None
        self._ready = False

    def row(self, size: tuple[int, int] = (0, 0)) -> None:
        """Begins the next row; `add` puts boxes into it."""
        self._sizes.append(size)
        self._starts.append(len(self._boxes))

    def add(
        self,
        box: Sequence[SupportsFloat],
        cls: int,
        *,
        polygons: Sequence[np.ndarray] = (),
        rle: str = "",
        **extra: Any,
    ) -> None:
        self._boxes.append(box)
        self._classes.append(cls)
        self._starts[-1] = len(self._boxes)
        for name, value in extra.items():
            self._extra.setdefault(name, []).append(value)
        for polygon in polygons:
            self._points.append(np.asarray(polygon, dtype=np.float32).reshape(-1, 2))
            self._rings.append(self._rings[-1] + len(self._points[-1]))
        self._ring_starts.append(len(self._rings) - 1)
        self._rle.append(rle)

    def finish(self) -> Annotations:
        """Turns the lists into arrays; call it once, after the last `add`."""
        self.boxes = np.asarray(self._boxes, dtype=np.float32).reshape(-1, 4)
        self.classes = np.asarray(self._classes, dtype=np.int64)
        self.starts = np.asarray(self._starts, dtype=np.int64)
        self.sizes = np.asarray(self._sizes, dtype=np.int32).reshape(-1, 2)
        self.extra = {k: np.asarray(v) for k, v in self._extra.items()}
        self.points = np.concatenate(self._points) if self._points else np.zeros((0, 2), np.float32)
        self.rings = np.asarray(self._rings, dtype=np.int64)
        self.ring_starts = np.asarray(self._ring_starts, dtype=np.int64)
        self.rle = self._rle if any(self._rle) else None
        self._ready = True
        return self

    def arrays(self) -> dict[str, np.ndarray]:
        """Everything as arrays, for the cache."""
        names = ("boxes", "classes", "starts", "sizes", "points", "rings", "ring_starts")
        out = {n: getattr(self, n) for n in names} | {f"extra_{k}": v for k, v in self.extra.items()}
        return out | ({"rle": pack(self.rle)} if self.rle is not None else {})

    @classmethod
    def of(cls, arrays: dict[str, np.ndarray], *, relative: bool = False) -> Annotations:
        out = cls(relative=relative)
        for name in ("boxes", "classes", "starts", "sizes", "points", "rings", "ring_starts"):
            setattr(out, name, arrays[name])
        out.extra = {k[6:]: v for k, v in arrays.items() if k.startswith("extra_")}
        out.rle = unpack(arrays["rle"]) if "rle" in arrays else None
        out._ready = True
        return out

    def __len__(self) -> int:
        return len(self.starts) - 1

    @property
    def outlined(self) -> bool:
        return len(self.points) > 0 or self.rle is not None

    def target(self, row: int, *, size: tuple[int, int] | None = None, maps: bool = True) -> dict[str, Any]:
        """boxes, classes, masks (when there are outlines and `maps`) and extra of one row."""
        a, b = int(self.starts[row]), int(self.starts[row + 1])
        if size is None and (self.relative or (maps and self.outlined)):
            known = (int(self.sizes[row, 0]), int(self.sizes[row, 1]))
            size = known if known[0] else (self.size_of(row) if self.size_of is not None else known)
        scale = np.array([size[1], size[0]] * 2, dtype=np.float32) if self.relative and size else np.float32(1)
        out: dict[str, Any] = {
            "boxes": torch.from_numpy(self.boxes[a:b] * scale),
            "classes": torch.from_numpy(self.classes[a:b].copy()),
        }
        extra: dict[str, Any] = {k: torch.from_numpy(v[a:b].copy()) for k, v in self.extra.items()}
        if "keypoints" in extra and self.relative and size:
            extra["keypoints"][..., :2] *= torch.tensor([size[1], size[0]])
        if self.outlined:
            outlines = [self.outline(i) for i in range(a, b)]
            if self.relative and size:
                outlines = [[p * np.array([size[1], size[0]], np.float32) for p in rings] for rings in outlines]
            extra["polygons"] = [[torch.from_numpy(np.array(p)) for p in rings] for rings in outlines]
            if maps and size and size[0]:
                masks = [
                    decode_rle(self.rle[i], size) if self.rle and self.rle[i] else fill(rings, size)
                    for i, rings in zip(range(a, b), outlines)
                ]
                out["masks"] = torch.stack(masks) if masks else torch.zeros((0, *size), dtype=torch.bool)
        if extra:
            out["extra"] = extra
        return out

    def outline(self, box: int) -> list[np.ndarray]:
        """The polygons of one box, each (p, 2) of x, y."""
        rings = range(int(self.ring_starts[box]), int(self.ring_starts[box + 1]))
        return [self.points[self.rings[r] : self.rings[r + 1]] for r in rings]


def fill(polygons: Sequence[np.ndarray], size: tuple[int, int]) -> Bool[Tensor, "h w"]:
    """The pixels whose centre lies inside any of the polygons (x, y; pixel 0 spans 0..1), by the even-odd rule."""
    h, w = size
    out = np.zeros((h, w), dtype=bool)
    centres = np.arange(h) + 0.5
    for polygon in polygons:
        if len(polygon) < 3:
            continue
        x1, y1 = np.asarray(polygon, dtype=np.float64).T
        x2, y2 = np.roll(x1, -1), np.roll(y1, -1)
        crossed = (np.minimum(y1, y2)[:, None] <= centres) & (centres < np.maximum(y1, y2)[:, None])
        edge, row = np.nonzero(crossed)
        at = x1[edge] + (centres[row] - y1[edge]) * (x2[edge] - x1[edge]) / (y2[edge] - y1[edge])
        turns = np.zeros((h, w + 1), dtype=np.int64)
        np.add.at(turns, (row, np.clip(np.ceil(at - 0.5), 0, w).astype(np.int64)), 1)
        out |= turns.cumsum(1)[:, :w] % 2 == 1
    return torch.from_numpy(out)


def decode_rle(text: str, size: tuple[int, int]) -> Bool[Tensor, "h w"]:
    """COCO run lengths, a list or its compressed text, as a mask. Runs go down the columns, starting with zeros."""
    record = json.loads(text)
    counts = record["counts"]
    h, w = record.get("size", size)
    if isinstance(counts, str):
        counts = _uncompress(counts)
    values = np.zeros(len(counts), dtype=bool)
    values[1::2] = True
    flat = np.repeat(values, counts)
    if flat.size != h * w:
        flat = np.resize(np.pad(flat, (0, max(0, h * w - flat.size))), h * w)
    return torch.from_numpy(np.ascontiguousarray(flat.reshape(w, h).T))


def encode_rle(mask: Bool[Tensor, "h w"]) -> dict[str, Any]:
    """A mask as uncompressed COCO run lengths."""
    flat = mask.numpy().T.reshape(-1)
    change = np.flatnonzero(np.diff(flat)) + 1
    edges = np.concatenate([[0], change, [flat.size]])
    counts = np.diff(edges).tolist()
    return {"size": [int(mask.shape[0]), int(mask.shape[1])], "counts": [0, *counts] if flat[:1].any() else counts}


def _uncompress(text: str) -> list[int]:
    """COCO's text form: 5 bits and a continuation bit per character from '0' on, signed, each run after the second
    as the difference to the one two before."""
    counts: list[int] = []
    value = shift = 0
    for character in text.encode():
        bits = character - 48
        value |= (bits & 0x1F) << shift
        shift += 5
        if not bits & 0x20:
            if bits & 0x10:
                value -= 1 << shift
            counts.append(value + counts[-2] if len(counts) > 2 else value)
            value = shift = 0
    return counts


def mask_boxes(masks: Bool[Tensor, "k h w"]) -> Float[Tensor, "k 4"]:
    """The tight box of each mask, xyxy with the far edge outside the last pixel; zeros for an empty mask."""
    out = torch.zeros((len(masks), 4))
    for i, mask in enumerate(masks):
        ys, xs = mask.any(1).nonzero(), mask.any(0).nonzero()
        if len(ys):
            out[i] = torch.tensor([xs[0, 0], ys[0, 0], xs[-1, 0] + 1, ys[-1, 0] + 1])
    return out
