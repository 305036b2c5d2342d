"""Distil: a rewritten model learns its answers back from the model that it was made of.

Soft distillation: Hinton et al., arXiv 1503.02531, as the finetune of LPViT (ECCV 2024, arXiv 2407.02068) takes it from
DeiT (ICML 2021, arXiv 2012.12877). Code: facebookresearch/deit (Apache-2.0), Akimoto-Cris/LPViT (no licence); ours.

loss = (1 - weight) * task's loss + weight * t^2 KL(teacher at temperature t || student at temperature t).
The layers of `rewrite.block_prune` hold only the blocks that they kept, so no optimiser revives the others; weights
that a mask of zeros holds down otherwise (`masked=True`) are set to zero again after every step, since momentum and
decay would move them.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from lynceus.core.config import to_dict
from lynceus.core.errors import AdviceError
from lynceus.core.identity import model_key
from lynceus.core.report import Report
from lynceus.core.subject import Subject
from lynceus.core.types import Batch
from lynceus.data import Dataset, open_dataset
from lynceus.recipes.supervised import Supervised, SupervisedConfig
from lynceus.tasks.classify import Classify
from lynceus.train.checkpoint import describe_model
from lynceus.train.fit import FitConfig, fit


@dataclass(frozen=True, kw_only=True)
class DistilConfig:
    """weight: share of the teacher in the loss, in [0, 1]. temperature: of both answers. masked: weights that are
    exactly zero at the start stay zero."""

    weight: float = 0.5
    temperature: float = 3.0
    masked: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.weight <= 1:
            raise AdviceError(f"weight is the teacher's share of the loss, from 0 to 1, not {self.weight}.")
        if not self.temperature > 0:
            raise AdviceError(f"temperature is above 0, not {self.temperature}; DeiT takes 3.")


def soft(student: Float[Tensor, "b k"], teacher: Float[Tensor, "b k"], temperature: float) -> Float[Tensor, ""]:
    """t^2 KL(softmax(teacher / t) || softmax(student / t)), mean over the batch, in nats."""
    t = temperature
    ours, theirs = F.log_softmax(student / t, -1), F.log_softmax(teacher / t, -1)
    return F.kl_div(ours, theirs, reduction="batchmean", log_target=True) * t**2


class Distil(Supervised):
    """Trains `student` (a rewritten predictor; all that takes gradients learns) towards labels and `teacher`.

    student, teacher: predictors on pixels that Classify built, of the same classes. views: crops, shifts, flips, mixup.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        config: DistilConfig | None = None,
        *,
        views: SupervisedConfig | None = None,
    ):
        nn.Module.__init__(self)
        task = getattr(student, "task", None)
        if not isinstance(task, Classify):
            raise AdviceError(
                f"The student is a predictor on pixels, as load_model(RUN) or Classify(...).build(net) give, not "
                f"{type(student).__name__}."
            )
        known = getattr(teacher, "classes", None)
        if known is None or list(known) != list(task.classes or ()):
            raise AdviceError(
                f"Teacher and student answer different questions: {list(known or ())[:5]} ... ({len(known or ())}) and "
                f"{list(task.classes or ())[:5]} ... ({len(task.classes or ())}). The teacher is the model that the "
                "student was made of."
            )
        self.method, self.config = config or DistilConfig(), views or SupervisedConfig()
        self.task, self.model, self.loss = task, student, task.loss
        self._teacher = [teacher.eval().requires_grad_(False)]  # in a list: neither trained, nor saved
        weights = [p for p in student.parameters() if p.requires_grad and p.ndim > 1]
        self._masks = [(p, p.detach() != 0) for p in weights if self.method.masked and bool((p == 0).any())]

    @property
    def teacher(self) -> nn.Module:
        return self._teacher[0]

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        logits = self.model(batch.image)
        losses = self.loss(logits, batch)
        if not self.method.weight:
            return losses
        with torch.no_grad():
            taught = self.teacher.to(batch.image.device)(batch.image)
        apart = soft(logits.float(), taught.float(), self.method.temperature)
        total = (1 - self.method.weight) * losses["loss"] + self.method.weight * apart
        return {**losses, "loss": total, "distil_loss": apart.detach()}

    @torch.no_grad()
    def after_step(self, step: int, total: int) -> None:
        """Sets masked weights to zero again."""
        for weight, mask in self._masks:
            weight.mul_(mask.to(weight.device))

    def describe(self) -> dict[str, Any]:
        return {
            "recipe": "distil",
            "distil": to_dict(self.method),
            "supervised": to_dict(self.config),
            "student": describe_model(self.model),
            "teacher": model_key(Subject(self.teacher)),
        }


GENTLE = FitConfig(epochs=2, lr=5e-4)


def distil(
    student: nn.Module,
    teacher: nn.Module,
    data: Dataset | str,
    *,
    config: DistilConfig | None = None,
    fitting: FitConfig | None = None,
    held_out: Dataset | float = 0.2,
    preset: Literal["auto", "plain", "small", "photo", "fine-tune"] = "auto",
    out: str | Path | None = None,
    resume: bool | Literal["changed"] = False,
) -> tuple[nn.Module, Report]:
    """Finetunes a rewritten model with its original as the teacher; gives the trained student and the Report.

    student, teacher: predictors, e.g. of load_model. data: labelled images of their classes. held_out: a Dataset to
    evaluate on, or the share of `data` set aside. fitting: how long (two gentle epochs by default). preset: views, as
    for train_classifier. out, resume: the run folder, as in `fit`.
    """
    from lynceus.recipes.classify import recipe_config, view_of

    fitting = fitting or GENTLE
    data = open_dataset(data) if not isinstance(data, Dataset) else data
    train, test = (
        (data, held_out) if isinstance(held_out, Dataset) else data.train_test(float(held_out), seed=fitting.seed)
    )
    size = getattr(student, "image_size", None)
    view = max(size) if size else view_of(train, getattr(student, "backbone", student), None)
    recipe = Distil(student, teacher, config, views=recipe_config(preset, view))
    report = fit(recipe, train, config=fitting, held_out=test, out=out, resume=resume)
    return recipe.export(), report
