"""The one door: `open_dataset` looks at what it is given and says what it saw. Nothing is ever downloaded here."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lynceus.core.errors import AdviceError, MissingError, nearest
from lynceus.core.progress import progress
from lynceus.data.dataset import Dataset, Pixels
from lynceus.data.decode import UnreadableError, image_size, is_image, resize, to_image

SMALL = 64  # pictures of at most this side are held in memory when they fit
ROOM = 1 << 29  # bytes that pictures held in memory may take unless in_memory=True


def open_dataset(
    source: Any,
    *,
    split: str | None = None,
    labels: Any = None,
    columns: dict[str, str] | None = None,
    size: int | tuple[int, int] | None = None,
    in_memory: bool | None = None,
    limit: int | None = None,
    max_bad: float = 0.05,
    layout: str | None = None,
) -> Dataset:
    """Opens pictures in whatever form they are.

    source: "digits" | an image folder, with or without class or split folders | a .parquet file or a folder of them |
        a list of paths | one picture | an array (n, h, w[, c]).
    split: only this split of a format that names splits. labels: (n,) class indices for an array; False ignores labels.
    columns: {"image": NAME, "label": NAME} of a table with unusual names. size: resize while reading to (h, w), or to a
        square of this side. in_memory: hold the pictures as one uint8 tensor; None does when all have one size of at
        most 64 pixels (or `size` makes them so) and 512 MB hold them.
    limit: at most this many samples, each class thinned alike. max_bad: unreadable pictures allowed, a number or, below
        1, a share. layout: skip the guessing and read as this layout.
    Raises AdviceError saying what was looked at, as a full path, and what to change.
    """
    out = _open(source, split=split, labels=labels, columns=columns, max_bad=max_bad, layout=layout)
    if limit is not None:
        out = out.take(limit)
    return _in_memory(out, size, in_memory)


def _open(
    source: Any, *, split: str | None, labels: Any, columns: dict[str, str] | None, max_bad: float, layout: str | None
) -> Dataset:
    from lynceus.data.digits import digits
    from lynceus.data.folder import read_folder, read_paths
    from lynceus.data.table import read_parquet

    if isinstance(source, Dataset):
        return source if split is None else source.part(split)
    if isinstance(source, np.ndarray | Tensor):
        return read_array(source, labels=labels)
    if isinstance(source, list | tuple):
        return read_paths(source, max_bad=max_bad)
    if not isinstance(source, str | os.PathLike):
        raise AdviceError(
            f"data.open takes a path, a list of paths, an array or a Dataset; got {type(source).__name__}."
        )
    if source == "digits" and not os.path.exists("digits"):
        return digits(split=split)
    path = locate(source)
    if path.is_file():
        if path.suffix == ".parquet":
            out = read_parquet([path], name=path.stem, origin=str(path), columns=columns, max_bad=max_bad)
        elif is_image(path):
            out = read_paths([path], max_bad=max_bad, name=path.stem)
        else:
            raise AdviceError(f"{path} is no dataset that can be read: a folder, .parquet or a picture is wanted.")
    else:
        out = read_folder(path, max_bad=max_bad, labelled=False if labels is False else None)
    return out if split is None else out.part(split)


def locate(source: str | os.PathLike[str]) -> Path:
    """The full path of something on disk. Raises MissingError with where was looked and the nearest name there."""
    text = os.fspath(source)
    path = Path(os.path.abspath(os.path.expanduser(text)))
    if path.exists():
        return path
    if "\\" in text and Path(os.path.abspath(text.replace("\\", "/"))).exists():
        raise MissingError(f"There is no {path}: write the path with / here: {text.replace(chr(92), '/')!r}.")
    if "://" in text:
        raise MissingError(f"{text!r} is an address; nothing is downloaded here. Fetch it first and give its path.")
    above = path.parent
    while not above.exists():
        above = above.parent
    try:
        close = nearest(path.relative_to(above).parts[0], os.listdir(above))
    except OSError:
        close = []
    hint = f" Did you mean {' or '.join(str(above / c) for c in close)}?" if close else ""
    start = "" if os.path.isabs(os.path.expanduser(text)) else f" ({text!r} relative to {os.getcwd()})"
    lack = "" if above == path.parent else f" The nearest folder that is there is {above}."
    raise MissingError(f"There is no file or folder {path}{start}.{lack}{hint}")


def read_array(array: Any, *, labels: Any = None, classes: Sequence[str] | None = None, name: str = "array") -> Dataset:
    """Pictures that are an array already: (n, h, w), (n, h, w, c), (n, c, h, w), or one picture of these without n."""
    images = to_image(array)
    images = images if images.ndim == 4 else images[None]
    if len(images) == 0:
        raise AdviceError("The array holds no picture.")
    if labels is False:
        labels = None
    if labels is not None:
        labels = np.asarray(labels)
        if len(labels) != len(images):
            raise AdviceError(f"{len(labels)} labels for {len(images)} pictures; there must be one for each.")
        if labels.dtype.kind in "US":
            found = sorted({str(v) for v in labels})
            classes = classes or found
            labels = np.array([list(classes).index(str(v)) for v in labels])
        classes = classes or [str(i) for i in range(int(labels.max()) + 1)]
    origin = f"an array of shape {tuple(np.shape(array))}"
    return Dataset(Pixels(images), name=name, origin=origin, classes=classes, labels=labels, layout="array")


def _in_memory(dataset: Dataset, size: int | tuple[int, int] | None, in_memory: bool | None) -> Dataset:
    target = (size, size) if isinstance(size, int) else size
    if dataset.images is not None:
        return dataset if target is None else dataset.hold(resize(dataset.images, target))
    if in_memory is False:
        if size is not None:
            raise AdviceError("size= resizes what is held in memory; with in_memory=False give the loader a transform.")
        return dataset
    if target is None and in_memory is None:
        return load(dataset, mixed=dataset) if _small(dataset) else dataset
    if target is not None and in_memory is None and 3 * target[0] * target[1] * len(dataset) > ROOM:
        raise AdviceError(
            f"{len(dataset):,} pictures of {target[0]} x {target[1]} need {3 * target[0] * target[1] * len(dataset) / 1e9:.1f} GB "
            "in memory. Pass in_memory=True if there is room, or give the loader a transform that resizes."
        )
    return load(dataset, target)


def load(dataset: Dataset, size: tuple[int, int] | None = None, *, mixed: Dataset | None = None) -> Dataset:
    """The dataset with its pictures decoded into one tensor; unreadable ones are left out and counted.

    mixed: what to return instead of raising when the pictures turn out to differ in size.
    """
    images: Tensor | None = None
    keep = []
    with progress(f"reading {dataset.name}", total=len(dataset), unit="images") as bar:
        for i in range(len(dataset)):
            try:
                image = dataset.source.read(int(dataset._rows[i]))
            except UnreadableError as error:
                dataset.skip(error, index=i)
                continue
            if size is not None:
                image = resize(image, size)
            if images is None:
                images = torch.empty((len(dataset), *image.shape), dtype=torch.uint8)
            elif image.shape != images.shape[1:]:
                if mixed is not None:
                    return mixed
                h, w = images.shape[-2:]
                raise AdviceError(
                    f"The pictures of {dataset.origin} differ in size: {dataset.id(i)} is {image.shape[-2]} x "
                    f"{image.shape[-1]}, the first {h} x {w}. Give size=N to resize them, or in_memory=False."
                )
            images[len(keep)] = image
            keep.append(i)
            if len(keep) % 256 == 0:
                bar.advance(256)
        bar.advance(len(dataset) - bar.done)
    if images is None:
        raise AdviceError(f"No picture of {dataset.origin} could be read.")
    return dataset.subset(keep).hold(images[: len(keep)])


def _small(dataset: Dataset) -> bool:
    """Whether all pictures seem to have one small size and fit in memory, from a look at up to 64 headers."""
    sizes = set()
    for i in np.unique(np.linspace(0, len(dataset) - 1, 64).astype(int)):
        try:
            path = dataset.path(i)
            sizes.add(image_size(path if path is not None else dataset.raw(i)))
        except (UnreadableError, MissingError):
            continue
        if len(sizes) > 1:
            return False
    if len(sizes) != 1:
        return False
    h, w = sizes.pop()
    return max(h, w) <= SMALL and 3 * h * w * len(dataset) <= ROOM
