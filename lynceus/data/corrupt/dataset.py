"""A corrupted copy of a data set on disk, laid out like CIFAR-10-C (arrays) or ImageNet-C (folders).

Hendrycks and Dietterich, ICLR 2019, arXiv 1903.12261. The published CIFAR-10-C is read by `read_corrupted` as well.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from lynceus.core.errors import AdviceError, MissingError, unknown
from lynceus.core.files import write_atomic
from lynceus.core.guard import fitted
from lynceus.core.progress import progress
from lynceus.core.types import Sample, as_float
from lynceus.data.corrupt.suite import chosen, corrupt, natural_scale, picture_generators
from lynceus.data.corrupt.tables import SEVERITIES, Scale
from lynceus.data.dataset import Dataset
from lynceus.data.formats.write import class_folder
from lynceus.data.sources import Pixels

MANIFEST = "corrupted.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class _Copy:
    """What is copied, where to, and how: the arguments of `corrupt_dataset`."""

    dataset: Dataset
    target: Path
    severities: Sequence[int]
    scale: Literal["auto", "imagenet", "cifar"]
    side: int | None
    quality: int | None
    seed: int
    batch_size: int


def corrupt_dataset(
    dataset: Dataset,
    folder: str | os.PathLike[str],
    *,
    corruptions: str | Sequence[str] = "benchmark",
    severities: Sequence[int] = (1, 2, 3, 4, 5),
    scale: Literal["auto", "imagenet", "cifar"] = "auto",
    layout: Literal["array", "folder"] = "array",
    side: int | None = None,
    quality: int | None = None,
    seed: int = 0,
    batch_size: int = 64,
    quiet: bool = False,
) -> Path:
    """Writes every picture under every corruption and severity into `folder`; returns its full path.

    corruptions: names, groups, "benchmark" (15) or "all" (19). scale: "auto" goes by the size of the pictures.
    layout: "array" writes NAME.npy (severities * n, h, w, 3) uint8, the lowest severity first, and labels.npy, as
      CIFAR-10-C does; "folder" writes NAME/SEVERITY/CLASS/picture.png, as ImageNet-C does.
    side: pictures are first brought to this short side and cut square; needed for arrays when sizes differ.
    quality: folders only: JPEG of this quality instead of PNG. The published ImageNet-C has 85.
    seed: every picture has its own generator from (seed, corruption, severity, index): those of the check `corrupted`.
    A corruption that was finished before with the same options is not made again. Raises AdviceError for a folder that
    holds anything else.
    """
    names = chosen(corruptions)
    wrong = [s for s in severities if isinstance(s, bool) or s not in (1, 2, 3, 4, 5)]
    if wrong or not severities:
        raise AdviceError(f"severities are whole numbers from 1 to 5, at least one, not {tuple(severities)}.")
    if layout not in ("array", "folder"):
        raise unknown("layout of a corrupted copy", str(layout), ("array", "folder"))
    if scale not in ("auto", *SEVERITIES):
        raise unknown("scale of corruptions", str(scale), ("auto", *SEVERITIES))
    if quality is not None and (layout == "array" or not 1 <= quality <= 100):
        raise AdviceError(f"quality={quality} is for JPEG files, from 1 to 100: with layout='folder' only.")
    if len(dataset) == 0:
        raise AdviceError("There are no pictures to corrupt; the data set is empty.")
    levels = tuple(sorted(set(severities)))
    options = {
        "source": dataset.origin,
        "pictures": len(dataset),
        "severities": list(levels),
        "scale": scale,
        "layout": layout,
        "side": side,
        "quality": quality,
        "seed": seed,
        "classes": dataset.classes,
    }
    target, done = _opened(Path(os.path.abspath(os.path.expanduser(folder))), options)
    copy = _Copy(
        dataset=dataset, target=target, severities=levels, scale=scale, side=side, quality=quality, seed=seed,
        batch_size=batch_size,
    )  # fmt: skip
    total = len(names) * len(levels) * len(dataset)
    with progress("corrupting", total=total, unit="pictures", quiet=quiet) as bar:
        for name in names:
            if name in done:
                bar.advance(len(levels) * len(dataset))
                continue
            write = _write_array if layout == "array" else _write_folder
            write(copy, name, bar)
            done.append(name)
            _note(target, options, done)
    return target


def read_corrupted(folder: str | os.PathLike[str], corruption: str, severity: int) -> Dataset:
    """One corruption at one severity out of a folder of arrays: our own, or the published CIFAR-10-C."""
    base = Path(os.path.abspath(os.path.expanduser(folder)))
    file, labels = base / f"{corruption}.npy", base / "labels.npy"
    for path in (file, labels):
        if not path.is_file():
            there = ", ".join(sorted(p.stem for p in base.glob("*.npy"))) or "no .npy file"
            raise MissingError(f"There is no {path}; in {base}: {there}.")
    images = np.load(file, mmap_mode="r", allow_pickle=False)
    known = np.load(labels, allow_pickle=False)
    manifest = json.loads((base / MANIFEST).read_text()) if (base / MANIFEST).is_file() else {}
    severities = manifest.get("severities", [1, 2, 3, 4, 5])
    if severity not in severities:
        raise AdviceError(f"{base} holds the severities {severities}, not {severity}.")
    if images.ndim != 4 or len(images) % len(severities) or len(known) != len(images):
        raise AdviceError(
            f"{file} holds {tuple(images.shape)} for {len(known)} labels; one picture (h, w, 3) for each is needed, "
            f"{len(severities)} severities one after the other."
        )
    n = len(images) // len(severities)
    at = slice(n * severities.index(severity), n * (severities.index(severity) + 1))
    chosen_labels = known[at].astype(np.int64)
    classes = manifest.get("classes") or [str(i) for i in range(int(chosen_labels.max(initial=0)) + 1)]
    pixels = torch.from_numpy(np.array(images[at])).permute(0, 3, 1, 2).contiguous()
    return Dataset(
        Pixels(pixels), name=f"{corruption} {severity}", origin=str(file), classes=classes, labels=chosen_labels
    )


def _opened(target: Path, options: dict[str, Any]) -> tuple[Path, list[str]]:
    file = target / MANIFEST
    if file.is_file():
        before = json.loads(file.read_text(encoding="utf-8"))
        done = list(before.pop("done", []))
        if before != options:
            changed = [k for k in options if before.get(k) != options[k]]
            raise AdviceError(
                f"{target} holds a corrupted copy made with other options ({', '.join(changed)}). Give another folder."
            )
        return target, done
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise AdviceError(f"{target} is not empty; a corrupted copy goes into a new folder.")
    target.mkdir(parents=True, exist_ok=True)
    _note(target, options, [])
    return target, []


def _note(target: Path, options: dict[str, Any], done: list[str]) -> None:
    write_atomic(target / MANIFEST, json.dumps({**options, "done": done}, indent=1))


def _batches(dataset: Dataset, side: int | None, batch_size: int) -> Iterator[tuple[int, list[Sample], Tensor]]:
    """(index of the first, samples, their uint8 pictures): neighbours of one size together."""
    start, held = 0, list[tuple[Sample, Tensor]]()
    for index in range(len(dataset)):
        sample = dataset[index]
        image = sample.image.expand(3, -1, -1)
        if side is not None:
            image = fitted(as_float(image), side, side)
        if image.is_floating_point():
            image = (image * 255).round().to(torch.uint8)
        if held and (len(held) == batch_size or held[0][1].shape != image.shape):
            yield start, [s for s, _ in held], torch.stack([x for _, x in held])
            start, held = index, []
        held.append((sample, image))
    yield start, [s for s, _ in held], torch.stack([x for _, x in held])


def _made(images: Tensor, name: str, severity: int, copy: _Copy, start: int) -> np.ndarray:
    """(b, h, w, 3) uint8."""
    high, wide = images.shape[-2:]
    constants: Scale = natural_scale(high, wide) if copy.scale == "auto" else copy.scale
    seeds = picture_generators(copy.seed, name, severity, range(start, start + len(images)))
    out = corrupt(images, name, severity, generator=seeds, scale=constants)
    return out.permute(0, 2, 3, 1).contiguous().numpy()


def _write_array(copy: _Copy, name: str, bar: Any) -> None:
    n, room = len(copy.dataset), None
    part = copy.target / f".{name}.part"
    labels = np.full(n, -1, dtype=np.int64)
    for start, samples, images in _batches(copy.dataset, copy.side, copy.batch_size):
        high, wide = images.shape[-2:]
        if room is None:
            shape = (len(copy.severities) * n, high, wide, 3)
            room = np.lib.format.open_memmap(part, mode="w+", dtype=np.uint8, shape=shape)
        if room.shape[1:3] != (high, wide):
            part.unlink()
            raise AdviceError(
                f"{samples[0].id or start} is {high} x {wide}, others {room.shape[1]} x {room.shape[2]}: an array "
                "holds one size. Give side=SIDE, or layout='folder'."
            )
        labels[start : start + len(samples)] = [-1 if s.label is None else int(s.label) for s in samples]
        for level, severity in enumerate(copy.severities):
            at = level * n + start
            room[at : at + len(images)] = _made(images, name, severity, copy, start)
            bar.advance(len(images))
    assert room is not None
    room.flush()
    del room
    os.replace(part, copy.target / f"{name}.npy")
    np.save(copy.target / "labels.npy", np.tile(labels, len(copy.severities)))


def _write_folder(copy: _Copy, name: str, bar: Any) -> None:
    from PIL import Image

    for start, samples, images in _batches(copy.dataset, copy.side, copy.batch_size):
        for severity in copy.severities:
            for i, (sample, pixels) in enumerate(zip(samples, _made(images, name, severity, copy, start))):
                place = copy.target / name / str(severity)
                if sample.label is not None:
                    place = class_folder(place, (copy.dataset.classes or [])[int(sample.label)])
                place.mkdir(parents=True, exist_ok=True)
                stem = f"{start + i:06d}"
                if copy.quality is None:
                    Image.fromarray(pixels).save(place / f"{stem}.png")
                else:
                    Image.fromarray(pixels).save(place / f"{stem}.jpg", quality=copy.quality, optimize=True)
            bar.advance(len(images))
