"""Instance retrieval with frozen features: overlapping sub-patches, PCA whitening, exact distances.

Razavian, Azizpour, Sullivan, Carlsson, "CNN Features off-the-shelf", CVPR 2014 workshops, arXiv 1403.6382. No code is
public. Whitening is fitted on reference patches only; a query never changes it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from lynceus.core.errors import AdviceError
from lynceus.core.progress import track
from lynceus.core.report import Report, environment
from lynceus.core.rng import generator
from lynceus.core.subject import Subject
from lynceus.core.types import Sample, as_float
from lynceus.gauntlet.features import Extractor, FeatureBank, labelled
from lynceus.gauntlet.probes import unit
from lynceus.gauntlet.ranking import ranked, ranking_metrics
from lynceus.gauntlet.scores import bootstrap
from lynceus.gauntlet.views import patches


@dataclass(frozen=True, kw_only=True)
class Whitening:
    """(x - mean) @ basis has the identity as its covariance on what it was fitted on. basis: (c, d)."""

    mean: Float[np.ndarray, " c"]
    basis: Float[np.ndarray, "c d"]

    def __call__(self, x: Float[np.ndarray, "... c"]) -> Float[np.ndarray, "... d"]:
        return (x - self.mean) @ self.basis


def fit_whitening(x: Float[np.ndarray, "n c"], dims: int = 500) -> Whitening:
    """PCA to at most `dims` directions, each scaled to unit variance (n - 1), in float64. Directions without variance
    are cut, so there are never more than n - 1."""
    if len(x) < 2:
        raise AdviceError("Whitening needs at least two reference vectors.")
    x = np.asarray(x, dtype=np.float64)
    mean = x.mean(0)
    _, s, v = np.linalg.svd(x - mean, full_matrices=False)
    keep = min(dims, len(x) - 1, int((s > 1e-6 * max(s[0], 1e-30)).sum()))
    if keep == 0:
        raise AdviceError("All reference vectors are equal; there is nothing to whiten.")
    return Whitening(mean=mean, basis=v[:keep].T / s[:keep] * np.sqrt(len(x) - 1))


@dataclass(frozen=True, kw_only=True)
class RetrieverConfig:
    """Options of a Retriever.

    reference_levels, query_levels: sub-patch levels, level i has i^2 patches; 1 and 1 is a single vector per picture.

    dims: of the PCA whitening, 500 for large sets; 0 leaves it out; "auto" chooses by leaving patches out of the
    references (few references amplify noise in many dimensions). power: p of the signed power sign(x) |x|^p after
    whitening (2 in the paper), None leaves it out. size: the side that every patch is resized to. block: numbers of
    the distance matrix held at once."""

    reference_levels: int = 3
    query_levels: int = 2
    dims: int | Literal["auto"] = "auto"
    candidates: tuple[int, ...] = (32, 64, 128, 256, 500)
    power: float | None = None
    size: int = 96
    block: int = 1 << 24


class Retriever:
    """References in, distances out: `fit(references)`, then `distances(queries)` (q, n).

    The distance of a query patch to a reference is the smallest over its patches, that of a query the mean over the
    query's patches."""

    def __init__(self, extractor: Extractor, config: RetrieverConfig = RetrieverConfig(), *, quiet: bool = False):
        self.extractor, self.config, self.quiet = extractor, config, quiet
        self.whitening: Whitening | None = None
        self.dims = 0
        self._base: np.ndarray | None = None

    def vectors(self, images: Sequence[Tensor], levels: int) -> Float[np.ndarray, "n p c"]:
        """Unit vectors of the sub-patches of every picture (3, h, w); pictures may differ in size."""
        size, out = (self.config.size, self.config.size), []
        for image in track(images, "sub-patches", unit="images", quiet=self.quiet):
            out.append(self.extractor(patches(as_float(image), levels, size)).numpy())
        if not out:
            raise AdviceError("There are no pictures to search.")
        return unit(np.stack(out).astype(np.float64))

    def fit(self, references: Sequence[Tensor]) -> Retriever:
        """Takes the reference pictures, fits the whitening on their patches, and returns itself."""
        return self.fit_vectors(self.vectors(references, self.config.reference_levels))

    def fit_vectors(self, base: Float[np.ndarray, "n p c"]) -> Retriever:
        dims = self._choose(base) if self.config.dims == "auto" else self.config.dims
        flat = base.reshape(-1, base.shape[-1])
        self.whitening = fit_whitening(flat, dims) if dims else None
        self.dims = self.whitening.basis.shape[1] if self.whitening else base.shape[-1]
        self._base = self._finish(base, self.whitening)
        return self

    def distances(self, queries: Sequence[Tensor]) -> Float[np.ndarray, "q n"]:
        return self.vector_distances(self.vectors(queries, self.config.query_levels))

    def vector_distances(self, queries: Float[np.ndarray, "q p c"]) -> Float[np.ndarray, "q n"]:
        """Distances of the queries' unit vectors to every reference."""
        if self._base is None:
            raise AdviceError("The retriever has no references yet: call fit(references) first.")
        return spatial_distances(self._finish(queries, self.whitening), self._base, block=self.config.block)

    def _finish(self, x: np.ndarray, whitening: Whitening | None) -> np.ndarray:
        if whitening is not None:
            x = whitening(x)
        return unit(x, self.config.power)

    def _choose(self, base: np.ndarray) -> int:
        """Dimensions by recall among the references alone: one patch of each is a query, the others stay references."""
        n, p, c = base.shape
        options = sorted({min(d, c, n * p - 1) for d in self.config.candidates})
        if p < 2:
            return options[min(1, len(options) - 1)] if n < 1000 else options[-1]
        left = [1 + k for k in range(min(p - 1, 3))]  # patches of the second level, crops of the picture
        whole = fit_whitening(base.reshape(-1, c), max(options))
        recall = []
        for d in options:
            part = Whitening(mean=whole.mean, basis=whole.basis[:, :d])
            right = 0.0
            for k in left:
                others = np.delete(base, k, axis=1)
                found = spatial_distances(self._finish(base[:, k : k + 1], part), self._finish(others, part))
                right += float((found.argmin(1) == np.arange(n)).mean())
            recall.append(right)
        return options[int(np.argmax(recall))]


def spatial_distances(
    queries: Float[np.ndarray, "q p c"], references: Float[np.ndarray, "n r c"], *, block: int = 1 << 24
) -> Float[np.ndarray, "q n"]:
    """Exact L2: least over the reference's patches, mean over the query's; by blocks of at most `block` numbers."""
    q, p, c = queries.shape
    n, r, _ = references.shape
    base = torch.from_numpy(np.ascontiguousarray(references)).reshape(n * r, c)
    query = torch.from_numpy(np.ascontiguousarray(queries))
    norms = base.square().sum(1)
    out = torch.empty(q, n, dtype=base.dtype)
    rows = max(1, block // max(p * n * r, 1))
    for i in range(0, q, rows):
        part = query[i : i + rows].reshape(-1, c)
        square = part.square().sum(1, keepdim=True) + norms - 2 * part @ base.T
        near = square.clamp_(min=0).view(-1, n, r).amin(2).sqrt()
        out[i : i + rows] = near.view(-1, p, n).mean(1)
    return out.numpy()


@dataclass(frozen=True, kw_only=True)
class Retrieval:
    """Check: every picture searches for the others of its class, by cosine of the pooled vectors, itself removed.

    data: a labelled set, or a pair (references, queries). released_mrr: see `ranking_metrics`. limit: at most this many
    queries, drawn by the seed."""

    needs: ClassVar[frozenset[str]] = frozenset({"features", "labels"})

    ks: tuple[int, ...] = (1, 5, 10)
    kind: Literal["area", "trapezoid", "eleven"] = "area"
    released_mrr: bool = False
    limit: int = 2000
    layer: str | None = None

    def __call__(self, subject: Subject, data: Any, *, seed: int = 0, bank: FeatureBank | None = None) -> Report:
        subject.require(self.needs)
        if data is None or (hasattr(data, "__len__") and len(data) == 0):
            raise AdviceError("The data is empty: retrieval needs labelled images, for instance data.open('digits').")
        bank = bank or FeatureBank()
        pair = isinstance(data, (tuple, list)) and len(data) == 2 and not isinstance(data[0], Sample)
        sets: Any = data if pair else [data]
        parts = [labelled(bank.get(subject, part, layer=self.layer)) for part in sets]
        references, queries = parts[0], parts[-1]
        if np.asarray(references.labels).ndim == 2:
            raise AdviceError("Retrieval takes one class per image, not multi-hot labels.")
        pick = torch.randperm(len(queries), generator=generator(seed, "queries"))[: self.limit].sort().values.numpy()
        base, query = unit(references.vectors), unit(queries.vectors[pick])
        wanted = np.asarray(queries.labels)[pick]
        relevance = []
        for i in range(0, len(pick), 256):
            positive = wanted[i : i + 256, None] == references.labels
            junk = None if pair else pick[i : i + 256, None] == np.arange(len(references))
            relevance.append(ranked(-query[i : i + 256] @ base.T, positive, junk).astype(np.int8))
        rows = np.concatenate(relevance)
        means, each = ranking_metrics(rows, ks=self.ks, kind=self.kind, released_mrr=self.released_mrr)
        report = Report(name="retrieval", summary=means)
        report.environment = environment(seed=seed, subject=subject.name, layer=self.layer or "pooled")
        names = references.classes or tuple(str(k) for k in range(int(wanted.max()) + 1))
        for k in np.unique(wanted):
            of = {
                key: float(np.nanmean(v[wanted == k])) for key, v in each.items() if np.isfinite(v[wanted == k]).any()
            }
            report.rows.append(
                {"class": names[k] if k < len(names) else str(k), "queries": int((wanted == k).sum()), **of}
            )
        valid = each["mAP"][~np.isnan(each["mAP"])]
        if len(valid):
            means["mAP low"], means["mAP high"] = bootstrap(valid, seed=seed)
        report.notes.append(
            f"{len(pick)} queries against {len(references)} references, cosine of the vectors before the classifier; "
            f"{self.kind} average precision; MRR {'before' if self.released_mrr else 'after'} junk is removed."
        )
        return report
