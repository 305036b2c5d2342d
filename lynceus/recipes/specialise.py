"""Specialise: a trained base model becomes a small model of another task, by adapters that learn while channels go.

Paper: Hedegaard et al., Structured Pruning Adapters, Pattern Recognition 2024, arXiv 2211.10155
Code: LukasHedegaard/channel-spa-experiments (read for facts only); written from the paper

The schedule of its channel-pruning study: the adapted base is trained; then, again and again, a fixed share of the
channels that are left goes, least important first, and what remains is trained on. At every density asked for, a longer
training ends with falling rates; there the model is evaluated and its delta is written. What it reaches beside plain
fine-tuning and pruning is measured by `python -m bench.adapters`.
"""

from __future__ import annotations

import copy
import json
import math
import re
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lynceus.core.config import differences, to_dict
from lynceus.core.cost import cost
from lynceus.core.errors import AdviceError
from lynceus.core.files import write_atomic
from lynceus.core.identity import model_key
from lynceus.core.plots import lines
from lynceus.core.progress import progress
from lynceus.core.report import Report, environment
from lynceus.core.rng import borrowed, derive
from lynceus.core.subject import Subject
from lynceus.core.types import Batch, as_float
from lynceus.data import Dataset, open_dataset
from lynceus.recipes.supervised import Supervised, SupervisedConfig
from lynceus.rewrite.adapters import Adapt, Delta, Fuse, delta, prune
from lynceus.rewrite.adapters.importance import CRITERIA, Criterion
from lynceus.rewrite.adapters.layers import Adapted
from lynceus.rewrite.dependency import dependencies
from lynceus.tasks.classify import Classify, resized
from lynceus.train.checkpoint import describe_model, load_model, save_model
from lynceus.train.evaluate import Evaluate
from lynceus.train.fit import FitConfig, fit
from lynceus.train.guard import Interrupted


@dataclass(frozen=True, kw_only=True, slots=True)
class SpecialiseConfig:
    """The schedule of pruning.

    left: shares of the prunable channels at which the model is finished, evaluated and kept; falling, in (0, 1]; 1 is
    the model before any pruning. step: share of the channels left that goes at each pruning step.
    before: epochs before the first step. between: epochs after each step. finish: epochs, with falling learning rate,
    at each density in `left`.
    importance: "l1", "l2", "gradient", "taylor", "lrp"; images: how many training images the last three look at, all at
    once. Sizes of weights tell what mattered to the base's task, and frozen ones cannot make up for a wrong choice.
    scope: "global" ranks all layers together, "layer" takes the same share of each. least: channels that stay in each.
    multiple: what is left of each layer is rounded up to a multiple of so many channels, at every step; 8 or 16 makes
    small models faster.
    """

    left: tuple[float, ...] = (0.5, 0.3, 0.1)
    step: float = 0.2
    before: float = 2.0
    between: float = 0.5
    finish: float = 2.0
    importance: Criterion = "taylor"
    images: int = 64
    scope: Literal["global", "layer"] = "layer"
    least: int = 2
    multiple: int = 1

    def __post_init__(self) -> None:
        falling = list(self.left) == sorted(set(self.left), reverse=True)
        if not self.left or not falling or not all(0 < v <= 1 for v in self.left):
            raise AdviceError(f"left holds falling shares of the channels in (0, 1], as (0.5, 0.3), not {self.left}.")
        if not 0 < self.step < 1:
            raise AdviceError(f"step is the share of the channels that goes at a time, in (0, 1), not {self.step}.")
        if min(self.before, self.between, self.finish) < 0 or self.finish <= 0:
            raise AdviceError("before and between are epochs from 0, finish is above 0.")
        if self.importance not in CRITERIA:
            raise AdviceError(f"importance is one of {', '.join(CRITERIA)}, not {self.importance!r}.")
        if min(self.least, self.images, self.multiple) < 1:
            raise AdviceError("least, images and multiple are at least 1.")


class Specialise(Supervised):
    """Learns what requires gradients of a predictor that is there already; `export()` is that predictor.

    model: what Classify built, adapted or plain, perhaps pruned. views: crops, shifts, flips and mixing."""

    def __init__(self, model: nn.Module, views: SupervisedConfig | None = None):
        nn.Module.__init__(self)
        known: Any = model
        self.model, self.task = known, known.task
        self.config = views or SupervisedConfig()
        self.loss = known.task.loss

    def param_groups(self) -> list[dict[str, Any]]:
        """Adapters and weights with decay (towards the base), biases, norms and tokens without."""
        known = [(n, p) for n, p in self.model.named_parameters() if p.requires_grad]
        plain: set[str] = getattr(self.model.backbone, "no_weight_decay", set)()
        free = [p for n, p in known if p.ndim <= 1 or n.removeprefix("backbone.") in plain]
        apart = {id(p) for p in free}
        groups: list[dict[str, Any]] = [
            {"params": [p for _, p in known if id(p) not in apart]},
            {"params": free, "weight_decay": 0.0},
        ]
        return [g for g in groups if g["params"]]

    def describe(self) -> dict[str, Any]:
        return {"recipe": "specialise", "supervised": to_dict(self.config), "model": describe_model(self.model)}


@dataclass(frozen=True, kw_only=True)
class Special:
    """A finished density: share of the channels that are left, the model with its adapters (or the fine-tuned one), the
    same fused for use, and its delta (None without adapters)."""

    left: float
    model: nn.Module
    fused: nn.Module
    delta: Delta | None


# minutes' schedule; adapters take about twice the learning rate of fine-tuning
SPECIALISE = FitConfig(lr=2e-3, weight_decay=5e-4)


def specialise(
    base: nn.Module,
    data: Dataset | str,
    *,
    adapter: Adapt | None = Adapt(rank=8),  # noqa: B008
    config: SpecialiseConfig | None = None,
    fitting: FitConfig | None = None,
    held_out: Dataset | float = 0.2,
    preset: Literal["auto", "plain", "small", "photo"] = "auto",
    out: str | Path | None = None,
    resume: bool = False,
) -> tuple[list[Special], Report]:
    """Makes models of the task in `data` from `base` at each density; gives them and the Report.

    base: a trained predictor (of train_classifier or load_model), which stays bit for bit as it is; where the classes
    are others, a fresh classifier is learned whole and goes into the delta. adapter: kind and rank; None fine-tunes all
    weights instead. fitting: learning rate, batches, seed; how long is said by the config, the schedule is its own.
    held_out: a Dataset to evaluate on, or the share of `data` set aside. preset: views, as for train_classifier.
    out: a folder; every density gets left-NN/ with the fused predictor and delta.safetensors; resume goes on after the
    last finished density. Summary and rows: accuracy, learned parameters, bytes of the delta, weights and MACs left.
    """
    from lynceus.recipes.classify import recipe_config, view_of

    config, fitting = config or SpecialiseConfig(), fitting or SPECIALISE
    if fitting.epochs is not None or fitting.steps is not None or fitting.seconds is not None:
        raise AdviceError("How long to train is said by SpecialiseConfig(before, between, finish), not by FitConfig.")
    data = open_dataset(data) if not isinstance(data, Dataset) else data
    if isinstance(held_out, Dataset):
        train, test = data, held_out
    else:
        train, test = data.train_test(float(held_out), seed=fitting.seed)
    start, fresh = for_classes(base, train, seed=fitting.seed)
    size = start.image_size
    views = recipe_config(preset, max(size) if size else view_of(train, start.backbone, None))
    dense = cost(start, _example(start, train)[:1])
    model: Any = start
    if adapter is not None:
        if adapter.full is None and fresh:
            name = getattr(start.backbone, "head_name", "head")
            adapter = replace(adapter, full=rf"^backbone\.{re.escape(name)}$")
        model = adapter(start, _example(start, train)[:2])
    folder = None if out is None else Path(out)
    places = [None if folder is None else folder / f"left-{round(100 * v):02d}" for v in config.left]
    if folder is not None and len(set(places)) < len(places):
        raise AdviceError(f"left={config.left} names folders by whole percents, of which two are the same.")
    there = [p for p in places if p is not None and (p / "adapted" / "model.safetensors").is_file()]
    if there and not resume:
        raise AdviceError(f"{there[0].resolve()} is there already. Go on with it: resume=True; or give another `out`.")
    if folder is not None:
        _same_run(folder, bool(there), {
            "base": model_key(Subject(base, needs_grad=False)),
            "adapter": adapter, "config": config, "fitting": fitting, "preset": preset,
            "data": train.fingerprint(), "held_out": test.fingerprint(),
        })  # fmt: skip
    made: list[Special] = []
    rows: list[dict[str, Any]] = []
    whole = dependencies(model, _example(model, train, 2)).channels
    if not whole and min(config.left) < 1:
        raise AdviceError(
            f"No channel of this model can be pruned with {adapter.kind if adapter else 'all weights'}; splopa adapts "
            "blocks for block pruning, so take kind='splora' or 'sppara', or left=(1.0,)."
        )
    try:
        with progress("specialising", total=len(config.left), unit="densities", quiet=fitting.quiet) as bar:
            for number, (density, place) in enumerate(zip(config.left, places)):
                done = place in there
                if done:
                    model = load_model(place / "adapted")  # type: ignore[operator]
                    if adapter is None:
                        model.requires_grad_(True)
                else:
                    at = 10_000 * number
                    if number == 0 and config.before:
                        _train(model, train, views, fitting, config.before, at, schedule="constant")
                    model = _down_to(model, train, views, config, fitting, density * whole, at)
                    _train(model, train, views, fitting, config.finish, at + 9_999, schedule="cosine")
                special, row = _finished(model, density, dense, train, test, fitting)
                if place is not None and not done:
                    save_model(special.fused, place)
                    if special.delta is not None:
                        special.delta.save(place / "delta.safetensors")
                    save_model(special.model, place / "adapted")
                made.append(special)
                rows.append(row)
                bar.advance(accuracy=row["accuracy"], left=f"{density:.0%}")
    except KeyboardInterrupt:
        where = "nothing was saved, since specialise had no `out` folder"
        if folder is not None:
            again = f"specialise(..., out={str(folder)!r}, resume=True), or the same command with --resume"
            where = f"go on with {again}"
        raise Interrupted(f"Stopped with {len(made)} of {len(config.left)} densities finished; {where}.") from None
    return made, _report(rows, adapter, folder)


# what decides no result
HARMLESS = tuple(f"fitting.{n}:" for n in ("quiet", "workers", "log_every", "save_every", "evaluate_every", "device"))


def _same_run(folder: Path, begun: bool, now: dict[str, Any]) -> None:
    """Keeps what decides the result in the folder; raises where the finished densities in it were made otherwise."""
    file, now = folder / "run.json", json.loads(json.dumps(to_dict(now)))
    if begun and file.is_file():
        then = json.loads(file.read_text(encoding="utf-8"))
        left = min(len(then["config"]["left"]), len(now["config"]["left"]))  # further densities may be asked for
        short = [{**v, "config": {**v["config"], "left": list(v["config"]["left"])[:left]}} for v in (then, now)]
        changes = [line for line in differences(short[0], short[1]) if not line.startswith(HARMLESS)]
        if changes:
            raise AdviceError(
                f"The densities in {folder.resolve()} were made with other options; changed (then -> now): "
                f"{'; '.join(changes[:5])}. Give the old ones, or another `out`."
            )
    write_atomic(file, json.dumps(now, indent=2))


def for_classes(base: nn.Module, data: Dataset, *, seed: int = 0) -> tuple[Any, bool]:
    """A copy of a predictor for the classes of `data`, and whether its classifier is fresh."""
    known: Any = base
    if not hasattr(known, "backbone") or not isinstance(getattr(known, "task", None), Classify):
        raise AdviceError(
            f"specialise takes a trained predictor (load_model(RUN), or Classify(...).build(backbone)), not "
            f"{type(base).__name__}."
        )
    if not data.classes:
        raise AdviceError(f"{data.origin} has no labels, so there is nothing to learn.")
    made = copy.deepcopy(known)
    if list(known.task.classes or ()) == list(data.classes):
        return made, False
    task = replace(known.task, classes=tuple(data.classes), num_classes=None)
    with borrowed(seed, "classifier"):
        made.backbone.reset_classifier(len(data.classes))
    return task.build(made.backbone), True


def _example(model: Any, data: Dataset, count: int = 64) -> Tensor:
    """Pixels of some images as the model takes them."""
    step = max(1, len(data) // count)
    images = [as_float(data[i].image)[None] for i in range(0, len(data), step)][:count]
    if model.image_size is not None:
        images = [resized(i, model.image_size, model.task.resize) for i in images]
    if len({i.shape for i in images}) > 1:
        images = images[:1]
    return torch.cat(images).to(next(model.parameters()).device)


def _down_to(
    model: Any, data: Dataset, views: Any, config: SpecialiseConfig, fitting: FitConfig, goal: float, at: int
) -> Any:
    """Prunes step by step to so many channels; trains between the steps."""
    few = _example(model, data, 2)
    channels = dependencies(model, few).channels
    if channels <= goal + 1:
        return model
    # as many equal steps as none is larger than asked for
    count = math.ceil(math.log(goal / channels) / math.log(1 - config.step) - 1e-6)
    share = (goal / channels) ** (1 / count)
    for step in range(1, count + 1):
        ratio = max(0.0, 1 - channels * share**step / dependencies(model, few).channels)
        loss, images = _question(model, data, config)
        model = prune(
            model, ratio, importance=config.importance, example=images, loss=loss, scope=config.scope,
            least=config.least, multiple=config.multiple,
        )  # fmt: skip
        if step < count and config.between:
            _train(model, data, views, fitting, config.between, at + step, schedule="constant")
    return model


def _question(model: Any, data: Dataset, config: SpecialiseConfig) -> tuple[Any, Tensor]:
    """The loss on some training images, where the importance asks for one; and what the channels are followed on."""
    few = _example(model, data, 2)
    if config.importance in ("l1", "l2"):
        return None, few
    image = _example(model, data, config.images)
    chosen = [data[i] for i in range(0, len(data), max(1, len(data) // config.images))][: len(image)]
    label = torch.tensor([s.label for s in chosen], device=image.device)
    if config.importance == "lrp":
        return (lambda m: m(image).gather(1, label[:, None]).sum()), few
    batch = Batch(image=image, sizes=[(int(image.shape[-2]), int(image.shape[-1]))] * len(image), label=label)
    return (lambda m: model.task.loss(m(image), batch)["loss"]), few


def _train(
    model: nn.Module, data: Dataset, views: Any, fitting: FitConfig, epochs: float, at: int, *, schedule: Any
) -> None:
    """Trains in place; every part has an order of its own, derived from the seed."""
    part = replace(
        fitting, epochs=epochs, schedule=schedule, seed=derive(fitting.seed, "part", at) % 2**31,
        warmup=fitting.warmup if at == 0 else 0.0, quiet=True,
    )  # fmt: skip
    model.train()
    fit(Specialise(model, views), data, config=part)
    model.eval()


def _finished(
    model: Any, density: float, dense: Any, train: Dataset, test: Dataset, fitting: FitConfig
) -> tuple[Special, dict[str, Any]]:
    model.eval()
    change = delta(model) if any(isinstance(m, Adapted) for m in model.modules()) else None
    fused = Fuse()(model) if change is not None else copy.deepcopy(model)
    found = Evaluate(details=False, quiet=True)(Subject(fused), test, seed=fitting.seed)
    now = cost(fused, _example(fused, train)[:1])
    weights = sum(p.numel() for p in fused.parameters())
    with tempfile.TemporaryDirectory() as folder:
        size = change.save(Path(folder) / "d.safetensors").stat().st_size if change else 4 * weights
    row = {
        "left": density,
        "accuracy": found.summary.get("accuracy", float("nan")),
        "learned": change.parameters if change else weights,
        "delta_kb": size / 1e3,
        "weights": weights,
        "weights_kb": 4 * weights / 1e3,
        "macs": now.macs,
        "macs_share": now.macs / dense.macs,
    }
    return Special(left=density, model=copy.deepcopy(model), fused=fused, delta=change), row


def _report(rows: list[dict[str, Any]], adapter: Adapt | None, folder: Path | None) -> Report:
    name = "fine-tuning" if adapter is None else adapter.kind
    report = Report(name=f"specialise ({name})", rows=rows, environment=environment())
    last = rows[-1]
    report.answer = (
        f"At {last['left']:.0%} of the channels: accuracy {last['accuracy']:.2%} with {last['learned']:,} learned "
        f"numbers ({last['delta_kb']:.0f} kB), {last['macs_share']:.1%} of the base's multiply-adds."
    )
    for row in rows:
        report.summary[f"accuracy at {row['left']:.0%}"] = row["accuracy"]
        report.summary[f"learned at {row['left']:.0%}"] = float(row["learned"])
    for column, title in (("learned", "learned numbers"), ("macs", "multiply-adds")):
        report.figures[f"accuracy-{column}.plotly"] = lines(
            {name: ([r[column] for r in rows], [r["accuracy"] for r in rows])}, x_title=title, y_title="accuracy"
        )
    if folder is not None:
        report.save(folder)
    return report
