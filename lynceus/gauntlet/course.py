"""The stations of the course: what is measured of every subject, in which group it counts, and which way is better."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lynceus.core.cost import cost, latency
from lynceus.core.errors import unknown
from lynceus.core.rng import generator
from lynceus.core.subject import Subject
from lynceus.core.types import as_float
from lynceus.gauntlet.entries import CentreView, Entry, train_subject
from lynceus.gauntlet.features import FeatureBank
from lynceus.gauntlet.probes import KNN, FewShot, LinearSVM, Logistic
from lynceus.gauntlet.shifts import SHIFTS, shifted
from lynceus.rewrite import crop_selection as cs
from lynceus.train.evaluate import Evaluate
from lynceus.trust.shift import Kind, shift, shift_set

if TYPE_CHECKING:
    from lynceus.gauntlet.run import GauntletConfig


@dataclass(kw_only=True)
class Context:
    """What a station sees."""

    entry: Entry
    subject: Subject
    model: nn.Module | None  # the trained classifier, when there is one
    train: Any
    test: Any
    seed: int
    config: GauntletConfig
    bank: FeatureBank
    folder: Any


@dataclass(frozen=True, kw_only=True)
class Station:
    """run: what is measured, name -> number. group: where its numbers count in the ranking; "" for beside it.

    lower: metrics where less is better. beside: metrics that are shown but do not count. noisy: depends on the machine
    and the moment, so that it never counts nor decides whether two runs are equal. modes: where it is measured."""

    run: Callable[[Context], dict[str, float]]
    group: str
    modes: tuple[str, ...]
    lower: tuple[str, ...] = ()
    beside: tuple[str, ...] = ()
    noisy: bool = False
    version: int = 1  # a changed protocol is another cell


def accuracy(c: Context) -> dict[str, float]:
    found = Evaluate(details=False, quiet=True)(c.subject, c.test).summary
    return {k: found[k] for k in ("accuracy", "macro_accuracy")}


def calibration(c: Context) -> dict[str, float]:
    found = Evaluate(details=False, quiet=True)(c.subject, c.test).summary
    return {"calibration error": found["ece"], "nll": found["nll"]}


def consistency(c: Context) -> dict[str, float]:
    """Answers (or nearest neighbours of frozen features) under shifts of one pixel in eight directions."""
    images = c.test.images[: c.config.shift_images]
    # a pixel cut from a tiny picture changes what it shows: repeat its border instead
    extend = c.config.radius if c.config.crop is None and min(images.shape[-2:]) < 28 else 0
    frozen = c.config.mode == "frozen"
    subject: Any = Subject(c.subject.embed, name=c.subject.name) if frozen else c.subject
    report = shift(subject, images, shift_set(c.config.radius, "8"), embedding=frozen, extend=extend, batch_size=128)
    kinds = {r["kind"]: r for r in report.rows}
    return {f"{k} {m}": float(kinds[k][m]) for k in kinds for m in ("consistency", "adversarial")}


def out_of_distribution(c: Context) -> dict[str, float]:
    """Accuracy under each light shift of style; for frozen features that of a logistic probe."""
    views = {name: c.test.hold(shifted(c.test.images, name, seed=c.seed)) for name in SHIFTS}
    if c.config.mode != "frozen":
        check = Evaluate(details=False, quiet=True)
        return {f"accuracy under {n}": check(c.subject, v).summary["accuracy"] for n, v in views.items()}
    import numpy as np

    train = c.bank.get(c.subject, c.train)
    vectors = np.concatenate([c.bank.get(c.subject, v).vectors for v in views.values()])
    scores, _ = Logistic(cs=(0.1,)).scores(
        train.vectors, np.asarray(train.labels), vectors, classes=len(c.train.classes), seed=c.seed
    )
    labels = np.asarray(c.test.labels)
    right = [(part.argmax(1) == labels).mean() for part in np.split(scores, len(views))]
    return {f"accuracy under {n}": float(r) for n, r in zip(views, right)}


def _probe(probe: Any, name: str) -> Callable[[Context], dict[str, float]]:
    def run(c: Context) -> dict[str, float]:
        train, test = c.bank.get(c.subject, c.train), c.bank.get(c.subject, c.test)
        return {name: float(probe.on(train, test, seed=c.seed).summary["accuracy"])}

    return run


def few_shot(c: Context) -> dict[str, float]:
    train, test = c.bank.get(c.subject, c.train), c.bank.get(c.subject, c.test)
    found = FewShot(episodes=c.config.episodes).on(train, test, seed=c.seed).summary
    return {f"few-shot {k.split(', ')[1]}": float(v) for k, v in found.items() if ", " in k}


def class_retrieval(c: Context) -> dict[str, float]:
    """Test pictures as queries among the training pictures, positives are of the same class."""
    from lynceus.gauntlet.copies import class_ranking

    train, test = c.bank.get(c.subject, c.train), c.bank.get(c.subject, c.test)
    return class_ranking(train.vectors, train.labels, test.vectors, test.labels)


def copies(c: Context) -> dict[str, float]:
    """Finding the original of attacked photographs."""
    from lynceus.gauntlet.copies import copy_detection

    return copy_detection(c.subject, c.config.photos, seed=c.seed, bank=c.bank)


def fine_tune(c: Context) -> dict[str, float]:
    trained = train_subject(
        c.entry,
        c.seed,
        c.train,
        c.config,
        c.folder / f"fine-tune-{c.config.finetune_steps}",
        steps=c.config.finetune_steps,
    )
    found = Evaluate(details=False, quiet=True)(trained.subject, c.test).summary
    return {"fine-tuned accuracy": found["accuracy"]}


def selection(c: Context) -> dict[str, float]:
    """Plain centre crop, crop selection and its cyclic form on the same network and views, and what was promised."""
    assert c.config.crop is not None
    assert c.model is not None
    r, side = c.config.radius, c.config.crop
    images, labels = c.test.images, torch.as_tensor(c.test.labels)
    n = min(images.shape[-2:]) - 2 * r
    moves = shift_set(r, "8")
    plain = CentreView(c.model, side)
    chosen = cs.crop_selection(c.model, input_size=side, view=n)
    cyclic = cs.crop_selection(c.model, input_size=side, view=n, cyclic=True)
    out: dict[str, float] = {}
    tested: list[tuple[str, nn.Module, Kind]] = [
        ("plain", plain, "both"),
        ("selected", chosen, "realistic"),
        ("cyclic selected", cyclic, "cyclic"),
    ]
    for name, model, kinds in tested:
        found = shift(model, images, moves, kind=kinds, view=n, labels=labels, batch_size=250)
        for row in found.rows:
            out[f"{name}: {row['kind']} consistency"] = float(row["consistency"])
            out[f"{name}: {row['kind']} adversarial"] = float(row["adversarial"])
            out[f"{name}: accuracy"] = float(row["accuracy"])
        if "certified" in found.summary:
            out[f"{name}: certified"] = found.summary["certified"]
    x = as_float(images)
    same = torch.cat([cs.same_crop(chosen, part, moves) for part in x.split(500)])
    out["same crop"] = float(same.double().mean())
    count = n - side + 1
    out["promised, all shifts"] = cs.probability_all(count, r)
    out["promised, single moves"] = sum(cs.probability_shift(count, m) for m in moves) / len(moves)
    draw = generator(c.seed, "random crops")
    right = []
    for _ in range(5):
        top, left = (int(torch.randint(r, r + count, (), generator=draw)) for _ in range(2))
        crop = Subject(c.model)
        guesses = [
            crop(as_float(part[..., top : top + side, left : left + side])).argmax(1) for part in images.split(250)
        ]
        right.append(float((torch.cat(guesses) == labels).double().mean()))
    out["random crop: accuracy"] = sum(right) / len(right)
    return out


def counted(c: Context) -> dict[str, float]:
    """Parameters and multiply-adds of one picture."""
    if not isinstance(c.subject.model, nn.Module):
        return {"params": 0.0}
    side = c.test.images.shape[-2:]
    found = cost(c.subject.model, c.subject.prepare(torch.zeros(1, 3, *side)))
    return {"params": float(found.params), "MACs": float(found.macs)}


def timed(c: Context) -> dict[str, float]:
    """Milliseconds of a pass, median, in this worker with its threads."""
    side, out = c.test.images.shape[-2:], {}
    for batch in c.config.latency_batches:
        x = torch.rand(batch, 3, *side, generator=generator(0, "latency"))
        out[f"ms, batch {batch}"] = float(latency(c.subject, x, repeats=c.config.latency_repeats, warmup=2).median)
    return out


BOTH = ("scratch", "frozen")
STATIONS: dict[str, Station] = {
    "accuracy": Station(run=accuracy, group="accuracy", modes=("scratch",), beside=("macro_accuracy",)),
    "calibration": Station(
        run=calibration, group="calibration", modes=("scratch",), lower=("calibration error", "nll")
    ),
    "knn": Station(run=_probe(KNN(k=20), "kNN"), group="frozen", modes=("frozen",)),
    "logistic": Station(run=_probe(Logistic(), "logistic"), group="frozen", modes=("frozen",)),
    "svm": Station(run=_probe(LinearSVM(cs=(1.0,)), "linear SVM"), group="frozen", modes=("frozen",)),
    "few-shot": Station(run=few_shot, group="few-shot", modes=("frozen",)),
    "retrieval": Station(run=class_retrieval, group="retrieval", modes=("frozen",), beside=("P@1", "P@5", "P@10")),
    "copies": Station(run=copies, group="copies", modes=("frozen",)),
    "shift": Station(run=consistency, group="shift", modes=BOTH),
    "ood": Station(run=out_of_distribution, group="out of distribution", modes=BOTH),
    "fine-tune": Station(run=fine_tune, group="fine-tune", modes=("frozen",)),
    "crop-selection": Station(run=selection, group="", modes=("scratch",), version=2),
    "cost": Station(run=counted, group="", modes=BOTH),
    "latency": Station(run=timed, group="", modes=BOTH, noisy=True),
}


def stations(config: GauntletConfig, entry: Entry) -> list[str]:
    """The stations that this entry passes, in order."""
    if config.stations is not None:
        for name in config.stations:
            if name not in STATIONS:
                raise unknown("station", name, STATIONS)
        chosen = [n for n in config.stations if config.mode in STATIONS[n].modes]
    else:
        chosen = [n for n, s in STATIONS.items() if config.mode in s.modes]
    without = set()
    if config.photos is None:
        without.add("copies")
    if config.crop is None or entry.kind == "function":
        without.add("crop-selection")
    if not config.finetune_steps or entry.kind == "function":
        without.add("fine-tune")
    return [n for n in chosen if n not in without]


def measure(name: str, context: Context) -> tuple[dict[str, float], float]:
    """The numbers of one station and the seconds they took."""
    start = time.monotonic()
    with torch.no_grad() if name != "fine-tune" else torch.enable_grad():
        values = STATIONS[name].run(context)
    return {k: float(v) for k, v in values.items()}, time.monotonic() - start
