"""Robustify: a small robust teacher makes a big pretrained classifier robust, by tuning a small part of it.

Paper: Jain et al., Efficiently Robustify Pre-trained Models, ICCV 2023, arXiv 2309.07499
Code: none public. The workflow is the paper's; the formulas of the loss, of the weight of a sample and of the choice
between the heads (`rewrite.three_heads`) are ours.

The big net gets a robust and a combined head beside its own. Per batch of clean pictures x and AugMix pictures x':
cross-entropy of the clean head on x, of the robust head on x', of the combined head on both; and towards the teacher,
at temperature 2, KL of the robust head on x' and of the combined head on both, each picture weighing exp(-entropy) of
the teacher's mean answer under dropout. Only the last blocks, the heads and perhaps the norms learn.
What it brings and costs beside full fine-tuning is measured by `python -m bench.trust_robustify`. There the rule nearly
always takes the robust head: the combined one, taught by the same teacher, is close to it.
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
from lynceus.data.augmix import AugMixConfig
from lynceus.recipes.augmix import mixtures, pure, with_mixtures
from lynceus.recipes.supervised import Supervised, SupervisedConfig
from lynceus.rewrite.three_heads import AddHeads, ThreeHeads
from lynceus.tasks.classify import Classify
from lynceus.train.checkpoint import describe_backbone
from lynceus.train.fit import FitConfig, fit
from lynceus.train.optim import param_groups
from lynceus.train.partial import last_blocks, norm_parameters, train_only


@dataclass(frozen=True, kw_only=True, slots=True)
class RobustifyConfig:
    """tune: share of the blocks that learn, from the end; 2 of 12 by default. most: largest share of all weights that
    learns, heads and norms included; fewer blocks, or parts of the last, where blocks are too large.
    norms: gains and biases of the frozen blocks' norms learn too (their statistics stay); the gradient then goes
    through the whole net.
    temperature: of the distillation. distil: its weight, times the square of the temperature.
    uncertain: pictures that the teacher is unsure of weigh less.
    passes: dropout passes of the teacher, and later of the heads' choice. dropout: share of the feature left out there.
    head_lr, norm_lr: factors on the learning rate for the heads, and for the norms of frozen blocks.
    """

    tune: float = 2 / 12
    most: float = 0.25
    norms: bool = True
    temperature: float = 2.0
    distil: float = 2.0
    uncertain: bool = True
    passes: int = 10
    dropout: float = 0.1
    head_lr: float = 1.0
    norm_lr: float = 10.0

    def __post_init__(self) -> None:
        for name in ("tune", "most"):
            if not 0 < getattr(self, name) <= 1:
                raise AdviceError(f"{name} is a share in (0, 1], not {getattr(self, name)}.")
        if min(self.temperature, self.head_lr, self.norm_lr) <= 0 or self.distil < 0:
            raise AdviceError("temperature, head_lr and norm_lr must be above 0, and distil at least 0.")
        if self.passes < 1 or not 0 <= self.dropout < 1:
            raise AdviceError("passes is at least 1 and dropout a share in [0, 1).")


def certainty(logits: Float[Tensor, "m b k"]) -> Float[Tensor, " b"]:
    """exp(-entropy of the mean answer) of m dropout passes, scaled to mean 1 over the batch."""
    mean = logits.softmax(-1).mean(0)
    weight = (mean * mean.clamp(min=1e-12).log()).sum(-1).exp()
    return weight / weight.mean()


def towards(
    student: Float[Tensor, "b k"], teacher: Float[Tensor, "b k"], weight: Float[Tensor, " b"], temperature: float
) -> Float[Tensor, ""]:
    """Mean over the batch of weight * KL(teacher || student) at a temperature, times its square."""
    ours, theirs = (F.log_softmax(logits / temperature, -1) for logits in (student, teacher))
    apart = F.kl_div(ours, theirs, reduction="none", log_target=True).sum(-1)
    return temperature**2 * (weight * apart).mean()


class Robustify(Supervised):
    """Teaches three heads on the last blocks of `big`, with the frozen `teacher`; `export()` is a ThreeHeads.

    big: a trained predictor (what Classify built), which stays as it is. teacher: another, of the same classes, that is
    robust. mixing: of the augmented pictures. views: crops, shifts and flips before it.
    """

    model: ThreeHeads

    def __init__(
        self,
        big: nn.Module,
        teacher: nn.Module,
        config: RobustifyConfig | None = None,
        *,
        mixing: AugMixConfig | None = None,
        views: SupervisedConfig | None = None,
    ):
        nn.Module.__init__(self)
        self.method, self.config, self.mixing = config or RobustifyConfig(), pure(views), mixing or AugMixConfig()
        m = self.method
        net: Any = getattr(big, "backbone", big)
        size: Any = getattr(big, "image_size", None) or getattr(net, "input_size", (64, 64))
        like = next(big.parameters())
        example = torch.rand((1, 3, *size), generator=torch.Generator().manual_seed(0)).to(like)
        self.model = AddHeads(passes=m.passes, dropout=m.dropout)(big, example)
        self.task = self.model.task
        self.loss = self.task.loss
        # in a list: neither trained, nor saved, nor averaged with what is learnt
        self._teacher = [_checked(teacher, self.task, example)]
        self.blocks = self._freeze()

    @property
    def teacher(self) -> Any:
        return self._teacher[0]

    def _freeze(self) -> list[str]:
        """Freezes all but the heads, the last blocks and perhaps the norms; gives the names of the blocks' weights."""
        net: Any = self.model.backbone.requires_grad_(False)
        total = sum(p.numel() for p in net.parameters())
        heads = [self.model.head(name) for name in ("clean", "robust", "combined")]
        own = sum(p.numel() for head in heads for p in head.parameters())
        norms = norm_parameters(net) if self.method.norms else []
        left = self.method.most - (own + sum(net.get_parameter(n).numel() for n in norms)) / total
        if left <= 0:
            raise AdviceError(f"The heads and norms alone are more than {self.method.most:.0%} of the weights.")
        blocks = last_blocks(net, self.method.tune, most=left)
        for name in {*blocks, *norms}:
            net.get_parameter(name).requires_grad_(True)
        for head in heads:
            head.requires_grad_(True)
        return blocks

    @property
    def share(self) -> float:
        """Share of the big model's weights that learn."""
        learns = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        return learns / sum(p.numel() for p in self.model.backbone.parameters())

    def train(self, mode: bool = True) -> Robustify:
        """Frozen blocks stay in eval mode: no dropout, and batch norms keep their statistics."""
        super().train(mode)
        if mode:
            train_only(self.model.backbone, self.blocks)
        return self

    def augment(self, batch: Batch, generator: torch.Generator) -> Batch:
        """Supervised's, and one mixture of every picture."""
        return with_mixtures(super().augment(batch, generator), 1, generator, self.mixing)

    @torch.no_grad()
    def lesson(self, image: Float[Tensor, "b 3 h w"]) -> tuple[Float[Tensor, "b k"], Float[Tensor, " b"]]:
        """The teacher's logits and how much each picture weighs. Dropout is on the vector that its classifier reads,
        so that all passes share one run of the net."""
        teacher, m = self.teacher.to(image.device), self.method
        net = teacher.backbone
        vector = net.forward_head(net.forward_features(teacher.prepared(image)), pre_logits=True)
        head = net.get_classifier() if hasattr(net, "get_classifier") else net.head
        logits: Tensor = head(vector).float()
        if not m.uncertain:
            return logits, logits.new_ones(len(logits))
        dropped = F.dropout(vector.expand(m.passes, *vector.shape), m.dropout, training=True)
        return logits, certainty(head(dropped.flatten(0, 1)).float().unflatten(0, (m.passes, -1)))

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        if batch.label is None or batch.label.ndim != 1:
            raise AdviceError("Robustify needs one label for every image, as a class number.")
        m, count = self.method, len(batch)
        clean, mixed = batch.pixels(), mixtures(batch)[:, 0]
        if clean.is_contiguous(memory_format=torch.channels_last):  # the order that fit asked for, and nets are fast in
            mixed = mixed.contiguous(memory_format=torch.channels_last)
        image = torch.cat([clean, mixed])
        logits = {name: made.float() for name, made in self.model.heads(self.model.vector(image)).items()}
        label = batch.label
        own = self.loss(logits["clean"][:count], batch)
        robust = F.cross_entropy(logits["robust"][count:], label, ignore_index=-1)
        combined = F.cross_entropy(logits["combined"], torch.cat([label, label]), ignore_index=-1)
        taught = own["loss"].new_zeros(())
        if m.distil:
            lesson, weight = self.lesson(image)
            taught = towards(logits["robust"][count:], lesson[count:], weight[count:], m.temperature)
            taught = taught + towards(logits["combined"], lesson, weight, m.temperature)
        parts = {"clean_loss": own["loss"], "robust_loss": robust, "combined_loss": combined, "distil_loss": taught}
        total = own["loss"] + robust + combined + m.distil * taught
        return {"loss": total, **{k: v.detach() for k, v in parts.items()}, "accuracy": own["accuracy"]}

    def param_groups(self) -> list[dict[str, Any]]:
        """What learns: the last blocks, the norms of the others, and the three heads."""
        net: Any = self.model.backbone
        heads = [p for name in ("clean", "robust", "combined") for p in self.model.head(name).parameters()]
        inside = {id(net.get_parameter(name)) for name in self.blocks}
        groups = param_groups(net)
        apart = {id(p) for p in heads}
        norms = [p for g in groups for p in g["params"] if id(p) not in inside | apart]
        out = [{**g, "params": [p for p in g["params"] if id(p) in inside]} for g in groups]
        out.append({"params": norms, "weight_decay": 0.0, "lr_scale": self.method.norm_lr})
        out.append({"params": [p for p in heads if p.ndim > 1], "lr_scale": self.method.head_lr})
        bias = [p for p in heads if p.ndim <= 1]
        out.append({"params": bias, "weight_decay": 0.0, "lr_scale": self.method.head_lr})
        return [g for g in out if g["params"]]

    def describe(self) -> dict[str, Any]:
        return {
            "recipe": "robustify",
            "robustify": to_dict(self.method),
            "augmix": to_dict(self.mixing),
            "supervised": to_dict(self.config),
            "task": {"name": self.task.name, **to_dict(self.task)},
            "backbone": describe_backbone(self.model.backbone),
            "teacher": model_key(Subject(self.teacher)),
        }


def _checked(teacher: Any, task: Classify, example: Tensor) -> nn.Module:
    """The teacher, frozen and in eval mode, after a look at what it can do."""
    parts = getattr(teacher, "backbone", None)
    if parts is None or not hasattr(teacher, "prepared") or not hasattr(parts, "forward_features"):
        raise AdviceError(
            f"The teacher is a predictor on pixels whose net parts features from head: Classify(...).build(net), or "
            f"load_model(RUN), not {type(teacher).__name__}."
        )
    if list(teacher.classes) != list(task.classes or ()):
        raise AdviceError(
            f"Teacher and student know different classes: {list(teacher.classes)[:5]} ... ({len(teacher.classes)}) and "
            f"{list(task.classes or ())[:5]} ... ({len(task.classes or ())}). Train the teacher on the same data."
        )
    made: nn.Module = teacher.eval().requires_grad_(False)
    with torch.no_grad():
        answers = made(example)
    if not bool(torch.isfinite(answers).all()):
        raise AdviceError("The teacher gives answers that are not finite; nothing can be learnt from it.")
    return made


# a few minutes' schedule: the tuned part is already good, so it moves gently
TUNE = FitConfig(epochs=3, lr=1e-3)


def robustify(
    big: nn.Module,
    small_teacher: nn.Module | str,
    data: Dataset | str,
    *,
    config: RobustifyConfig | None = None,
    fitting: FitConfig | None = None,
    held_out: Dataset | float = 0.2,
    mixing: AugMixConfig | None = None,
    preset: Literal["auto", "plain", "small", "photo"] = "auto",
    teaching: FitConfig | None = None,
    out: str | Path | None = None,
    resume: bool | Literal["changed"] = False,
) -> tuple[ThreeHeads, Report]:
    """Makes a trained classifier robust at a part of the cost of training it so; gives it and the Report.

    big: the predictor (of train_classifier or load_model); it stays as it is. data: labelled pictures of its classes.
    small_teacher: a robust predictor of the same classes, or the name of a model, which is trained with AugMix first.
    config: what learns and how. fitting: how long (TUNE by default). mixing: of the pictures.
    held_out: a Dataset to evaluate on, or the share of `data` set aside. preset: views, as for train_classifier.
    teaching: how long a teacher given by name is trained. out, resume: the run folder, as in `fit`.
    summary["share tuned"] is the share of the big model's weights that learnt.
    """
    from lynceus.recipes.classify import recipe_config, train_classifier, view_of

    fitting = fitting or TUNE
    data = open_dataset(data) if not isinstance(data, Dataset) else data
    train, test = (
        (data, held_out) if isinstance(held_out, Dataset) else data.train_test(float(held_out), seed=fitting.seed)
    )
    folder = None if out is None else Path(out)
    teacher_report = None
    if isinstance(small_teacher, str):
        teacher, teacher_report = train_classifier(
            train, small_teacher, held_out=test, recipe="augmix", preset=preset, config=teaching,
            out=folder / "teacher" if folder else None, resume=resume,
        )  # fmt: skip
    else:
        teacher = small_teacher
    size = getattr(big, "image_size", None)
    view = max(size) if size else view_of(train, getattr(big, "backbone", big), None)
    recipe = Robustify(big, teacher, config, mixing=mixing, views=recipe_config(preset, view))
    report = fit(recipe, train, config=fitting, held_out=test, out=out, resume=resume)
    report.summary["share tuned"] = recipe.share
    if teacher_report is not None:
        report.summary |= {f"teacher {k}": v for k, v in teacher_report.summary.items() if k in ("accuracy", "seconds")}
    return recipe.export(), report  # type: ignore[return-value]
