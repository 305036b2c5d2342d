"""Any map-style dataset of torch, torchvision's above all: (picture, target) becomes a Sample.

A target may be a class index, a dict with boxes, labels and masks (what torchvision's v2 wrapper gives; where it gives
nothing but an image id, the sample has no boxes), or a mask as picture or tensor.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from lynceus.core.errors import AdviceError
from lynceus.data.dataset import Dataset
from lynceus.data.decode import from_pillow, to_image
from lynceus.data.formats.options import Options


def detect(value: Any) -> bool:
    return hasattr(value, "__getitem__") and hasattr(value, "__len__") and isinstance(value, torch.utils.data.Dataset)


class Wrapped:
    """Rows of a dataset that gives (picture, target). The last row is kept, since picture and target come together."""

    def __init__(self, inner: Any, rich: bool):
        self.inner, self.rich = inner, rich
        self._last: tuple[int, Any] | None = None

    def __len__(self) -> int:
        return len(self.inner)

    def item(self, row: int) -> Any:
        if self._last is None or self._last[0] != row:
            self._last = (row, self.inner[row])
        return self._last[1]

    def read(self, row: int) -> Tensor:
        item = self.item(row)
        picture = item[0] if isinstance(item, tuple | list) else item
        return from_pillow(picture) if hasattr(picture, "mode") else to_image(picture)

    def raw(self, row: int) -> bytes:
        return self.read(row).numpy().tobytes()

    def id(self, row: int) -> str:
        samples = getattr(self.inner, "samples", None) or getattr(self.inner, "imgs", None)
        return str(samples[row][0]) if samples is not None and len(samples) == len(self) else str(row)

    def path(self, row: int) -> str | None:
        name = self.id(row)
        return name if name != str(row) else None

    def target(self, row: int, *, size: tuple[int, int] | None = None, maps: bool = True) -> dict[str, Any]:
        item = self.item(row)
        target = item[1] if isinstance(item, tuple | list) and len(item) > 1 else None
        if isinstance(target, dict):
            return _fields(target, size, maps)
        if isinstance(target, str) or (isinstance(target, list) and target and isinstance(target[0], str)):
            return {"text": target}
        if hasattr(target, "mode"):
            return {"segments": torch.from_numpy(np.array(target).astype(np.int64))} if maps else {}
        if isinstance(target, Tensor) and target.ndim >= 2:
            return {"segments": target.squeeze(0).long()} if maps else {}
        return {}

    def stamp(self, row: int) -> str:
        return self.id(row)


def _fields(target: dict[str, Any], size: tuple[int, int] | None, maps: bool) -> dict[str, Any]:
    known = {"boxes", "labels", "masks"}
    boxes = (
        torch.as_tensor(target.get("boxes", torch.zeros((0, 4)))).as_subclass(Tensor).to(torch.float32).reshape(-1, 4)
    )
    out: dict[str, Any] = {"boxes": boxes}
    out["classes"] = torch.as_tensor(target.get("labels", torch.zeros(len(boxes)))).as_subclass(Tensor).long()
    if "masks" in target and maps:
        out["masks"] = torch.as_tensor(target["masks"]).as_subclass(Tensor).bool()
    out["extra"] = {k: v for k, v in target.items() if k not in known}
    return out


def wrap(value: Any, options: Options) -> Dataset:
    """The dataset behind our face; its own transforms stay on."""
    if len(value) == 0:
        raise AdviceError(f"{type(value).__name__} holds nothing.")
    labels: Any = None
    for name in ("targets", "_labels", "labels", "_targets", "y"):
        found = getattr(value, name, None)
        if found is not None and len(found) == len(value):
            flat = np.asarray(found)
            if flat.ndim == 1 and flat.dtype.kind in "iu":
                labels = flat
                break
    first = value[0]
    target = first[1] if isinstance(first, tuple | list) and len(first) > 1 else None
    plain = target is None or isinstance(target, int | np.integer) or (isinstance(target, Tensor) and target.ndim == 0)
    if labels is None and plain and target is not None:
        labels = np.array([int(value[i][1]) for i in range(len(value))])
    classes = getattr(value, "classes", None)
    if labels is not None and classes is None:
        classes = [str(i) for i in range(int(labels.max()) + 1)]
    name = type(value).__name__
    return Dataset(
        Wrapped(value, rich=not plain),
        name=name,
        origin=f"{type(value).__module__}.{name}",
        classes=[str(c) if not isinstance(c, tuple) else str(c[0]) for c in classes] if classes is not None else None,
        labels=labels,
        max_bad=options.max_bad,
        layout="torchvision",
    )
