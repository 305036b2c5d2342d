"""The gauntlet: any subjects through one course under equal protocols, ending in one table and one answer.

Battle of the Backbones: A Large-Scale Comparison of Pretrained Models across Computer Vision Tasks, NeurIPS 2023
datasets and benchmarks, arXiv 2310.19909. Reference: hsouri/Battle-of-the-Backbones and its bob-* repositories.

Every finished cell (subject, seed, station) is a small file that holds its numbers, seed, time and settings, under a
name made of what decides them. A run that was interrupted, at any moment, goes on where it was and repeats nothing.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from lynceus.core.config import digest, to_dict
from lynceus.core.errors import AdviceError, unknown
from lynceus.core.files import write_atomic
from lynceus.core.progress import progress
from lynceus.core.report import Report, environment
from lynceus.gauntlet.course import STATIONS, Context, measure, stations
from lynceus.gauntlet.engine import Engine, run_jobs
from lynceus.gauntlet.entries import Entry, enter, train_subject
from lynceus.gauntlet.features import FeatureBank
from lynceus.gauntlet.outcome import final, outcome


@dataclass(frozen=True, kw_only=True)
class GauntletConfig:
    """The course and its budget.

    mode: "scratch" trains every subject at an equal budget (a name from scratch, given weights go on from there);
      "frozen" reads features as they are, computed once and shared by all probes.
    steps, batch_size: the budget. seconds: processor seconds (on a GPU: seconds) of each training instead of `steps`:
      some steps are timed, and the schedule is as long as then fits; results depend on the machine.
    lr: peak rate of AdamW; with more than one, every subject tries the same ones on a tenth of the training images.
    augment: "plain", "small" (shift and flip), "photo" or "fine-tune". crop: train on random crops of this side and
      test on the central one, which leaves room for crop selection.
    seeds: of initialisation, order and draws; one training each. finalists: when more subjects than that train from
      scratch, all run with the first seed, and only that many best ones with the others too (None: all with all).
    size: side that pictures are resized to first; None: as they are when they lie in memory, 64 for files.
    test_share, limit: share held out when the data names no test split; at most this many pictures.
    stations: names of the stations, None for all of the mode. shift_images, radius: of the shift station.
    episodes: of few-shot. finetune_steps: frozen mode also fine-tunes for that long (0: not). photos: folder of
      photographs for copy detection (frozen mode).
    jobs, threads: processes and threads of each. `jobs` changes no result, `threads` the last digits.
    """

    mode: Literal["scratch", "frozen"] = "scratch"
    steps: int = 400
    seconds: float | None = None
    batch_size: int = 64
    lr: tuple[float, ...] = (2e-3,)
    weight_decay: float = 0.05
    warmup: float = 0.1
    label_smoothing: float = 0.0
    augment: str = "plain"
    crop: int | None = None
    seeds: tuple[int, ...] = (0, 1, 2)
    finalists: int | None = 4
    size: int | None = None
    test_share: float = 0.2
    limit: int | None = None
    stations: tuple[str, ...] | None = None
    shift_images: int = 256
    radius: int = 1
    episodes: int = 20
    finetune_steps: int = 0
    photos: str | None = None
    latency_batches: tuple[int, ...] = (1, 8)
    latency_repeats: int = 20
    jobs: int = 1
    threads: int = 1

    def __post_init__(self) -> None:
        if self.mode not in ("scratch", "frozen"):
            raise unknown("mode", str(self.mode), ("scratch", "frozen"))
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise AdviceError(f"seeds are different numbers, at least one, not {self.seeds}.")
        if not self.lr or self.steps < 1 or self.batch_size < 1:
            raise AdviceError("The budget needs at least one lr, one step and one image per step.")
        if self.finalists is not None and self.finalists < 2:
            raise AdviceError(f"finalists are at least 2, or None for all subjects, not {self.finalists}.")
        if not 0 < self.test_share < 1:
            raise AdviceError(f"test_share is a share between 0 and 1, not {self.test_share}.")


DEMO = GauntletConfig(steps=200, finalists=3, jobs=2, shift_images=200)
CIFAR10 = GauntletConfig(
    steps=600, batch_size=64, limit=10_000, crop=22, augment="plain", seeds=(0,), jobs=2, shift_images=500, lr=(2e-3,)
)
PRESETS: dict[str, GauntletConfig] = {"demo": DEMO, "cifar10": CIFAR10}
_ELSEWHERE = (
    "jobs",
    "threads",
    "seeds",
    "finalists",
    "stations",
    "latency_batches",
    "latency_repeats",
)  # not part of every key
_LEARNING = ("steps", "seconds", "batch_size", "lr", "weight_decay", "warmup", "label_smoothing", "augment", "crop")


@dataclass(frozen=True, kw_only=True)
class Job:
    """All cells of one subject under one seed."""

    entry: Entry
    seed: int
    config: GauntletConfig
    train: Any
    test: Any
    keys: dict[str, str] = field(default_factory=dict)
    folder: str = ""


def gauntlet(
    models: Sequence[Any],
    data: Any,
    *,
    config: GauntletConfig | None = None,
    out: str | Path | None = None,
    resume: bool = True,
    engine: Engine = "local",
    quiet: bool = False,
) -> Report:
    """Runs every model through the course on `data` and ranks them.

    models: names of `list_models()`, "timm:NAME", "raw pixels", "HOG", "colour histogram"; modules, Subjects and
      feature functions; run folders of trained models; (label, any of these) and (name, weights file).
    data: a labelled Dataset (its own test split, or a stratified one), or a pair (train, test).
    out: keeps cells, trained weights and the report; a later call continues there. resume=False starts it anew.
    Report: rows by rank; arrays "z", "spearman"; figures accuracy vs cost, z-scores, seeds, learning curves; `answer`
      says it in words.
    """
    config = config or GauntletConfig()
    entries = enter(models)
    train, test = divide(data, config, entries)
    folder = Path(out) if out is not None else Path(tempfile.mkdtemp(prefix="lynceus-gauntlet-"))
    try:
        if not resume and (folder / "cells").exists():
            for part in ("cells", "trained", "features"):
                shutil.rmtree(folder / part, ignore_errors=True)
        (folder / "cells").mkdir(parents=True, exist_ok=True)
        text = f"{test.name}: {len(train)} to train on, {len(test)} held out"

        def course(entries: Sequence[Entry], config: GauntletConfig) -> Report:
            jobs = plan(entries, train, test, config, folder)
            return outcome(_run(jobs, folder, config, engine, quiet), entries, config, data=text)

        many = config.finalists is not None and config.finalists < len(entries)
        if many and config.mode == "scratch" and len(config.seeds) > 1:
            heat = course(entries, replace(config, seeds=config.seeds[:1]))
            best = {row["subject"] for row in heat.rows[: config.finalists]}
            report = final(heat, course([e for e in entries if e.name in best], config))
        else:
            report = course(entries, config)
        report.environment = environment(min(config.seeds), engine=engine, jobs=config.jobs)
        if out is not None:
            report.save(folder)
        return report
    finally:
        if out is None:
            shutil.rmtree(folder, ignore_errors=True)


def plan(entries: Sequence[Entry], train: Any, test: Any, config: GauntletConfig, folder: Path) -> list[Job]:
    """One job per subject and seed, with the key of every cell."""
    prints = (train.fingerprint(), test.fingerprint())
    protocol = {k: v for k, v in to_dict(config).items() if k not in _ELSEWHERE}
    jobs = []
    for seed in config.seeds:
        for entry in entries:
            keys = {}
            for name in stations(config, entry):
                more = (config.latency_batches, config.latency_repeats) if name == "latency" else ()
                keys[name] = digest([entry.identity, name, STATIONS[name].version, protocol, more, prints, seed], 20)
            jobs.append(
                Job(entry=entry, seed=seed, config=config, train=train, test=test, keys=keys, folder=str(folder))
            )
    return jobs


def _run(
    jobs: Sequence[Job], folder: Path, config: GauntletConfig, engine: Engine, quiet: bool
) -> list[dict[str, Any]]:
    wanted = {key for job in jobs for key in job.keys.values()}

    def present() -> int:
        return sum((folder / "cells" / f"{key}.json").is_file() for key in wanted)

    before = present()
    with progress("gauntlet", total=len(wanted), unit="cells", done=before, quiet=quiet) as bar:
        if before:
            bar.note(f"{before} of {len(wanted)} cells were measured before; going on in {folder.resolve()}")
        seen = before

        def tick() -> None:
            nonlocal seen
            now = present()
            bar.advance(now - seen)
            seen = now

        open_jobs = [j for j in jobs if any(not (folder / "cells" / f"{k}.json").is_file() for k in j.keys.values())]
        run_jobs(run_job, open_jobs, engine=engine, workers=config.jobs, threads=config.threads, tick=tick)
    cells = []
    for job in jobs:
        for name, key in job.keys.items():
            cell = json.loads((folder / "cells" / f"{key}.json").read_text())
            # an equal subject under another label shares the cell
            cells.append({**cell, "subject": job.entry.name, "station": name})
    return cells


def run_job(job: Job) -> int:
    """Measures the cells of one job that are not there yet; returns how many. Runs in any process."""
    cells = Path(job.folder) / "cells"
    missing = [n for n, key in job.keys.items() if not (cells / f"{key}.json").is_file()]
    if not missing:
        return 0
    entry, config = job.entry, job.config
    protocol = {k: v for k, v in to_dict(config).items() if k not in _ELSEWHERE}
    learning = {k: protocol[k] for k in _LEARNING}
    name = digest([entry.identity, learning, job.train.fingerprint(), job.seed], 20)
    folder = Path(job.folder) / "trained" / name
    folder.mkdir(parents=True, exist_ok=True)
    bank = FeatureBank(Path(job.folder) / "features" if config.mode == "frozen" else None, quiet=True)
    model: Any = None
    curve: tuple[list[float], list[float]] = ([], [])
    settings: dict[str, Any] = {}
    if config.mode == "scratch":
        trained = train_subject(entry, job.seed, job.train, config, folder)
        subject, model, curve, settings = trained.subject, trained.model, trained.curve, trained.settings
    else:
        subject = entry.subject(job.seed, job.train.classes)
    context = Context(
        entry=entry, subject=subject, model=model, train=job.train, test=job.test, seed=job.seed, config=config,
        bank=bank, folder=folder,
    )  # fmt: skip
    for station in missing:
        values, seconds = measure(station, context)
        cell = {
            "subject": entry.name,
            "station": station,
            "seed": job.seed,
            "values": values,
            "seconds": seconds,
            "when": time.strftime("%Y-%m-%dT%H:%M:%S"),
            "settings": {**settings, "threads": torch.get_num_threads(), "protocol": protocol},
            "weights": str(folder / "run") if model is not None else None,
        }
        if station == "accuracy" and curve[0]:
            cell["curve"] = curve
        write_atomic(cells / f"{job.keys[station]}.json", json.dumps(cell, indent=1))
    return len(missing)


def divide(data: Any, config: GauntletConfig, entries: Sequence[Entry]) -> tuple[Any, Any]:
    """(train, test) Datasets in memory, of one size."""
    import lynceus.data

    if isinstance(data, tuple) and len(data) == 2:
        train, test = (lynceus.data.open(d) for d in data)
    else:
        data = lynceus.data.open(data)
        if config.limit is not None:
            data = data.take(config.limit)
        if data.labels is None or data.classes is None:
            raise AdviceError(
                f"The gauntlet needs labels, and {data.name} has none: one folder per class, or a label column."
            )
        train, test = data.train_test(config.test_share)
    for part in (train, test):
        if part.labels is None or (part.labels < 0).any():
            raise AdviceError(f"The gauntlet needs a label for every picture; {part.name} lacks some.")
    if train.classes != test.classes:
        raise AdviceError(f"Training and test pictures have other classes: {train.classes} and {test.classes}.")
    if train.labels is not None and len(set(train.labels.tolist())) < 2:
        raise AdviceError(f"{train.name} has a single class; a comparison of classifiers needs at least two.")
    size = config.size
    if size is None and train.images is None:
        size = 64
    train, test = in_memory(train, size), in_memory(test, size)
    if config.crop is not None and config.crop + 2 * config.radius > min(test.images.shape[-2:]):
        raise AdviceError(
            f"crop={config.crop} leaves no room for shifts of {config.radius} px in {tuple(test.images.shape)}."
        )
    return train, test


def in_memory(data: Any, size: int | None) -> Any:
    """The same samples as one uint8 tensor, at size x size when given."""
    from lynceus.tasks.classify import resized

    if data.images is not None and (size is None or tuple(data.images.shape[-2:]) == (size, size)):
        return data
    if size is None:
        raise AdviceError("Pictures from files need one size= to be compared at.")
    if data.images is None and 3 * size**2 * len(data) > 2**31:
        raise AdviceError(
            f"{len(data)} pictures of {size} x {size} do not fit into 2 GB; use limit= or a smaller size=."
        )
    parts: list[Tensor] = []
    kept: list[int] = []
    for start in range(0, len(data), 256):
        if data.images is not None:
            x = data.images[start : start + 256].float() / 255
            x = F.interpolate(x, (size, size), mode="bicubic", antialias=True, align_corners=False)
            parts.append((x * 255).round().clamp(0, 255).to(torch.uint8))
            kept += range(start, start + len(x))
            continue
        for i in range(start, min(start + 256, len(data))):
            for sample in data.__getitems__([i]):  # an unreadable picture is counted and left out
                parts.append((resized(sample.image, (size, size))[None] * 255).round().clamp(0, 255).to(torch.uint8))
                kept.append(i)
    return (data if len(kept) == len(data) else data.subset(kept)).hold(torch.cat(parts))


def preset(name: str, **changes: Any) -> GauntletConfig:
    """A named configuration, changed where wanted."""
    if name not in PRESETS:
        raise unknown("preset", name, PRESETS)
    return replace(PRESETS[name], **changes)
