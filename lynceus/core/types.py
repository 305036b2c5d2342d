"""What travels between rooms: Stage, Sample, Batch, Prediction. Plain data, no behaviour beyond moving and stacking."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from lynceus.core.errors import AdviceError


@dataclass(frozen=True, slots=True)
class Stage:
    """What a decoder must know about one level of a backbone's pyramid."""

    channels: int
    stride: int
    name: str  # module path of the level, e.g. "stages.2"


@dataclass(slots=True, kw_only=True)
class Sample:
    """One image and whatever is known about it; tasks read what they need.

    `image` is RGB: uint8 in 0..255 or float in [0, 1]. Boxes are xyxy in pixels. `label` is a class index, or a
    multi-hot (k,) tensor. `classes` are the class indices of `boxes`/`masks`. `segments` is a class or instance map
    with 255 ignored. Invalid depth is nan. Maps may be
    coarser than the image. Everything else rides in `extra`.
    """

    image: UInt8[Tensor, "3 h w"] | Float[Tensor, "3 h w"]
    label: int | Tensor | None = None
    boxes: Float[Tensor, "k 4"] | None = None
    classes: Int[Tensor, " k"] | None = None
    masks: Bool[Tensor, "k _ _"] | None = None
    segments: Int[Tensor, "_ _"] | None = None
    depth: Float[Tensor, "_ _"] | None = None
    flow: Float[Tensor, "2 _ _"] | None = None
    text: str | list[str] | None = None
    id: str = ""
    path: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(slots=True, kw_only=True)
class Batch:
    """Samples stacked: images (b, 3, h, w), zero-padded right and bottom if their sizes differ (`sizes` keeps theirs).

    `label` is (b,) int64, (b, k) float for multi-hot or mixed labels, or None when no sample has one; a sample without
    a label inside a labelled batch has -1. Ragged fields stay lists of one entry per sample.
    """

    image: Tensor
    sizes: list[tuple[int, int]]
    label: Tensor | None = None
    boxes: list[Tensor | None] | None = None
    classes: list[Tensor | None] | None = None
    masks: list[Tensor | None] | None = None
    segments: list[Tensor | None] | None = None
    depth: list[Tensor | None] | None = None
    flow: list[Tensor | None] | None = None
    text: list[Any] | None = None
    ids: list[str] = field(default_factory=list)
    extra: list[dict[str, Any]] = field(default_factory=list)

    def __len__(self) -> int:
        return int(self.image.shape[0])

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Batch:
        """The same batch with every tensor on `device`."""

        def move(value: Any) -> Any:
            if isinstance(value, Tensor):
                return value.to(device, non_blocking=non_blocking)
            if isinstance(value, list):
                return [move(v) for v in value]
            if isinstance(value, dict):
                return {k: move(v) for k, v in value.items()}
            return value

        return Batch(**{f.name: move(getattr(self, f.name)) for f in fields(self)})

    def pixels(self) -> Float[Tensor, "b 3 h w"]:
        """The images as float in [0, 1], whatever they are stored as."""
        return as_float(self.image)


def as_float(image: Tensor) -> Tensor:
    """uint8 0..255 -> float32 [0, 1]; floats pass unchanged."""
    if image.dtype == torch.uint8:
        return image.to(torch.float32).div_(255)
    return image


_RAGGED = ("boxes", "classes", "masks", "segments", "depth", "flow", "text")


def collate(samples: Sequence[Sample]) -> Batch:
    """Stacks samples into a Batch. Raises AdviceError when there are none."""
    if not samples:
        raise AdviceError("A batch needs at least one sample; the list was empty.")
    sizes = [(int(s.image.shape[-2]), int(s.image.shape[-1])) for s in samples]
    if len(set(sizes)) == 1:
        image = torch.stack([s.image for s in samples])
    else:
        h, w = max(s[0] for s in sizes), max(s[1] for s in sizes)
        first = samples[0].image
        image = first.new_zeros((len(samples), first.shape[0], h, w))
        for row, s, (hi, wi) in zip(image, samples, sizes):
            row[:, :hi, :wi] = s.image
    label: Tensor | None = None
    labels = [s.label for s in samples]
    if any(v is not None for v in labels):
        if any(isinstance(v, Tensor) and v.ndim for v in labels):
            label = torch.stack([torch.as_tensor(v, dtype=torch.float32) for v in labels])
        else:
            label = torch.tensor([-1 if v is None else int(v) for v in labels], dtype=torch.long)
    ragged = {n: [getattr(s, n) for s in samples] for n in _RAGGED}
    return Batch(
        image=image,
        sizes=sizes,
        label=label,
        ids=[s.id for s in samples],
        extra=[s.extra for s in samples],
        **{n: (v if any(x is not None for x in v) else None) for n, v in ragged.items()},
    )


@dataclass(slots=True, kw_only=True)
class Prediction:
    """What a task says of one image. `scores` are probabilities per class (k,) or per box (n,)."""

    label: int | None = None
    name: str | None = None  # the class name of `label`, when the task knows its classes
    scores: Tensor | None = None
    boxes: Tensor | None = None
    classes: Tensor | None = None
    masks: Tensor | None = None
    segments: Tensor | None = None
    depth: Tensor | None = None
    text: str | None = None
    id: str = ""
    image: Tensor | None = None  # the picture itself, so that it can be shown
    extra: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """What is set, as plain Python values (the picture is left out)."""
        out: dict[str, Any] = {}
        for f in fields(self):
            value = getattr(self, f.name)
            if f.name == "image" or value is None or value == {} or (f.name == "id" and not value):
                continue
            out[f.name] = value.tolist() if isinstance(value, Tensor) else value
        return out

    def to_json(self) -> str:
        return json.dumps(self.to_dict())

    def picture(self) -> Any:
        """The image with what was found drawn on it, as a PIL image."""
        from lynceus.core.draw import draw_prediction

        return draw_prediction(self)

    def save(self, path: str | Path) -> Path:
        """Writes the picture (.png, .jpg) or the values (.json) to `path`, and returns it."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".json":
            path.write_text(self.to_json())
        else:
            self.picture().save(path)
        return path

    def show(self) -> None:
        self.picture().show()
