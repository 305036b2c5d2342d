"""Features of frozen models: extracted once per (model, layer, image), and shared by all probes.

Razavian, Azizpour, Sullivan, Carlsson, "CNN Features off-the-shelf: an Astounding Baseline for Recognition", CVPR 2014
workshops, arXiv 1403.6382. No code is public. The paper reads one late layer of one network; here it is the pooled
penultimate vector of any subject, or any inner layer by its module name.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from lynceus.core.errors import AdviceError, unknown
from lynceus.core.files import write_atomic
from lynceus.core.identity import image_key, model_key
from lynceus.core.progress import progress
from lynceus.core.subject import Subject
from lynceus.core.types import Sample, as_float

Pool = Literal["mean", "max", "flat"]


@dataclass(frozen=True, kw_only=True)
class Features:
    """Vectors of a data set, float32 (n, c), or (n, v, c) with v views per image, and what is known about them.

    labels: (n,) int64 class indices, (n, k) float multi-hot, or None. key: which model and layer they come from."""

    vectors: Float[np.ndarray, "n ... c"]
    labels: np.ndarray | None = None
    classes: tuple[str, ...] | None = None
    name: str = "features"
    key: str = ""

    def __len__(self) -> int:
        return len(self.vectors)

    def take(self, indices: np.ndarray) -> Features:
        """The rows `indices`."""
        labels = None if self.labels is None else self.labels[indices]
        return Features(
            vectors=self.vectors[indices], labels=labels, classes=self.classes, name=self.name, key=self.key
        )


class FeatureCache:
    """Vectors by image key: in memory, and with a folder on disk too, one shard per batch, each written atomically."""

    def __init__(self, folder: str | Path | None = None):
        self.folder = Path(folder) if folder is not None else None
        self.hits = self.misses = 0
        self._rows: dict[str, dict[bytes, np.ndarray]] = {}
        self._lock = threading.RLock()

    def rows(self, space: str) -> dict[bytes, np.ndarray]:
        """Everything known of one space (a model and a layer): image key -> vector."""
        with self._lock:
            if space not in self._rows:
                self._rows[space] = {}
                if self.folder is not None and not space.startswith("object-"):
                    for file in sorted((self.folder / space).glob("*.safetensors")):
                        self._read(file, self._rows[space])
            return self._rows[space]

    def _read(self, file: Path, rows: dict[bytes, np.ndarray]) -> None:
        from safetensors import SafetensorError
        from safetensors.numpy import load_file

        try:
            shard = load_file(file)
        except (SafetensorError, OSError):
            return  # a damaged shard is only a cache miss
        rows.update(zip((k.tobytes() for k in shard["keys"]), shard["vectors"]))

    def add(self, space: str, keys: Sequence[bytes], vectors: np.ndarray) -> None:
        """Remembers `vectors` (n, c) under `keys`."""
        from safetensors.numpy import save

        rows = self.rows(space)
        with self._lock:
            rows.update(zip(keys, vectors))
        if self.folder is None or space.startswith("object-"):
            return
        folder = self.folder / space
        name = hashlib.blake2b(b"".join(keys), digest_size=12).hexdigest()
        data = save(
            {
                "keys": np.frombuffer(b"".join(keys), np.uint8).reshape(-1, 16).copy(),
                "vectors": np.ascontiguousarray(vectors),
            }
        )
        write_atomic(folder / f"{name}.safetensors", data)


class _Found(Exception):
    """Raised in a hook: the layer that was asked for has answered, the rest of the network need not run."""


class Extractor:
    """Images -> vectors (b, c) of a frozen model, the same whatever the batch size, each image computed once.

    model: a Subject, or anything a Subject takes. layer: None for the pooled vector before the classifier, or the name
      of a module inside the model ("layers.2", "backbone.layers.2"; the backbone's own names work too).
    pool: what becomes of a map or of tokens from `layer`: "mean", "max", an int g for a g x g mean grid, or "flat".
    channels: where a 4-d output of `layer` keeps its channels, "first", "last", or "auto" (by the module's kind and
      the shape; refused when both are possible).
    cache: a FeatureCache, a folder for one, None for memory only.
    """

    def __init__(
        self,
        model: Subject | nn.Module | Any,
        layer: str | None = None,
        *,
        pool: Pool | int = "mean",
        channels: Literal["auto", "first", "last"] = "auto",
        batch_size: int = 64,
        cache: FeatureCache | str | Path | None = None,
        quiet: bool = False,
    ):
        if batch_size < 1:
            raise AdviceError(f"batch_size must be at least 1, not {batch_size}.")
        if not isinstance(pool, int) and pool not in ("mean", "max", "flat"):
            raise unknown("pool", str(pool), ["mean", "max", "flat"], how="An int g pools to a g x g grid.")
        self.subject = model if isinstance(model, Subject) else Subject(model, needs_grad=False)
        self.layer, self.pool, self.channels, self.batch_size, self.quiet = layer, pool, channels, batch_size, quiet
        self.cache = cache if isinstance(cache, FeatureCache) else FeatureCache(cache)
        self.module = None if layer is None else self._find(layer)
        self.level = self._level(layer)

    def _find(self, layer: str) -> nn.Module:
        model = self.subject.model
        if not isinstance(model, nn.Module):
            raise AdviceError(f"{self.subject.name} is a plain function: it has no inner layers, leave layer=None.")
        named = dict(model.named_modules())
        backbone = getattr(model, "backbone", None)
        inner = dict(backbone.named_modules()) if isinstance(backbone, nn.Module) else {}
        found = named.get(layer, inner.get(layer))
        if found is None or layer == "":
            raise unknown("layer", layer, [n for n in [*inner, *named] if n])
        return found

    def _level(self, layer: str | None) -> int | None:
        """The pyramid level that a layer's name stands for: a stage need not be one module that is called."""
        model = getattr(self.subject.model, "backbone", self.subject.model)
        names = [s.name for s in getattr(model, "stages", ()) if hasattr(s, "stride")]
        layer = (layer or "").removeprefix("backbone.")
        return names.index(layer) if layer in names and hasattr(model, "forward_intermediates") else None

    @property
    def space(self) -> str:
        """Names what the vectors are: the model's key, the layer and its pooling."""
        key = model_key(self.subject)
        return f"{key}-pooled" if self.layer is None else f"{key}-{self.layer}-{self.pool}-{self.channels}"

    def __call__(self, images: Tensor | Sequence[Tensor]) -> Float[Tensor, "n c"]:
        """Vectors of images (n, 3, h, w), or of a list of (3, h, w) of any sizes; uint8, or float in [0, 1]."""
        return torch.from_numpy(self._vectors(list(images), self.space))

    def of(self, data: Any) -> Features:
        """Vectors and labels of a whole data set, decoded one batch ahead of the model."""
        space, vectors, labels = self.space, [], []
        total = len(data) if hasattr(data, "__len__") else None
        with progress(f"features of {self.subject.name}", total=total, unit="images", quiet=self.quiet) as bar:
            for samples in _ahead(batches(data, self.batch_size)):
                vectors.append(self._vectors([s.image for s in samples], space))
                labels += [s.label for s in samples]
                bar.advance(len(samples))
        if not labels:
            raise AdviceError(
                "There are no images to extract features from; check the data with data.open(...).check()."
            )
        classes = getattr(data, "classes", None) or None
        return Features(
            vectors=np.concatenate(vectors),
            labels=_stack_labels(labels),
            classes=tuple(classes) if classes else None,
            name=str(getattr(data, "name", "data")),
            key=space,
        )

    def _vectors(self, images: list[Tensor], space: str) -> np.ndarray:
        if not images:
            raise AdviceError("There are no images to extract features from.")
        rows, keys = self.cache.rows(space), [image_key(image) for image in images]
        new: dict[tuple[Any, ...], dict[bytes, Tensor]] = {}
        for key, image in zip(keys, images):
            if key not in rows:
                new.setdefault((*image.shape, image.dtype), {})[key] = image
        fresh = sum(len(group) for group in new.values())
        self.cache.misses += fresh
        self.cache.hits += len(images) - fresh
        for group in new.values():  # images of one size run together, nothing is padded
            names, stack = list(group), list(group.values())
            for i in range(0, len(stack), self.batch_size):
                vectors = self._run(torch.stack(stack[i : i + self.batch_size]))
                self.cache.add(space, names[i : i + self.batch_size], vectors)
        return np.stack([rows[key] for key in keys])

    @torch.inference_mode()
    def _run(self, images: Tensor) -> np.ndarray:
        with evaluating(self.subject.model):
            out = self.subject.embed(as_float(images)) if self.module is None else self._inner(as_float(images))
        return out.float().cpu().numpy()

    def _inner(self, images: Tensor) -> Tensor:
        if self.level is not None:
            return self._pooled(self.subject.features(images)[self.level], first=True)
        seen: list[Any] = []

        def hook(module: nn.Module, args: Any, output: Any) -> None:
            seen.append(output)
            raise _Found

        assert self.module is not None
        handle = self.module.register_forward_hook(hook)
        try:
            self.subject(images)
        except _Found:
            pass
        finally:
            handle.remove()
        if not seen:
            raise AdviceError(
                f"The layer {self.layer!r} of {self.subject.name} is never called; name a layer inside it."
            )
        out = seen[0][0] if isinstance(seen[0], (tuple, list)) else seen[0]
        if not isinstance(out, Tensor):
            raise AdviceError(
                f"The layer {self.layer!r} gives a {type(out).__name__}, not a tensor; name a layer inside it."
            )
        return self._pooled(out)

    def _pooled(self, x: Tensor, *, first: bool = False) -> Tensor:
        if x.ndim == 3:  # tokens (b, n, c)
            if isinstance(self.pool, int):
                raise AdviceError("Tokens have no grid to pool to; use pool='mean', 'max' or 'flat'.")
            return x.mean(1) if self.pool == "mean" else x.amax(1) if self.pool == "max" else x.flatten(1)
        if x.ndim == 4:
            if not first and self._channels_last(x):
                x = x.permute(0, 3, 1, 2)
            if self.pool == "mean":
                return x.mean((2, 3))
            if self.pool == "max":
                return x.amax((2, 3))
            if isinstance(self.pool, int):
                return nn.functional.adaptive_avg_pool2d(x, self.pool).flatten(1)
        return x.flatten(1)

    def _channels_last(self, x: Tensor) -> bool:
        if self.channels != "auto":
            return self.channels == "last"
        if isinstance(self.module, (nn.Conv2d, nn.BatchNorm2d, nn.GroupNorm)):
            return False
        if isinstance(self.module, (nn.Linear, nn.LayerNorm)):
            return True
        model = getattr(self.subject.model, "backbone", self.subject.model)
        widths = {stage.channels for stage in getattr(model, "stages", ()) if hasattr(stage, "channels")}
        first, last = x.shape[1] in widths, x.shape[3] in widths
        if first == last:
            first, last = x.shape[2] == x.shape[3], x.shape[1] == x.shape[2]
        if first == last:
            raise AdviceError(
                f"{self.layer!r} gives {tuple(x.shape)}: say where its channels are, channels='first' or 'last'."
            )
        return last


class FeatureBank:
    """Features of (subject, data, layer), computed once and shared by every probe of a gauntlet.

    folder: keeps vectors on disk as well, so that an interrupted run finds them again; None: memory only."""

    def __init__(self, folder: str | Path | None = None, *, batch_size: int = 64, quiet: bool = False):
        self.cache = FeatureCache(folder)
        self.batch_size, self.quiet = batch_size, quiet
        self._known: dict[tuple[str, str], Features] = {}
        self._kept: list[Any] = []  # objects whose id is part of a key must outlive it
        self._lock = threading.RLock()

    def extractor(self, subject: Subject, *, layer: str | None = None) -> Extractor:
        self._kept.append((subject.model, subject._features))
        return Extractor(subject, layer, batch_size=self.batch_size, cache=self.cache, quiet=self.quiet)

    def get(self, subject: Subject, data: Any, *, layer: str | None = None) -> Features:
        """Vectors (n, c) and labels of `data` as `subject` sees them. A second call costs a look-up."""
        if isinstance(data, Features):
            return data
        extractor = self.extractor(subject, layer=layer)
        space = extractor.space
        if hasattr(data, "fingerprint"):
            key = (space, data.fingerprint())
        else:
            data = data if isinstance(data, (list, tuple)) else list(data)
            key = (space, f"object-{id(data):x}")
        with self._lock:
            if key not in self._known:
                self._known[key] = extractor.of(data)
                self._kept.append(data)
            return self._known[key]


def batches(data: Any, size: int) -> Iterator[list[Sample]]:
    """Lists of up to `size` samples, in order."""
    if hasattr(data, "__getitems__") and hasattr(data, "__len__"):
        for start in range(0, len(data), size):
            yield data.__getitems__(list(range(start, min(start + size, len(data)))))
        return
    chunk: list[Sample] = []
    for sample in data:
        chunk.append(sample)
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def _ahead(source: Iterator[list[Sample]]) -> Iterator[list[Sample]]:
    """Reads the next batch in a thread while this one is used."""
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(next, source, None)
        while (item := future.result()) is not None:
            future = pool.submit(next, source, None)
            yield item


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """The model in eval mode inside the block; every submodule gets its mode back after it."""
    training = [m for m in model.modules() if m.training] if isinstance(model, nn.Module) else []
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _stack_labels(labels: list[Any]) -> np.ndarray | None:
    if all(label is None for label in labels):
        return None
    if any(isinstance(label, Tensor) and label.ndim for label in labels):
        return np.stack([np.asarray(label, dtype=np.float32) for label in labels])
    return np.array([-1 if label is None else int(label) for label in labels], dtype=np.int64)


def labelled(features: Features) -> Features:
    """The rows that have a label. None at all, or a single class, is an advising error."""
    if features.labels is None or (features.labels.ndim == 1 and (features.labels < 0).all()):
        raise AdviceError(
            f"{features.name} has no labels, and a probe learns from labels: open a folder of class folders."
        )
    if features.labels.ndim == 1:
        features = features.take(np.flatnonzero(features.labels >= 0)) if (features.labels < 0).any() else features
        if len(np.unique(np.asarray(features.labels))) < 2:
            raise AdviceError(f"{features.name} has a single class; a probe needs at least two.")
    return features


def stratified(
    labels: np.ndarray, fraction: float, *, seed: int, keys: Sequence[Any] = ()
) -> tuple[np.ndarray, np.ndarray]:
    """Indices (rest, taken): `fraction` of every class is taken, at least one, never all of a class of two or more."""
    from lynceus.core.rng import numpy_generator

    if not 0 < fraction < 1:
        raise AdviceError(f"A fraction lies between 0 and 1, not {fraction}.")
    rng = numpy_generator(seed, "split", *keys)
    groups = labels if labels.ndim == 1 else np.zeros(len(labels), int)
    order = rng.permutation(len(groups))
    taken = np.zeros(len(groups), bool)
    for c in np.unique(groups):
        members = order[groups[order] == c]
        count = min(max(1, round(fraction * len(members))), len(members) - 1)
        taken[members[:count]] = True
    return np.flatnonzero(~taken), np.flatnonzero(taken)


def split(
    data: Any, subject: Subject, bank: FeatureBank | None, *, test_fraction: float, seed: int, layer: str | None = None
) -> tuple[Features, Features]:
    """Train and test features: `data` is a pair (train, test), or one data set that is divided by class, seeded."""
    if data is None or (hasattr(data, "__len__") and len(data) == 0):
        raise AdviceError("The data is empty: a probe needs labelled images, for instance data.open('digits').")
    bank = bank or FeatureBank()
    if isinstance(data, (tuple, list)) and len(data) == 2 and not isinstance(data[0], Sample):
        train, test = (labelled(bank.get(subject, part, layer=layer)) for part in data)
        if train.vectors.shape[1] != test.vectors.shape[1]:
            raise AdviceError(
                f"Train vectors have {train.vectors.shape[1]} numbers and test vectors {test.vectors.shape[1]}."
            )
        return train, test
    whole = labelled(bank.get(subject, data, layer=layer))
    rest, taken = stratified(np.asarray(whole.labels), test_fraction, seed=seed)
    return whole.take(rest), whole.take(taken)
