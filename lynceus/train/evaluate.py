"""Evaluate: how well a classifier does on labelled images. Numbers, a row per class, the confusion matrix, calibration,
and the pictures it got most wrong."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from lynceus.core.errors import AdviceError
from lynceus.core.plots import confusion, image_grid, lines
from lynceus.core.progress import progress
from lynceus.core.report import Report, environment
from lynceus.core.subject import Subject
from lynceus.core.types import Batch, Sample, collate
from lynceus.data.decode import UnreadableError
from lynceus.tasks.classify import resized, summarise
from lynceus.train.feed import known_labels


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluate:
    """Classification accuracy of a subject.

    batch_size: images at once. details: also the table per class, confusion matrix, calibration and worst pictures.
    worst: how many of the pictures with the highest loss are shown. quiet: no progress.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"labels"})

    batch_size: int = 256
    details: bool = True
    worst: int = 12
    quiet: bool = False

    def __call__(self, subject: Any, data: Any, *, seed: int = 0) -> Report:
        """data: a Dataset or Samples with labels. `seed` is not used: nothing here is random."""
        subject = subject if isinstance(subject, Subject) else Subject(subject, needs_grad=False)
        start = time.monotonic()
        with progress(f"evaluating {subject.name}", total=_length(data), unit="images", quiet=self.quiet) as bar:
            parts: list[tuple[Tensor, Tensor]] = []
            ids: list[str] = []
            with torch.inference_mode():
                for batch in batches(data, subject, self.batch_size):
                    if batch.label is None:
                        raise AdviceError(
                            "An accuracy needs labels, and these images have none; lynceus.train.predict.predict "
                            "needs no labels."
                        )
                    raw = subject(batch.pixels())
                    task: Any = getattr(subject.model, "task", None)
                    scores = task.probabilities(raw) if hasattr(task, "probabilities") else raw.float().softmax(-1)
                    parts.append((scores.cpu(), batch.label.cpu()))
                    ids += batch.ids or [str(len(ids) + i) for i in range(len(batch))]
                    bar.advance(len(batch))
        if not parts:
            raise AdviceError("There is no image to evaluate on: the data is empty.")
        scores, labels = torch.cat([s for s, _ in parts]), torch.cat([t for _, t in parts])
        classes = subject.classes or getattr(data, "classes", None) or [str(i) for i in range(scores.shape[1])]
        if labels.ndim == 1 and int(labels.max()) >= scores.shape[1]:
            raise AdviceError(
                f"The data has the label {int(labels.max())}, and {subject.name} knows the classes 0 to "
                f"{scores.shape[1] - 1}; evaluate on its own classes."
            )
        theirs = getattr(data, "classes", None)
        task = getattr(subject.model, "task", None)
        if theirs and hasattr(task, "check_classes"):
            task.check_classes(theirs, what=str(getattr(data, "name", "the data")))
        if len(classes) != scores.shape[1]:
            raise AdviceError(f"{subject.name} gives {scores.shape[1]} outputs for {len(classes)} classes.")
        numbers, rows, matrix = summarise(scores, labels, classes)
        report = Report(name=f"accuracy of {subject.name}", summary=numbers, environment=environment(seed))
        report.summary["images"] = float(len(labels))
        if not self.details:
            return report
        report.summary["evaluation_seconds"] = time.monotonic() - start
        report.rows = rows
        report.arrays |= {"scores": scores.numpy(), "labels": labels.numpy()}
        if labels.ndim == 1:
            report.arrays["confusion"] = matrix
            report.figures["confusion matrix.plotly"] = confusion(matrix, classes)
            report.figures["calibration.plotly"] = calibration_figure(scores, labels)
            self._show_worst(report, data, scores, labels, classes, ids)
        return report

    def _show_worst(
        self, report: Report, data: Any, scores: Tensor, labels: Tensor, classes: Any, ids: list[str]
    ) -> None:
        """Adds the grid of pictures with the highest loss."""
        if not hasattr(data, "__getitem__") or not self.worst:
            return
        at = list(range(len(ids)))
        if len(ids) != _length(data):  # some pictures could not be read
            if not hasattr(data, "id"):
                return
            where = {data.id(i): i for i in range(_length(data) or 0)}
            at = [where[i] for i in ids]
        loss = -scores.gather(1, labels.clamp(min=0)[:, None])[:, 0].clamp(min=1e-12).log()
        loss[labels < 0] = -1
        order = loss.argsort(descending=True, stable=True)[: self.worst].tolist()
        order = [i for i in order if labels[i] >= 0]
        captions = [
            f"{classes[int(labels[i])]} → {classes[int(scores[i].argmax())]} {float(scores[i].max()):.0%}"
            for i in order
        ]
        report.figures["worst pictures.png"] = image_grid([data[at[i]].image for i in order], captions, columns=6)
        report.arrays["worst"] = np.array([at[i] for i in order])


def batches(data: Any, subject: Any, size: int) -> Iterator[Batch]:
    """Batches in order. Images of different sizes are brought to the model's own (`image_size` of a task, or the
    subject's `size`); a model without one gets them one by one. Unreadable files are left out and counted."""
    images = getattr(data, "images", None)
    if isinstance(images, Tensor):
        labels = known_labels(data)
        labels = None if labels is None else torch.as_tensor(labels)
        h, w = int(images.shape[-2]), int(images.shape[-1])
        for at in range(0, len(images), size):
            part = images[at : at + size]
            label = None if labels is None else labels[at : at + size]
            yield Batch(
                image=part, sizes=[(h, w)] * len(part), label=label, ids=[str(i) for i in range(at, at + len(part))]
            )
        return
    task = getattr(getattr(subject, "model", subject), "task", None)
    target = getattr(task, "size", None) or getattr(subject, "size", None)
    policy = getattr(task, "resize", "squash")
    waiting: list[Sample] = []
    for sample in samples(data):
        if target is not None and tuple(sample.image.shape[-2:]) != tuple(target):
            sample = Sample(
                image=resized(sample.image, target, policy), label=sample.label, id=sample.id, path=sample.path
            )
        if (waiting and waiting[0].image.shape != sample.image.shape) or len(waiting) == size:
            yield _stack(waiting)
            waiting = []
        waiting.append(sample)
    if waiting:
        yield _stack(waiting)


def first_images(data: Any, model: Any, count: int, *, size: tuple[int, int] | None = None) -> Float[Tensor, "b 3 h w"]:
    """RGB in [0, 1] of the first `count` images of `data`, or all where there are fewer, in one size: `size`, else the
    one that `model` (a module or Subject) was trained for, else that of the first image."""
    subject = model if isinstance(model, Subject) else Subject(model, needs_grad=False)
    wanted = size or getattr(getattr(subject.model, "task", None), "size", None) or subject.size
    parts: list[Tensor] = []
    for batch in batches(data, subject, count):
        part = batch.pixels()
        wanted = wanted or (int(part.shape[-2]), int(part.shape[-1]))
        if tuple(part.shape[-2:]) != tuple(wanted):
            part = nn.functional.interpolate(part, wanted, mode="bilinear", antialias=True, align_corners=False)
        parts.append(part[: count - sum(map(len, parts))])
        if sum(map(len, parts)) >= count:
            break
    if not parts:
        raise AdviceError("There is no image to look at: the data is empty.")
    return torch.cat(parts)


def _stack(waiting: list[Sample]) -> Batch:
    if len({s.image.dtype for s in waiting}) > 1:
        waiting = [
            Sample(image=resized(s.image, (s.image.shape[-2], s.image.shape[-1])), label=s.label, id=s.id, path=s.path)
            for s in waiting
        ]
    return collate([Sample(image=s.image, label=s.label, id=s.id, path=s.path) for s in waiting])


def samples(data: Any) -> Iterator[Sample]:
    """Samples of a dataset, a list or any iterable, in order; unreadable files are skipped as the dataset allows."""
    if not (hasattr(data, "__len__") and hasattr(data, "__getitem__")):
        yield from data
        return
    for i in range(len(data)):
        try:
            yield data[i]
        except UnreadableError as error:
            if not hasattr(data, "skip"):
                raise
            data.skip(error, index=i)


def _length(data: Any) -> int | None:
    return len(data) if hasattr(data, "__len__") else None


# figures ------------------------------------------------------------------------------------------
def calibration_figure(scores: Tensor, labels: Tensor, bins: int = 15) -> bytes:
    """How often the model is right where it is so sure: accuracy per bin of confidence."""
    known = labels >= 0
    sure, said = scores[known].max(-1)
    right = (said == labels[known]).float()
    at = (sure * bins).long().clamp(0, bins - 1)
    count = torch.bincount(at, minlength=bins)
    keep = count > 0
    x = torch.bincount(at, sure.double(), bins)[keep] / count[keep]
    y = torch.bincount(at, right.double(), bins)[keep] / count[keep]
    return lines(
        {"perfect": ([0, 1], [0, 1]), "this model": (x, y)}, x_title="confidence", y_title="accuracy", markers=True
    )
