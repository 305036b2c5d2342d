"""What an audit works on: samples that passed the guards, what is right for each, and grounds that they may take."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from lynceus.core.errors import AdviceError
from lynceus.core.guard import examine
from lynceus.core.identity import image_key
from lynceus.core.subject import Subject
from lynceus.core.types import Sample, as_float
from lynceus.trust.edits.find import Finder, find_mask
from lynceus.trust.edits.remove import Method
from lynceus.trust.edits.scene import Scene, donor_image, main_mask, object_masks, pixels
from lynceus.trust.edits.spectrum import visible_complexity

POOL = 32  # images whose grounds are lent to others
LENT = 128  # pictures that are read when donors are given
BATCH = 64


@dataclass(kw_only=True)
class Material:
    """labels: what counts as right. names: of the samples. Nothing but the lenders' scenes is held in memory."""

    fetch: Callable[[int], Sample]
    labels: list[int]
    names: list[str]
    lenders: list[Sample]
    fill: Method
    seed: int
    scenes: dict[int, Scene] = field(default_factory=dict)
    grounds: dict[tuple[int, tuple[int, int]], np.ndarray] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def donor_key(self) -> str:
        return " ".join(image_key(d.image).hex() for d in self.lenders)

    def scene(self, index: int) -> Scene:
        """The sample taken apart. Those that lend their ground are kept, and the last one."""
        if index not in self.scenes:
            for old in [i for i in self.scenes if self.lenders or i >= POOL]:
                del self.scenes[old]
            self.scenes[index] = Scene.of(self.fetch(index), method=self.fill, seed=self.seed, name=self.names[index])
        return self.scenes[index]

    def others(self, index: int) -> list[int]:
        """The lenders that are not image `index` itself."""
        count = len(self.lenders) or min(len(self), POOL)
        return [i for i in range(count) if self.lenders or i != index]

    def ground(self, lender: int, scene: Scene) -> UInt8[np.ndarray, "h w 3"]:
        """The ground of a lender at the scene's size."""
        key = (lender, scene.size)
        if key not in self.grounds:
            if len(self.grounds) >= 2 * LENT:
                self.grounds.clear()
            given: Sample | Scene = self.lenders[lender] if self.lenders else self.scene(lender)
            if isinstance(given, Sample) and object_masks(given) is not None:
                given = Scene.of(given, method=self.fill, seed=self.seed)
            self.grounds[key] = donor_image(given, scene)
        return self.grounds[key]

    def busiest(self, index: int, scene: Scene) -> Sample | None:
        """The ground of highest complexity among those that others lend, as a sample."""
        lent = [self.ground(i, scene) for i in self.others(index)]
        if not lent:
            return None
        return Sample(image=torch.from_numpy(max(lent, key=_busy)).permute(2, 0, 1))


def _busy(image: np.ndarray) -> float:
    return visible_complexity(image, None)


def collect(
    subject: Subject,
    data: Iterable[Sample],
    *,
    masks: Literal["given"] | Finder,
    donors: Iterable[Sample] | None,
    fill: Method,
    limit: int | None,
    seed: int,
) -> tuple[Material, list[str]]:
    """Every sample looked at once: pixels, masks, labels, and the subject's answers to the first few; and the notes.

    Raises AdviceError for what makes edits meaningless, naming the sample.
    """
    fetch, count = _indexed(data, limit)
    notes: list[str] = []
    kept: list[tuple[int, str, int, int]] = []  # position, name, label, class of the mask
    found: dict[int, np.ndarray] = {}
    lacking: list[str] = []
    refusal: AdviceError | None = None
    first: list[tuple[Tensor, str]] = []
    for position in range(count):
        sample = fetch(position)
        if sample is None:
            continue
        name = sample.id or sample.path or f"sample {position}"
        picture = pixels(sample.image, name)
        if len(first) < 8:
            first.append((sample.image, name))
        if isinstance(sample.label, Tensor) and sample.label.ndim:
            raise AdviceError(f"{name} has several classes at once; an audit reads one class per image.")
        kind = -1
        if masks != "given":
            mask = find_mask(picture, masks)
            if not 0.005 <= mask.mean() <= 0.9:
                lacking.append(name)
                continue
            found[position] = np.packbits(mask)
        else:
            given = object_masks(sample)
            if given is None or len(given) == 0:
                lacking.append(name)
                refusal = refusal or _refusal(sample, name)
                continue
            which, _ = main_mask(sample, name)
            kind = int(sample.classes[which]) if sample.classes is not None and sample.masks is not None else -1
        kept.append((position, name, -1 if sample.label is None else int(sample.label), kind))
    if not first:
        raise AdviceError("There are no images to edit; the data set is empty, or its limit is 0.")
    if not kept:
        raise refusal or AdviceError(
            f"In none of {count} images an object was found by {masks}; give data with masks instead."
        )
    if masks != "given":
        how = "by GrabCut from a centred box" if masks == "grabcut" else "as what differs from the border's colour"
        notes.append(f"Masks were guessed {how}: drops are about these regions, which may not be the objects.")
    if lacking:
        notes.append(f"{len(lacking)} of {count} images without an object were left out, e.g. {lacking[0]}.")

    def get(index: int) -> Sample:
        position = kept[index][0]
        sample = fetch(position)
        assert sample is not None
        if position not in found:
            return sample
        h, w = sample.image.shape[-2:]
        mask = np.unpackbits(found[position], count=h * w).reshape(1, h, w).astype(bool)
        return replace(sample, masks=torch.from_numpy(mask), classes=None, boxes=None, segments=None)

    lenders = list(islice(donors, LENT)) if donors is not None else []
    if donors is not None and not lenders:
        raise AdviceError("There are no pictures to lend a background; give donors, or leave them out.")
    labels = _labels(subject, get, kept, first, getattr(data, "classes", None), notes)
    names = [name for _, name, _, _ in kept]
    return Material(fetch=get, labels=labels, names=names, lenders=lenders, fill=fill, seed=seed), notes


def _indexed(data: Iterable[Sample], limit: int | None) -> tuple[Callable[[int], Sample | None], int]:
    """Samples by position, read again when asked for; None for a picture that cannot be read."""
    source: Any = data
    many = getattr(source, "__getitems__", None)
    if many is None and not (hasattr(source, "__getitem__") and hasattr(source, "__len__")):
        source = list(data if limit is None else islice(data, limit))
    count = len(source) if limit is None else min(limit, len(source))

    def fetch(position: int) -> Sample | None:
        if many is None:
            return source[position]
        return next(iter(many([position])), None)  # a Dataset leaves out, and counts, what it cannot read

    return fetch, count


def _refusal(sample: Sample, name: str) -> AdviceError:
    try:
        main_mask(sample, name)
    except AdviceError as error:
        return error
    return AdviceError(f"{name} has no mask.")


def _labels(
    subject: Subject,
    get: Callable[[int], Sample],
    kept: list[tuple[int, str, int, int]],
    first: list[tuple[Tensor, str]],
    classes: Sequence[str] | None,
    notes: list[str],
) -> list[int]:
    """What the right answer is, after a look at the subject's answers to the first images."""
    shape = (first[0][0].shape, first[0][0].dtype)
    alike = [(image, name) for image, name in first if (image.shape, image.dtype) == shape]
    notes += examine(subject, torch.stack([image for image, _ in alike]), ids=[name for _, name in alike])
    outputs = logits(subject, first[0][0][None]).shape[1]
    labels = [label for _, _, label, _ in kept]
    for _, name, label, _ in kept:
        if label >= outputs:
            raise AdviceError(
                f"{name} has the label {label}, but {subject.name} gives {outputs} classes (0 to {outputs - 1}). "
                "Give the model that was trained on these classes, or other data."
            )
    kinds = [kind for _, _, _, kind in kept]
    if all(label < 0 for label in labels) and classes is not None and len(classes) == outputs and min(kinds) >= 0:
        notes.append("The images have no label; the class of the edited mask is taken as the right answer.")
        return kinds
    missing = [i for i, label in enumerate(labels) if label < 0]
    for i in missing:
        labels[i] = int(logits(subject, get(i).image[None])[0].argmax())
    if missing:
        notes.append(
            f"{len(missing)} of {len(labels)} images have no label: the model's own answer on the unedited image is "
            "taken as right there, so that drops say how many answers change."
        )
    return labels


def logits(subject: Subject, images: Tensor) -> Float[Tensor, "b k"]:
    """The subject's answers, some images at a time."""
    with torch.no_grad():
        return torch.cat([subject(as_float(part)).detach().float().cpu() for part in images.split(BATCH)])
