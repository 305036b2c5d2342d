"""Many subjects, many cells, one ranking: z-scores by group, intervals of ranks, stability, correlations of cells.

Battle of the Backbones: A Large-Scale Comparison of Pretrained Models across Computer Vision Tasks, NeurIPS 2023
datasets and benchmarks, arXiv 2310.19909. Reference: hsouri/Battle-of-the-Backbones (MIT), bob-retrieval. The score is
theirs: z over the pool with the population's standard deviation, averaged inside groups, then over groups.

A cell is one metric of one task on one data set under one protocol. A table maps subject -> cell -> value; a missing
cell, None and nan mean "not measured". Every z depends on the pool: the ranking says which subjects it had, and how it
changes when one of them leaves.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from lynceus.core.errors import AdviceError, unknown
from lynceus.core.report import Report
from lynceus.core.rng import numpy_generator

Table = Mapping[str, Mapping[str, float | None]]


@dataclass(frozen=True, kw_only=True)
class Ranking:
    """The outcome, best subject first.

    subjects: names. scores: mean z of each, averaged inside groups first; nan when it has no cell. cells: names of the
    cells that counted. z: (subjects, cells), larger is better, nan for missing. counts: cells present of each subject.
    groups: cell -> group. dropped: cell -> why it does not count.
    """

    subjects: tuple[str, ...]
    scores: Float[np.ndarray, " n"]
    cells: tuple[str, ...]
    z: Float[np.ndarray, "n m"]
    counts: np.ndarray
    groups: dict[str, str]
    dropped: dict[str, str]

    @property
    def ranks(self) -> dict[str, int]:
        """1 is best; equal scores share the better rank."""
        return {s: 1 + int(np.sum(self.scores > v + 1e-12)) for s, v in zip(self.subjects, self.scores)}

    def score(self, subject: str) -> float:
        if subject not in self.subjects:
            raise unknown("subject", subject, self.subjects)
        return float(self.scores[self.subjects.index(subject)])


def rank(
    table: Table,
    *,
    lower_is_better: Collection[str] = (),
    groups: Mapping[str, str] | None = None,
) -> Ranking:
    """Mean z-scores of the subjects of `table`.

    lower_is_better: cells that are errors, distances or costs; their z is flipped. groups: cell -> group name; cells
    without one form one group together. A cell that is equal for all, or that fewer than two subjects have, is dropped.
    """
    subjects, cells, values = matrix(table)
    flipped = [c for c in lower_is_better if c not in cells]
    if flipped:
        raise unknown("cell", flipped[0], cells, how="(in lower_is_better)")
    sign = np.array([-1.0 if c in lower_is_better else 1.0 for c in cells])
    z, dropped = zscores(values, cells)
    keep = [i for i, c in enumerate(cells) if c not in dropped]
    z, kept = (z * sign)[:, keep], tuple(cells[i] for i in keep)
    group = {c: (groups or {}).get(c, "") for c in kept}
    scores = _grouped(z, [group[c] for c in kept])
    order = np.argsort(np.where(np.isnan(scores), np.inf, -scores), kind="stable")
    return Ranking(
        subjects=tuple(subjects[i] for i in order),
        scores=scores[order],
        cells=kept,
        z=z[order],
        counts=(~np.isnan(z)).sum(1)[order],
        groups=group,
        dropped=dropped,
    )


def matrix(table: Table) -> tuple[list[str], list[str], Float[np.ndarray, "n m"]]:
    """Subjects, cells (both in order of appearance) and values (nan for missing)."""
    if len(table) == 0:
        raise AdviceError("There is nothing to rank: the table has no subject.")
    subjects = list(table)
    cells = list(dict.fromkeys(c for row in table.values() for c in row))
    values = np.full((len(subjects), len(cells)), np.nan)
    for i, subject in enumerate(subjects):
        for j, cell in enumerate(cells):
            value = table[subject].get(cell)
            values[i, j] = np.nan if value is None else float(value)
    if np.isinf(values).any():
        i, j = np.argwhere(np.isinf(values))[0]
        raise AdviceError(f"The cell {cells[j]!r} of {subjects[i]!r} is infinite; leave it out (None) if it failed.")
    return subjects, cells, values


def zscores(values: Float[np.ndarray, "n m"], cells: Sequence[str]) -> tuple[Float[np.ndarray, "n m"], dict[str, str]]:
    """(value - mean) / population std of each column over those that have it, and the cells that tell nothing."""
    z, dropped = np.full(values.shape, np.nan), {}
    for j, cell in enumerate(cells):
        here = ~np.isnan(values[:, j])
        column = values[here, j]
        if len(column) < 2:
            dropped[cell] = f"measured on {len(column)} of {len(values)} subjects"
            continue
        std = column.std()
        if std <= 1e-12 * max(1.0, float(np.abs(column).max())):
            dropped[cell] = "equal for all subjects"
            continue
        z[here, j] = (column - column.mean()) / std
    return z, dropped


def _grouped(z: Float[np.ndarray, "n m"], groups: Sequence[str]) -> Float[np.ndarray, " n"]:
    """Mean over groups of the means of the present cells of each."""
    names = list(dict.fromkeys(groups))
    means = np.full((len(z), len(names)), np.nan)
    for k, name in enumerate(names):
        part = z[:, [i for i, g in enumerate(groups) if g == name]]
        count = (~np.isnan(part)).sum(1)
        means[:, k] = np.where(count > 0, np.nansum(part, 1) / np.maximum(count, 1), np.nan)
    count = (~np.isnan(means)).sum(1)
    return np.where(count > 0, np.nansum(means, 1) / np.maximum(count, 1), np.nan)


def rank_intervals(
    tables: Sequence[Table] | Table,
    *,
    lower_is_better: Collection[str] = (),
    groups: Mapping[str, str] | None = None,
    draws: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> dict[str, tuple[float, float]]:
    """Bootstrap interval of each subject's rank.

    tables: one table per seed, with the same subjects: seeds are drawn with replacement, for each subject on its own,
    and cells too inside every group; one table alone resamples its cells only.
    """
    many = [tables] if isinstance(tables, Mapping) else list(tables)
    subjects, cells, _ = matrix({s: {c: v for t in many for c, v in t.get(s, {}).items()} for t in many for s in t})
    stack = np.stack([_aligned(t, subjects, cells) for t in many])  # (seeds, subjects, cells)
    sign = np.array([-1.0 if c in lower_is_better else 1.0 for c in cells])
    names = [(groups or {}).get(c, "") for c in cells]
    rng = numpy_generator(seed, "rank_intervals")
    ranks = np.full((draws, len(subjects)), np.nan)
    rows = np.arange(len(subjects))[:, None]
    members = {g: np.array([i for i, n in enumerate(names) if n == g]) for g in dict.fromkeys(names)}
    for d in range(draws):
        picks = rng.integers(len(many), size=(len(many), len(subjects)))
        values = _nanmean(stack[picks, rows.T]) if len(many) > 1 else stack[0]
        columns = np.concatenate([rng.choice(m, len(m)) for m in members.values()])
        z, _dropped = zscores(values[:, columns], [f"{cells[i]} {k}" for k, i in enumerate(columns)])
        scores = _grouped(z * sign[columns], [names[i] for i in columns])
        better = (scores[None] > scores[:, None] + 1e-12).sum(1)
        equal = (np.abs(scores[None] - scores[:, None]) <= 1e-12).sum(1)
        ranks[d] = np.where(np.isnan(scores), np.nan, 1 + better + (equal - 1) / 2)
    tail = 100 * (1 - level) / 2
    out = {}
    for i, subject in enumerate(subjects):
        known = ranks[~np.isnan(ranks[:, i]), i]
        if len(known):
            low, high = np.percentile(known, [tail, 100 - tail])
            out[subject] = (float(low), float(high))
        else:
            out[subject] = (math.nan, math.nan)
    return out


def _aligned(table: Table, subjects: Sequence[str], cells: Sequence[str]) -> np.ndarray:
    values = np.full((len(subjects), len(cells)), np.nan)
    for i, s in enumerate(subjects):
        for j, c in enumerate(cells):
            value = table.get(s, {}).get(c)
            values[i, j] = np.nan if value is None else float(value)
    return values


def _nanmean(values: np.ndarray) -> np.ndarray:
    count = (~np.isnan(values)).sum(0)
    return np.where(count > 0, np.nansum(values, 0) / np.maximum(count, 1), np.nan)


def mean_table(tables: Sequence[Table]) -> dict[str, dict[str, float]]:
    """The mean of each cell over several tables (seeds), over those that have it."""
    subjects = list(dict.fromkeys(s for t in tables for s in t))
    cells = list(dict.fromkeys(c for t in tables for row in t.values() for c in row))
    mean = _nanmean(np.stack([_aligned(t, subjects, cells) for t in tables]))
    return {
        s: {c: float(mean[i, j]) for j, c in enumerate(cells) if not math.isnan(mean[i, j])}
        for i, s in enumerate(subjects)
    }


def leave_one_out(
    table: Table, *, lower_is_better: Collection[str] = (), groups: Mapping[str, str] | None = None
) -> dict[str, tuple[int, int]]:
    """Best and worst rank of each subject, counted among itself and the others, when any one other leaves the pool.

    A rank is counted in the full pool's terms: the subject that left keeps its place above or below."""
    full = rank(table, lower_is_better=lower_is_better, groups=groups).ranks
    out = {s: (r, r) for s, r in full.items()}
    if len(table) < 3:
        return out
    for gone in table:
        rest = {s: row for s, row in table.items() if s != gone}
        present = {c for row in rest.values() for c in row}
        ranks = rank(rest, lower_is_better=[c for c in lower_is_better if c in present], groups=groups).ranks
        for s, r in ranks.items():
            place = r + (1 if full[gone] < full[s] else 0)
            out[s] = (min(out[s][0], place), max(out[s][1], place))
    return out


def correlations(table: Table, *, minimum: int = 3) -> tuple[list[str], Float[np.ndarray, "m m"]]:
    """Spearman's rank correlation of every pair of cells, over the subjects with both; nan below `minimum` of them."""
    from scipy.stats import rankdata

    _subjects, cells, values = matrix(table)
    out = np.full((len(cells), len(cells)), np.nan)
    for i in range(len(cells)):
        for j in range(i, len(cells)):
            both = ~np.isnan(values[:, i]) & ~np.isnan(values[:, j])
            if both.sum() < minimum:
                continue
            a, b = rankdata(values[both, i]), rankdata(values[both, j])
            if a.std() > 0 and b.std() > 0:
                out[i, j] = out[j, i] = float(np.corrcoef(a, b)[0, 1])
    return cells, out


def inside(table: Table, classes: Mapping[str, str], **options: object) -> dict[str, Ranking]:
    """A ranking inside every class of subjects (sizes, architectures): subject -> class; lone members are left out."""
    out = {}
    for name in dict.fromkeys(classes[s] for s in table):
        members = {s: row for s, row in table.items() if classes[s] == name}
        if len(members) > 1:
            out[name] = rank(members, **options)  # type: ignore[arg-type]
    return out


def markdown(rows: Iterable[Mapping[str, object]]) -> str:
    """Rows as a Markdown table."""
    rows = list(rows)
    names = list(dict.fromkeys(k for row in rows for k in row))

    def text(value: object) -> str:
        if value is None or (isinstance(value, float) and math.isnan(value)):
            return ""
        return f"{value:.4g}" if isinstance(value, float) else str(value).replace("|", "\\|")

    lines = ["| " + " | ".join(names) + " |", "|" + " --- |" * len(names)]
    lines += ["| " + " | ".join(text(row.get(n)) for n in names) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def report(
    table: Table,
    *,
    name: str = "ranking",
    lower_is_better: Collection[str] = (),
    groups: Mapping[str, str] | None = None,
    draws: int = 1000,
    seed: int = 0,
) -> Report:
    """A Report of one table: mean z, bootstrap interval of the rank, leave-one-out range, cells, correlations."""
    ranking = rank(table, lower_is_better=lower_is_better, groups=groups)
    intervals = rank_intervals(table, lower_is_better=lower_is_better, groups=groups, draws=draws, seed=seed)
    stable = leave_one_out(table, lower_is_better=lower_is_better, groups=groups) if len(table) <= 200 else {}
    out = Report(name=name)
    for i, subject in enumerate(ranking.subjects):
        row: dict[str, object] = {
            "rank": ranking.ranks[subject],
            "subject": subject,
            "mean z": float(ranking.scores[i]),
        }
        row["rank 95%"] = "{:.0f} to {:.0f}".format(*intervals[subject])
        if stable:
            row["leave one out"] = "{} to {}".format(*stable[subject])
        row["cells"] = int(ranking.counts[i])
        out.rows.append(row)
    cells, spearman = correlations(table)
    out.arrays = {"z": ranking.z, "spearman": spearman}
    out.notes = pool_notes(ranking)
    out.notes.append(f"Cells, in the order of the arrays: {', '.join(cells)}.")
    return out


def pool_notes(ranking: Ranking) -> list[str]:
    """What the reader of mean z-scores must know."""
    few = ", ".join(ranking.subjects[:12]) + (" ..." if len(ranking.subjects) > 12 else "")
    notes = [
        f"A z-score compares with this pool of {len(ranking.subjects)} subjects only ({few}); another pool gives other "
        f"scores. {len(ranking.cells)} cells count, in {len(set(ranking.groups.values()))} groups."
    ]
    notes += [f"The cell {cell!r} does not count: {why}." for cell, why in ranking.dropped.items()]
    short = [s for s, c in zip(ranking.subjects, ranking.counts) if c < len(ranking.cells)]
    if short:
        notes.append(f"Not every cell was measured for {', '.join(short[:8])}{' ...' if len(short) > 8 else ''}.")
    return notes
