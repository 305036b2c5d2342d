"""What a learning curve says: laws and forecast, the bend and its cause, capacity, label noise, the long tail."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from lynceus.core.report import Report, environment
from lynceus.gauntlet import fits

if TYPE_CHECKING:
    from lynceus.gauntlet.scaling import LearningCurve

UNLEARNED = 0.25  # of the loss of guessing: above it a model has not learned its own training images


def findings(curve: LearningCurve) -> Report:
    """The report of a study. Rows: kind "size", "law", "noise", "tail" or "capacity"; accuracies are fractions."""
    from lynceus.gauntlet.scaling import curve_figure

    config = curve.config
    report = Report(
        name="data scaling", environment=environment(seed=curve.seed, budget=config.budget, data=curve.label)
    )
    kind = "updates for every size" if config.budget.kind == "steps" else "passes over every subset"
    report.notes.append(
        f"Budget: fixed {config.budget.kind}, {config.budget} ({kind}); {config.seeds} seeds; "
        f"{curve.n_test} test images."
    )
    report.notes.append(
        f"{curve.duplicates} near-duplicates of test images were left out of the pool."
        if config.cosine > 0
        else "Near-duplicates between training pool and test were not looked for."
    )
    if config.seeds < 3:
        report.notes.append("With fewer than 3 seeds the error bars are those of the test set alone.")
    found: dict[str, fits.Fit] = {}
    for capacity in config.capacities:
        points = curve.points(capacity)
        found[capacity] = fits.fit(points, draws=config.draws, seed=curve.seed)
        report.arrays[f"accuracy {capacity}"] = points.accuracy
        losses = [float(curve.values("train_loss", capacity=capacity, n=n).mean()) for n in curve.sizes]
        for n, mean, sd, loss in zip(curve.sizes, points.mean, points.sd, losses):
            report.rows.append(
                {
                    "kind": "size",
                    "capacity": capacity,
                    "n": n,
                    "accuracy": float(mean),
                    "sd": float(sd),
                    "train_loss": loss,
                }
            )
        _law(report, capacity, found[capacity], losses, curve)
    for capacity, fit in found.items():
        report.rows += fit.rows(kind="law", capacity=capacity)
    report.arrays["n"] = np.array(curve.sizes)
    if len(config.capacities) > 1:
        _capacity(report, curve, found)
    if "finetune_accuracy" in curve.results[0]:
        for capacity in config.capacities:
            tuned = curve.points(capacity, "finetune_accuracy")
            line = fits.fit_law("log", tuned, draws=config.draws, seed=curve.seed)
            low, high = line.interval("b")
            report.arrays[f"finetune accuracy {capacity}"] = tuned.accuracy
            report.summary[f"{capacity}: fine-tuned slope per decade"] = line.parameters["b"]
            report.notes.append(
                f"{capacity}: transfer to the other task, linear probe above; fine-tuned "
                f"{' '.join(_points(v) for v in tuned.mean)}, {_points(line.parameters['b'])} points per decade of "
                f"pretraining images [{_points(low)}, {_points(high)}]{', rejected' if line.rejected else ''}."
            )
    for p in config.noise:
        _noise(report, curve, found, p)
    for r in config.tails:
        _tail(report, curve, r)
    report.figures["learning curve.plotly"] = curve_figure(curve, found, config.capacities)
    return report


def _points(value: float) -> str:
    return f"{100 * value:.1f}"


def _law(report: Report, name: str, fit: fits.Fit, losses: list[float], curve: LearningCurve) -> None:
    points, best, line = fit.points, fit.best, fit.laws["log"]
    low, high = line.interval("b")
    report.summary[f"{name}: accuracy at {curve.sizes[-1]}"] = float(points.mean[-1])
    report.summary[f"{name}: slope per decade"] = line.parameters["b"]
    report.notes.append(
        f"{name}: AICc chooses the {fit.chosen} law (R2 {best.r2:.3f}, misfit p = {best.p_value:.2g}); log-linear "
        f"slope {_points(line.parameters['b'])} points per decade [{_points(low)}, {_points(high)}], R2 {line.r2:.3f}"
        + (", rejected." if line.rejected else ".")
    )
    if not math.isnan(fit.last_error):
        report.summary[f"{name}: leave-last-out error"] = fit.last_error
        report.notes.append(f"{name}: without the largest size the law misses it by {_points(fit.last_error)} points.")
    need = fits.more_examples(fit, curve.config.gain)
    gain = f"+{_points(need.gain)} point{'s' if need.gain != 0.01 else ''}"
    if need.examples is None:
        report.notes.append(f"{name}: how many more images {gain} would need is not answered: {need.why}.")
    else:
        report.summary[f"{name}: images for {gain}"] = need.examples
        top = "unbounded" if need.high is None or need.high > 1e9 else f"{need.high:,.0f}"
        report.notes.append(f"{name}: {gain} needs about {need.examples:,.0f} more images [{need.low:,.0f}, {top}].")
    if line.rejected:
        _bend(report, name, fit, losses, curve)


def _bend(report: Report, name: str, fit: fits.Fit, losses: list[float], curve: LearningCurve) -> None:
    count = fits.bend(fit.points)
    if count < 3 or count >= len(curve.sizes):
        return
    head = fits.fit_law("log", fit.points.head(count), draws=curve.config.draws, seed=curve.seed)
    low, high = head.interval("b")
    gap = float(head(fit.points.n[-1]) - fit.points.mean[-1])
    report.summary[f"{name}: bend after n"] = float(curve.sizes[count - 1])
    report.summary[f"{name}: slope before the bend"] = head.parameters["b"]
    text = (
        f"{name}: log-linear up to {curve.sizes[count - 1]} images ({_points(head.parameters['b'])} points per decade "
        f"[{_points(low)}, {_points(high)}], R2 {head.r2:.3f}), beyond that {_points(abs(gap))} points "
        f"{'below' if gap > 0 else 'above'} that line at {curve.sizes[-1]}"
    )
    chance = math.log(max(len(curve.class_counts), 2))
    share = losses[-1] / chance
    report.summary[f"{name}: train loss / guessing"] = share
    if gap > 0 and share > UNLEARNED:
        report.summary[f"{name}: budget-limited"] = 1.0
        text += (
            f": budget-limited. The training loss at {curve.sizes[-1]} is still {losses[-1]:.2f} nats "
            f"({100 * share:.0f}% of guessing; {losses[0]:.2f} at {curve.sizes[0]}): {curve.config.budget} or the "
            "capacity is the limit, not the data"
        )
    elif gap > 0:
        text += f": the training images are learned (loss {losses[-1]:.2f}), so more of the same data brings less"
    report.notes.append(text + ".")


def _capacity(report: Report, curve: LearningCurve, found: dict[str, fits.Fit]) -> None:
    """Ratio of slopes, and how the gap between the largest and the smallest capacity grows with the data."""
    from scipy.stats import t as student

    small, large = curve.config.capacities[0], curve.config.capacities[-1]
    a, b = found[large].laws["log"], found[small].laws["log"]
    ratio = a.parameters["b"] / b.parameters["b"] if b.parameters["b"] else float("nan")
    low, high = np.percentile(a.draws[:, 1] / b.draws[:, 1], [2.5, 97.5])
    gap = found[large].points.accuracy - found[small].points.accuracy  # (seeds, sizes): same subsets, same test set
    half = gap.shape[1] // 2
    growth = gap[:, half:].mean(1) - gap[:, :half].mean(1)
    mean, seeds = float(growth.mean()), len(growth)
    row: dict[str, Any] = {
        "kind": "capacity",
        "capacity": f"{large} - {small}",
        "slope ratio": ratio,
        "ratio_low": float(low),
    }
    row |= {
        "ratio_high": float(high),
        "gap small n": float(gap[:, :half].mean()),
        "gap large n": float(gap[:, half:].mean()),
    }
    row |= {"growth": mean}
    text = (
        f"Slope of {large} / {small}: {ratio:.2f} [{low:.2f}, {high:.2f}]. Their gap grows from "
        f"{_points(row['gap small n'])} to {_points(row['gap large n'])} points"
    )
    if seeds > 1:
        half_width = float(student.ppf(0.975, seeds - 1) * growth.std(ddof=1) / math.sqrt(seeds))
        row |= {"growth_low": mean - half_width, "growth_high": mean + half_width}
        ends = f"[{_points(mean - half_width)}, {_points(mean + half_width)}]"
        text += f", by {_points(mean)} {ends} (t interval, {seeds} seeds)"
        report.summary["gap growth, low end"] = mean - half_width
    report.summary["gap growth"] = mean
    report.rows.append(row)
    report.notes.append(text + ".")


def _extra(curve: LearningCurve) -> tuple[int, ...]:
    return tuple(curve.config.extra_sizes or curve.sizes[-2:-1])


def _noise(report: Report, curve: LearningCurve, found: dict[str, fits.Fit], p: float) -> None:
    """What noise costs, beside what less clean data costs: the clean set with the same accuracy."""
    capacity = curve.config.capacities[-1]
    fit = found[capacity]
    # the measured curve, made monotone, read backwards
    top = np.maximum.accumulate(fit.points.mean)
    for n in _extra(curve):
        clean = curve.values("accuracy", capacity=capacity, n=n) if n in curve.sizes else np.array([float(fit.best(n))])
        noisy = curve.values("accuracy", capacity=capacity, n=n, noise=p)
        half = float(np.interp(math.log(n / 2), np.log(fit.points.n), fit.points.mean))
        same = float(np.exp(np.interp(noisy.mean(), top, np.log(fit.points.n))))
        below = noisy.mean() < top[0]
        row: dict[str, Any] = {
            "kind": "noise",
            "capacity": capacity,
            "n": n,
            "noise": p,
            "accuracy": float(noisy.mean()),
        }
        row |= {"sd": float(noisy.std(ddof=1)) if len(noisy) > 1 else float(fit.points.sd[-1])}
        row |= {"clean accuracy": float(clean.mean()), "cost": float(clean.mean() - noisy.mean())}
        row |= {"cost of half the data": float(clean.mean() - half), "same as clean n": same}
        report.rows.append(row)
        report.summary[f"cost of {100 * p:g}% noise at {n}"] = row["cost"]
        report.notes.append(
            f"{100 * p:g}% {curve.config.noise_model} label noise at {n} images costs {_points(row['cost'])} points; "
            f"half the clean data costs {_points(row['cost of half the data'])}. This much noise equals having "
            f"{'fewer than' if below else 'about'} {same:,.0f} clean images instead of {n:,}."
        )


def _tail(report: Report, curve: LearningCurve, r: float) -> None:
    """Head, medium and tail thirds of the classes; plain accuracy is on a test set with the training proportions."""
    capacity = curve.config.capacities[-1]
    for n in _extra(curve):
        per_class = curve.values("class_accuracy", capacity=capacity, n=n, tail=r)  # (seeds, classes)
        counts = curve.values("class_counts", capacity=capacity, n=n, tail=r).mean(0)
        order = np.argsort(-counts, kind="stable")
        thirds = np.array_split(order, 3)
        head, medium, tail = (float(per_class[:, part].mean()) for part in thirds)
        plain = float((per_class * counts / counts.sum()).sum(1).mean())
        balanced = float(per_class.mean())
        row = {"kind": "tail", "capacity": capacity, "n": n, "tail": r, "accuracy": plain, "balanced": balanced}
        report.rows.append(row | {"head": head, "medium": medium, "tail third": tail})
        report.summary[f"head - tail at ratio {r:g}"] = head - tail
        report.notes.append(
            f"Long tail of ratio {r:g} at {n} images: head {_points(head)}, medium {_points(medium)}, "
            f"tail {_points(tail)}; balanced accuracy {_points(balanced)}, plain (test classes in training "
            f"proportions) {_points(plain)}."
        )
