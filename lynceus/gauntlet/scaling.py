"""Data scaling: how accuracy grows with the number of training images, and what more data of which kind would bring.

Sun, Shrivastava, Singh, Gupta, "Revisiting Unreasonable Effectiveness of Data in Deep Learning Era", ICCV 2017,
arXiv 1707.02968. No code is public. The grid (sizes x seeds x capacities, label noise, long tails) is run cell by cell,
each finished cell is kept, the laws are in `gauntlet.fits`.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np

from lynceus.core.config import digest, to_dict
from lynceus.core.errors import AdviceError
from lynceus.core.files import write_atomic
from lynceus.core.plots import lines
from lynceus.core.progress import progress
from lynceus.core.report import Report, environment
from lynceus.core.rng import derive
from lynceus.core.subject import Subject
from lynceus.core.types import Sample
from lynceus.gauntlet import fits
from lynceus.gauntlet.cells import Budget, Cell, CellData, ProbeCell, SupervisedCell, TrainCell, cell_key
from lynceus.gauntlet.features import FeatureBank, stratified
from lynceus.gauntlet.subsets import Relabelled, corrupt, near_duplicates, nested, thumbnails


@dataclass(frozen=True, kw_only=True)
class ScalingConfig:
    """The grid of a data-scaling study.

    sizes: training images per point, increasing; None: `smallest`, times `factor` each, up to all there are.
    seeds: repetitions; each draws its own subsets and initialisation. capacities: names that `train_cell` knows.
    budget: how long every cell trains. subset: "stratified" keeps the class proportions, "random" does not.
    noise: label-noise rates, run at `extra_sizes` with the last capacity. noise_model: "symmetric" or "pair".
    tails: imbalance ratios, likewise. extra_sizes: None means the second largest size.
    cosine: test pictures whose thumbnail has a cosine above it with a pool picture are near-duplicates, and the pool
    picture is left out; 1.0 looks for equal pictures only, 0 switches the search off.
    draws: bootstrap repetitions. gain: the improvement that "how many more" is asked for, 0.01 is one point.
    """

    sizes: tuple[int, ...] | None = None
    smallest: int = 100
    factor: float = 2.0
    seeds: int = 3
    capacities: tuple[str, ...] = ("resnet_nano",)
    budget: Budget = field(default_factory=Budget)
    subset: Literal["stratified", "random"] = "stratified"
    noise: tuple[float, ...] = ()
    noise_model: Literal["symmetric", "pair"] = "symmetric"
    tails: tuple[float, ...] = ()
    extra_sizes: tuple[int, ...] | None = None
    cosine: float = 0.98
    draws: int = 1000
    gain: float = 0.01

    def grid(self, pool: int) -> tuple[int, ...]:
        """The sizes for a pool of that many images."""
        if self.sizes is not None:
            if list(self.sizes) != sorted(set(self.sizes)) or self.sizes[0] < 2 or self.sizes[-1] > pool:
                raise AdviceError(
                    f"sizes must increase from at least 2 to at most {pool}, the images there are: {self.sizes}."
                )
            return self.sizes
        if self.factor <= 1:
            raise AdviceError(f"factor must be above 1, not {self.factor}.")
        count = int(math.log(pool / self.smallest, self.factor) + 1e-9) + 1 if pool >= self.smallest else 0
        sizes = tuple(round(self.smallest * self.factor**i) for i in range(count))
        if len(sizes) < 3:
            raise AdviceError(
                f"{pool} training images give {len(sizes)} sizes from {self.smallest} by {self.factor:g}; a law needs "
                f"3. Lower smallest, for instance smallest={max(pool // 8, 2)}."
            )
        return sizes

    def cells(self, pool: int) -> list[Cell]:
        """Every cell of the grid: seed by seed, the small sizes first."""
        sizes, last = self.grid(pool), self.capacities[-1]
        out = []
        for s in range(self.seeds):
            out += [Cell(capacity=c, n=n, seed=s, budget=self.budget) for n in sizes for c in self.capacities]
            for n in self.extra_sizes or sizes[-2:-1]:
                out += [Cell(capacity=last, n=n, seed=s, noise=p, budget=self.budget) for p in self.noise]
                out += [Cell(capacity=last, n=n, seed=s, tail=r, budget=self.budget) for r in self.tails]
        return out


@dataclass(kw_only=True)
class LearningCurve:
    """Finished cells and what they were run with; `report()` says what they mean."""

    config: ScalingConfig
    cells: list[Cell]
    results: list[dict[str, Any]]
    n_test: int
    class_counts: np.ndarray
    duplicates: int = 0
    ran: int = 0
    seed: int = 0
    label: str = "data"

    def values(self, key: str, *, capacity: str, n: int, noise: float = 0.0, tail: float = 1.0) -> np.ndarray:
        """`key` of the cells of one point, one entry per seed."""
        want = (capacity, n, noise, tail)
        return np.array(
            [r[key] for c, r in zip(self.cells, self.results) if (c.capacity, c.n, c.noise, c.tail) == want]
        )

    @property
    def sizes(self) -> list[int]:
        return sorted({c.n for c in self.cells if c.noise == 0 and c.tail == 1})

    def points(self, capacity: str, key: str = "accuracy") -> fits.Points:
        """The clean curve of one capacity."""
        table = np.stack([self.values(key, capacity=capacity, n=n) for n in self.sizes], 1)
        return fits.Points(
            n=np.array(self.sizes, float), accuracy=table, n_test=int(self.results[0].get("n_test", self.n_test))
        )

    def report(self) -> Report:
        """Table, figure and findings."""
        from lynceus.gauntlet.findings import findings

        return findings(self)


def learning_curve(
    data: Any,
    *,
    config: ScalingConfig = ScalingConfig(),
    train_cell: TrainCell | None = None,
    test: Any = None,
    test_fraction: float = 0.2,
    out: str | Path | None = None,
    seed: int = 0,
    workers: int = 1,
    quiet: bool = False,
) -> LearningCurve:
    """Runs the grid. Cells that are finished in `out` are not run again, so a killed study goes on where it was.

    data: a labelled data set, or a pair (pool, test). train_cell: (capacity, CellData, Budget, seed) -> dict with
    "accuracy", "train_loss", "class_accuracy"; default `SupervisedCell()`, which trains `create_model(capacity)`.
    workers: processes; the cells' results do not depend on it.
    """
    train_cell = train_cell or SupervisedCell()
    pool, test = _pool_and_test(data, test, test_fraction, seed)
    labels, test_labels = np.asarray(pool.labels), np.asarray(test.labels)
    classes = int(max(labels.max(), test_labels.max())) + 1
    duplicates = np.zeros(0, int)
    if config.cosine > 0:
        duplicates = np.unique(
            near_duplicates(thumbnails(test), thumbnails(pool), cosine=min(config.cosine, 0.99999))[:, 1]
        )
        if len(duplicates):
            keep = np.setdiff1d(np.arange(len(pool)), duplicates)
            pool, labels = pool.subset(keep), labels[keep]
    cells = config.cells(len(pool))
    job = _Job(pool=pool, test=test, labels=labels, classes=classes, config=config, train_cell=train_cell, seed=seed)
    stamp = digest([pool.fingerprint(), test.fingerprint(), config.subset, config.noise_model, seed])
    keys = [cell_key(cell, stamp, train_cell) for cell in cells]
    folder = Path(out) / "cells" if out is not None else None
    known = {key: value for key in keys if (value := _read(folder, key)) is not None}
    todo = [(cell, key) for cell, key in zip(cells, keys) if key not in known]
    with progress("learning curve", total=len(cells), unit="cells", done=len(known), quiet=quiet) as bar:
        for cell, key, result in _run(job, todo, workers):
            known[key] = result
            _write(folder, key, cell, result)
            bar.advance(n=cell.n, accuracy=result["accuracy"])
    counts = np.bincount(labels, minlength=classes)
    return LearningCurve(
        config=config,
        cells=cells,
        results=[known[key] for key in keys],
        n_test=len(test),
        class_counts=counts,
        duplicates=len(duplicates),
        ran=len(todo),
        seed=seed,
        label=str(getattr(pool, "name", "data")),
    )


def _pool_and_test(data: Any, test: Any, fraction: float, seed: int) -> tuple[Any, Any]:
    if isinstance(data, (tuple, list)) and len(data) == 2 and not isinstance(data[0], Sample):
        data, test = data
    if data is None or not hasattr(data, "subset") or len(data) == 0:
        raise AdviceError("A data-scaling study needs a labelled data set, for instance data.open('digits').")
    for part in (data, test):
        labels = None if part is None else part.labels
        if part is not None and (labels is None or len(labels) == 0 or np.min(labels) < 0):
            raise AdviceError("Every picture of a data-scaling study needs a label; leave out those without.")
    if len(np.unique(data.labels)) < 2:
        raise AdviceError("The data has a single class; there is nothing to learn.")
    if test is not None:
        return data, test
    if getattr(data, "splits", None) is not None:
        return data.train_test(fraction, seed=seed)
    rest, taken = stratified(np.asarray(data.labels), fraction, seed=seed)
    return data.subset(rest), data.subset(taken)


@dataclass(kw_only=True)
class _Job:
    pool: Any
    test: Any
    labels: np.ndarray
    classes: int
    config: ScalingConfig
    train_cell: TrainCell
    seed: int

    def __call__(self, cell: Cell) -> dict[str, Any]:
        draw = derive(self.seed, "cell", cell.seed)
        (index,) = nested(self.labels, [cell.n], seed=draw, how=self.config.subset, tail=cell.tail)
        labels = self.labels
        if cell.noise:
            labels = corrupt(labels, cell.noise, seed=draw, how=self.config.noise_model, classes=self.classes)
        train = Relabelled(self.pool.subset(index), labels[index])
        data = CellData(train=train, labels=labels[index], test=self.test, classes=self.classes)
        result = self.train_cell(cell.capacity, data, cell.budget, draw)
        missing = {"accuracy", "train_loss"} - result.keys()
        if missing:
            raise AdviceError(
                f"The training function must return {' and '.join(sorted(missing))}; it gave {sorted(result)}."
            )
        counts = np.bincount(labels[index], minlength=self.classes)
        return {**result, "class_counts": counts.tolist()}


_worker_job: _Job | None = None


def _start_worker(job: _Job) -> None:
    from lynceus.core.workers import begin

    global _worker_job
    _worker_job = job
    begin()


def _worker(cell: Cell) -> dict[str, Any]:
    assert _worker_job is not None
    return _worker_job(cell)


def _run(job: _Job, todo: list[tuple[Cell, str]], workers: int) -> Iterable[tuple[Cell, str, dict[str, Any]]]:
    if workers <= 1 or len(todo) < 2:
        for cell, key in todo:
            yield cell, key, job(cell)
        return
    import multiprocessing
    from concurrent.futures import ProcessPoolExecutor, as_completed

    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker, initargs=(job,)) as pool:
        futures = {pool.submit(_worker, cell): (cell, key) for cell, key in todo}
        try:
            for future in as_completed(futures):
                yield *futures[future], future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _read(folder: Path | None, key: str) -> dict[str, Any] | None:
    if folder is None or not (folder / f"{key}.json").is_file():
        return None
    return json.loads((folder / f"{key}.json").read_text())["result"]


def _write(folder: Path | None, key: str, cell: Cell, result: dict[str, Any]) -> None:
    if folder is None:
        return
    write_atomic(folder / f"{key}.json", json.dumps({"cell": to_dict(cell), "result": result}, default=float))


@dataclass(frozen=True, kw_only=True)
class DataScaling:
    """Check: the learning curve of a subject's frozen features (a logistic probe on growing subsets), with its law.

    For curves of models trained from scratch on growing subsets use `learning_curve`. The sizes default to a factor 2
    from four images per class. Rows are the sizes and the laws; the summary holds slope, fit and forecast."""

    needs: ClassVar[frozenset[str]] = frozenset({"features", "labels"})

    config: ScalingConfig = ScalingConfig(smallest=0)
    test_fraction: float = 0.3
    out: str | None = None
    bank: FeatureBank | None = field(default=None, compare=False, repr=False)

    def __call__(self, subject: Subject, data: Any, *, seed: int = 0, bank: FeatureBank | None = None) -> Report:
        """data: a labelled Dataset or a pair (pool, test)."""
        subject.require(self.needs)
        pool, test = _pool_and_test(data, None, self.test_fraction, seed)
        smallest = self.config.smallest or 4 * len(np.unique(pool.labels))
        config = dataclasses.replace(self.config, capacities=(subject.name,), smallest=smallest)
        cell = ProbeCell(subjects={subject.name: subject}, bank=bank or self.bank or FeatureBank(quiet=True))
        # the model's own key, since its name alone does not say which weights made a cell
        out = Path(self.out) / cell.bank.extractor(subject).space if self.out is not None else None
        curve = learning_curve((pool, test), config=config, train_cell=cell, out=out, seed=seed)
        report = curve.report()
        report.environment = environment(seed=seed, subject=subject.name)
        report.notes.insert(
            0, "Frozen features with a logistic probe: no budget applies, the probe is solved to the end."
        )
        return report


def curve_figure(curve: LearningCurve, found: dict[str, fits.Fit], shown: Sequence[str]) -> bytes:
    """Accuracy (linear) over images (log): the points of each capacity and the chosen law with its band."""
    series: dict[str, tuple[Any, Any]] = {}
    bands: dict[str, tuple[Any, Any]] = {}
    for capacity in shown:
        fit = found[capacity]
        n = np.geomspace(fit.points.n[0], 2 * fit.points.n[-1], 40)
        series[f"{capacity}: measured"] = (fit.points.n, 100 * fit.points.mean)
        low = 100 * (fit.points.mean - 1.96 * fit.points.error)
        bands[f"{capacity}: measured"] = (low, 200 * fit.points.mean - low)
        name = f"{capacity}: {fit.chosen} law"
        series[name] = (n, 100 * fit.best(n))
        spread = np.percentile(fits.predict(fit.chosen, fit.best.draws[:, None, :], n), [2.5, 97.5], axis=0)
        bands[name] = (100 * spread[0], 100 * spread[1])
    return lines(series, bands=bands, x_title="training images", y_title="test accuracy, %", log_x=True)
