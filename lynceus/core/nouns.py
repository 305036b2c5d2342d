"""The five nouns on one page. Backbone is a class (`lynceus.backbones.Backbone`); the other four are protocols here.

| noun     | is                                                              | gives                                  |
|----------|-----------------------------------------------------------------|----------------------------------------|
| Backbone | a network family: image -> pyramid of maps                      | a module                               |
| Task     | what to predict: head, loss, decoding, metric                   | a predictor on any backbone            |
| Recipe   | how something is learned: a module whose forward returns a loss | a trained module                       |
| Rewrite  | a function from model to model                                  | a changed model, the old one untouched |
| Check    | a function from model and data to findings                      | a Report                               |
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from lynceus.core.report import Report
from lynceus.core.subject import Subject
from lynceus.core.types import Batch, Prediction, Sample


@runtime_checkable
class Metric(Protocol):
    """Accumulates over batches. `compute` gives named numbers."""

    def update(self, predictions: Sequence[Prediction], batch: Batch) -> None: ...
    def compute(self) -> dict[str, float]: ...


@runtime_checkable
class Task(Protocol):
    """What to predict, on any backbone."""

    name: ClassVar[str]

    def build(self, backbone: nn.Module) -> nn.Module:
        """Backbone + head. The module takes pixels in [0, 1], owns its normalisation, and gives raw outputs."""
        ...

    def loss(self, raw: Any, target: Batch) -> dict[str, Tensor]:
        """A dict that holds "loss"; what else it holds is logged."""
        ...

    def decode(self, raw: Any, sizes: Sequence[tuple[int, int]]) -> list[Prediction]: ...
    def metric(self) -> Metric: ...


class Recipe(nn.Module):
    """How something is learned. Owns every module that the method trains (student, teacher, predictor, policy ...)."""

    def transform(self, sample: Sample, generator: torch.Generator | None = None) -> Any:
        """Per-sample views, masks or tokens, made in the loader. Draw only from `generator` (seeded by seed, epoch and
        index, so that neither the number of workers nor an interruption changes them); None means evaluation."""
        return sample

    def augment(self, batch: Any, generator: torch.Generator) -> Any:
        """What is cheaper on the whole batch (crop, flip, mixup), on the training device. Seeded by seed and step."""
        return batch

    def forward(self, batch: Any) -> dict[str, Tensor]:
        """A dict that holds "loss"; what else it holds is logged."""
        raise NotImplementedError(f"{type(self).__name__} must write forward(batch) -> dict with 'loss'")

    def param_groups(self) -> list[dict[str, Any]]:
        """Groups with "params" and optionally "weight_decay" and "lr_scale". Default: one group of what is trainable,
        biases and one-dimensional parameters without decay."""
        decay = [p for p in self.parameters() if p.requires_grad and p.ndim > 1]
        plain = [p for p in self.parameters() if p.requires_grad and p.ndim <= 1]
        return [{"params": decay}, {"params": plain, "weight_decay": 0.0}]

    def after_step(self, step: int, total: int) -> None:
        """Called after every optimiser step: momentum teachers, temperatures, policies."""

    def export(self) -> nn.Module:
        """What the user keeps."""
        raise NotImplementedError(f"{type(self).__name__} must write export() -> the trained module")


@runtime_checkable
class Rewrite(Protocol):
    """A frozen dataclass of options with __call__: model in, changed model out, the old one untouched.

    `example` is a batch of pixels in [0, 1] that the model accepts; None where it is rebuilt from a file. The module
    made has the attributes `rewrite` (this) and `original` (the module changed), which is all that its file needs to
    hold besides the weights."""

    def __call__(self, model: nn.Module, example: Tensor | None) -> nn.Module: ...


@dataclass(frozen=True)
class _Chain:
    rewrites: tuple[Rewrite, ...]

    def __call__(self, model: nn.Module, example: Tensor | None) -> nn.Module:
        for rewrite in self.rewrites:
            model = rewrite(model, example)
        return model


def chain(*rewrites: Rewrite) -> Rewrite:
    """The rewrites one after the other, as one rewrite."""
    return _Chain(rewrites)


@runtime_checkable
class Check(Protocol):
    """A frozen dataclass of options with __call__: subject and data in, findings out.

    `needs` names what the check asks of subject and data: "gradients", "features", "labels", "masks" ..."""

    needs: ClassVar[frozenset[str]]

    def __call__(self, subject: Subject, data: Iterable[Sample], *, seed: int = 0) -> Report: ...
