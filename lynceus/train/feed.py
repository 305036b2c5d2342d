"""Feed: in which order images come, and how they become batches. Everything is a function of (seed, epoch, position),
so that workers, interruptions and the number of processes change nothing."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lynceus.core import rng
from lynceus.core.errors import AdviceError
from lynceus.core.nouns import Recipe
from lynceus.core.types import Batch, Sample, collate
from lynceus.data.decode import UnreadableError


def as_map(data: Any) -> Any:
    """`data` as something with __len__ and __getitem__; an iterable of samples is read into a list."""
    if isinstance(data, (str, bytes)):
        raise AdviceError(f"fit takes a dataset, not the text {data!r}: fit(recipe, lynceus.data.open({data!r}), ...).")
    if not (hasattr(data, "__len__") and hasattr(data, "__getitem__")):
        if not isinstance(data, Iterable):
            raise AdviceError(
                f"Data is a dataset or a list of Samples, not {type(data).__name__}; lynceus.data.open(...) makes one."
            )
        data = list(data)
    if not len(data):
        raise AdviceError(
            "The data is empty: there is no image to learn from. Check the path, and what data.open(...).check() says."
        )
    return data


def known_labels(data: Any) -> Any:
    """The labels of a dataset where they are known without decoding: its `labels`, or those of a list of Samples.
    None when that would mean reading files."""
    for name in ("multilabels", "labels"):
        if getattr(data, name, None) is not None:
            return getattr(data, name)
    if isinstance(data, (list, tuple)) and isinstance(data[0], Sample):
        values = [s.label for s in data]
        if any(isinstance(v, Tensor) and v.ndim for v in values):
            return torch.stack([torch.as_tensor(v) for v in values]).numpy()
        return [-1 if v is None else int(v) for v in values]
    return None


def in_memory(data: Any, recipe: Recipe) -> tuple[Tensor, Tensor | None] | None:
    """(images uint8 (n, 3, h, w), labels) when batches can be cut out of memory: equal sizes, and a recipe that makes
    no views of single samples. None otherwise."""
    own = getattr(recipe, "views", None)
    makes_views = bool(own) if own is not None else type(recipe).transform is not Recipe.transform
    if makes_views:
        return None
    images = getattr(data, "images", None)
    if isinstance(images, Tensor) and getattr(data, "plain", True):
        labels = known_labels(data)
        labels = None if labels is None else torch.as_tensor(labels)
        return images, labels.float() if labels is not None and labels.ndim == 2 else labels
    if isinstance(data, list) and len(data) <= 50_000 and all(_plain(s, data[0]) for s in data):
        batch = collate(data)
        return batch.image, batch.label
    return None


def _plain(sample: Any, first: Any) -> bool:
    """Nothing but a small uint8 image and a label."""
    if not isinstance(sample, Sample) or sample.image.dtype != torch.uint8 or sample.image.shape != first.image.shape:
        return False
    rest = (sample.boxes, sample.masks, sample.segments, sample.depth, sample.flow, sample.text)
    return sample.image.numel() <= 3 * 64 * 64 and all(v is None for v in rest) and not sample.extra


def permutation(count: int, seed: int, epoch: int) -> Tensor:
    """The order of an epoch."""
    return torch.randperm(count, generator=rng.generator(seed, "order", epoch))


class _Views(Dataset[Any]):
    """Samples after the recipe's transform; an item is (epoch, index)."""

    def __init__(self, data: Any, recipe: Recipe, seed: int):
        self.data, self.recipe, self.seed = data, recipe, seed

    def __getitems__(self, items: Sequence[tuple[int, int]]) -> list[Any]:
        """(transformed, None) per item, or (None, (index, where, why)) for a picture that cannot be read."""
        out: list[Any] = []
        for epoch, index in items:
            try:
                sample = self.data[index]
            except UnreadableError as error:
                out.append((None, (index, error.where, error.why)))
                continue
            out.append((self.recipe.transform(sample, rng.generator(self.seed, "view", epoch, index)), None))
        return out

    def __getitem__(self, item: tuple[int, int]) -> Any:
        return self.__getitems__([item])[0]


class Feed:
    """Batches of the run. `batches(start)` gives the global batch of every step from `start` on, this process's part.

    count: images. per_epoch: steps of one epoch (an incomplete last batch is dropped). batch: images of a step over all
    processes; at most `count`. With data in memory every process cuts and augments the whole batch and keeps its part,
    so that two processes see what one would; otherwise each loads its part only.
    """

    def __init__(
        self,
        data: Any,
        recipe: Recipe,
        *,
        batch: int,
        seed: int,
        workers: int,
        rank: int,
        world: int,
        device: torch.device,
    ):
        self.recipe, self.seed, self.rank, self.world, self.device = recipe, seed, rank, world, device
        self.data = data
        self.count = len(data)
        self.batch = min(batch, self.count)
        self.per_epoch = self.count // self.batch
        self.workers = workers
        if self.batch < world:
            raise AdviceError(
                f"A batch of {self.batch} cannot be shared by {world} processes; raise batch_size to at least {world}."
            )
        memory = in_memory(data, recipe)
        self.memory: tuple[Tensor, Tensor | None] | None = None
        if memory is not None:
            images, labels = memory
            self.memory = images.to(device), None if labels is None else labels.to(device)

    def part(self, size: int) -> slice:
        """Which of `size` images of a batch are this process's."""
        return slice(self.rank * size // self.world, (self.rank + 1) * size // self.world)

    def indices(self, step: int) -> Tensor:
        """Indices of the global batch of a step."""
        epoch, at = divmod(step, self.per_epoch)
        if getattr(self, "_epoch", None) != epoch:
            self._epoch, self._order = epoch, permutation(self.count, self.seed, epoch)
        return self._order[at * self.batch : (at + 1) * self.batch]

    def batches(self, start: int, stop: int) -> Iterator[Any]:
        """The augmented batches of steps start .. stop - 1, on the device."""
        if self.memory is not None:
            for step in range(start, stop):
                yield self._cut(step)
            return
        sampler = _Steps(self, start, stop)
        loader: DataLoader[Any] = DataLoader(
            _Views(self.data, self.recipe, self.seed),
            batch_sampler=sampler,
            num_workers=self.workers,
            collate_fn=_collate,
            pin_memory=self.device.type == "cuda",
            persistent_workers=False,
            prefetch_factor=4 if self.workers else None,
            worker_init_fn=_one_thread,
        )
        for step, (batch, bad) in zip(range(start, stop), loader):
            for index, where, why in bad:
                self.data.skip(UnreadableError(where, why), index=index)  # raises when there are too many
            if batch is None:
                raise AdviceError(
                    f"Not one image of the batch of step {step} can be read: {bad[0][1]} ({bad[0][2]}) and others."
                )
            on_device = batch.to(self.device, non_blocking=True) if hasattr(batch, "to") else _move(batch, self.device)
            keys = (self.seed, "augment", step) if self.world == 1 else (self.seed, "augment", step, self.rank)
            yield self.recipe.augment(on_device, rng.generator(*keys))

    def _cut(self, step: int) -> Any:
        assert self.memory is not None
        images, labels = self.memory
        index = self.indices(step).to(self.device)
        image = images.index_select(0, index)
        h, w = int(image.shape[-2]), int(image.shape[-1])
        batch = Batch(
            image=image,
            sizes=[(h, w)] * len(image),
            label=None if labels is None else labels.index_select(0, index),
        )
        made = self.recipe.augment(batch, rng.generator(self.seed, "augment", step))
        return made if self.world == 1 else pick(made, self.part(len(index)))


class _Steps:
    """The batch sampler: lists of (epoch, index) of this process."""

    def __init__(self, feed: Feed, start: int, stop: int):
        self.feed, self.start, self.stop = feed, start, stop

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for step in range(self.start, self.stop):
            index = self.feed.indices(step)
            epoch = step // self.feed.per_epoch
            yield [(epoch, i) for i in index[self.feed.part(len(index))].tolist()]

    def __len__(self) -> int:
        return self.stop - self.start


def _collate(items: list[Any]) -> tuple[Any, list[Any]]:
    """(batch, what could not be read); the batch is None when nothing could."""
    bad = [why for _, why in items if why is not None]
    good = [made for made, why in items if why is None]
    if not good:
        return None, bad
    return (collate(good) if isinstance(good[0], Sample) else torch.utils.data.default_collate(good)), bad


def _one_thread(worker: int) -> None:
    torch.set_num_threads(1)


def _move(value: Any, device: torch.device) -> Any:
    if isinstance(value, (Tensor, Batch)):
        return value.to(device)
    if isinstance(value, dict):
        return {k: _move(v, device) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_move(v, device) for v in value)
    return value


def size_of(batch: Any) -> int:
    """How many images a batch has."""
    if isinstance(batch, (Batch, Tensor)):
        return len(batch)
    values = list(batch.values()) if isinstance(batch, dict) else list(batch)
    return size_of(values[0])


def pick(batch: Any, part: slice) -> Any:
    """Some images of a batch: of a Batch, or of tensors along their first axis in lists and dicts."""
    if isinstance(batch, Batch):
        values: dict[str, Any] = {name: getattr(batch, name) for name in Batch.__dataclass_fields__}
        kept: dict[str, Any] = {k: (v[part] if v is not None else None) for k, v in values.items()}
        return Batch(**kept)
    if isinstance(batch, dict):
        return {k: pick(v, part) for k, v in batch.items()}
    if isinstance(batch, (list, tuple)):
        return type(batch)(pick(v, part) for v in batch)
    return batch[part] if isinstance(batch, Tensor) else batch


def pieces(batch: Any, count: int) -> list[tuple[Any, int]]:
    """A batch cut into `count` (piece, images) of as equal size as can be; empty ones are left out."""
    total = size_of(batch)
    if count <= 1:
        return [(batch, total)]
    edges = [total * i // count for i in range(count + 1)]
    return [(pick(batch, slice(a, b)), b - a) for a, b in itertools.pairwise(edges) if b > a]
