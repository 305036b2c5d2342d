"""Split: groups of classes, a pruned and retrained sub-model for each, a place for each, and the fusion: a `Plan`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from lynceus.core.cost import cost
from lynceus.core.errors import AdviceError, unknown
from lynceus.core.progress import progress
from lynceus.core.rng import generator
from lynceus.core.subject import Subject
from lynceus.core.types import as_float
from lynceus.rewrite.split.assign import Budget, Device, Load, assign, devices_of
from lynceus.rewrite.split.classes import Grouping, groups
from lynceus.rewrite.split.cut import Anatomy, Cut, anatomy, even, whole
from lynceus.rewrite.split.fused import Fused, Parts, fit_fusion, sign
from lynceus.rewrite.split.importance import HOWS, How, Probe, choose
from lynceus.rewrite.split.part import Part, cut_head, folded, opened, own_head
from lynceus.rewrite.split.plan import Plan, Share
from lynceus.rewrite.split.retrain import Retrain, moved, outputs, retrain


@dataclass(frozen=True, kw_only=True)
class SplitConfig:
    """How a model is split.

    parts: sub-models; None for one per device. group: which classes go together: random, confusion (those that the
    model mixes up), or the groups themselves. pruned: shares of the heads that every sub-model loses at least; None for
    half. measure: of importance: taylor (second order), fast or exact (the KL itself), magnitude, random. calibration:
    images of a sub-model's classes that importance is measured on. rounds: of pruning and retraining on the way from
    nothing to what goes. ratio: of the fusion's hidden layer to its input. fusion_steps: training steps of the fusion.
    views: moved copies of the images that it learns from besides, if retrain moves any. feature_dropout: probability
    that a sub-model's feature is missing in them. seed: of every random choice.
    """

    parts: int | None = None
    group: Grouping | tuple[tuple[int, ...], ...] = "random"
    pruned: int | None = None
    measure: How = "taylor"
    calibration: int = 256
    rounds: int = 2
    retrain: Retrain = field(default_factory=Retrain)
    ratio: float = 0.5
    fusion_steps: int = 500
    views: int = 4
    feature_dropout: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        if self.measure not in HOWS:
            raise unknown("measure of importance", self.measure, HOWS)
        if self.calibration < 1 or self.rounds < 1 or self.fusion_steps < 0 or self.ratio <= 0:
            raise AdviceError(
                "A split takes calibration and rounds from 1, fusion_steps from 0 and ratio above 0; got "
                f"{self.calibration}, {self.rounds}, {self.fusion_steps} and {self.ratio}."
            )
        if not 0 <= self.feature_dropout < 1:
            raise AdviceError(f"feature_dropout is a probability below 1, not {self.feature_dropout}.")
        if self.parts is not None and self.parts < 1:
            raise AdviceError(f"A model is split into at least one sub-model, not {self.parts}.")


def split(
    model: nn.Module,
    devices: int | Sequence[Device],
    data: Any,
    budget: Budget | None = None,
    *,
    config: SplitConfig | None = None,
    quiet: bool = True,
) -> Plan:
    """Splits a trained ViT, DeiT or Swin into sub-models for weak devices; `model` stays as it is.

    devices: `Device`s with their limits, or their number. data: labelled images that sub-models and fusion learn from,
    a Dataset, Samples, or a pair (images (n, 3, h, w) as the model takes them, labels (n,)). budget: limits of the
    whole. Raises AdviceError before any long work when the model cannot be cut, there are too few classes or the
    limits cannot be kept (InfeasibleError).
    """
    config, budget, devices = config or SplitConfig(), budget or Budget(), devices_of(devices)
    part, head = opened(model)
    classes, parts = head.out_features, anatomy(part.backbone)
    count = config.parts if config.parts is not None else len(devices)
    if config.parts is None and count > classes:
        raise AdviceError(
            f"There are {count} devices for {classes} classes, and each sub-model owns at least one class. Give at "
            f"most {classes} devices, or SplitConfig(parts={classes}) and leave the others idle."
        )
    if count > classes:
        groups(classes, count)
    start = parts.unit // 2 if config.pruned is None else config.pruned
    even(parts, start, part.backbone.config.mlp_ratio)
    image, label = collected(data, model)
    if int(label.max()) >= classes or int(label.min()) < 0:
        raise AdviceError(
            f"The labels run from {int(label.min())} to {int(label.max())}; the model knows the classes 0 to "
            f"{classes - 1}."
        )
    table = loads(part, parts, image[:1])
    pruned, where = assign([table] * count, devices, budget, start=start)
    log_p = outputs(lambda x: head(part(x)).double().log_softmax(-1), image)
    confusion = torch.zeros(classes, classes).index_put_((label, log_p.argmax(1)), torch.ones(len(label)), True)
    made = groups(classes, count, config.group, confusion=confusion, seed=config.seed)
    absent = [c for c in range(classes) if not bool((label == c).any())]
    if absent:
        raise AdviceError(
            f"The data shows no image of class {absent[0]}{' and others' if len(absent) > 1 else ''}; a sub-model "
            "learns its classes from images of them. Give data with every class."
        )
    nets, heads, cuts = [], [], []
    with progress("splitting", total=count, unit="sub-models", quiet=quiet) as bar:
        for i, group in enumerate(made):
            net, own, cut = sub_model(
                part, head, image, label, log_p, group, pruned[i], config, seed=config.seed + 1000 * i
            )
            nets.append(net)
            heads.append(own)
            cuts.append(cut)
            bar.advance()
    by = Parts(groups=made, cuts=tuple(cuts), ratio=config.ratio, seed=config.seed)
    fused = join(nets, by, model, image, label, config)
    shares = tuple(
        Share(
            classes=g,
            pruned=n,
            unit=parts.unit,
            device=devices[d].name,
            cut=c,
            bytes=size(net),
            flops=flops(net, image),
        )
        for g, n, d, c, net in zip(made, pruned, where, cuts, nets)
    )
    names = tuple(getattr(model, "classes", None) or [str(i) for i in range(classes)])
    return Plan(
        net=fused,
        heads=nn.ModuleList(heads),
        shares=shares,
        devices=devices,
        budget=budget,
        names=names,
        dense={"bytes": float(size(part)), "flops": flops(part, image), "parameters": float(numbers(part))},
        image_shape=tuple(image.shape[1:]),
        image_bytes=image[:1].numel() * image.element_size(),
        fusion_flops=cost(fused.fusion, torch.zeros(1, sum(fused.fusion.widths))).flops,
    )


def sub_model(
    part: Part,
    head: nn.Linear,
    image: Tensor,
    label: Int[Tensor, " n"],
    log_p: Float[Tensor, "n k"],
    group: tuple[int, ...],
    pruned: int,
    config: SplitConfig,
    *,
    seed: int,
) -> tuple[Part, nn.Linear, Cut]:
    """The sub-model of one group, its own classifier (the group's classes, then "other"), and what stayed of the whole.

    Importance is measured on images of the group's classes against what the whole model says of them; after each round
    the sub-model is trained again on its classes and, as "other", on the rest.
    """
    number = torch.full((head.out_features,), -1)
    number[list(group)] = torch.arange(len(group))
    own = number[label]
    mine = (own >= 0).nonzero()[:, 0]
    if not len(mine):
        mine = torch.arange(len(label))
    mine = mine[torch.randperm(len(mine), generator=generator(seed, "calibration"))[: config.calibration]]
    target = folded(log_p, group)
    parts = anatomy(part.backbone)
    net, score, cut = part, own_head(head, group), whole(parts)
    gone = 0
    for goal in _goals(pruned, config.rounds):
        # the first round is judged on all classes, as the whole model answers; later ones on the sub-model's answers
        judge, reference = (head, log_p) if gone == 0 else (score, target)
        if goal > gone:
            probe = Probe(net, judge, as_float(image[mine]), reference[mine])
            now = probe.parts
            step = choose(probe, goal - gone, config.measure, seed=seed)
            score = cut_head(score, step, now.widths[-1])
            net, cut, gone = net.cut(step), cut.then(step), goal
        else:
            net = net.cut(whole(anatomy(net.backbone)))
        retrain(net, score, image, own, target, config.retrain, seed=seed + goal)
    return net, score, cut


def _goals(pruned: int, rounds: int) -> list[int]:
    """Shares gone after each round, in equal steps; at least one round, for the retraining."""
    made = [round(pruned * (i + 1) / rounds) for i in range(rounds)]
    return sorted({g for g in made if g}) or [0]


def join(nets: Sequence[Part], by: Parts, model: nn.Module, image: Tensor, label: Tensor, config: SplitConfig) -> Fused:
    """The sub-models with a fusion that was trained on their features."""
    fused = by(model)
    fused = sign(Fused(nets, by.groups, fused.fusion), by, model).eval()
    if config.fusion_steps:
        features, repeated = seen(nets, image, label, config)
        fit_fusion(
            fused.fusion,
            features,
            repeated,
            steps=config.fusion_steps,
            dropout=config.feature_dropout if len(nets) > 1 else 0.0,
            seed=config.seed,
        )
    return fused


def seen(nets: Sequence[Part], image: Tensor, label: Tensor, config: SplitConfig) -> tuple[Tensor, Tensor]:
    """The features that a fusion learns from and their labels: of the images, and of moved copies of them where the
    sub-models were trained on such (features of images known by heart look surer than those of new ones)."""
    learn, draw = config.retrain, generator(config.seed, "views")
    parts = [torch.cat([outputs(net, image) for net in nets], 1)]
    views = config.views if learn.shift or learn.flip else 0
    with torch.no_grad():
        for _ in range(views):
            rows = []
            for some in image.split(64):
                x = moved(as_float(some), draw, shift=learn.shift, flip=learn.flip)
                rows.append(torch.cat([net(x) for net in nets], 1))
            parts.append(torch.cat(rows))
    return torch.cat(parts), label.repeat(1 + views)


@dataclass(frozen=True, kw_only=True)
class Split:
    """Rewrite: the model as `parts` sub-models, each for some classes, and a fusion of their features, in one module.

    Needs images but no labels: what the model itself says of them stands for those. With labels, and for devices with
    limits, call `split`, whose plan holds the same module as `plan.net`.

    parts: sub-models. pruned: shares of the heads that each loses; None for half. measure: of importance: taylor, fast,
    exact, magnitude, random. rounds: of pruning and retraining. steps: of retraining in each round. fusion_steps: of
    training the fusion. seed: of every random choice.
    """

    calibration: ClassVar[int] = 512

    parts: int = 2
    pruned: int | None = None
    measure: How = "taylor"
    rounds: int = 1
    steps: int = 200
    fusion_steps: int = 300
    seed: int = 0

    def __call__(self, model: nn.Module, example: Tensor | None = None) -> nn.Module:
        """example: pixels (n, 3, h, w) as the model takes them, the more the better."""
        if example is None:
            raise AdviceError("Split measures on images: give them as example, or use split(model, devices, data).")
        part, head = opened(model)
        config = SplitConfig(
            pruned=self.pruned,
            measure=self.measure,
            rounds=self.rounds,
            retrain=Retrain(steps=self.steps, batch=32),
            fusion_steps=self.fusion_steps,
            seed=self.seed,
        )
        parts = anatomy(part.backbone)
        pruned = parts.unit // 2 if self.pruned is None else self.pruned
        even(parts, pruned, part.backbone.config.mlp_ratio)
        made = groups(head.out_features, self.parts, seed=self.seed)
        log_p = outputs(lambda x: head(part(x)).double().log_softmax(-1), example)
        label = log_p.argmax(1)
        nets, cuts = [], []
        for i, group in enumerate(made):
            net, _, cut = sub_model(part, head, example, label, log_p, group, pruned, config, seed=self.seed + 1000 * i)
            nets.append(net)
            cuts.append(cut)
        by = Parts(groups=made, cuts=tuple(cuts), ratio=config.ratio, seed=self.seed)
        return join(nets, by, model, example, label, config)


# sizes -------------------------------------------------------------------------------------------
def numbers(part: nn.Module) -> int:
    return sum(p.numel() for p in part.parameters())


def size(part: nn.Module) -> int:
    """Bytes of weights."""
    return sum(p.numel() * p.element_size() for p in part.parameters())


def flops(part: nn.Module, image: Tensor) -> float:
    """Of one image."""
    return float(cost(part, as_float(image[:1])).flops)


def loads(part: Part, parts: Anatomy, image: Tensor) -> list[Load]:
    """What a sub-model asks of its device with 0, 1, ... shares pruned, whichever units go."""
    out = []
    for pruned in range(parts.unit):
        counts = even(parts, pruned, part.backbone.config.mlp_ratio)
        first = [tuple(tuple(range(n)) for n in some) for some in counts]
        small = part.cut(Cut(channels=first[0], heads=first[1], hidden=first[2]))
        out.append(Load(bytes=size(small), flops=flops(small, image)))
    return out


def collected(data: Any, model: nn.Module) -> tuple[Tensor, Int[Tensor, " n"]]:
    """Images as `model` takes them, and labels, in memory. data: as `split` takes it."""
    if isinstance(data, (tuple, list)) and len(data) == 2 and isinstance(data[0], Tensor):
        image, label = data
        if image.ndim != 4 or not isinstance(label, Tensor) or label.shape != (len(image),) or not len(image):
            raise AdviceError(
                "Images are (n, c, h, w) and labels (n,), of the same n above 0; got "
                f"{tuple(image.shape)} and {tuple(getattr(label, 'shape', ()))}."
            )
        return image, label.long()
    if getattr(data, "plain", False) and getattr(data, "labels", None) is not None and hasattr(model, "prepared"):
        batch = data.batch(range(len(data)))
        return batch.image, batch.label
    subject, images, labels = Subject(model), [], []
    samples: Iterable[Any] = data
    for sample in samples:
        if not isinstance(sample.label, int):
            raise AdviceError(
                "Sub-models learn their classes from labels, one per image, and these images have none (or several). "
                "The rewrite Split takes the model's own answers: Split(parts=2)(model, images)."
            )
        x = sample.image[None]
        if subject.normalise is not None or subject.size is not None:
            x = subject.prepare(x)
        images.append(x)
        labels.append(sample.label)
    if not images:
        raise AdviceError("The data is empty; a split needs images of every class.")
    if len({tuple(x.shape) for x in images}) > 1:
        inner: Any = getattr(model, "backbone", model)
        size: Any = getattr(model, "image_size", None) or inner.input_size
        from lynceus.tasks.classify import resized

        images = [resized(x, size) for x in images]
    return torch.cat(images), torch.tensor(labels)
