"""Dataset: pictures and whatever is known about them, behind one face whatever the format on disk.

A `Source` (lynceus.data.sources) knows where the pictures are and how one is read; a `Dataset` is a choice of its
rows with labels that are known without decoding anything. Subsets and splits share the source.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, SupportsIndex

import numpy as np
import torch
from jaxtyping import Int, UInt8
from torch import Tensor

from lynceus.core.errors import AdviceError, unknown
from lynceus.core.report import Report
from lynceus.core.rng import numpy_generator
from lynceus.core.types import Batch, Sample, collate
from lynceus.data.decode import UnreadableError
from lynceus.data.sources import Chosen, Source
from lynceus.data.sources import Pixels as Pixels

log = logging.getLogger("lynceus.data")


class Dataset(torch.utils.data.Dataset[Sample]):
    """Pictures with labels known without decoding; index it for a `Sample`; `images` holds all when they are in memory.

    name: short, for tables. origin: the full path, or what else it was made of. classes: names by index.
    labels: (n,) int64, -1 for none, or None when nothing is labelled. multilabels: (n, k) uint8 when a picture may have
    several classes (`Sample.label` is then a multi-hot tensor). splits: the split of each row, if named.
    unreadable: id -> why, of every picture that was skipped so far. notes: what the reader should tell the user.
    inverse: class index -> the id that the format on disk uses for it, when that differs.
    """

    def __init__(
        self,
        source: Source,
        *,
        name: str,
        origin: str = "",
        classes: Sequence[str] | None = None,
        labels: Any = None,
        multilabels: Any = None,
        splits: Any = None,
        max_bad: int | float = 0.05,
        layout: str = "",
        notes: Sequence[str] = (),
        inverse: Mapping[int, Any] | None = None,
        rows: Any = None,
    ):
        n = len(source)
        self.source, self.name, self.origin, self.layout = source, name, origin or name, layout
        self.classes = list(classes) if classes is not None else None
        self.inverse = dict(inverse) if inverse is not None else None
        self.notes = list(notes)
        self.max_bad = max_bad
        self.unreadable: dict[str, str] = {}
        self._rows = np.arange(n) if rows is None else np.asarray(rows, dtype=np.int64)
        self._labels = None if labels is None else np.ascontiguousarray(labels, dtype=np.int64)
        self._multi = None if multilabels is None else np.ascontiguousarray(multilabels, dtype=np.uint8)
        self._splits = None if splits is None else np.asarray(splits, dtype=object)
        self._images: Tensor | None = source.images if isinstance(source, Pixels) else None
        self._chosen: Tensor | None = None
        self.labels: np.ndarray | None = None if self._labels is None else self._labels[self._rows]
        for label, values in (("labels", self._labels), ("multilabels", self._multi), ("splits", self._splits)):
            if values is not None and len(values) != n:
                raise AdviceError(f"{name}: {len(values)} {label} for {n} pictures; there must be one for each.")

    # reading ------------------------------------------------------------------------------------------------------
    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: SupportsIndex) -> Sample:
        """The sample at `index`. Raises UnreadableError, which names the file, when its picture cannot be decoded."""
        n, at = len(self._rows), index.__index__()
        if not -n <= at < n:
            raise IndexError(f"{self.name} has {n} samples; there is no index {at}")
        row = int(self._rows[at])
        return self._sample(row, self._image(row))

    def __getitems__(self, indices: Iterable[SupportsIndex]) -> list[Sample]:
        """The samples at `indices` without those that cannot be read; these are counted in `unreadable`.

        Raises AdviceError once more pictures were unreadable than `max_bad` allows.
        """
        out = []
        for index in indices:
            try:
                out.append(self[int(index)])
            except UnreadableError as error:
                self.skip(error, index=int(index))
        return out

    def __iter__(self) -> Iterator[Sample]:
        """Every sample in order; pictures that cannot be read are left out and counted, as in `__getitems__`."""
        for index in range(len(self)):
            yield from self.__getitems__([index])

    def _image(self, row: int) -> Tensor:
        return self._images[row] if self._images is not None else self.source.read(row)

    def _sample(self, row: int, image: Tensor) -> Sample:
        label: int | Tensor | None = None
        if self._multi is not None:
            label = torch.from_numpy(self._multi[row].astype(np.float32))
        elif self._labels is not None and self._labels[row] >= 0:
            label = int(self._labels[row])
        known = self.source.target(row, size=(int(image.shape[-2]), int(image.shape[-1]))) if self.source.rich else {}
        return Sample(image=image, label=label, id=self.source.id(row), path=self.source.path(row), **known)

    @property
    def plain(self) -> bool:
        """Whether the pictures are in memory and nothing but labels is known about them, so that `batch` is quick."""
        return self._images is not None and not self.source.rich

    def batch(self, indices: Sequence[SupportsIndex] | Int[Tensor, " b"] | Int[np.ndarray, " b"]) -> Batch:
        """The samples at `indices` as one Batch, by indexing when the pictures are in memory."""
        if not self.plain:
            return collate(self.__getitems__([int(i) for i in indices]))
        rows = self._rows[np.asarray(indices, dtype=np.int64)]
        assert self._images is not None
        image = self._images[torch.from_numpy(rows)]
        label = None
        if self._multi is not None:
            label = torch.from_numpy(self._multi[rows].astype(np.float32))
        elif self._labels is not None:
            label = torch.from_numpy(self._labels[rows])
        sizes = [(int(image.shape[-2]), int(image.shape[-1]))] * len(rows)
        ids = [self.source.id(int(r)) for r in rows]
        return Batch(image=image, sizes=sizes, label=label, ids=ids, extra=[{} for _ in rows])

    def skip(self, error: UnreadableError, *, index: int | None = None) -> None:
        """Notes one unreadable picture; raises AdviceError when there are more of them than `max_bad` allows."""
        key = self.id(index) if index is not None else error.where
        if key not in self.unreadable:
            self.unreadable[key] = error.why
            log.warning("skipped %s: %s", error.where, error.why)
        allowed = self.bad_allowed()
        if len(self.unreadable) > allowed:
            first = "; ".join(f"{k} ({why})" for k, why in list(self.unreadable.items())[:5])
            raise AdviceError(
                f"{len(self.unreadable)} of {len(self.source)} pictures in {self.origin} cannot be read, more than the "
                f"{allowed} allowed: {first}. Mend or delete them, or allow more: max_bad={len(self.unreadable) * 2}."
            )

    def bad_allowed(self) -> int:
        """How many pictures may be unreadable: `max_bad` itself, or that share of all (at least one) when below 1."""
        return max(1, int(self.max_bad * len(self.source))) if 0 < self.max_bad < 1 else int(self.max_bad)

    # what is known without decoding -------------------------------------------------------------------------------
    @property
    def images(self) -> UInt8[Tensor, "n 3 h w"] | None:
        """All pictures as one tensor when they are held in memory, else None."""
        if self._images is None:
            return None
        if self._chosen is None:
            whole = len(self._rows) == len(self._images) and np.array_equal(self._rows, np.arange(len(self._images)))
            self._chosen = self._images if whole else self._images[torch.from_numpy(self._rows)]
        return self._chosen

    @property
    def multilabels(self) -> np.ndarray | None:
        return None if self._multi is None else self._multi[self._rows]

    @property
    def splits(self) -> np.ndarray | None:
        return None if self._splits is None else self._splits[self._rows]

    def id(self, index: SupportsIndex) -> str:
        return self.source.id(int(self._rows[index.__index__()]))

    def path(self, index: SupportsIndex) -> str | None:
        return self.source.path(int(self._rows[index.__index__()]))

    def target(self, index: SupportsIndex, *, maps: bool = True) -> dict[str, Any]:
        """Boxes, classes and the like of one sample without its picture; masks and segments too when `maps`."""
        return self.source.target(int(self._rows[index.__index__()]), maps=maps)

    def raw(self, index: SupportsIndex) -> bytes:
        """The bytes of one picture as stored."""
        return self.source.raw(int(self._rows[index.__index__()]))

    def counts(self) -> dict[str, int]:
        """Samples per class name, in the order of the classes; "(no label)" last when there are any."""
        labels, multi = self.labels, self.multilabels
        if multi is not None:
            return dict(zip(self.classes or map(str, range(multi.shape[1])), (int(v) for v in multi.sum(0))))
        if labels is None:
            return {}
        names = self.classes or [str(i) for i in range(int(labels.max(initial=-1)) + 1)]
        out = dict(zip(names, np.bincount(labels[labels >= 0], minlength=len(names)).tolist()))
        none = int((labels < 0).sum())
        return out | ({"(no label)": none} if none else {})

    def __repr__(self) -> str:
        parts = [f"{len(self):,} pictures"]
        if self.classes is not None:
            shown = ", ".join(self.classes[:10]) + (", ..." if len(self.classes) > 10 else "")
            parts.append(f"{len(self.classes)} classes ({shown})")
        if self.splits is not None:
            names, count = np.unique(self.splits.astype(str), return_counts=True)
            parts.append("splits " + ", ".join(f"{k} {v:,}" for k, v in zip(names, count)))
        if self._images is not None:
            parts.append("in memory")
        return f"Dataset({self.name!r}: {'; '.join(parts)}; from {self.origin})"

    # choosing -----------------------------------------------------------------------------------------------------
    def subset(self, indices: Any) -> Dataset:
        """The samples at `indices` (integers or a boolean mask), in that order."""
        chosen = np.asarray(indices)
        if chosen.dtype == bool:
            if len(chosen) != len(self):
                raise AdviceError(f"A mask of {len(chosen)} entries cannot choose among {len(self)} samples.")
            chosen = np.flatnonzero(chosen)
        out = Dataset.__new__(Dataset)
        out.__dict__ = dict(self.__dict__)
        out._rows = self._rows[chosen.astype(np.int64)]
        out._chosen = None
        out.labels = None if self._labels is None else self._labels[out._rows]
        return out

    def part(self, split: str) -> Dataset:
        """The samples of one split of those that the format names. "test" and "val" stand for each other if alone."""
        if self.splits is None:
            raise AdviceError(
                f"{self.origin} has no splits of its own. Make them: train, test = dataset.split(0.8, 0.2)."
            )
        names = sorted({str(s) for s in self.splits})
        wanted = split
        if split not in names:
            groups = ({"val", "valid", "validation", "dev"}, {"test", "testing"}, {"train", "training"})
            alike = [n for g in groups if split in g for n in names if n in g]
            held_out = [n for n in names if n in groups[0] | groups[1]] if split in groups[0] | groups[1] else []
            if len(alike) != 1 and len(held_out) != 1:
                raise unknown("split", split, names, how=f"({self.origin})")
            wanted = (alike or held_out)[0]
        return self.subset(self.splits == wanted)

    def split(self, *fractions: float, seed: int = 0) -> tuple[Dataset, ...]:
        """Disjoint parts of the given shares, each class divided alike; what the shares leave becomes one more part.

        The same seed gives the same parts. A class of at least as many samples as parts is in every part.
        """
        if not fractions or not all(f > 0 for f in fractions) or sum(fractions) > 1 + 1e-6:
            raise AdviceError(f"Shares must be positive and sum to at most 1, e.g. split(0.8, 0.2); got {fractions}.")
        shares = [*fractions] if sum(fractions) > 1 - 1e-6 else [*fractions, 1 - sum(fractions)]
        strata = self.labels if self.labels is not None else np.zeros(len(self), dtype=np.int64)
        rng = numpy_generator(seed, "split")
        parts: list[list[np.ndarray]] = [[] for _ in shares]
        cuts = np.cumsum(shares)[:-1]
        for value in np.unique(strata):
            members = rng.permutation(np.flatnonzero(strata == value))
            at = np.rint(cuts * len(members)).astype(int)
            if len(members) >= len(shares):
                at = np.clip(at, np.arange(1, len(shares)), len(members) - np.arange(len(shares) - 1, 0, -1))
            for part, piece in zip(parts, np.split(members, at)):
                part.append(piece)
        return tuple(self.subset(np.sort(np.concatenate(p)) if p else []) for p in parts)

    def train_test(self, share: float = 0.2, *, seed: int = 0) -> tuple[Dataset, Dataset]:
        """What to train on and what to test on: the format's own splits if it names them, else a stratified `split`."""
        if self.splits is not None:
            names = {str(s) for s in self.splits}
            train = [n for n in ("train", "training") if n in names]
            held = [n for n in ("val", "valid", "validation", "dev", "test", "testing") if n in names]
            if train and held:
                return self.part(train[0]), self.part(held[0])
        train_part, test_part = self.split(1 - share, share, seed=seed)
        return train_part, test_part

    def take(self, limit: int, *, seed: int = 0) -> Dataset:
        """At most `limit` samples, each class thinned alike, in their old order."""
        if limit < 1:
            raise AdviceError(f"limit must be at least 1; got {limit}.")
        if limit >= len(self):
            return self
        strata = self.labels if self.labels is not None else np.zeros(len(self), dtype=np.int64)
        order = numpy_generator(seed, "take").permutation(len(self))
        rank = np.empty(len(self))
        for value in np.unique(strata):
            members = order[strata[order] == value]
            rank[members] = (np.arange(len(members)) + 0.5) / len(members)
        return self.subset(np.sort(np.argsort(rank, kind="stable")[:limit]))

    def hold(self, images: UInt8[Tensor, "n 3 h w"]) -> Dataset:
        """The same samples with these pictures in memory, one per sample."""
        if len(images) != len(self):
            raise AdviceError(f"{len(images)} pictures for {len(self)} samples; there must be one for each.")
        out = self.subset(np.arange(len(self)))
        out.source = Chosen(self.source, self._rows)
        out._labels = self.labels
        out._multi, out._splits = self.multilabels, self.splits
        out._rows = np.arange(len(self))
        out._images = images
        return out

    # looking ------------------------------------------------------------------------------------------------------
    def fingerprint(self, *, content: bool = False) -> str:
        """A hash of which samples these are: ids and file sizes (the pixels when in memory), labels, classes, order.

        content: hash the bytes of every picture instead of its size.
        """
        digest = hashlib.blake2b(digest_size=16)
        digest.update(repr((len(self), self.classes)).encode())
        for values in (self.labels, self.multilabels):
            digest.update(b"-" if values is None else values.tobytes())
        images = self.images
        if images is not None:
            digest.update(repr(tuple(images.shape[1:])).encode())
            digest.update(images.numpy().tobytes())
        elif content:
            for row in self._rows:
                digest.update(hashlib.blake2b(self.source.raw(int(row)), digest_size=16).digest())
        else:
            digest.update("\n".join(self.source.stamp(int(row)) for row in self._rows).encode())
        return digest.hexdigest()

    def check(self, *, strict: bool = False, decode: bool = True) -> Report:
        """Counts per split and class, and every problem found. See `lynceus.data.checks.check`."""
        from lynceus.data.checks import check

        return check(self, strict=strict, decode=decode)
