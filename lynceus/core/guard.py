"""What a check looks at before long work: pixels, labels, masks, and how the model answers them.

`collect` reads images of one size, labels and masks from any iterable of samples and examines them; `examine` does the
second half for tensors. Whatever would make a long search meaningless is one AdviceError that names the sample or the
layer; whatever only makes it doubtful comes back as a note.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn

from lynceus.core.errors import AdviceError
from lynceus.core.subject import Subject, wrong_range
from lynceus.core.types import Sample, as_float

SLACK = 1e-6  # resizing and JPEG filters leave rounding errors of this size outside [0, 1]
# the least that a field of this name may be, in any check; seconds=0 ends a check at once, and its report says so
LEAST: dict[str, int] = {
    **dict.fromkeys(("steps", "restarts", "batch_size", "limit", "images", "targets", "generations", "queries"), 1),
    **dict.fromkeys(("boxes", "count", "record"), 1),
    **dict.fromkeys(("seconds", "shown", "crops", "jitter", "extend"), 0),
}
ABOVE_ZERO = frozenset({"step_size", "adversarial_step"})
SHARES = frozenset({"drop", "confident"})  # probabilities
APART = 1e-3  # two passes over the same image that differ by more (in deviations of the outputs) are no rounding


def sensible(check: object) -> None:
    """Raises AdviceError for a number among the fields of a check that means nothing: NaN anywhere, fewer than one
    step, image or query, a negative time, a probability outside [0, 1]."""
    if not is_dataclass(check):
        return
    kind = type(check).__name__
    for name in (f.name for f in fields(check)):
        value = getattr(check, name)
        several = value if isinstance(value, tuple) else (value,)
        numbers = [v for v in several if isinstance(v, int | float) and not isinstance(v, bool)]
        if any(math.isnan(v) for v in numbers):
            raise AdviceError(f"{kind}: {name} is not a number (nan). Give one, or leave {name} out for its default.")
        for v in numbers:
            if name in LEAST and v < LEAST[name]:
                wanted = f"{LEAST[name]} or more"
            elif name in ABOVE_ZERO and v <= 0:
                wanted = "above 0"
            elif name in SHARES and not 0 <= v <= 1:
                wanted = "a probability, from 0 to 1"
            else:
                continue
            raise AdviceError(f"{kind}: {name} is {wanted}, not {v:g}. Leave {name} out for its default.")


@dataclass(frozen=True, kw_only=True, slots=True)
class Material:
    """What a check works on: examined images with what is known about them.

    images: (n, c, h, w) float32 in [0, 1]. labels: (n,) int64, -1 where nobody knows. ids: a name per image.
    classes: how many classes the subject knows. names: their names, where known. masks: one (k, h, w) bool per image,
    None where it has none. notes: sentences for the report.
    """

    images: Float[Tensor, "n c h w"]
    labels: Int[Tensor, " n"]
    ids: list[str]
    classes: int
    names: list[str] | None = None
    masks: list[Tensor | None] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.images)

    def name(self, label: int) -> str:
        """The class name of `label`, else the number; "?" for -1."""
        if label < 0:
            return "?"
        return self.names[label] if self.names and label < len(self.names) else str(label)

    def labelled(self) -> Material:
        """The same without the images whose label nobody knows. Raises AdviceError when none is left."""
        keep = (self.labels >= 0).nonzero().flatten().tolist()
        if len(keep) == len(self):
            return self
        if not keep:
            raise AdviceError("No image has a label, and this check compares answers with labels; give labelled data.")
        return Material(
            images=self.images[keep],
            labels=self.labels[keep],
            ids=[self.ids[i] for i in keep],
            classes=self.classes,
            names=self.names,
            masks=[self.masks[i] for i in keep] if self.masks else [],
            notes=[*self.notes, f"{len(self) - len(keep)} images without a label were left out."],
        )


def collect(
    subject: Subject,
    data: Iterable[Sample],
    *,
    needs: frozenset[str] = frozenset(),
    limit: int | None = None,
    side: int | tuple[int, int] | None = None,
    probe: int = 4,
) -> Material:
    """The first `limit` samples as one examined batch.

    needs: a check's `needs`; "labels" and "masks" are then asked of every sample, "gradients" and "features" of the
      subject. side: images are resized (short side) and cut square to it, on the pixel grid k / 255; None leaves them,
      unless sizes differ and the subject has a size of its own.
    probe: how many images the model is tried on. Raises AdviceError: see `examine`.
    """
    subject.require(needs)
    samples = list(data if limit is None else islice(data, limit))
    if not samples:
        raise AdviceError("There are no images to look at; the data set is empty, or its limit is 0.")
    ids = [s.id or s.path or f"sample {i}" for i, s in enumerate(samples)]
    for name, sample in zip(ids, samples):
        _pixels(sample.image, name)
    sizes = {tuple(s.image.shape) for s in samples}
    if side is None and len(sizes) > 1:
        side = subject.size or getattr(subject.model, "image_size", None)
        if side is None:
            few = ", ".join(f"{h} x {w}" for _, h, w in sorted(sizes)[:3])
            raise AdviceError(f"Images of different sizes ({few} ...) need one size: Subject(model, size=SIDE).")
    if side is not None:
        height, width = (side, side) if isinstance(side, int) else (int(side[0]), int(side[1]))
        images = torch.stack([fitted(as_float(s.image), height, width) for s in samples])
    else:
        images = torch.stack([as_float(s.image) for s in samples])
    labels = torch.full((len(samples),), -1)
    for i, sample in enumerate(samples):
        if isinstance(sample.label, Tensor) and sample.label.ndim:
            raise AdviceError(
                f"{ids[i]} has several classes at once; this check reads one class per image. "
                "Set Sample.label to an integer."
            )
        if sample.label is not None:
            labels[i] = int(sample.label)
            if labels[i] < 0 and "labels" in needs:
                raise AdviceError(f"{ids[i]} has the label {int(labels[i])}; classes are counted from 0.")
    masks = [s.masks for s in samples]
    if "masks" in needs:
        for name, sample in zip(ids, samples):
            _mask(sample.masks, sample.image, name)
    if "labels" in needs and bool((labels < 0).all()):
        raise AdviceError(
            "No image has a label, and this check compares answers with labels. Give a folder with one sub-folder per "
            "class, or samples with Sample(label=...)."
        )
    theirs: list[str] | None = getattr(data, "classes", None)
    notes = examine(subject, images, labels, ids=ids, classes=len(theirs) if theirs else None, probe=probe)
    classes = _outputs(subject, images[:1]).shape[1]
    if theirs and len(theirs) != classes and "labels" in needs:
        raise AdviceError(
            f"The data has {len(theirs)} classes and {subject.name} gives {classes}, so that its labels say nothing "
            "about these answers. Give the model that was trained on these classes, or data of its own."
        )
    if theirs and subject.classes and list(theirs) != list(subject.classes):
        notes.append(
            f"The data's classes ({_few(theirs)}) and those of {subject.name} ({_few(subject.classes)}) have other "
            "names; they are matched by their order."
        )
    names = subject.classes or theirs
    return Material(
        images=images.to(torch.float32),
        labels=labels,
        ids=ids,
        classes=classes,
        names=list(names) if names else None,
        masks=masks if any(m is not None for m in masks) else [],
        notes=notes,
    )


def examine(
    subject: Subject,
    images: Float[Tensor, "n c h w"] | UInt8[Tensor, "n c h w"],
    labels: Int[Tensor, " n"] | None = None,
    *,
    ids: Sequence[str] | None = None,
    classes: int | None = None,
    probe: int = 4,
) -> list[str]:
    """Notes on what is doubtful about asking `subject` about `images`; AdviceError for what makes it meaningless.

    Raises for: no images, pixels that are not finite or not in [0, 1], a model in training mode, answers that are not
    finite (naming the layer where they begin) or not (b, k), a number of classes other than `classes`, labels that the
    model does not have, a model that writes on its input, answers that depend on the other images of the batch.
    Notes: answers that look like probabilities, or that differ from call to call. The model is asked about at most
    `probe` images, four times.
    """
    names = list(ids) if ids is not None else [f"sample {i}" for i in range(len(images))]
    if images.ndim != 4 or len(images) == 0:
        raise AdviceError(f"A check takes a batch of images (n, 3, h, w), not {tuple(images.shape)}.")
    if len(names) != len(images) or (labels is not None and len(labels) != len(images)):
        raise AdviceError(
            f"{len(images)} images come with {len(names)} names and {0 if labels is None else len(labels)} labels."
        )
    if images.dtype.is_floating_point:
        _range(images, names)
    if isinstance(subject.model, nn.Module):
        modes = [n or "the model itself" for n, m in subject.model.named_modules() if m.training]
        if modes:
            raise AdviceError(
                f"{subject.name} is in training mode ({_few(modes)}): batch norm and dropout would change its answers "
                "from batch to batch. Call model.eval() first."
            )
    few = as_float(images[: max(1, probe)])
    with torch.no_grad():
        copy = few.clone()
        _outputs(subject, copy)
        if not copy.equal(few):
            raise AdviceError(
                f"{subject.name} writes on the images that it is given, so that they change while they are studied. "
                "Give it a copy: Subject(lambda x: model(x.clone())), or inplace=False in its first layer."
            )
        first, second = _outputs(subject, few), _outputs(subject, few)
        alone = torch.cat([_outputs(subject, x[None]) for x in few]) if len(few) > 1 else first
    _finite(subject, few, first, names)
    _classes(subject, first.shape[1], labels, names, classes)
    notes = []
    scale = max(float(first.double().std(correction=0)), 1e-6 * (1 + float(first.double().abs().mean())))
    if float((first - second).double().abs().max()) > APART * scale:
        notes.append(
            f"{subject.name} gives other answers when asked twice: it is random inside, so that what a search finds "
            "may not hold at the next call. Average its answers over several calls."
        )
    elif float((first - alone).double().abs().max()) > APART * scale:
        raise AdviceError(
            f"{subject.name} answers differently when an image stands alone and in a batch: something inside reads the "
            "whole batch (batch norm in training mode, a softmax or mean over axis 0). Findings per image mean nothing "
            "for it; keep the images of a batch apart."
        )
    if looks_like_probabilities(first) and not subject.probabilities:
        notes.append(
            f"The answers of {subject.name} are probabilities, not logits: their softmax is taken twice, which "
            "flattens gradients and makes attacks look weaker. Subject(model, probabilities=True) mends it."
        )
    return notes


def looks_like_probabilities(outputs: Float[Tensor, "b k"]) -> bool:
    """Whether every row is non-negative and sums to one."""
    rows = outputs.double()
    return bool((rows >= 0).all()) and bool(((rows.sum(1) - 1).abs() < 1e-3).all()) and rows.shape[1] > 1


def fitted(image: Float[Tensor, "c h w"], height: int, width: int) -> Float[Tensor, "c _ _"]:
    """Resized to cover height x width and cut at its centre, rounded to the grid k / 255 that stored pictures have."""
    have = (int(image.shape[-2]), int(image.shape[-1]))
    scale = max(height / have[0], width / have[1])
    size = (max(height, round(have[0] * scale)), max(width, round(have[1] * scale)))
    if size != have:
        x = F.interpolate(image[None], size, mode="bilinear", antialias=True, align_corners=False)[0]
        image = (x * 255).round().clamp(0, 255) / 255
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    return image[:, top : top + height, left : left + width]


@torch.no_grad()
def answers(subject: Subject, images: Tensor) -> Tensor:
    """What the subject says of `images` without gradients. Raises AdviceError where the model itself breaks on them."""
    try:
        return subject(as_float(images))
    except (AdviceError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # the model is the user's: whatever it raises, these pixels were too much for it
        height, width = images.shape[-2:]
        said = " ".join(str(error).split())[:300]
        raise AdviceError(
            f"{subject.name} cannot answer images of {height} x {width} pixels: {type(error).__name__}: {said}. A "
            "model made for one size takes --resize SIDE (Subject(model, size=SIDE)); a function takes one batch of "
            "pixels (b, 3, h, w) in [0, 1] and gives logits (b, k)."
        ) from error


def _outputs(subject: Subject, images: Tensor) -> Tensor:
    out = answers(subject, images)
    if out.shape[1] < 2:
        raise AdviceError(
            f"{subject.name} gives one number per image; a check of classes needs at least two. For a yes-or-no logit "
            "z give both: Subject(lambda x: torch.cat([-model(x), model(x)], 1))."
        )
    return out.cpu()


def _pixels(image: Tensor, name: str) -> None:
    if not isinstance(image, Tensor) or image.ndim != 3 or image.shape[0] not in (1, 3) or 0 in image.shape:
        shape = tuple(image.shape) if isinstance(image, Tensor) else type(image).__name__
        raise AdviceError(f"{name} is no picture (3, h, w) but {shape}.")
    if image.dtype.is_floating_point:
        _range(image[None], [name])
    elif image.dtype != torch.uint8:
        raise AdviceError(f"{name} has pixels of type {image.dtype}; give uint8 in 0..255 or float in [0, 1].")


def _range(images: Tensor, names: Sequence[str]) -> None:
    flat = images.detach().flatten(1)
    odd = ~flat.isfinite().all(1)
    if bool(odd.any()):
        raise AdviceError(f"{_few(_named(odd, names))}: pixels that are not finite. Leave these images out.")
    low, high = flat.aminmax(dim=1)
    wrong = (low < -SLACK) | (high > 1 + SLACK)
    if bool(wrong.any()):
        least, most = float(low.min()), float(high.max())
        raise AdviceError(
            f"Images must be RGB in [0, 1]; {_few(_named(wrong, names))}: pixels from {least:.3g} to {most:.3g}. "
            f"{wrong_range(least, most)}"
        )


def _mask(masks: Tensor | None, image: Tensor, name: str) -> None:
    if masks is None or masks.ndim != 3 or len(masks) == 0:
        raise AdviceError(f"{name} has no mask, and this check edits masked objects; set Sample(masks=(k, h, w) bool).")
    if 0 in masks.shape or bool((~masks.bool().flatten(1).any(1)).any()):
        raise AdviceError(f"{name} has a mask without a single pixel ({tuple(masks.shape)}); leave that object out.")
    if tuple(masks.shape[-2:]) != tuple(image.shape[-2:]):
        raise AdviceError(
            f"{name} is {tuple(image.shape[-2:])} and its masks are {tuple(masks.shape[-2:])}; bring them to one size."
        )


def _finite(subject: Subject, images: Tensor, outputs: Tensor, names: Sequence[str]) -> None:
    odd = ~outputs.isfinite().all(1)
    if not bool(odd.any()):
        return
    where = first_not_finite(subject, images[odd])
    raise AdviceError(
        f"{subject.name} answers {_few(_named(odd, names))} with numbers that are not finite (NaN or infinity)"
        + (f"; they begin in the layer {where!r}" if where else "")
        + ". Look at its weights, or at the pixels of that sample."
    )


def first_not_finite(subject: Subject, images: Float[Tensor, "b c h w"]) -> str | None:
    """The innermost module, in the order of the forward pass, whose output is the first that is not finite."""
    if not isinstance(subject.model, nn.Module):
        return None
    found: list[str] = []

    def listen(name: str) -> Any:
        def hear(_module: nn.Module, _args: Any, out: Any) -> None:
            if isinstance(out, Tensor) and out.dtype.is_floating_point and not bool(out.isfinite().all()):
                found.append(name)

        return hear

    handles = [m.register_forward_hook(listen(n or "the model itself")) for n, m in subject.model.named_modules()]
    try:
        with torch.no_grad():
            subject(images)
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None  # inner modules finish, and are heard, before the ones that hold them


def _classes(subject: Subject, outputs: int, labels: Tensor | None, names: Sequence[str], classes: int | None) -> None:
    if subject.classes and len(subject.classes) != outputs:
        raise AdviceError(
            f"{subject.name} gives {outputs} numbers per image and names {len(subject.classes)} classes; "
            "Subject(model, classes=[...]) takes one name per output."
        )
    if labels is not None and bool((labels >= outputs).any()):
        worst = labels >= outputs
        raise AdviceError(
            f"{_few(_named(worst, names))}: label {int(labels.max())}, but {subject.name} gives {outputs} classes "
            f"(0 to {outputs - 1}). Give the model that was trained on these classes, or other data."
        )
    if classes is not None and classes > outputs:
        raise AdviceError(
            f"The data has {classes} classes and {subject.name} gives {outputs}; they must be the same classes in the "
            "same order."
        )


def _named(which: Tensor, names: Sequence[str]) -> list[str]:
    return [names[i] for i in which.nonzero().flatten().tolist()]


def _few(names: Sequence[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
