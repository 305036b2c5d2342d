"""Numbers on disk: .npy and .npz, MNIST's idx, CIFAR's binary and Python files, SVHN's .mat in both forms, HDF5.

Nothing that could run code is unpickled: .npz is read with allow_pickle=False, and CIFAR's Python files by a reader
that knows numpy arrays and plain values only.
"""

from __future__ import annotations

import gzip
import io
import os
import pickle
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lynceus.core.errors import AdviceError, MissingError, missing_extra
from lynceus.data.boxes import Annotations
from lynceus.data.dataset import Dataset
from lynceus.data.decode import to_image
from lynceus.data.formats.options import Options
from lynceus.data.formats.write import fresh
from lynceus.data.sources import Files, Pixels

IMAGES = ("images", "image", "x", "X", "data", "arr_0", "pixels")
LABELS = ("labels", "label", "y", "Y", "targets", "target", "arr_1")
CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def detect(path: Path) -> bool:
    """A file with one of the endings, or a folder of MNIST, CIFAR or SVHN files."""
    if path.is_file():
        return path.suffix in (".npy", ".npz", ".mat", ".h5", ".hdf5") or _is_idx(path)
    return _kind(path) is not None


def _is_idx(path: Path) -> bool:
    return re.search(r"idx[13]-ubyte(\.gz)?$", path.name) is not None


def _kind(folder: Path) -> str | None:
    names = set(os.listdir(folder))
    if any(re.search(r"images[-.]idx3-ubyte(\.gz)?$", n) for n in names):
        return "mnist"
    if "data_batch_1" in names or ({"train", "meta"} <= names and (folder / "train").is_file()):
        return "cifar"
    if "data_batch_1.bin" in names or {"train.bin", "test.bin"} <= names:
        return "cifar-bin"
    if "digitStruct.mat" in names:
        return "svhn-full"
    if {"train_32x32.mat", "test_32x32.mat"} & names:
        return "svhn"
    if any((folder / s / "digitStruct.mat").is_file() for s in ("train", "test")):
        return "svhn-full"
    return "npz" if sum(n.endswith(".npz") for n in names) == 1 and len(names) == 1 else None


def read(path: Path, options: Options) -> Dataset:
    if path.is_file():
        if path.suffix == ".npy":
            return _dataset([("", _load(path), None)], path, None)
        if path.suffix == ".npz":
            return _read_npz(path, options)
        if path.suffix == ".mat":
            return _dataset([("", *_svhn(path))], path, [str(i) for i in range(10)])
        if path.suffix in (".h5", ".hdf5"):
            return _read_hdf5(path, options)
        return _read_mnist(path.parent, path)
    readers = {"mnist": _read_mnist, "cifar": _read_cifar, "cifar-bin": _read_cifar_binary, "svhn": _read_svhn}
    kind = _kind(path)
    if kind == "npz":
        return _read_npz(next(path.glob("*.npz")), options)
    return _read_svhn_full(path) if kind == "svhn-full" else readers[kind or "mnist"](path)


def _dataset(parts: Sequence[tuple[str, Any, Any]], path: Path, classes: Sequence[str] | None) -> Dataset:
    """parts: (split, images, labels or None)."""
    images = torch.cat([to_image(x) if np.ndim(x) == 4 else to_image(np.asarray(x)[..., None]) for _, x, _ in parts])
    labels = None
    if all(y is not None for _, _, y in parts):
        for split, x, y in parts:
            if len(x) != len(y):
                raise AdviceError(
                    f"{path}: {len(x)} pictures and {len(y)} labels in {split or 'it'}; they must be as many."
                )
        labels = np.concatenate([np.asarray(y).reshape(-1) for _, _, y in parts]).astype(np.int64)
        classes = classes or [str(i) for i in range(int(labels.max(initial=0)) + 1)]
        if labels.max(initial=0) >= len(classes):
            raise AdviceError(f"{path}: label {labels.max()}, but there are {len(classes)} class names, from 0 on.")
    splits = [s for s, x, _ in parts for _ in range(len(x))] if len(parts) > 1 else None
    return Dataset(
        Pixels(images), name=path.stem, origin=str(path), classes=classes, labels=labels, splits=splits, layout="array"
    )


def _load(path: Path) -> Any:
    try:
        return np.load(path, allow_pickle=False)
    except ValueError as error:
        if "pickle" in str(error).lower():
            raise AdviceError(
                f"{path} holds Python objects, which could run code when read, so it is refused. Save "
                f"it again as plain "
                "numbers: numpy.savez(file, images=uint8 array, labels=int array)."
            ) from None
        raise AdviceError(f"{path} is no numpy file: {error}. Copy it again.") from None
    except (OSError, EOFError) as error:
        raise AdviceError(f"{path} cannot be read: {error}. Copy it again.") from None


def _read_npz(path: Path, options: Options) -> Dataset:
    with _load(path) as stored:
        names = list(stored.files)
        parts = []
        for split in ("train", "val", "test"):
            x = next(
                (n for n in (f"x_{split}", f"{split}_images", f"images_{split}", f"X_{split}") if n in names), None
            )
            if x is not None:
                y = next((n for n in (f"y_{split}", f"{split}_labels", f"labels_{split}") if n in names), None)
                parts.append((split, _member(stored, x, path), None if y is None else _member(stored, y, path)))
        if not parts:
            x = options.columns.get("image") or next((n for n in IMAGES if n in names), None)
            y = options.columns.get("label") or next((n for n in LABELS if n in names), None)
            if x is None or x not in names:
                raise AdviceError(
                    f"{path} has no array of pictures called {x or 'images'}; it has "
                    f"{', '.join(names)}. Say which with "
                    'columns={"image": NAME, "label": NAME}.'
                )
            parts.append(
                ("", _member(stored, x, path), _member(stored, y, path) if y is not None and y in names else None)
            )
        classes = [str(c) for c in _member(stored, "classes", path)] if "classes" in names else None
    return _dataset(parts, path, classes)


def _member(stored: Any, name: str, path: Path) -> np.ndarray:
    try:
        values: np.ndarray = stored[name]
    except ValueError:
        raise AdviceError(
            f"{path}: {name} holds Python objects, which could run code when read, so it is refused. "
            f"Save plain numbers."
        ) from None
    return values


def _idx(path: Path) -> np.ndarray:
    with gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb") as opened:
        raw = opened.read()
    if len(raw) < 8 or raw[:3] != b"\0\0\x08":
        raise AdviceError(f"{path} is no idx file of bytes (it begins with {raw[:4]!r}).")
    shape = tuple(np.frombuffer(raw, dtype=">i4", count=raw[3], offset=4).tolist())
    body = np.frombuffer(raw, dtype=np.uint8, offset=4 + 4 * raw[3])
    if body.size != np.prod(shape):
        raise AdviceError(
            f"{path} is cut short: {body.size} values, its head promises {'x'.join(map(str, shape))}. Copy it again."
        )
    return body.reshape(shape)


def _read_mnist(folder: Path, only: Path | None = None) -> Dataset:
    parts = []
    files = [only] if only is not None else sorted(folder.iterdir())
    for file in files:
        if re.search(r"images[-.]idx3-ubyte(\.gz)?$", file.name):
            twin = file.name.replace("images", "labels").replace("idx3", "idx1")
            beside = next(
                (folder / n for n in (twin, twin.removesuffix(".gz"), f"{twin}.gz") if (folder / n).is_file()), None
            )
            if beside is None and only is None:
                raise MissingError(f"{file} is there, but its labels {folder / twin} are not.")
            split = "train" if "train" in file.name else "test"
            parts.append((split, _idx(file), None if beside is None else _idx(beside)))
    if not parts:
        raise AdviceError(f"{only or folder} holds labels only; open the file of images (…-images-idx3-ubyte).")
    return _dataset(parts, only or folder, None)


class _Plain(pickle.Unpickler):
    """Unpickles numpy arrays of numbers, texts, lists and dicts; refuses everything that could run code."""

    ALLOWED = {
        ("numpy.core.multiarray", "_reconstruct"),
        ("numpy._core.multiarray", "_reconstruct"),
        ("numpy", "ndarray"),
        ("numpy", "dtype"),
        ("_codecs", "encode"),
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in self.ALLOWED:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} is not allowed")


def _safe_pickle(path: Path) -> dict[Any, Any]:
    try:
        record = _Plain(io.BytesIO(path.read_bytes()), encoding="bytes").load()
    except Exception as error:
        raise AdviceError(
            f"{path} is refused: it is no CIFAR file of numbers only ({error}). Take the binary "
            f"version of CIFAR, or a parquet."
        ) from None
    if not isinstance(record, dict):
        raise AdviceError(f"{path} is no CIFAR file: it holds a {type(record).__name__}.")
    return {k.decode() if isinstance(k, bytes) else k: v for k, v in record.items()}


def _read_cifar(folder: Path) -> Dataset:
    files = [("train", f) for f in sorted(folder.glob("data_batch_*"))] or [("train", folder / "train")]
    test = next((folder / n for n in ("test_batch", "test") if (folder / n).is_file()), None)
    parts = []
    for split, file in [*files, *([("test", test)] if test else [])]:
        record = _safe_pickle(file)
        labels = record.get("fine_labels", record.get("labels"))
        if "data" not in record or labels is None:
            raise AdviceError(f"{file} has no data and labels; it has {', '.join(map(str, record))}.")
        parts.append((split, np.asarray(record["data"]).reshape(-1, 3, 32, 32), labels))
    meta = next((folder / n for n in ("batches.meta", "meta") if (folder / n).is_file()), None)
    classes = None
    if meta is not None:
        record = _safe_pickle(meta)
        names = record.get("fine_label_names", record.get("label_names"))
        classes = [n.decode() if isinstance(n, bytes) else str(n) for n in names] if names else None
    return _merge(parts, folder, classes)


def _read_cifar_binary(folder: Path) -> Dataset:
    hundred = (folder / "train.bin").is_file()
    files = (
        [("train", folder / "train.bin")]
        if hundred
        else [("train", f) for f in sorted(folder.glob("data_batch_*.bin"))]
    )
    files += [("test", f) for f in (folder / "test.bin", folder / "test_batch.bin") if f.is_file()]
    length, at = (3074, 1) if hundred else (3073, 0)
    parts = []
    for split, file in files:
        raw = np.fromfile(file, dtype=np.uint8)
        if raw.size == 0 or raw.size % length:
            raise AdviceError(f"{file} is cut short: {raw.size} bytes are no multiple of {length}. Copy it again.")
        rows = raw.reshape(-1, length)
        parts.append((split, rows[:, length - 3072 :].reshape(-1, 3, 32, 32), rows[:, at]))
    names = folder / ("fine_label_names.txt" if hundred else "batches.meta.txt")
    classes = names.read_text().split() if names.is_file() else None if hundred else list(CIFAR10)
    return _merge(parts, folder, classes)


def _merge(parts: list[tuple[str, np.ndarray, Any]], folder: Path, classes: Sequence[str] | None) -> Dataset:
    merged = []
    for split in dict.fromkeys(s for s, _, _ in parts):
        xs, ys = [x for s, x, _ in parts if s == split], [np.asarray(y) for s, _, y in parts if s == split]
        merged.append((split, np.concatenate(xs), np.concatenate(ys)))
    return _dataset(merged, folder, classes)


def _svhn(file: Path) -> tuple[np.ndarray, np.ndarray]:
    from scipy.io import loadmat

    try:
        record = loadmat(file)
    except (ValueError, NotImplementedError, OSError, TypeError) as error:
        raise AdviceError(f"{file} cannot be read as a MATLAB file ({error}). Copy it again.") from None
    if "X" not in record or "y" not in record:
        found = [k for k in record if not k.startswith("__")]
        raise AdviceError(f"{file} has no X and y as SVHN's files do; it has {', '.join(found)}.")
    return np.moveaxis(record["X"], -1, 0), record["y"].reshape(-1).astype(np.int64) % 10


def _read_svhn(folder: Path) -> Dataset:
    files = [
        (s, folder / f"{s}_32x32.mat") for s in ("train", "test", "extra") if (folder / f"{s}_32x32.mat").is_file()
    ]
    return _dataset([(s, *_svhn(f)) for s, f in files], folder, [str(i) for i in range(10)])


def _h5py() -> Any:
    try:
        import h5py
    except ImportError:
        raise missing_extra("h5py", "formats", use="Reading HDF5 files") from None
    return h5py


def _read_hdf5(path: Path, options: Options) -> Dataset:
    h5py = _h5py()
    try:
        with h5py.File(path, "r") as file:
            names = [n for n in file if isinstance(file[n], h5py.Dataset)]
            x = options.columns.get("image") or next((n for n in IMAGES if n in names), None)
            y = options.columns.get("label") or next((n for n in LABELS if n in names), None)
            if x is None or x not in names:
                raise AdviceError(
                    f"{path} has no dataset of pictures called {x or 'images'}; it has "
                    f"{', '.join(names)}. Say which with "
                    'columns={"image": NAME, "label": NAME}.'
                )
            return _dataset([("", file[x][()], file[y][()] if y in names else None)], path, None)
    except OSError as error:
        raise AdviceError(f"{path} is no readable HDF5 file ({error}). Copy it again.") from None


def _read_svhn_full(path: Path) -> Dataset:
    """SVHN's photographs with a box per digit (digitStruct.mat, an HDF5 file)."""
    h5py = _h5py()
    folders = [path] if (path / "digitStruct.mat").is_file() else [path / s for s in ("train", "test", "extra")]
    folders = [f for f in folders if (f / "digitStruct.mat").is_file()]
    names, splits, out = [], [], Annotations()
    for folder in folders:
        with h5py.File(folder / "digitStruct.mat", "r") as file:
            group = file["digitStruct"]

            def values(item: Any, key: str, file: Any = file) -> list[float]:
                data = item[key]
                return [float(file[data[k][0]][0][0]) if len(data) > 1 else float(data[0][0]) for k in range(len(data))]

            for k in range(len(group["name"])):
                name = "".join(chr(int(c[0])) for c in file[group["name"][k][0]][()])
                item = file[group["bbox"][k][0]]
                names.append(str(folder / name))
                splits.append(folder.name)
                out.row()
                sides = [values(item, key) for key in ("left", "top", "width", "height", "label")]
                for x, y, w, h, label in zip(*sides):
                    out.add((x - 1, y - 1, x - 1 + w, y - 1 + h), int(label) % 10)
    source = Files("", names, targets=out.finish())
    return Dataset(
        source,
        name=path.name,
        origin=str(path),
        classes=[str(i) for i in range(10)],
        splits=splits if len(folders) > 1 else None,
        layout="svhn",
    )


def write(dataset: Dataset, folder: Path) -> None:
    """folder/data.npz with images (n, 3, h, w), labels and classes. All pictures must have one size."""
    fresh(folder)
    if dataset.images is None and len({tuple(dataset[i].image.shape) for i in range(len(dataset))}) > 1:
        raise AdviceError(f"The pictures of {dataset.origin} differ in size; open them with size=N to write one array.")
    images = (
        dataset.images if dataset.images is not None else torch.stack([dataset[i].image for i in range(len(dataset))])
    )
    arrays: dict[str, np.ndarray] = {"images": images.numpy()}
    if dataset.labels is not None:
        arrays |= {"labels": dataset.labels, "classes": np.array(dataset.classes)}
    np.savez(folder / "data.npz", **arrays)  # type: ignore[arg-type]
