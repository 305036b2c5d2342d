"""Ranking metrics of retrieval: mAP, precision and recall at k, MRR, with junk and with queries that have no positive.

Goldblum et al., "Battle of the Backbones", NeurIPS 2023, arXiv 2310.19909; code hsouri/bob-retrieval. Protocol of the
revisited Oxford and Paris sets: junk is removed before ranks are counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from jaxtyping import Float, Int

from lynceus.core.errors import AdviceError


def ranking_metrics(
    relevance: Int[np.ndarray, "q n"],
    *,
    ks: Sequence[int] = (1, 5, 10),
    kind: Literal["area", "trapezoid", "eleven"] = "area",
    released_mrr: bool = False,
) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """Means over queries, and the values per query (nan where a query has no positive).

    relevance: for each query the references from near to far: 1 positive, 0 negative, -1 junk (ignored).
    kind: of average precision. "area": mean precision at the positives; "trapezoid": the revisited Oxford code's, mean
      of the precisions just before and at each positive; "eleven": best precision at recalls 0, 0.1 ... 1.
    released_mrr: count the rank of the first positive before junk is removed, as the released code does.
    Precision at k divides by k; recall at k divides by the positives of the query; queries without positives are left
    out of every mean, and counted in "queries without positives".
    """
    if relevance.ndim != 2 or relevance.shape[0] == 0 or relevance.shape[1] == 0:
        raise AdviceError(f"relevance must be (queries, references) with at least one of each, not {relevance.shape}.")
    if not np.isin(relevance, (-1, 0, 1)).all():
        raise AdviceError("relevance holds 1 (positive), 0 (negative) and -1 (junk) only.")
    hit, kept = relevance == 1, relevance != -1
    count = hit.sum(1)
    some = count > 0
    rank = np.cumsum(kept, 1)  # 1-based, junk removed
    found = np.cumsum(hit, 1)
    each: dict[str, np.ndarray] = {}
    with np.errstate(divide="ignore", invalid="ignore"):
        each["mAP"] = _average_precision(hit, rank, found, count, kind)
        for k in ks:
            first = (hit & (rank <= k)).sum(1)
            each[f"P@{k}"] = np.where(some, first / k, np.nan)
            each[f"R@{k}"] = np.where(some, first / count, np.nan)
        start = hit.argmax(1)
        place = start + 1 if released_mrr else rank[np.arange(len(rank)), start]
        each["MRR"] = np.where(some, 1 / place, np.nan)
    means = {name: float(value[some].mean()) if some.any() else float("nan") for name, value in each.items()}
    means["queries"] = float(some.sum())
    means["queries without positives"] = float((~some).sum())
    return means, each


def _average_precision(
    hit: np.ndarray, rank: np.ndarray, found: np.ndarray, count: np.ndarray, kind: str
) -> Float[np.ndarray, " q"]:
    precision = np.where(rank > 0, found / np.maximum(rank, 1), 0.0)
    if kind == "area":
        total = np.where(hit, precision, 0).sum(1)
    elif kind == "trapezoid":
        before = np.where(rank > 1, (found - 1) / np.maximum(rank - 1, 1), 1.0)
        total = np.where(hit, (precision + before) / 2, 0).sum(1)
    elif kind == "eleven":
        ceiling = np.maximum.accumulate(np.where(hit, precision, 0)[:, ::-1], 1)[:, ::-1]
        recall = found / np.maximum(count, 1)[:, None]
        best = [np.where(recall >= level / 10 - 1e-12, ceiling, 0).max(1) for level in range(11)]
        return np.where(count > 0, np.mean(best, 0), np.nan)
    else:
        raise AdviceError(f"kind is 'area', 'trapezoid' or 'eleven', not {kind!r}.")
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def ranked(
    distances: Float[np.ndarray, "q n"], positive: np.ndarray, junk: np.ndarray | None = None
) -> Int[np.ndarray, "q n"]:
    """Relevance in order of distance; ties keep the order of the references. positive, junk: (q, n) bool."""
    relevance = np.where(positive, 1, 0)
    if junk is not None:
        relevance = np.where(junk, -1, relevance)
    return np.take_along_axis(relevance, np.argsort(distances, 1, kind="stable"), 1)


def four_of_four(relevance: Int[np.ndarray, "q n"]) -> float:
    """UKBench's score: mean number of positives among the first 4, the query's own picture counted (0..4)."""
    return float((relevance[:, :4] == 1).sum(1).mean())
