"""Subsets for data-scaling studies: nested, stratified or long-tailed; label noise; near-duplicates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lynceus.core.errors import AdviceError
from lynceus.core.rng import numpy_generator
from lynceus.core.types import Sample, as_float


def nested(
    labels: np.ndarray,
    sizes: Sequence[int],
    *,
    seed: int,
    how: Literal["stratified", "random"] = "stratified",
    tail: float = 1.0,
    classes: int | None = None,
) -> list[np.ndarray]:
    """Index sets of the given sizes out of a pool with `labels` (n,); each smaller one is contained in the larger.

    how: "stratified" keeps the pool's class proportions at every size, "random" does not look at labels.
    tail: imbalance ratio r >= 1; class k is given in proportion r^(-k/(C-1)), the same r at every size.
    classes: only the first that many classes (in an order drawn by `seed`), to tell variety from volume.
    """
    if tail < 1:
        raise AdviceError(f"tail is the ratio of the largest to the smallest class, at least 1, not {tail}.")
    rng = numpy_generator(seed, "subset")
    order = rng.permutation(len(labels))
    names, counts = np.unique(labels, return_counts=True)
    if how == "random" and tail == 1 and classes is None:
        return [np.sort(_prefix(order, n, len(labels))) for n in sizes]
    weights = counts / counts.sum() if tail == 1 else tail ** (-np.arange(len(names)) / max(len(names) - 1, 1))
    if classes is not None:
        if not 1 < classes <= len(names):
            raise AdviceError(f"classes must lie in 2..{len(names)}, not {classes}.")
        weights = np.where(np.isin(np.arange(len(names)), rng.permutation(len(names))[:classes]), weights, 0)
    weights = weights / weights.sum()
    # every image gets the share of the pool at which its class would need it; a prefix in that order is a subset
    share = np.full(len(labels), np.inf)
    for c, name in enumerate(names):
        members = order[labels[order] == name]
        if weights[c] > 0:
            share[members] = (np.arange(len(members)) + 0.5) / weights[c]
    limit = min(counts[c] / weights[c] for c in range(len(names)) if weights[c] > 0)
    largest = max(sizes)
    if largest > round(limit) and (tail > 1 or classes is not None):
        raise AdviceError(
            f"This pool holds at most {int(limit)} images at ratio {tail:g} of its classes; {largest} were asked."
        )
    order = order[np.argsort(share[order], kind="stable")]
    return [np.sort(_prefix(order, n, len(labels))) for n in sizes]


def _prefix(order: np.ndarray, n: int, pool: int) -> np.ndarray:
    if not 1 <= n <= pool:
        raise AdviceError(f"The pool holds {pool} images; a subset of {n} cannot be drawn from it.")
    return order[:n]


def corrupt(
    labels: np.ndarray,
    rate: float,
    *,
    seed: int,
    how: Literal["symmetric", "pair", "missing"] = "symmetric",
    classes: int | None = None,
) -> np.ndarray:
    """Labels with noise. Each image has its own draw, so a higher rate corrupts a superset, whatever subset is taken.

    symmetric: to any other class with probability `rate`; pair: class c -> c + 1; missing: for multi-hot labels (n, k),
    each positive is dropped with probability `rate`."""
    if not 0 <= rate <= 1:
        raise AdviceError(f"A noise rate lies in 0..1, not {rate}.")
    rng = numpy_generator(seed, "noise")
    if how == "missing":
        if labels.ndim != 2:
            raise AdviceError(
                "'missing' noise is for multi-hot labels (n, k); use 'symmetric' or 'pair' for class indices."
            )
        return np.where(rng.random(labels.shape) < rate, 0, labels).astype(labels.dtype)
    count = classes or int(labels.max()) + 1
    hit = rng.random(len(labels)) < rate
    shift = rng.integers(1, count, len(labels)) if how == "symmetric" else 1
    return np.where(hit, (labels + shift) % count, labels)


class Relabelled:
    """A data set whose samples carry other labels; everything else is the data set's own."""

    def __init__(self, data: Any, labels: np.ndarray):
        if len(data) != len(labels):
            raise AdviceError(f"{len(data)} images need as many labels, not {len(labels)}.")
        self.data, self.labels = data, labels

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "data":
            raise AttributeError(name)
        return getattr(self.data, name)

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Sample:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[Sample]:
        samples = self.data.__getitems__(indices)
        for sample, index in zip(samples, indices):
            sample.label = int(self.labels[index])
        return samples

    def fingerprint(self) -> str:
        import hashlib

        return hashlib.blake2b(self.data.fingerprint().encode() + self.labels.tobytes(), digest_size=12).hexdigest()


def thumbnails(data: Any, side: int = 16) -> np.ndarray:
    """Small centred unit vectors (n, 3 side^2) of the pictures: near-duplicates have a cosine near 1."""
    images: Any = getattr(data, "images", None)
    chunks: list[Tensor] = []
    if images is not None:
        chunks = [_thumbnail(images[i : i + 1024], side) for i in range(0, len(images), 1024)]
    else:
        chunks = [_thumbnail(sample.image[None], side) for sample in data]
    return torch.cat(chunks).numpy()


def _thumbnail(images: Tensor, side: int) -> Tensor:
    small = F.interpolate(as_float(images), (side, side), mode="bilinear", antialias=True, align_corners=False).flatten(
        1
    )
    return F.normalize(small - small.mean(1, keepdim=True), dim=1, eps=1e-6)


def near_duplicates(test: np.ndarray, pool: np.ndarray, *, cosine: float = 0.98, block: int = 4096) -> np.ndarray:
    """(k, 2) pairs (test row, pool row) whose unit vectors have a cosine above `cosine`, found by blocks."""
    pairs = []
    a, b = torch.from_numpy(np.ascontiguousarray(test)), torch.from_numpy(np.ascontiguousarray(pool))
    for i in range(0, len(a), block):
        for j in range(0, len(b), block):
            hits = (a[i : i + block] @ b[j : j + block].T > cosine).nonzero()
            pairs.append(hits + torch.tensor([i, j]))
    return torch.cat(pairs).numpy() if pairs else np.zeros((0, 2), np.int64)
