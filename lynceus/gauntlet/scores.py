"""Scores of probes: accuracy with intervals, a row per class, average precision of multi-label scores."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
from jaxtyping import Float

from lynceus.core.report import Report, environment
from lynceus.core.rng import numpy_generator


def wilson(right: int, count: int, z: float = 1.96) -> tuple[float, float]:
    """95% interval of a proportion, good for few and for extreme counts."""
    if count == 0:
        return 0.0, 1.0
    p, d = right / count, 1 + z * z / count
    centre, half = p + z * z / (2 * count), z * math.sqrt(p * (1 - p) / count + z * z / (4 * count * count))
    return max((centre - half) / d, 0.0), min((centre + half) / d, 1.0)


def mean_interval(values: np.ndarray) -> tuple[float, float, float]:
    """Mean and its 95% t interval."""
    from scipy.stats import t as student

    mean = float(values.mean())
    if len(values) < 2:
        return mean, mean, mean
    half = float(student.ppf(0.975, len(values) - 1) * values.std(ddof=1) / math.sqrt(len(values)))
    return mean, mean - half, mean + half


def bootstrap(values: np.ndarray, *, seed: int, draws: int = 1000) -> tuple[float, float]:
    """95% percentile interval of the mean of `values`."""
    rng = numpy_generator(seed, "bootstrap")
    means = [float(values[rng.integers(0, len(values), len(values))].mean()) for _ in range(draws)]
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def average_precision_of_scores(
    scores: Float[np.ndarray, "n k"], labels: np.ndarray, kind: Literal["area", "eleven"] = "area"
) -> Float[np.ndarray, " k"]:
    """Average precision per class of multi-label scores; nan for a class without positives.

    "area": mean precision at the positives. "eleven": VOC's mean of the best precision at recall 0, 0.1 ... 1."""
    out = np.full(scores.shape[1], np.nan)
    for k in range(scores.shape[1]):
        hit = (labels[:, k] > 0)[np.argsort(-scores[:, k], kind="stable")]
        if hit.any():
            precision, recall = np.cumsum(hit) / np.arange(1, len(hit) + 1), np.cumsum(hit) / hit.sum()
            if kind == "area":
                out[k] = precision[hit].mean()
            else:
                ceiling = np.maximum.accumulate(precision[::-1])[::-1]
                levels = np.arange(11) / 10
                out[k] = np.mean([ceiling[np.searchsorted(recall, level - 1e-12)] for level in levels])
    return out


def report_scores(
    name: str, scores: np.ndarray, labels: np.ndarray, classes: Sequence[str] | None, *, seed: int
) -> Report:
    """Rows per class and the summary of (n, k) scores against single labels (n,) or multi-hot ones (n, k)."""
    report = Report(name=name, environment=environment(seed=seed))
    names = [classes[k] if classes and k < len(classes) else str(k) for k in range(scores.shape[1])]
    if labels.ndim == 2:
        area, eleven = (average_precision_of_scores(scores, labels, kind) for kind in ("area", "eleven"))
        for k, title in enumerate(names):
            report.rows.append(
                {
                    "class": title,
                    "n": int((labels[:, k] > 0).sum()),
                    "AP": float(area[k]),
                    "AP 11-point": float(eleven[k]),
                }
            )
        report.summary = {"mAP": float(np.nanmean(area)), "mAP 11-point": float(np.nanmean(eleven))}
        report.summary["accuracy"] = report.summary["mAP"]
        report.notes.append("mAP is the area kind (mean precision at the positives); the 11-point kind is beside it.")
        return report
    guess = scores.argmax(1)
    right = guess == labels
    for k in np.unique(labels):
        members = labels == k
        hits, count = int(right[members].sum()), int(members.sum())
        low, high = wilson(hits, count)
        named = int((guess == k).sum())
        report.rows.append(
            {
                "class": names[k],
                "n": count,
                "accuracy": hits / count,
                "low": low,
                "high": high,
                "precision": hits / named if named else 0.0,
            }
        )
    low, high = bootstrap(right.astype(float), seed=seed)
    report.summary = {
        "accuracy": float(right.mean()),
        "accuracy low": low,
        "accuracy high": high,
        "mean class accuracy": float(np.mean([row["accuracy"] for row in report.rows])),
        "chance": float(np.bincount(labels).max() / len(labels)),
    }
    report.arrays["right"] = right
    return report
