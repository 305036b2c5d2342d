"""The one door: `open_dataset` looks at what it is given and says what it saw. Nothing is ever downloaded here."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lynceus.core.errors import AdviceError, MissingError, nearest, unknown
from lynceus.core.progress import progress
from lynceus.data.dataset import Dataset
from lynceus.data.decode import UnreadableError, image_size, is_image, resize, to_image
from lynceus.data.digits import digits
from lynceus.data.folder import class_folders, read_folder, read_paths
from lynceus.data.formats import arrays, coco, csv_table, hub, masks, shards, torchvision_sets, voc, yolo
from lynceus.data.formats.options import Options
from lynceus.data.sources import Pixels

log = logging.getLogger("lynceus.data")
SMALL = 64  # pictures of at most this side are held in memory when they fit
ROOM = 1 << 29  # bytes that pictures held in memory may take unless in_memory=True


LAYOUTS = ("folder", "flat", "csv", "coco", "yolo", "voc", "masks", "anomaly", "parquet", "hub", "webdataset", "array")
_LOOKS = (
    ("coco", coco),
    ("yolo", yolo),
    ("voc", voc),
    ("hub", hub),
    ("webdataset", shards),
    ("array", arrays),
    ("masks", masks),
)
_READERS: dict[str, Any] = dict(_LOOKS) | {"csv": csv_table, "parquet": hub, "anomaly": masks}


def open_dataset(
    source: Any,
    *,
    split: str | None = None,
    labels: Any = None,
    columns: Mapping[str, str] | None = None,
    size: int | tuple[int, int] | None = None,
    in_memory: bool | None = None,
    limit: int | None = None,
    max_bad: int | float = 0.05,
    layout: str | None = None,
) -> Dataset:
    """Opens pictures in whatever form they are. Nothing is downloaded.

    source: "digits" (the default set; a folder of that name is "./digits") | an image folder, with or without class
        and split folders | CSV or TSV | a COCO .json or its folder | YOLO's data.yaml or its folder | a VOC folder |
        folders of pictures and masks | parquet, or what Hugging Face's save_to_disk wrote | WebDataset .tar files |
        .npy, .npz, MNIST, CIFAR, SVHN, HDF5 | one picture or a list of paths | an array (n, h, w[, c]) | a dataset of
        torchvision or of Hugging Face.
    split: only this split of a format that names splits. labels: class index (or name) per picture of an array or of a
        list; False ignores labels. columns: {"image": NAME, "label": NAME} for tables with unusual names.
    size: resize while reading to (h, w), or to a square of this side. in_memory: hold the pictures as one uint8 tensor;
        None does so when all have one size of at most 64 pixels (or `size` makes them so) and 512 MB hold them.
    limit: at most this many samples, each class thinned alike. max_bad: unreadable pictures allowed, a number or, below
        1, a share. layout: one of LAYOUTS, to skip the guessing.
    Raises AdviceError saying what was looked at, as a full path, and what to change.
    """
    options = Options(labels=labels, columns=dict(columns or {}), max_bad=max_bad)
    out = _open(source, options, layout, split)
    if split is not None and out.layout != "digits":
        out = out.part(split)
    if limit is not None:
        out = out.take(limit)
    for note in out.notes:
        log.info("%s: %s", out.origin, note)
    return _in_memory(out, size, in_memory)


def _open(source: Any, options: Options, layout: str | None, split: str | None) -> Dataset:
    if isinstance(source, Dataset):
        return source
    if isinstance(source, np.ndarray | Tensor):
        return read_array(source, labels=options.labels)
    if isinstance(source, list | tuple):
        return _listed(source, options)
    if hub.is_hub_dataset(source):
        return hub.wrap(source, options)
    if torchvision_sets.detect(source):
        return torchvision_sets.wrap(source, options)
    if not isinstance(source, str | os.PathLike):
        raise AdviceError(
            f"data.open takes a path, a list of paths, an array or a dataset; got {type(source).__name__}."
        )
    if source == "digits" and layout is None:
        return digits(split=split)
    path = locate(source)
    if layout is not None:
        if layout not in LAYOUTS:
            raise unknown("layout", layout, LAYOUTS)
        if layout in _READERS:
            read: Callable[..., Dataset] = _READERS[layout].read
            return read(path, options)
        return read_folder(path, max_bad=options.max_bad, labelled=False if layout == "flat" else None)
    return detect(path, options)


def detect(path: Path, options: Options) -> Dataset:
    """Reads `path` as the first layout that fits."""
    if path.is_file() and is_image(path):
        return read_paths([path], max_bad=options.max_bad, name=path.stem)
    for _, reader in _LOOKS:
        if reader.detect(path):
            found: Dataset = reader.read(path, options)
            return found
    if path.is_file():
        if csv_table.detect(path):
            return csv_table.read(path, options)
        if path.suffix.lower() == ".txt":
            return _listed(
                [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()], options, path
            )
        raise _strange_file(path)
    table = csv_table.usual(path)
    if table is not None and not class_folders(path):
        return csv_table.read(path, options)
    lone = lone_labels(path)
    if lone is not None:
        raise lone
    return read_folder(path, max_bad=options.max_bad, labelled=False if options.labels is False else None)


def _listed(paths: Sequence[Any], options: Options, file: Path | None = None) -> Dataset:
    """A list of paths (relative to the text file that holds them, if one does), or of arrays of one size."""
    if paths and isinstance(paths[0], np.ndarray | Tensor):
        return read_array(np.stack([np.asarray(p) for p in paths]), labels=options.labels)
    base = file.parent if file is not None else Path()
    out = read_paths([base / p for p in paths], max_bad=options.max_bad, name=file.stem if file else "pictures")
    if options.labels is None or options.labels is False:
        return out
    index, classes = indices(options.labels, len(out))
    return Dataset(
        out.source,
        name=out.name,
        origin=out.origin,
        classes=classes,
        labels=index,
        max_bad=options.max_bad,
        layout="list",
    )


def _strange_file(path: Path) -> AdviceError:
    if path.suffix.lower() in (".zip", ".gz", ".tgz", ".7z", ".rar", ".bz2", ".xz"):
        return AdviceError(f"{path} is an archive; unpack it and open the folder.")
    if path.suffix == ".json":
        return AdviceError(f"{path} is JSON, but no COCO file: it has no `images`, `annotations` and `categories`.")
    return AdviceError(
        f"{path} is no dataset that can be read. Files may be .parquet, .csv, .tsv, COCO .json, YOLO "
        f".yaml, .tar, .npz, .npy, "
        ".mat, .h5, a .txt list of paths, or a picture."
    )


def lone_labels(path: Path) -> AdviceError | None:
    """The error for a folder whose labels are plainly lost: images/ of YOLO or VOC without what belongs beside it."""
    if not (path / "images").is_dir() or any((path / n).is_dir() for n in ("train", "val", "test")):
        return None
    inside = [p.name for p in (path / "images").iterdir() if p.is_dir()]
    if (path / "labels").is_dir() and not any((path / "labels").rglob("*.txt")):
        return MissingError(
            f"{path / 'labels'} holds no label file; each picture in {path / 'images'} needs a .txt "
            f"of the same name (or a "
            "PNG mask). To use the pictures without labels, open that folder."
        )
    lost = not inside or set(inside) <= {"train", "val", "test"}
    if lost and [p.name for p in path.iterdir() if p.is_dir() and not p.name.startswith(".")] == ["images"]:
        return MissingError(
            f"{path} has pictures in images/, but no labels beside it: neither labels/ (YOLO), "
            f"masks/, a .csv nor a COCO .json. "
            f"Add them, or open {path / 'images'} for the pictures alone."
        )
    return None


def locate(source: str | os.PathLike[str]) -> Path:
    """The full path of something on disk. Raises MissingError with where was looked and the nearest name there."""
    text = os.fspath(source)
    path = Path(os.path.abspath(os.path.expanduser(text)))
    if path.exists() or re.search(r"\{\d+\.\.\d+\}", path.name):
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
        labels, found = indices(labels, len(images))
        classes = classes or found
    origin = f"an array of shape {tuple(np.shape(array))}"
    return Dataset(Pixels(images), name=name, origin=origin, classes=classes, labels=labels, layout="array")


def indices(labels: Any, count: int) -> tuple[np.ndarray, list[str]]:
    """Labels given as numbers or names, as indices and class names."""
    values = labels.numpy() if isinstance(labels, Tensor) else np.asarray(labels)
    if values.shape != (count,):
        raise AdviceError(f"{len(values)} labels for {count} pictures; there must be one for each.")
    if values.dtype.kind in "US":
        names = sorted({str(v) for v in values})
        return np.searchsorted(names, values.astype(str)).astype(np.int64), names
    if values.dtype.kind not in "iub":
        raise AdviceError(f"Labels are whole numbers from 0 on, or names; these are {values.dtype}.")
    return values.astype(np.int64), [str(i) for i in range(int(values.max(initial=-1)) + 1)]


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
            f"{len(dataset):,} pictures of {target[0]} x {target[1]} need more than {ROOM >> 20} MB in memory. "
            " Pass in_memory=True if there is room, or give the loader a transform that resizes."
        )
    return load(dataset, target)


def load(dataset: Dataset, size: tuple[int, int] | None = None, *, mixed: Dataset | None = None) -> Dataset:
    """The dataset with its pictures decoded into one tensor; unreadable ones are left out and counted.

    mixed: what to return instead of raising when the pictures turn out to differ in size.
    """
    images: Tensor | None = None
    keep: list[int] = []
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
    for i in np.unique(np.linspace(0, len(dataset) - 1, 64).astype(int).tolist()):
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
