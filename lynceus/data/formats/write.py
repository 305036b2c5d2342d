"""What the writers share: a folder of their own, pictures without loss, texts put in place whole."""

from __future__ import annotations

import os
from pathlib import Path

from lynceus.core.errors import AdviceError
from lynceus.core.types import Sample


def fresh(folder: Path) -> None:
    """Makes `folder`. Raises AdviceError when it holds something already."""
    if folder.exists() and any(folder.iterdir()):
        raise AdviceError(f"{folder.resolve()} is not empty; nothing is overwritten. Give another folder, or empty it.")
    folder.mkdir(parents=True, exist_ok=True)


def class_folder(folder: Path, name: str) -> Path:
    """The folder of a class below `folder`. Raises AdviceError for a name that would lead elsewhere."""
    if name in ("", ".", "..") or "/" in name or "\\" in name or "\0" in name:
        raise AdviceError(f"The class {name!r} cannot be a folder's name. Rename it, or save as csv or parquet.")
    return folder / name


def stem_of(sample: Sample, index: int) -> str:
    """A file name without ending, unique by index, that still tells where the sample comes from."""
    base = os.path.splitext(os.path.basename(sample.id))[0] or "image"
    return f"{index:06d}" if base == str(index) else f"{index:06d}_{base}"


def save_picture(sample: Sample, folder: Path, index: int) -> str:
    """Writes the picture as PNG and returns its name."""
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    name = f"{stem_of(sample, index)}.png"
    Image.fromarray(sample.image.permute(1, 2, 0).numpy()).save(folder / name)
    return name


def write_text(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


def boxes_of(sample: Sample) -> list[tuple[list[float], int]]:
    """(x1, y1, x2, y2) and class index of each box of the sample."""
    if sample.boxes is None or sample.classes is None:
        return []
    return list(zip(sample.boxes.tolist(), sample.classes.tolist()))
