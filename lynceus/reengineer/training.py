"""Why two training set-ups give different results: the first thing in which they differ, and which option explains it.

A run is any function that trains for a few steps and returns a `Trace`; `fit_run` makes one from this library's own
`fit`, `trace_steps` records a plain loop.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lynceus.core.errors import AdviceError
from lynceus.core.report import Report


@dataclass(kw_only=True)
class Trace:
    """What a short run left behind.

    losses, lrs: per step. grad_norms: parameter group (or name) -> norm of its gradient at the first step.
    weight_norms: parameter (or group) -> norm after the last step. order: identities of the samples of the first steps.
    data: statistics of what the model was fed ("mean", "std" per channel, "classes": histogram).
    """

    losses: list[float]
    lrs: list[float] = field(default_factory=list)
    grad_norms: dict[str, float] = field(default_factory=dict)
    weight_norms: dict[str, float] = field(default_factory=dict)
    order: list[Any] = field(default_factory=list)
    data: dict[str, list[float]] = field(default_factory=dict)


Run = Callable[[], Trace]


def train_check(
    a: Trace | Run, b: Trace | Run, *, tolerance: float = 1e-5, band: float = 0.05, statistics: float = 0.05
) -> Report:
    """Compares two runs in the order in which things go wrong; the first row that differs is where to look.

    tolerance: relative, for the first loss, gradient norms and learning rates. band: relative, for the loss curves.
    statistics: for the inputs' mean and standard deviation, in standard deviations, and for class shares.
    summary["exit_code"] is 1 when something differs.
    """
    x, y = (t if isinstance(t, Trace) else t() for t in (a, b))
    report = Report(name="training")

    def row(what: str, gap: float, limit: float, detail: str = "", look: str = "") -> None:
        verdict = "not recorded" if math.isnan(gap) else "equal" if gap <= limit else "DIFFERS"
        report.rows.append({"what": what, "gap": gap, "tolerance": limit, "verdict": verdict, "detail": detail,
                            "look at": look if verdict == "DIFFERS" else ""})  # fmt: skip

    def known(*parts: Any) -> bool:
        return all(len(p) > 0 for p in parts)

    mean = _vector_gap(x.data.get("mean", []), y.data.get("mean", []), x.data.get("std", []))
    row(
        "inputs: mean",
        mean,
        statistics,
        _show(x.data.get("mean"), y.data.get("mean")),
        "normalisation, range of pixels",
    )
    std = _vector_gap(x.data.get("std", []), y.data.get("std", []), x.data.get("std", []))
    row(
        "inputs: standard deviation",
        std,
        statistics,
        _show(x.data.get("std"), y.data.get("std")),
        "normalisation, augmentation",
    )
    shares = _vector_gap(_shares(x.data.get("classes", [])), _shares(y.data.get("classes", [])), [])
    row("class shares", shares, statistics, "", "sampling, label order, filtering")
    if known(x.order, y.order):
        same = sum(i == j for i, j in zip(x.order, y.order)) / max(len(x.order), len(y.order))
        row("order of samples", 1 - same, 0.0, f"{same:.0%} in the same place", "seed, shuffling, sampler, workers")
    first = _relative(x.losses[0], y.losses[0]) if known(x.losses, y.losses) else math.nan
    row(
        "loss of the first step",
        first,
        tolerance,
        _show(x.losses[:1], y.losses[:1]),
        "data, initialisation, loss, label smoothing",
    )
    groups = [g for g in x.grad_norms if g in y.grad_norms]
    worst = max(groups, key=lambda g: _relative(x.grad_norms[g], y.grad_norms[g]), default="")
    gap = _relative(x.grad_norms[worst], y.grad_norms[worst]) if worst else math.nan
    only = sorted(set(x.grad_norms) ^ set(y.grad_norms))
    told = f"worst: {worst}" + (f"; only in one: {only[:3]}" if only else "")
    look = "loss reduction, frozen parts, clipping, model"
    row("gradient norms of the first step", math.inf if only else gap, tolerance, told, look)
    lrs = max((_relative(i, j) for i, j in zip(x.lrs, y.lrs)), default=math.nan)
    at = next((n for n, (i, j) in enumerate(zip(x.lrs, y.lrs)) if _relative(i, j) > tolerance), None)
    row(
        "learning rates",
        lrs,
        tolerance,
        f"first differs at step {at}" if at is not None else "",
        "schedule, warm-up, scaling by batch size",
    )
    common = list(zip(x.losses, y.losses))
    spread = max((abs(i - j) / max(abs(i), 1e-12) for i, j in common), default=math.nan)
    at = next((n for n, (i, j) in enumerate(common) if abs(i - j) > band * abs(i)), None)
    row(
        "loss curves",
        spread,
        band,
        f"leave the band at step {at}" if at is not None else f"{len(common)} steps",
        "optimiser, weight decay, betas, EMA, clipping",
    )
    names = [n for n in x.weight_norms if n in y.weight_norms]
    heavy = max((_relative(x.weight_norms[n], y.weight_norms[n]) for n in names), default=math.nan)
    row("norms of the weights at the end", heavy, band, "", "weight decay and what it applies to")
    differ = [r["what"] for r in report.rows if r["verdict"] == "DIFFERS"]
    report.notes.append(f"differs first in: {differ[0]}" if differ else "no difference found")
    missing = [r["what"] for r in report.rows if r["verdict"] == "not recorded"]
    if missing:
        report.notes.append(f"not recorded by both runs: {', '.join(missing)}")
    report.summary = {"differences": float(len(differ)), "exit_code": float(bool(differ))}
    return report


def bisect(
    run: Callable[[dict[str, Any]], Trace],
    good: Mapping[str, Any],
    bad: Mapping[str, Any],
    *,
    budget: int = 15,
    noise: float = 1e-6,
) -> Report:
    """Ranks the options that explain the gap between two configurations, in at most `budget` runs.

    run: a configuration -> the trace of a short run; it must be deterministic (seeded). Every option in which the two
    differ is switched from good to bad, alone where the budget allows, else in groups that are split when they matter.
    rows: option, good, bad, gap (distance of its trace from the good one), share of the summed gaps.
    """
    if set(good) != set(bad):
        raise AdviceError(f"Both configurations need the same options; only in one: {sorted(set(good) ^ set(bad))}.")
    keys = [k for k in good if good[k] != bad[k]]
    if not keys:
        raise AdviceError("The two configurations are equal; there is nothing to bisect.")
    if budget < 3:
        raise AdviceError(f"A bisection needs at least 3 runs, not {budget}.")
    runs = 0

    def gap_of(group: Sequence[str]) -> float:
        nonlocal runs
        runs += 1
        return distance(reference, run({**good, **{k: bad[k] for k in group}}))

    reference = run(dict(good))
    runs += 1
    whole = gap_of(keys)
    gaps: dict[str, float] = {}
    unknown_groups: list[list[str]] = []
    if len(keys) <= budget - runs:
        gaps = {k: gap_of([k]) for k in keys}
    else:
        pending = [keys]
        while pending:
            group = pending.pop(0)
            if budget - runs < 1:
                unknown_groups.append(group)
                continue
            if len(group) == 1:
                gaps[group[0]] = gap_of(group)
                continue
            half = [group[: len(group) // 2], group[len(group) // 2 :]]
            for part in half:
                if len(part) == 1 or budget - runs < 1 or gap_of(part) > noise:
                    pending.append(part)
                else:
                    gaps |= dict.fromkeys(part, 0.0)
    report = Report(name="bisect")
    total = sum(gaps.values()) or 1.0
    for key, gap in sorted(gaps.items(), key=lambda p: -p[1]):
        verdict = "explains" if gap > noise else "harmless"
        report.rows.append(
            {
                "option": key,
                "good": str(good[key]),
                "bad": str(bad[key]),
                "gap": gap,
                "share": gap / total,
                "verdict": verdict,
            }
        )
    for group in unknown_groups:
        report.notes.append(f"budget spent before these could be told apart: {', '.join(group)}")
    found = [r["option"] for r in report.rows if r["verdict"] == "explains"]
    report.notes.insert(
        0, f"explained by: {', '.join(found) or 'none of them alone'} (whole gap {whole:.3g}, {runs} runs)"
    )
    report.summary = {"runs": float(runs), "gap": whole, "options": float(len(keys)), "explaining": float(len(found))}
    return report


def distance(a: Trace, b: Trace) -> float:
    """How far two traces are apart: root mean square of relative differences, the largest over what both recorded."""
    parts = [(a.losses, b.losses), (a.lrs, b.lrs)]
    pairs: list[tuple[Any, Any]] = [(a.weight_norms, b.weight_norms), (a.grad_norms, b.grad_norms), (a.data, b.data)]
    for x, y in pairs:
        both = [k for k in x if k in y]
        parts.append(([n for k in both for n in _numbers(x[k])], [n for k in both for n in _numbers(y[k])]))
    return max((_rms(x, y) for x, y in parts if x and y), default=0.0)


# making traces --------------------------------------------------------------------------------------------------------
def trace_steps(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    loss: Callable[[Tensor, Tensor], Tensor],
    optimizer: torch.optim.Optimizer,
    schedule: Callable[[int], float] | None = None,
) -> Trace:
    """Trains over `batches` of (inputs, labels) and records. schedule: step -> factor of the learning rate."""
    base = [g["lr"] for g in optimizer.param_groups]
    trace = Trace(losses=[])
    fed: list[Tensor] = []
    labels: list[Tensor] = []
    for step, (x, y) in enumerate(batches):
        for group, lr in zip(optimizer.param_groups, base):
            group["lr"] = lr * (schedule(step) if schedule is not None else 1.0)
        value = loss(model(x), y)
        optimizer.zero_grad()
        torch.autograd.backward(value)
        if step == 0:
            trace.grad_norms = {n: float(p.grad.norm()) for n, p in model.named_parameters() if p.grad is not None}
        optimizer.step()
        trace.losses.append(float(value.detach()))
        trace.lrs.append(optimizer.param_groups[0]["lr"])
        fed.append(x)
        labels.append(y)
    trace.weight_norms = norms(model)
    trace.data = statistics_of(torch.cat(fed)[:1000], torch.cat(labels)[:1000])
    return trace


def fit_run(make: Callable[[dict[str, Any]], tuple[nn.Module, Any, Any]]) -> Callable[[dict[str, Any]], Trace]:
    """A run of this library's `fit`: `make(options)` gives (recipe, data, FitConfig), seeded by itself."""

    def run(options: dict[str, Any]) -> Trace:
        import csv
        from dataclasses import replace

        from lynceus.train.fit import fit

        recipe, data, config = make(options)
        with tempfile.TemporaryDirectory() as folder:
            fit(recipe, data, config=replace(config, log_every=1, quiet=True), out=folder)  # type: ignore[arg-type]
            with (Path(folder) / "log.csv").open(newline="") as stream:
                rows = list(csv.DictReader(stream))
        columns = {k: [float(r[k]) for r in rows if r.get(k)] for k in (rows[0] if rows else {})}
        trace = Trace(losses=columns.get("loss", []), lrs=columns.get("lr", []), weight_norms=norms(recipe))
        first = columns.get("grad_norm") or columns.get("gradient")
        if first:
            trace.grad_norms = {"all": first[0]}
        return trace

    return run


def norms(model: nn.Module) -> dict[str, float]:
    """Parameter -> its norm."""
    return {n: float(p.detach().norm()) for n, p in model.named_parameters()}


def statistics_of(images: Tensor, labels: Tensor | None = None) -> dict[str, list[float]]:
    """Mean and standard deviation per channel of (n, c, ...) inputs, and the class histogram."""
    axes = [i for i in range(images.ndim) if i != 1]
    out = {"mean": images.double().mean(axes).tolist(), "std": images.double().std(axes, correction=0).tolist()}
    if labels is not None and not labels.is_floating_point():
        out["classes"] = torch.bincount(labels.flatten()).double().tolist()
    return out


def _relative(a: float, b: float) -> float:
    return abs(a - b) / max(abs(a), abs(b), 1e-12)


def _rms(x: Sequence[float], y: Sequence[float]) -> float:
    n = min(len(x), len(y))
    a, b = np.asarray(x[:n], dtype=np.float64), np.asarray(y[:n], dtype=np.float64)
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        return 0.0 if np.array_equal(a, b, equal_nan=True) else 1e6
    scale = max(float(np.sqrt(np.mean(a**2))), 1e-12)
    return float(np.sqrt(np.mean((a - b) ** 2))) / scale


def _numbers(value: float | list[float]) -> list[float]:
    return value if isinstance(value, list) else [value]


def _vector_gap(x: Sequence[float], y: Sequence[float], unit: Sequence[float]) -> float:
    if not x or not y:
        return math.nan
    if len(x) != len(y):
        return math.inf
    units = unit if len(unit) == len(x) else [1.0] * len(x)
    return max(abs(i - j) / max(abs(u), 1e-12) for i, j, u in zip(x, y, units))


def _shares(counts: Sequence[float]) -> list[float]:
    return [c / sum(counts) for c in counts] if counts and sum(counts) else []


def _show(a: Any, b: Any) -> str:
    def text(v: Any) -> str:
        return "[" + ", ".join(f"{i:.4g}" for i in v) + "]" if v else "-"

    return f"{text(a)} and {text(b)}"
