"""The loader: batches that depend on (seed, epoch, index) only, so that workers and interruptions change nothing.

Each sample's transform draws from a generator of its own; which batch a sample falls into depends on seed and epoch.
Starting at batch k skips the ones before without reading a file.
"""

from __future__ import annotations

import logging
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lynceus.core.errors import AdviceError
from lynceus.core.rng import generator
from lynceus.core.types import Sample, collate
from lynceus.data.dataset import Dataset
from lynceus.data.decode import UnreadableError

log = logging.getLogger("lynceus.data")


def loader(
    dataset: Dataset,
    batch_size: int,
    *,
    transform: Callable[..., Any] | None = None,
    shuffle: bool = False,
    seed: int = 0,
    epoch: int = 0,
    workers: int = 0,
    start: int = 0,
    drop_last: bool = False,
    rank: int = 0,
    world: int = 1,
) -> Loader:
    """Batches of `dataset`, once through, in an order given by (seed, epoch).

    transform: called per sample as transform(sample, generator), the generator seeded by (seed, epoch, index); when it
        has the attribute `batched = True`, per batch as transform(batch, generator), seeded by (seed, epoch, batch).
        What it gives may be anything: Samples are collated into a `Batch`, other things come as a list.
    workers: processes that read; 0 reads in this one. The batches are the same whatever their number.
    start: batches to leave out at the beginning, unread. drop_last: leave out the last batch when it is not full.
    rank, world: of each `batch_size * world` samples this process gets its contiguous share.
    Unreadable pictures are left out of their batch and counted in `dataset.unreadable`.
    """
    if batch_size < 1:
        raise AdviceError(f"batch_size must be at least 1; got {batch_size}.")
    if len(dataset) == 0:
        raise AdviceError(f"{dataset.name} holds no sample; there is nothing to load.")
    if drop_last and len(dataset) < batch_size * world:
        raise AdviceError(
            f"{dataset.name} has {len(dataset)} samples, fewer than one batch of {batch_size * world}, and incomplete "
            f"batches are dropped. Take batch_size={max(1, len(dataset) // world)} or smaller."
        )
    return Loader(dataset, batch_size, transform, shuffle, seed, epoch, workers, start, drop_last, rank, world)


class Loader:
    """What `loader` gives: iterate it for batches; `len` is how many are left from `start` on."""

    def __init__(
        self,
        dataset: Dataset,
        batch_size: int,
        transform: Callable[..., Any] | None,
        shuffle: bool,
        seed: int,
        epoch: int,
        workers: int,
        start: int,
        drop_last: bool,
        rank: int,
        world: int,
    ):
        self.dataset, self.batch_size, self.workers, self.start = dataset, batch_size, workers, start
        self.rank, self.world, self.drop_last = rank, world, drop_last
        self.order = order(len(dataset), shuffle=shuffle, seed=seed, epoch=epoch)
        self.work = _Work(dataset, transform, seed, epoch)

    @property
    def total(self) -> int:
        """Batches of the whole epoch."""
        whole = self.batch_size * self.world
        return len(self.dataset) // whole if self.drop_last else -(-len(self.dataset) // whole)

    def __len__(self) -> int:
        return max(0, self.total - self.start)

    def indices(self, batch: int) -> Tensor:
        """Which samples batch number `batch` of this process is made of."""
        whole = self.batch_size * self.world
        members = self.order[batch * whole : (batch + 1) * whole]
        return members.tensor_split(self.world)[self.rank]

    def __iter__(self) -> Iterator[Any]:
        jobs = [(b, self.indices(b)) for b in range(self.start, self.total)]
        for batch, bad in self._results(jobs):
            for index, where, why in bad:
                self.dataset.skip(UnreadableError(where, why), index=index)
            if batch is not None:
                yield batch

    def _results(self, jobs: list[tuple[int, Tensor]]) -> Iterator[Any]:
        workers = min(self.workers, len(jobs))
        if workers and torch.multiprocessing.get_start_method(allow_none=False) != "fork":
            try:
                pickle.dumps(self.work)
            except Exception as error:
                log.warning("reading without worker processes, since the transform cannot be sent to them: %s", error)
                workers = 0
        if not workers:
            yield from (self.work[job] for job in jobs)
            return
        reader = DataLoader(
            self.work, batch_size=None, sampler=jobs, num_workers=workers, prefetch_factor=4, worker_init_fn=_one_thread
        )
        try:
            yield from reader
        except RuntimeError as error:
            if "DataLoader worker" in str(error) and ("bus error" in str(error) or "killed" in str(error)):
                raise AdviceError(
                    f"A worker process that reads pictures died ({str(error).splitlines()[0]}). "
                    f"Shared memory (/dev/shm) or "
                    f"memory is too small for {workers} workers: take workers=0 or a smaller batch_size."
                ) from error
            raise


def order(count: int, *, shuffle: bool, seed: int, epoch: int) -> Tensor:
    """The order in which an epoch goes through `count` samples."""
    if not shuffle:
        return torch.arange(count)
    return torch.randperm(count, generator=generator(seed, "order", epoch))


class _Work(torch.utils.data.Dataset[Any]):
    """Makes one batch in whatever process it runs. Gives (batch or None, [(index, where, why) of the unreadable])."""

    def __init__(self, dataset: Dataset, transform: Callable[..., Any] | None, seed: int, epoch: int):
        self.dataset, self.transform, self.seed, self.epoch = dataset, transform, seed, epoch

    def __getitem__(self, job: tuple[int, Tensor]) -> tuple[Any, list[tuple[int, str, str]]]:
        number, indices = job
        batched = getattr(self.transform, "batched", False)
        bad: list[tuple[int, str, str]] = []
        batch: Any
        if self.dataset.plain and (self.transform is None or batched):
            batch = self.dataset.batch(indices)
        else:
            out = []
            for index in indices.tolist():
                try:
                    sample = self.dataset[index]
                except UnreadableError as error:
                    bad.append((index, error.where, error.why))
                    continue
                if self.transform is not None and not batched:
                    sample = self.transform(sample, generator(self.seed, "sample", self.epoch, index))
                out.append(sample)
            if not out:
                return None, bad
            batch = collate(out) if isinstance(out[0], Sample) else out
        if batched and self.transform is not None:
            batch = self.transform(batch, generator(self.seed, "batch", self.epoch, number))
        return batch, bad


def _one_thread(worker: int) -> None:
    torch.set_num_threads(1)
