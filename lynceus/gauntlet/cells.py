"""One cell of a data-scaling study: train on a subset, measure on the test set. The study is in `gauntlet.scaling`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lynceus.core.config import digest
from lynceus.core.errors import AdviceError
from lynceus.core.nouns import Recipe
from lynceus.core.rng import borrowed, generator
from lynceus.core.subject import Subject
from lynceus.core.types import Batch, as_float
from lynceus.data.dataset import Dataset, Pixels
from lynceus.gauntlet.features import FeatureBank, Features, batches
from lynceus.train.fit import FitConfig, fit


@dataclass(frozen=True, kw_only=True)
class Budget:
    """How long every cell trains. "steps": as many updates whatever n is; "epochs": as many passes.

    Fixed epochs mix the amount of data with the length of the optimisation; fixed steps may end before large sets are
    learned. Reports name the budget."""

    kind: Literal["steps", "epochs"] = "steps"
    amount: int = 700
    batch_size: int = 64

    def steps(self, n: int) -> int:
        """Updates for a subset of n images."""
        return self.amount if self.kind == "steps" else self.amount * max(1, math.ceil(n / self.batch_size))

    def __str__(self) -> str:
        return f"{self.amount} {self.kind} of {self.batch_size}"


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One point of the grid."""

    capacity: str
    n: int
    seed: int
    noise: float = 0.0
    tail: float = 1.0
    budget: Budget = field(default_factory=Budget)


@dataclass(kw_only=True)
class CellData:
    """What a cell trains and tests on. `labels` (n,) of the training subset may be noisy; the test labels never are."""

    train: Any
    labels: np.ndarray
    test: Any
    classes: int


TrainCell = Callable[[str, CellData, Budget, int], dict[str, Any]]
"""(capacity, data, budget, seed) -> {"accuracy": 0..1, "train_loss": nats, "class_accuracy": [...]}; more is kept."""


def measure(logits: np.ndarray, labels: np.ndarray, classes: int) -> dict[str, Any]:
    """What a cell must return about its test set: accuracy, accuracy per class, mean cross-entropy."""
    right = logits.argmax(1) == labels
    counts = np.bincount(labels, minlength=classes)
    per_class = np.bincount(labels, weights=right, minlength=classes) / np.maximum(counts, 1)
    loss = float(F.cross_entropy(torch.from_numpy(logits).float(), torch.from_numpy(labels).long()))
    return {"accuracy": float(right.mean()), "class_accuracy": per_class.tolist(), "test_loss": loss}


def default_build(name: str, classes: int) -> nn.Module:
    """A model of the library by name, freshly initialised."""
    from lynceus.backbones import create_model

    return create_model(name, num_classes=classes)


@dataclass(frozen=True, kw_only=True)
class SupervisedCell:
    """Trains a model from scratch on a subset with `fit`: SGD with momentum, one cycle, mirrored and shifted pictures.

    build: (capacity, classes) -> module on normalised images; default `create_model(capacity)`. lr: peak rate; of
    several, each size picks its own on a seventh of its subset, so that no size is judged by another's optimum.
    shift: largest random shift in pixels. The training loss returned is the one without augmentation, on up to
    `loss_images` images of the subset, with the labels that were trained on.
    """

    build: Callable[[str, int], nn.Module] = default_build
    lr: tuple[float, ...] = (0.05,)
    momentum: float = 0.9
    weight_decay: float = 5e-4
    mirror: bool = True
    shift: int = 0
    loss_images: int = 2000

    def __call__(self, capacity: str, data: CellData, budget: Budget, seed: int) -> dict[str, Any]:
        images, tests = pixels(data.train), pixels(data.test)
        labels = torch.from_numpy(np.asarray(data.labels, dtype=np.int64))
        lr, steps = self.lr[0], budget.steps(len(images))
        if len(self.lr) > 1:
            lr = self._pick(capacity, images, labels, data.classes, budget, seed)
        subject = self.train(capacity, images, labels, data.classes, steps, budget.batch_size, lr, seed)
        out = measure(_logits(subject, tests), np.asarray(data.test.labels), data.classes)
        some = torch.randperm(len(images), generator=generator(seed, "loss"))[: self.loss_images]
        seen = torch.from_numpy(_logits(subject, images[some]))
        loss = float(F.cross_entropy(seen, labels[some]))
        return out | {"train_loss": loss, "lr": lr, "updates": steps}

    def _pick(self, capacity: str, images: Tensor, labels: Tensor, classes: int, budget: Budget, seed: int) -> float:
        order = torch.randperm(len(images), generator=generator(seed, "rate"))
        held, rest = order[: len(order) // 7 + 1], order[len(order) // 7 + 1 :]
        best = []
        for lr in self.lr:
            subject = self.train(
                capacity, images[rest], labels[rest], classes, budget.steps(len(rest)), budget.batch_size, lr, seed
            )
            logits = torch.from_numpy(_logits(subject, images[held]))
            best.append(float(F.cross_entropy(logits, labels[held]).nan_to_num(math.inf)))
        return self.lr[int(np.argmin(best))]

    def train(
        self,
        capacity: str,
        images: Tensor,
        labels: Tensor,
        classes: int,
        steps: int,
        size: int,
        lr: float,
        seed: int,
    ) -> Subject:
        """One model trained for `steps` updates of `size` images (n, 3, h, w), in eval mode."""
        with borrowed(seed, "init", capacity):
            model = self.build(capacity, classes)
        return self.tune(model, images, labels, steps, size, lr, seed)

    def tune(
        self, model: nn.Module, images: Tensor, labels: Tensor, steps: int, size: int, lr: float, seed: int
    ) -> Subject:
        """Trains `model` itself, from the weights it has."""
        subject = Subject(model)
        config = FitConfig(
            steps=steps,
            batch_size=size,
            optimizer="nesterov",
            lr=lr,
            momentum=self.momentum,
            weight_decay=self.weight_decay,
            schedule="one-cycle",
            seed=seed,
            quiet=True,
        )
        part = Dataset(Pixels(images), name=f"{len(images)} images", labels=labels.numpy())
        fit(_Learner(model, subject, self.mirror, self.shift), part, config=config)
        model.eval()
        return subject


class _Learner(Recipe):
    """Plain cross-entropy for any module: normalised as a subject would, mirrored and shifted on the batch."""

    def __init__(self, model: nn.Module, subject: Subject, mirror: bool, shift: int):
        super().__init__()
        self.model, self.mirror, self.shift = model, mirror, shift
        self.prepare = subject.prepare

    def augment(self, batch: Batch, generator: torch.Generator) -> Batch:
        image = batch.image
        if self.mirror:
            flip = torch.rand(len(image), 1, 1, 1, generator=generator) < 0.5
            image = torch.where(flip.to(image.device), image.flip(-1), image)
        if self.shift:
            by = torch.randint(-self.shift, self.shift + 1, (2,), generator=generator)
            image = torch.roll(image, (int(by[0]), int(by[1])), (-2, -1))
        return dataclasses.replace(batch, image=image)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        assert batch.label is not None  # the gauntlet takes labelled data only
        return {"loss": F.cross_entropy(self.model(self.prepare(batch.pixels())), batch.label)}

    def export(self) -> nn.Module:
        return self.model


@dataclass(frozen=True, kw_only=True)
class TransferCell:
    """The transfer axis: trains on the subset, then reads a small other task with what was learned.

    "accuracy" is that of a linear probe on the frozen features, "finetune_accuracy" that after tuning all weights;
    `LearningCurve.points(capacity, "finetune_accuracy")` is the second curve. downstream: (train, test), labelled.
    finetune: its budget. lr: its peak rate."""

    downstream: tuple[Any, Any]
    pretrain: SupervisedCell = field(default_factory=SupervisedCell)
    finetune: Budget = field(default_factory=lambda: Budget(amount=200))
    lr: float = 0.01

    def __call__(self, capacity: str, data: CellData, budget: Budget, seed: int) -> dict[str, Any]:
        from lynceus.gauntlet.probes import LinearProbe

        images, labels = pixels(data.train), torch.from_numpy(np.asarray(data.labels, dtype=np.int64))
        first, cell = budget.steps(len(images)), self.pretrain
        subject = cell.train(capacity, images, labels, data.classes, first, budget.batch_size, cell.lr[0], seed)
        loss = float(
            F.cross_entropy(torch.from_numpy(_logits(subject, images[: cell.loss_images])), labels[: cell.loss_images])
        )
        bank, (train, test) = FeatureBank(quiet=True), self.downstream
        there = torch.from_numpy(np.asarray(train.labels, dtype=np.int64))
        wanted, classes = np.asarray(test.labels), int(max(train.labels.max(), test.labels.max())) + 1
        scores, _ = LinearProbe().scores(
            bank.get(subject, train).vectors, there.numpy(), bank.get(subject, test).vectors, classes=classes, seed=seed
        )
        if not hasattr(subject.model, "reset_classifier"):
            raise AdviceError(
                f"{capacity} has no reset_classifier, so its classifier cannot be exchanged for the other task."
            )
        with borrowed(seed, "new head"):
            subject.model.reset_classifier(classes)
        size, steps = self.finetune.batch_size, self.finetune.steps(len(there))
        tuned = cell.tune(subject.model, pixels(train), there, steps, size, self.lr, seed)
        after = measure(_logits(tuned, pixels(test)), wanted, classes)
        out = measure(scores, wanted, classes) | {"train_loss": loss, "n_test": len(wanted)}
        return out | {"finetune_accuracy": after["accuracy"]}


@dataclass(frozen=True, kw_only=True)
class ProbeCell:
    """Frozen features of one subject and a logistic probe: the curve of what its features gain from more labels.

    capacity is the subject's name. The budget does not apply: the probe is convex and solved to the end."""

    subjects: dict[str, Subject] = field(default_factory=dict)
    bank: FeatureBank = field(default_factory=FeatureBank)
    c: float = 1.0

    def __call__(self, capacity: str, data: CellData, budget: Budget, seed: int) -> dict[str, Any]:
        from sklearn.linear_model import LogisticRegression

        train = self.bank.get(self.subjects[capacity], data.train).vectors
        test: Features = self.bank.get(self.subjects[capacity], data.test)
        mean, scale = train.mean(0), train.std(0) + 1e-6
        if len(np.unique(data.labels)) < 2:
            raise AdviceError("The smallest subset holds a single class; start the sizes higher.")
        probe = LogisticRegression(C=self.c, max_iter=500).fit((train - mean) / scale, data.labels)
        seen = probe.decision_function((test.vectors - mean) / scale)
        logits = np.full((len(test), data.classes), -1e9)
        logits[:, probe.classes_] = np.stack([-seen, seen], 1) / 2 if seen.ndim == 1 else seen
        inside = probe.predict_log_proba((train - mean) / scale)
        column = np.searchsorted(probe.classes_, data.labels)
        loss = -float(inside[np.arange(len(inside)), column].mean())
        return measure(logits, np.asarray(data.test.labels), data.classes) | {"train_loss": loss}


def pixels(data: Any) -> Tensor:
    """All pictures of a data set as one tensor (n, 3, h, w). Sizes must be equal."""
    images = getattr(data, "images", None)
    if images is not None:
        return images
    stack = [s.image for chunk in batches(data, 256) for s in chunk]
    if len({s.shape for s in stack}) != 1:
        raise AdviceError("Training from scratch needs pictures of one size: data.open(..., size=64) makes them so.")
    return torch.stack(stack)


@torch.inference_mode()
def _logits(subject: Subject, images: Tensor) -> np.ndarray:
    return np.concatenate(
        [subject(as_float(images[i : i + 256])).float().cpu().numpy() for i in range(0, len(images), 256)]
    )


def cell_key(cell: Cell, fingerprint: str, train_cell: Any) -> str:
    """Names the result of a cell: the same whenever the same function trains the same cell on the same data."""
    name = getattr(train_cell, "__qualname__", type(train_cell).__qualname__)
    part = [d.fingerprint() for d in getattr(train_cell, "downstream", ())]
    settings = {
        k: v for k, v in getattr(train_cell, "__dict__", {}).items() if isinstance(v, (int, float, str, tuple, bool))
    }
    build = getattr(train_cell, "build", None)
    return digest([cell, fingerprint, name, settings, getattr(build, "__qualname__", ""), *part], 20)
