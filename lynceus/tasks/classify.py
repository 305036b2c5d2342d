"""Classify: one label per image (or several, `multi_label`), on any backbone.

Metrics are torchmetrics': top-1 and top-5 accuracy, macro accuracy (mean over classes), expected calibration error
(15 bins, L1; Guo et al., On Calibration of Modern Neural Networks, ICML 2017, arXiv 1706.04599), confusion matrix.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from lynceus.core.errors import AdviceError, nearest
from lynceus.core.subject import IMAGENET_MEAN, IMAGENET_STD, Normalise
from lynceus.core.types import Batch, Prediction, as_float


def resized(image: Tensor, size: tuple[int, int], policy: str = "crop") -> Tensor:
    """Pixels (..., c, h, w), uint8 or float in [0, 1], at `size`: float. "crop": scaled until both sides reach it, then
    the centre is cut out (keeps proportions); "squash": scaled to the size whatever the proportions."""
    h, w = int(image.shape[-2]), int(image.shape[-1])
    if (h, w) == tuple(size):
        return as_float(image)
    x = as_float(image)
    flat = x.reshape(-1, *x.shape[-3:])
    if policy == "crop" and h * size[1] != w * size[0]:
        scale = max(size[0] / h, size[1] / w)
        middle = (max(size[0], round(h * scale)), max(size[1], round(w * scale)))
    else:
        middle = size
    flat = F.interpolate(flat, middle, mode="bilinear", antialias=True, align_corners=False)
    top, left = (middle[0] - size[0]) // 2, (middle[1] - size[1]) // 2
    flat = flat[..., top : top + size[0], left : left + size[1]]
    return flat.reshape(*x.shape[:-2], *size)


class Classifier(nn.Module):
    """A backbone with its preprocessing: pixels (b, 3, h, w), uint8 or float in [0, 1] -> logits (b, k).

    Grey images (b, 1, h, w) are repeated. With `image_size`, images of another size are brought to it by the task's
    `resize` policy; without, the backbone gets them as they are. This is what `fit` trains and `predict` loads.
    """

    owns_pixels = True

    def __init__(self, backbone: nn.Module, task: Classify):
        super().__init__()
        self.backbone = backbone
        self.task = task
        config = getattr(backbone, "pretrained_cfg", None) or {}
        self.normalise = Normalise(
            getattr(backbone, "mean", None) or config.get("mean", IMAGENET_MEAN),
            getattr(backbone, "std", None) or config.get("std", IMAGENET_STD),
        )
        self.name = str(getattr(backbone, "name", type(backbone).__name__))

    @property
    def classes(self) -> list[str]:
        return list(self.task.classes or ())

    @property
    def image_size(self) -> tuple[int, int] | None:
        return self.task.size

    def prepared(self, image: Tensor) -> Float[Tensor, "b c h w"]:
        """What the backbone is given for pixels: three channels, the size of the task, normalised."""
        x = as_float(image)
        if x.shape[1] == 1 and self.normalise.mean.shape[1] == 3:
            x = x.expand(-1, 3, -1, -1)
        if self.task.size is not None and tuple(x.shape[-2:]) != self.task.size:
            x = resized(x, self.task.size, self.task.resize)
        out: Tensor = self.normalise(x)
        return out

    def forward(self, image: Tensor) -> Float[Tensor, "b k"]:
        logits: Tensor = self.backbone(self.prepared(image))
        return logits


@dataclass(frozen=True, kw_only=True, slots=True)
class Classify:
    """Which of `classes` an image shows.

    classes: their names, in the order of the labels; or num_classes alone (names are then "0", "1" ...).
    label_smoothing: share of the target spread over all classes, in [0, 1).
    multi_label: several classes may be true at once (labels are multi-hot (k,); sigmoid and binary cross-entropy).
    image_size: side or (h, w) that the model brings images to; None leaves them as they are.
    resize: "crop" keeps proportions and cuts the centre, "squash" does not.
    """

    name: ClassVar[str] = "classify"

    classes: Sequence[str] | None = None
    num_classes: int | None = None
    label_smoothing: float = 0.0
    multi_label: bool = False
    image_size: int | tuple[int, int] | None = None
    resize: Literal["crop", "squash"] = "crop"

    def __post_init__(self) -> None:
        names = self.classes
        if names is None:
            if not self.num_classes:
                raise AdviceError(
                    "Classify needs its classes: Classify(classes=['cat', 'dog']) or Classify(num_classes=10)."
                )
            names = tuple(str(i) for i in range(self.num_classes))
        if isinstance(names, str):
            raise AdviceError(
                f"classes is a list of names, not the text {names!r}: Classify(classes=[{names!r}, ...])."
            )
        if isinstance(names, int):
            raise AdviceError(f"classes is a list of names; a number of classes is Classify(num_classes={names}).")
        names = tuple(str(n) for n in names)
        if self.num_classes is not None and self.num_classes != len(names):
            raise AdviceError(
                f"num_classes is {self.num_classes} and there are {len(names)} names in classes; give one of them."
            )
        twice = sorted({n for n in names if names.count(n) > 1}) if len(set(names)) < len(names) else []
        if twice:
            raise AdviceError(f"Two classes are both called {twice[0]!r}; every class needs its own name.")
        if len(names) < 2:
            raise AdviceError(
                f"A classifier needs at least two classes; there is {list(names)}. With folders, give each class "
                "its own: data/cat, data/dog."
            )
        if not 0 <= self.label_smoothing < 1:
            raise AdviceError(f"label_smoothing is a share in [0, 1), not {self.label_smoothing}.")
        object.__setattr__(self, "classes", names)
        object.__setattr__(self, "num_classes", len(names))

    @property
    def size(self) -> tuple[int, int] | None:
        """`image_size` as (h, w)."""
        if self.image_size is None or isinstance(self.image_size, tuple):
            return self.image_size
        return (self.image_size, self.image_size)

    def build(self, backbone: Any) -> Classifier:
        """The backbone with as many outputs as there are classes (a fresh head if it had another number), and its
        normalisation, as one module on pixels."""
        if getattr(backbone, "num_classes", None) != self.num_classes:
            if not hasattr(backbone, "reset_classifier"):
                raise AdviceError(
                    f"{type(backbone).__name__} has no reset_classifier(num_classes), so its head cannot be changed to "
                    f"{self.num_classes} classes; take a backbone of lynceus.create_model, or write that method."
                )
            backbone.reset_classifier(self.num_classes)
        return Classifier(backbone, self)

    def loss(self, raw: Float[Tensor, "b k"], target: Batch) -> dict[str, Tensor]:
        """Cross-entropy with integer labels (-1 is skipped) or soft ones (b, k); binary cross-entropy when multi_label.
        Also gives "accuracy" (against the larger part of a mixed label)."""
        label = target.label
        if label is None:
            raise AdviceError(
                "These images have no labels, and a classifier learns from labels; check the data with data.check()."
            )
        if raw.shape[-1] != self.num_classes:
            raise AdviceError(
                f"The model gives {raw.shape[-1]} outputs for {self.num_classes} classes; build it with Classify.build."
            )
        raw = raw.float()
        if self.multi_label:
            if label.ndim != 2:
                raise AdviceError(
                    "multi_label needs multi-hot labels (b, k); these are single indices: Classify(multi_label=False)."
                )
            smooth = label.float() * (1 - self.label_smoothing) + self.label_smoothing / 2
            right = ((raw > 0) == (label > 0.5)).float().mean()
            return {"loss": F.binary_cross_entropy_with_logits(raw, smooth), "accuracy": right.detach()}
        if label.ndim == 2:
            hard = label.argmax(-1)
            loss = F.cross_entropy(raw, label.float(), label_smoothing=self.label_smoothing)
        else:
            hard = label
            loss = F.cross_entropy(raw, label, label_smoothing=self.label_smoothing, ignore_index=-1)
        known = hard >= 0
        right = ((raw.argmax(-1) == hard) & known).sum() / known.sum().clamp(min=1)
        return {"loss": loss, "accuracy": right.detach()}

    def probabilities(self, raw: Float[Tensor, "b k"]) -> Float[Tensor, "b k"]:
        """Softmax, or sigmoid when multi_label, in float32."""
        return raw.float().sigmoid() if self.multi_label else raw.float().softmax(-1)

    def decode(self, raw: Float[Tensor, "b k"], sizes: Sequence[tuple[int, int]] = ()) -> list[Prediction]:
        """The likeliest class of each image, its name, and all probabilities."""
        scores = self.probabilities(raw.detach()).cpu()
        names = self.classes or ()
        best = scores.argmax(-1).tolist()
        return [Prediction(label=i, name=names[i], scores=row) for i, row in zip(best, scores)]

    def metric(self) -> ClassificationMetric:
        return ClassificationMetric(self)

    def check_labels(self, labels: Any, *, what: str = "the data") -> None:
        """Raises before long work: no labels, labels outside the classes, a single class."""
        values = np.asarray(labels)
        if values.ndim == 2:
            if values.shape[1] != self.num_classes:
                raise AdviceError(
                    f"Labels of {what} have {values.shape[1]} entries each; there are {self.num_classes} classes."
                )
            return
        if self.multi_label:
            raise AdviceError(
                f"Labels of {what} are single indices and the task is multi_label; use Classify(multi_label=False)."
            )
        known = values[values >= 0]
        if not len(known):
            raise AdviceError(
                f"None of the {len(values)} images of {what} has a label; put them into one folder per class, or "
                "give a labels file."
            )
        if known.max() >= (self.num_classes or 0):
            raise AdviceError(
                f"{what[:1].upper()}{what[1:]} has the label {int(known.max())}, and the {self.num_classes} "
                "classes are numbered 0 to "
                f"{(self.num_classes or 0) - 1}; count labels from 0, or list all classes: "
                f"Classify(num_classes={int(known.max()) + 1})."
            )
        if len(np.unique(known)) < 2:
            only = (self.classes or ())[int(known[0])]
            raise AdviceError(
                f"All labelled images of {what} are of one class ({only!r}); a classifier needs at least two."
            )

    def check_classes(self, classes: Sequence[str], *, what: str = "the data") -> None:
        """Raises when the data's class list is another than the task's (order included)."""
        ours = tuple(self.classes or ())
        if list(classes) == list(ours) or ours == tuple(str(i) for i in range(len(classes))):
            return
        if sorted(classes) == sorted(ours):
            raise AdviceError(
                f"{what} lists the same classes in another order, so that labels would be mixed up: "
                f"{list(classes)[:5]} ... against {list(ours)[:5]} ..."
            )
        odd = [c for c in classes if c not in ours] or [c for c in ours if c not in classes]
        close = nearest(odd[0], ours if odd[0] not in ours else classes, 1)
        raise AdviceError(
            f"The class list of {what} ({len(classes)}) is not the model's ({len(ours)}): {odd[0]!r} is only in "
            "one of them"
            + (f" (did you mean {close[0]!r}?)." if close else ".")
            + " Train on this data, or use data with the model's classes."
        )


def summarise(
    scores: Float[Tensor, "n k"], labels: Tensor, classes: Sequence[str]
) -> tuple[dict[str, float], list[dict[str, Any]], np.ndarray]:
    """(numbers, one row per class, confusion matrix [true, predicted]) of probabilities and labels; labels of -1 are
    left out. Multi-hot labels (n, k) give mean average precision and F1 instead of accuracies, and no matrix."""
    from torchmetrics.functional import classification as tm

    scores, labels = scores.float().cpu(), labels.cpu()
    k = len(classes)
    if labels.ndim == 2:
        truth = (labels > 0.5).long()
        ap = tm.multilabel_average_precision(scores, truth, k, average="none")
        f1 = tm.multilabel_f1_score(scores, truth, k, average="none")
        rows = [
            {"class": c, "images": int(truth[:, i].sum()), "AP": float(ap[i]), "F1": float(f1[i])}
            for i, c in enumerate(classes)
        ]
        exact = float(((scores > 0.5).long() == truth).all(-1).float().mean())
        return (
            {"mAP": float(ap[~ap.isnan()].mean()), "F1": float(f1.mean()), "exact": exact},
            rows,
            np.zeros((0, 0), np.int64),
        )
    known = labels >= 0
    scores, labels = scores[known], labels[known].long()
    if not len(labels):
        raise AdviceError("There is no labelled image to measure on; an accuracy needs labels.")
    matrix = tm.multiclass_confusion_matrix(scores, labels, k)
    count, told, right = matrix.sum(1), matrix.sum(0), matrix.diag()
    recall = right / count.clamp(min=1)
    precision = right / told.clamp(min=1)
    picked = scores.gather(1, labels[:, None])[:, 0].clamp(min=1e-12)
    numbers = {
        "accuracy": float(tm.multiclass_accuracy(scores, labels, k, average="micro")),
        "macro_accuracy": float(recall[count > 0].mean()),
        "nll": float(-picked.log().mean()),
        "ece": float(tm.multiclass_calibration_error(scores, labels, k, n_bins=15, norm="l1")),
    }
    if k > 5:
        numbers["top5"] = float(tm.multiclass_accuracy(scores, labels, k, average="micro", top_k=5))
    rows = [
        {"class": c, "images": int(count[i]), "accuracy": float(recall[i]) if count[i] else float("nan"),
         "precision": float(precision[i]) if told[i] else float("nan")}
        for i, c in enumerate(classes)
    ]  # fmt: skip
    return numbers, rows, matrix.numpy().astype(np.int64)


class ClassificationMetric:
    """Collects predictions and labels; `compute` gives accuracy, macro_accuracy, nll, ece and, above 5 classes, top5;
    `rows` and `confusion` hold the table per class and the matrix after it."""

    def __init__(self, task: Classify):
        self.task = task
        self.scores: list[Tensor] = []
        self.labels: list[Tensor] = []
        self.rows: list[dict[str, Any]] = []
        self.confusion: np.ndarray = np.zeros((0, 0), np.int64)

    def update(self, predictions: Sequence[Prediction], batch: Batch) -> None:
        if batch.label is None:
            raise AdviceError("This batch has no labels; an accuracy needs them.")
        rows = [p.scores for p in predictions if p.scores is not None]
        if len(rows) != len(batch):
            raise AdviceError(f"{len(rows)} predictions with scores for {len(batch)} images.")
        self.update_scores(torch.stack(rows), batch.label)

    def update_scores(self, scores: Float[Tensor, "b k"], labels: Tensor) -> None:
        """The same from probabilities, without a Prediction per image."""
        self.scores.append(scores.detach().cpu())
        self.labels.append(labels.detach().cpu())

    def compute(self) -> dict[str, float]:
        if not self.scores:
            raise AdviceError("Nothing was measured yet: call update(predictions, batch) first.")
        numbers, self.rows, self.confusion = summarise(
            torch.cat(self.scores), torch.cat(self.labels), self.task.classes or ()
        )
        return numbers
