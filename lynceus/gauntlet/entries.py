"""Who runs the gauntlet: names, weights, modules, feature functions, each as an Entry that can travel to a worker."""

from __future__ import annotations

import copy
import csv
import dataclasses
import hashlib
import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from lynceus.backbones import create_model
from lynceus.backbones._table import family_module, variants
from lynceus.core.config import digest, to_dict
from lynceus.core.errors import AdviceError, MissingError, unknown
from lynceus.core.files import write_atomic
from lynceus.core.identity import model_key
from lynceus.core.rng import borrowed, derive
from lynceus.core.subject import Subject
from lynceus.core.types import Batch
from lynceus.gauntlet.baselines import FUNCTIONS, baseline
from lynceus.gauntlet.features import FeatureBank
from lynceus.recipes.supervised import PRESETS, Supervised
from lynceus.tasks.classify import Classify
from lynceus.train.checkpoint import load_model, save_model
from lynceus.train.fit import FitConfig, fit

if TYPE_CHECKING:
    from lynceus.gauntlet.run import GauntletConfig


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One competitor. kind: "name" (built fresh from `source` for every seed), "weights" (name, file), "object"
    (a module or Subject), "function" (features without weights). identity: what cells are filed under."""

    name: str
    kind: Literal["name", "weights", "object", "function"]
    source: Any
    identity: str

    @property
    def seeded(self) -> bool:
        """Whether another seed is another network even without training."""
        return self.kind == "name"

    def subject(self, seed: int, classes: Sequence[str]) -> Subject:
        """The competitor as it stands, untrained here."""
        if self.kind in ("object", "function"):
            return Subject(self.source, name=self.name)
        return Subject(self.module(seed, len(classes)), name=self.name, needs_grad=False)

    def module(self, seed: int, classes: int) -> nn.Module:
        """A module of its own to train or read. Raises AdviceError for what has no weights."""
        if self.kind == "name":
            with borrowed(seed, "init", self.source):
                return create_model(self.source, num_classes=classes)
        if self.kind == "weights":
            name, file = self.source
            return load_model(file) if name is None else create_model(name, weights=file)
        inner = self.source.model if isinstance(self.source, Subject) else self.source
        if not isinstance(inner, nn.Module):
            raise AdviceError(f"{self.name} is a function: it has no weights to train. Use mode='frozen' for it.")
        return copy.deepcopy(inner)


def enter(models: Sequence[Any]) -> list[Entry]:
    """Entries of whatever the caller named. Bad names and missing files are refused before any work."""
    if isinstance(models, (str, nn.Module, Subject)) or not isinstance(models, Sequence) or not len(models):
        raise AdviceError("gauntlet takes a list of models, such as ['resnet_nano', 'vit_nano'], at least one.")
    entries: list[Entry] = []
    for model in models:
        entry = _enter(model)
        same = sum(e.name == entry.name or e.name.startswith(f"{entry.name} (") for e in entries)
        entries.append(dataclasses.replace(entry, name=f"{entry.name} ({same + 1})") if same else entry)
    return entries


def _enter(model: Any) -> Entry:
    if isinstance(model, Entry):
        return model
    if isinstance(model, tuple) and len(model) == 2 and isinstance(model[0], str):
        label, what = model
        if isinstance(what, (str, Path)):
            known = label in variants() or label.startswith("timm:")
            return _weights(label, label if known else None, Path(what))
        return dataclasses.replace(_object(what), name=label)
    if isinstance(model, Path):
        return _weights(model.name, None, model)
    if isinstance(model, str):
        if model in FUNCTIONS:
            return Entry(name=model, kind="function", source=baseline(model), identity=f"baseline {model}")
        if model.startswith("timm:"):
            create_model(model)  # an unknown name must fail now, not in an hour
            return Entry(name=model, kind="name", source=model, identity=model)
        table = variants()
        if model not in table:
            if Path(model).exists():
                return _weights(Path(model).name, None, Path(model))
            how = "Also 'timm:NAME', a run folder, or " + ", ".join(repr(f) for f in FUNCTIONS) + "."
            raise unknown("model", model, table, how=how)
        config = family_module(table[model]).VARIANTS[model]
        return Entry(name=model, kind="name", source=model, identity=f"{model} {digest(to_dict(config))}")
    return _object(model)


def _weights(label: str, name: str | None, path: Path) -> Entry:
    if not path.exists():
        raise MissingError(f"There are no weights at {str(path)!r} (looked at {path.resolve()}).")
    from lynceus.train.checkpoint import model_file

    file = model_file(path) if name is None else path
    code = hashlib.blake2b(file.read_bytes(), digest_size=12).hexdigest()
    return Entry(name=label, kind="weights", source=(name, str(file)), identity=f"{name} {code}")


def _object(model: Any) -> Entry:
    if not callable(model):
        raise AdviceError(f"gauntlet takes names, modules, Subjects and functions, not {type(model).__name__}.")
    subject = model if isinstance(model, Subject) else None
    inner = subject.model if subject else model
    name = (
        subject.name
        if subject
        else str(getattr(model, "name", None) or getattr(model, "__name__", type(model).__name__))
    )
    if isinstance(inner, nn.Module):
        key = model_key(subject or Subject(copy.deepcopy(inner)))
        return Entry(name=name, kind="object", source=model, identity=key.removeprefix("object-"))
    base = inner.func if isinstance(inner, partial) else inner
    code = f"{getattr(base, '__module__', '')}.{getattr(base, '__qualname__', type(base).__qualname__)}"
    features = subject._features if subject else None
    source = subject or Subject(model, features=partial(_listed, model), name=name)
    more = getattr(getattr(features, "func", features), "__qualname__", "")
    return Entry(name=name, kind="function", source=source, identity=f"{code} {more} {getattr(subject, 'size', None)}")


def _listed(function: Any, image: Tensor) -> list[Tensor]:
    return [function(image)]


# ---- training ------------------------------------------------------------------------------------------------------
class CentreView(nn.Module):
    """A classifier that reads the central `side` x `side` pixels of whatever it is given."""

    owns_pixels = True

    def __init__(self, model: nn.Module, side: int):
        super().__init__()
        self.inner, self.side = model, side
        self.classes = getattr(model, "classes", None)

    def centre(self, image: Tensor) -> Tensor:
        """The central pixels."""
        top, left = (image.shape[-2] - self.side) // 2, (image.shape[-1] - self.side) // 2
        return image[..., top : top + self.side, left : left + self.side]

    def forward(self, image: Tensor) -> Tensor:
        return self.inner(self.centre(image))

    def embed(self, image: Tensor) -> list[Tensor]:
        """The pooled vector of the centre."""
        return [Subject(self.inner).embed(self.centre(image))]


class Cropped(Supervised):
    """Supervised learning from random crops of `side` pixels; what it learns is tested on the central crop."""

    def __init__(self, *args: Any, side: int, **options: Any):
        super().__init__(*args, **options)
        self.side = side

    def augment(self, batch: Batch, generator: torch.Generator) -> Batch:
        """A random crop per image, then what the configuration says."""
        b, _, h, w = batch.image.shape
        top = torch.randint(0, h - self.side + 1, (b,), generator=generator).to(batch.image.device)
        left = torch.randint(0, w - self.side + 1, (b,), generator=generator).to(batch.image.device)
        windows = batch.image.unfold(2, self.side, 1).unfold(3, self.side, 1)
        image = windows[torch.arange(b, device=batch.image.device), :, top, left]
        small = Batch(
            image=image, sizes=[(self.side, self.side)] * b, label=batch.label, ids=batch.ids, extra=batch.extra
        )
        return super().augment(small, generator)

    def describe(self) -> dict[str, Any]:
        return {**super().describe(), "side": self.side}


@dataclass(kw_only=True)
class Trained:
    """A subject after training. curve: (steps, losses). settings: what was chosen for it."""

    subject: Subject
    model: nn.Module | None
    curve: tuple[list[float], list[float]]
    settings: dict[str, Any]


def train_subject(
    entry: Entry, seed: int, train: Any, config: GauntletConfig, folder: Path, *, steps: int | None = None
) -> Trained:
    """Trains the entry on `train` with the gauntlet's budget: from scratch when it is a name, else from its weights.

    A finished training in `folder` is read back, an interrupted one goes on where it was. Features without weights
    get a logistic head."""
    classes = train.classes
    if entry.kind == "function":
        return Trained(
            subject=with_head(entry.subject(seed, classes), train),
            model=None,
            curve=([], []),
            settings={"head": "logistic"},
        )
    rate = config.lr[0] if len(config.lr) == 1 else _sweep(entry, seed, train, config, folder)
    run = folder / "run"
    if config.seconds and steps is None:
        steps = _steps_that_fit(entry, seed, train, config, folder)
    if not (run / "model.safetensors").is_file():
        recipe = _recipe(entry, seed, classes, config)
        options = _fit_config(config, seed, rate, steps)
        report = fit(recipe, train, config=options, out=run, resume=True)
        table = {k.removeprefix("log."): v.tolist() for k, v in report.arrays.items() if k.startswith("log.")}
        _write_csv(run / "curve.csv", table.get("step", []), table.get("loss", []))
        save_model(recipe.export(), run / "model.safetensors")
        for part in ("checkpoints/last.pt", "checkpoints/last.safetensors"):
            (run / part).unlink(missing_ok=True)
    inner = _own_backbone(entry, seed, classes)
    model = load_model(run / "model.safetensors", backbone=inner)
    settings = {"lr": rate, "steps": steps or config.steps, "batch_size": config.batch_size}
    return Trained(
        subject=as_subject(model, entry.name, config),
        model=model,
        curve=_read_csv(run / "curve.csv"),
        settings=settings,
    )


def _own_backbone(entry: Entry, seed: int, classes: Sequence[str]) -> nn.Module | None:
    """A fresh module for weights whose architecture is not one of the library's own names."""
    if entry.kind == "name":
        return None
    module = entry.module(seed, len(classes))
    backbone: Any = getattr(module, "backbone", module)
    if getattr(backbone, "num_classes", None) != len(classes) and hasattr(backbone, "reset_classifier"):
        backbone.reset_classifier(len(classes))
    return backbone


def as_subject(model: nn.Module, name: str, config: GauntletConfig) -> Subject:
    """The trained classifier as checks see it: the central crop when the gauntlet trains on crops."""
    if not config.crop:
        return Subject(model, name=name, needs_grad=False)
    view = CentreView(model, config.crop).eval()
    return Subject(view, name=name, needs_grad=False, features=view.embed)


def _recipe(entry: Entry, seed: int, classes: Sequence[str], config: GauntletConfig) -> Supervised:
    module = entry.module(seed, len(classes))
    backbone = getattr(module, "backbone", module)
    task = Classify(classes=tuple(classes), label_smoothing=config.label_smoothing)
    if config.augment not in PRESETS:
        raise unknown("augment", config.augment, PRESETS)
    options = PRESETS[config.augment]
    with borrowed(seed, "head", entry.name):
        if config.crop:
            return Cropped(task, backbone, options, side=config.crop)
        return Supervised(task, backbone, options)


def _fit_config(config: GauntletConfig, seed: int, lr: float, steps: int | None) -> FitConfig:
    return FitConfig(
        steps=steps or config.steps,
        batch_size=config.batch_size,
        lr=lr,
        weight_decay=config.weight_decay,
        warmup=config.warmup,
        seed=derive(seed, "fit") % 2**31,
        device="cpu" if not torch.cuda.is_available() else "auto",
        quiet=True,
    )


def _steps_that_fit(entry: Entry, seed: int, train: Any, config: GauntletConfig, folder: Path) -> int:
    """Steps of this entry that take `config.seconds`; timed once on a copy, then read back from `folder`."""
    file = folder / "budget.json"
    if file.is_file():
        return int(json.loads(file.read_text())["steps"])
    clock = time.perf_counter if torch.cuda.is_available() else time.process_time
    spent = []
    for steps in (4, 20):  # the difference leaves out what starting costs
        start = clock()
        fit(_recipe(entry, seed, train.classes, config), train, config=_fit_config(config, seed, config.lr[0], steps))
        spent.append(clock() - start)
    each = max((spent[1] - spent[0]) / 16, 1e-6)
    steps = max(1, round(float(config.seconds or 0) / each))
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(file, json.dumps({"steps": steps, "seconds_per_step": each}))
    return steps


def _sweep(entry: Entry, seed: int, train: Any, config: GauntletConfig, folder: Path) -> float:
    """The learning rate that does best on a tenth of the training images; every subject tries the same ones."""
    from lynceus.train.evaluate import Evaluate

    rest, held = train.split(0.9, 0.1, seed=derive(seed, "sweep") % 2**31)
    found = []
    for lr in config.lr:
        trained = train_subject(entry, seed, rest, dataclasses.replace(config, lr=(lr,)), folder / f"lr{lr:g}")
        found.append(Evaluate(details=False, quiet=True)(trained.subject, held).summary["accuracy"])
    return config.lr[int(np.argmax(found))]


def with_head(subject: Subject, train: Any, *, bank: FeatureBank | None = None, c: float = 1.0) -> Subject:
    """Features without weights, with a logistic head solved on `train`: a classifier like the others."""
    from sklearn.linear_model import LogisticRegression

    known = (bank or FeatureBank(quiet=True)).get(subject, train)
    mean, scale = known.vectors.mean(0), known.vectors.std(0) + 1e-6
    probe = LogisticRegression(C=c, max_iter=1000).fit((known.vectors - mean) / scale, known.labels)
    count = len(train.classes)
    weight, bias = np.zeros((count, known.vectors.shape[1])), np.full(count, -1e9)
    if len(probe.classes_) == 2 and probe.coef_.shape[0] == 1:
        probe.coef_, probe.intercept_ = (
            np.stack([-probe.coef_[0], probe.coef_[0]]) / 2,
            np.array([-1, 1]) * probe.intercept_ / 2,
        )
    weight[probe.classes_], bias[probe.classes_] = probe.coef_, probe.intercept_
    w = torch.from_numpy(weight / scale).float()
    b = torch.from_numpy(bias - (weight / scale) @ mean).float()

    def logits(image: Tensor) -> Tensor:
        return subject.embed(image).float() @ w.T + b

    return Subject(logits, name=subject.name, classes=train.classes, features=lambda x: [subject.embed(x)])


def _write_csv(path: Path, steps: list[float], losses: list[float]) -> None:
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False, newline="") as file:
        csv.writer(file).writerows(zip(steps, losses))
    Path(file.name).replace(path)


def _read_csv(path: Path) -> tuple[list[float], list[float]]:
    if not path.is_file():
        return [], []
    with open(path, newline="") as file:
        rows = [(float(a), float(b)) for a, b in csv.reader(file)]
    return [r[0] for r in rows], [r[1] for r in rows]
