"""WebDataset shards: name-000000.tar ..., a sample is the files of one key (the name up to its first dot): .jpg, .cls,
.json, .txt. An index of offsets, kept in the cache, makes every sample reachable at once, so that length, shuffling and
splitting by worker are those of any other dataset; `webdataset` itself is not needed.
"""

from __future__ import annotations

import io
import json
import re
import tarfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lynceus.core.errors import AdviceError, MissingError
from lynceus.data import cache
from lynceus.data.dataset import Dataset
from lynceus.data.decode import UnreadableError, is_image, read_image
from lynceus.data.folder import ending
from lynceus.data.formats.options import Options
from lynceus.data.formats.write import fresh

SIZE = 1000  # samples per shard written


def detect(path: Path) -> bool:
    """A .tar, a folder of them, or a pattern such as name-{000000..000012}.tar."""
    if re.search(r"\{\d+\.\.\d+\}", path.name):
        return True
    return path.suffix == ".tar" if path.is_file() else bool(ending(path, ".tar"))


def expand(path: Path) -> list[Path]:
    """The shards that a path, a folder or a pattern with {first..last} stands for."""
    found = re.search(r"\{(\d+)\.\.(\d+)\}", path.name)
    if found:
        first, last = found.groups()
        names = [path.name.replace(found[0], f"{k:0{len(first)}d}") for k in range(int(first), int(last) + 1)]
        files = [path.parent / n for n in names]
        lack = [f for f in files if not f.is_file()]
        if lack:
            raise MissingError(f"{len(lack)} of {len(files)} shards are not there, the first {lack[0]}.")
        return files
    return [path] if path.is_file() else ending(path, ".tar")


class Members:
    """Samples inside tar files, read by offset."""

    def __init__(self, files: list[str], where: np.ndarray, keys: list[str], extras: dict[str, np.ndarray]):
        self.files, self.where, self.keys, self.extras = files, where, keys, extras

    @property
    def rich(self) -> bool:
        return bool(self.extras)

    def __len__(self) -> int:
        return len(self.keys)

    def _bytes(self, place: np.ndarray) -> bytes:
        with open(self.files[int(place[0])], "rb") as opened:
            opened.seek(int(place[1]))
            return opened.read(int(place[2]))

    def raw(self, row: int) -> bytes:
        return self._bytes(self.where[row])

    def read(self, row: int) -> Tensor:
        name = f"{self.files[int(self.where[row, 0])]}:{self.keys[row]}"
        if self.where[row, 2] < 0:
            raise UnreadableError(name, "the sample has no picture")
        return read_image(self.raw(row), name=name)

    def id(self, row: int) -> str:
        return self.keys[row]

    def path(self, row: int) -> str | None:
        return None

    def target(self, row: int, *, size: tuple[int, int] | None = None, maps: bool = True) -> dict[str, Any]:
        out: dict[str, Any] = {}
        if "txt" in self.extras and self.extras["txt"][row, 2] >= 0:
            out["text"] = self._bytes(self.extras["txt"][row]).decode("utf-8", "replace")
        if "json" in self.extras and self.extras["json"][row, 2] >= 0:
            record = json.loads(self._bytes(self.extras["json"][row]))
            if isinstance(record, dict) and "boxes" in record:
                out["boxes"] = torch.tensor(record.pop("boxes"), dtype=torch.float32).reshape(-1, 4)
                out["classes"] = torch.tensor(record.pop("classes", []), dtype=torch.long)
            out["extra"] = record if isinstance(record, dict) else {"json": record}
        return out

    def stamp(self, row: int) -> str:
        return f"{self.keys[row]}:{int(self.where[row, 2])}"


def read(path: Path, options: Options) -> Dataset:
    files = expand(path)
    arrays = [cache.remember(f"shard {f}", cache.file_stamp(f), partial(_index, f)) for f in files]
    keys = [k for a in arrays for k in cache.unpack(a["keys"])]
    if not keys:
        raise AdviceError(f"{path} holds no sample with a picture.")

    def places(name: str) -> np.ndarray:
        return np.concatenate([np.insert(a[name], 0, s, axis=1) for s, a in enumerate(arrays)])

    extras = {k: places(k) for k in ("txt", "json") if any((a[k][:, 1] >= 0).any() for a in arrays)}
    source = Members([str(f) for f in files], places("image"), keys, extras)
    texts = [t for a in arrays for t in cache.unpack(a["cls"])]
    labels, classes = _labels(texts, files, path)
    names = [re.sub(r"[-_]?\d+$", "", f.stem).lower() for f in files]
    known = {"train", "val", "valid", "validation", "test"}
    splits = [n for n, a in zip(names, arrays) for _ in range(len(a["image"]))] if set(names) <= known else None
    return Dataset(
        source,
        name=path.name,
        origin=str(path),
        classes=classes,
        labels=labels,
        splits=splits if splits and len(set(splits)) > 1 else None,
        max_bad=options.max_bad,
        layout="webdataset",
    )


def _labels(texts: list[str], files: list[Path], path: Path) -> tuple[list[int] | None, list[str] | None]:
    given = [t for t in texts if t]
    listed = (path if path.is_dir() else files[0].parent) / "classes.txt"
    if not given:
        return None, listed.read_text(encoding="utf-8").split("\n")[:-1] if listed.is_file() else None
    if all(t.isdigit() for t in given):
        labels = [int(t) if t else -1 for t in texts]
        if listed.is_file():
            classes = [line.strip() for line in listed.read_text(encoding="utf-8").splitlines() if line.strip()]
            if max(labels) >= len(classes):
                raise AdviceError(f"{path}: label {max(labels)}, but {listed} names {len(classes)} classes, from 0 on.")
        else:
            classes = [str(i) for i in range(max(labels) + 1)]
        return labels, classes
    classes = sorted(set(given))
    position = {c: i for i, c in enumerate(classes)}
    return [position[t] if t else -1 for t in texts], classes


def _index(file: Path) -> dict[str, np.ndarray]:
    parts: dict[str, dict[str, tuple[int, int]]] = {}
    cls: dict[str, str] = {}
    try:
        with tarfile.open(file, "r:") as tar:
            for member in tar:
                if not member.isfile() or member.name.split("/")[-1].startswith("."):
                    continue
                folder, _, name = member.name.rpartition("/")
                stem, _, ending = name.partition(".")
                key = f"{folder}/{stem}" if folder else stem
                entry = parts.setdefault(key, {})
                kind = "image" if is_image(f"x.{ending}") else ending.lower()
                entry[kind] = (member.offset_data, member.size)
                if kind in ("cls", "label") and (opened := tar.extractfile(member)) is not None:
                    cls[key] = opened.read().decode("utf-8", "replace").strip()
    except (tarfile.TarError, EOFError, OSError) as error:
        packed = Path(file).read_bytes()[:2] == b"\x1f\x8b"
        why = "it is compressed; unpack it with gunzip" if packed else str(error)
        raise AdviceError(f"{file} is no readable tar file: {why}.") from None
    keys = [k for k, e in parts.items() if "image" in e]

    def places(name: str) -> np.ndarray:
        return np.array([parts[k].get(name, (-1, -1)) for k in keys], dtype=np.int64).reshape(-1, 2)

    return {n: places(n) for n in ("image", "txt", "json")} | {
        "keys": cache.pack(keys),
        "cls": cache.pack(cls.get(k, "") for k in keys) if cls else cache.pack([""] * len(keys)),
    }


def write(dataset: Dataset, folder: Path) -> None:
    """folder/<split>-000000.tar ... of 1000 samples: .png, .cls (index), .txt, .json (boxes, classes); classes.txt."""
    from PIL import Image

    fresh(folder)
    of: dict[str, list[int]] = {}
    for i in range(len(dataset)):
        of.setdefault("train" if dataset.splits is None else str(dataset.splits[i]), []).append(i)
    for split, members in of.items():
        for shard, begin in enumerate(range(0, len(members), SIZE)):
            with tarfile.open(folder / f"{split}-{shard:06d}.tar", "w") as tar:
                for i in members[begin : begin + SIZE]:
                    sample = dataset[i]
                    buffer = io.BytesIO()
                    Image.fromarray(sample.image.permute(1, 2, 0).numpy()).save(buffer, "PNG")
                    _put(tar, f"{i:06d}.png", buffer.getvalue())
                    if isinstance(sample.label, int):
                        _put(tar, f"{i:06d}.cls", str(sample.label).encode())
                    if isinstance(sample.text, str):
                        _put(tar, f"{i:06d}.txt", sample.text.encode())
                    if sample.boxes is not None and sample.classes is not None:
                        record = {"boxes": sample.boxes.tolist(), "classes": sample.classes.tolist()}
                        _put(tar, f"{i:06d}.json", json.dumps(record).encode())
    if dataset.classes:
        (folder / "classes.txt").write_text("\n".join(dataset.classes) + "\n", encoding="utf-8")


def _put(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))
