"""Pictures with a PNG mask of the same stem in a second folder (palette or grey ids, 255 ignored), with or without
folders per split; without a classes.txt, folders per class are the pictures' labels. And the anomaly layout:
train/good, test/<defect>, ground_truth/<defect>/<stem>_mask.png.

Anomaly layout: Bergmann et al., "MVTec AD", CVPR 2019.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from lynceus.core.errors import AdviceError, MissingError
from lynceus.data.boxes import Annotations, encode_rle, fill, mask_boxes
from lynceus.data.dataset import Dataset
from lynceus.data.decode import UnreadableError
from lynceus.data.folder import Entry, drop_empty, scan
from lynceus.data.formats.options import Options
from lynceus.data.formats.write import boxes_of, fresh, save_picture, write_text
from lynceus.data.sources import Chosen, Files

PICTURES = ("images", "image", "imgs", "img", "JPEGImages", "leftImg8bit")
MASKS = ("masks", "mask", "annotations", "labels", "segmentation", "SegmentationClass", "gt", "gtFine", "segments")
SUFFIXES = ("", "_mask", "_seg", "_gt", "_label", "_labelTrainIds", "-mask")
SPLITS = ("train", "training", "val", "valid", "validation", "test", "testing")


def detect(path: Path) -> bool:
    """Two folders of pictures, one of them masks; or good/defect folders with ground_truth."""
    return path.is_dir() and (_pair(path) is not None or _anomaly(path))


def _anomaly(path: Path) -> bool:
    return (path / "ground_truth").is_dir() and (path / "test").is_dir()


def _pair(path: Path) -> tuple[Path, Path] | None:
    pictures = next((path / n for n in PICTURES if (path / n).is_dir()), None)
    masks = next((path / n for n in MASKS if (path / n).is_dir()), None)
    if pictures is None or masks is None:
        return None
    return (pictures, masks) if any(e.name.lower().endswith(".png") for e in scan(masks)) else None


class Segments:
    """Masks of rows, read when asked for. paths: the mask of each row, None for none (then `empty` fills it)."""

    def __init__(self, source: Files, paths: list[str | None], *, classes: int | None, binary: bool = False):
        self.source, self.paths, self.classes, self.binary = source, paths, classes, binary

    def target(self, row: int, *, size: tuple[int, int] | None = None, maps: bool = True) -> dict[str, Any]:
        if not maps:
            return {}
        path = self.paths[row]
        if path is None:
            return {"segments": torch.zeros(size or self.source.size(row), dtype=torch.long)}
        segments = read_mask(path)
        size = size or self.source.size(row)
        if tuple(segments.shape) != tuple(size):
            raise AdviceError(
                f"The mask {path} is {segments.shape[0]} x {segments.shape[1]}, its picture {self.source.path(row)} is "
                f"{size[0]} x {size[1]} (height x width). Save the mask at the picture's size, without smoothing."
            )
        if self.binary:
            segments = (segments > 0).long()
        elif self.classes is not None:
            out = (segments >= self.classes) & (segments != 255)
            if out.any():
                raise AdviceError(
                    f"The mask {path} holds the value {int(segments[out].max())}, but there are "
                    f"{self.classes} classes: "
                    f"values go from 0 to {self.classes - 1}, and 255 is ignored. Correct the mask or classes.txt."
                )
        return {"segments": segments}


def read_mask(path: str | Path) -> Int[Tensor, "h w"]:
    """Class ids of a PNG mask: palette indices or grey values as stored. Raises AdviceError for colours."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as opened:
            opened.load()
            if opened.mode in ("RGB", "RGBA", "LA", "CMYK"):
                values = np.array(opened.convert("RGB"))
                if (values[..., 0] != values[..., 1]).any() or (values[..., 0] != values[..., 2]).any():
                    raise AdviceError(
                        f"The mask {os.path.abspath(path)} is a colour picture; a mask holds class "
                        f"ids, as grey or palette "
                        "PNG. Save it with one number per pixel."
                    )
                values = values[..., 0]
            else:
                values = np.array(opened)
    except FileNotFoundError:
        raise MissingError(f"There is no mask {os.path.abspath(path)}.") from None
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise UnreadableError(os.path.abspath(path), f"the mask is damaged ({str(error)[:80]})") from None
    return torch.from_numpy(values.astype(np.int64))


def read(path: Path, options: Options) -> Dataset:
    pair = _pair(path)
    if pair is None:
        return _read_anomaly(path, options)
    pictures, masks = pair
    entries = list(scan(pictures))
    if not entries:
        raise AdviceError(f"There is no picture under {pictures}.")
    found = {os.path.splitext(e.name)[0]: e.name for e in scan(masks)}
    names: list[str | None] = []
    for e in entries:
        stem = os.path.splitext(e.name)[0].removesuffix("_leftImg8bit")
        names.append(next((found[stem + s] for s in SUFFIXES if stem + s in found), None))
    lack = [e.name for e, n in zip(entries, names) if n is None]
    if lack:
        raise MissingError(
            f"{len(lack)} of {len(entries)} pictures in {pictures} have no mask in {masks}: "
            f"{', '.join(lack[:5])}. A mask has "
            f"the picture's name with .png, e.g. {masks / (os.path.splitext(lack[0])[0] + '.png')}."
        )
    classes = _classes(path)
    first = [e.name.split("/")[0].lower() for e in entries]
    splits = first if all("/" in e.name for e in entries) and set(first) <= set(SPLITS) else None
    kinds = _folders([e.name for e in entries], skip=0 if splits is None else 1)
    source = Files(pictures, [e.name for e in entries], sizes=[e.size for e in entries])
    source.targets = Segments(source, [f"{masks}/{n}" for n in names], classes=len(classes) if classes else None)
    extra = sorted(set(found.values()) - {n for n in names if n})
    notes = [f"{len(extra)} masks in {masks} have no picture, e.g. {extra[0]}"] if extra else []
    labels = None
    if classes is None and kinds is not None:
        classes = sorted(set(kinds))
        labels = [classes.index(k) for k in kinds]
    elif classes is None:
        notes.append(f"no class names: write them into {path / 'classes.txt'}, one per line, line 1 for value 0")
    out = Dataset(
        source,
        name=path.name,
        origin=str(path),
        classes=classes,
        labels=labels,
        splits=splits,
        max_bad=options.max_bad,
        layout="masks",
        notes=notes,
    )
    return drop_empty(out, entries)


def _folders(names: list[str], *, skip: int) -> list[str] | None:
    """The folder of each picture, where all of them lie in two or more: they are the pictures' classes."""
    parts = [n.split("/")[skip:-1] for n in names]
    if not all(len(p) == 1 for p in parts) or len({p[0] for p in parts}) < 2:
        return None
    return [p[0] for p in parts]


def _classes(path: Path) -> list[str] | None:
    file = path / "classes.txt"
    if not file.is_file():
        return None
    return [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]


def _read_anomaly(path: Path, options: Options) -> Dataset:
    entries: list[Entry] = []
    splits, kinds, masks = [], [], []
    truth = {os.path.splitext(e.name)[0]: e.name for e in scan(path / "ground_truth")}
    for split in ("train", "test"):
        for e in scan(path / split) if (path / split).is_dir() else ():
            kind, _, rest = e.name.partition("/")
            if not rest:
                raise AdviceError(
                    f"{path / split / e.name} lies outside a folder; use {path / split / 'good'} or a defect's."
                )
            stem = os.path.splitext(e.name)[0]
            mask = next((truth[stem + s] for s in SUFFIXES if stem + s in truth), None)
            if kind != "good" and mask is None:
                where = path / "ground_truth" / f"{stem}_mask.png"
                raise MissingError(f"The defect {path / split / e.name} has no mask; {where} is missing.")
            entries.append(Entry(f"{split}/{e.name}", e.size, e.mtime))
            splits.append(split)
            kinds.append(kind)
            masks.append(None if mask is None else f"{path}/ground_truth/{mask}")
    if not entries:
        raise AdviceError(f"There is no picture under {path / 'train'} and {path / 'test'}.")
    classes = ["good", *sorted(set(kinds) - {"good"})]
    source = Files(path, [e.name for e in entries], sizes=[e.size for e in entries])
    source.targets = Segments(source, masks, classes=None, binary=True)
    out = Dataset(
        source,
        name=path.name,
        origin=str(path),
        classes=classes,
        labels=[classes.index(k) for k in kinds],
        splits=splits,
        max_bad=options.max_bad,
        layout="anomaly",
    )
    return drop_empty(out, entries)


def write(dataset: Dataset, folder: Path) -> None:
    """folder/images/[split/]*.png, masks/ with the same names, classes.txt. Value 0 is background.

    Samples with `segments` and no boxes keep them. Boxes are drawn in order as classes + 1, by their mask or outline
    when they have one, else filled.
    """
    from PIL import Image

    fresh(folder)
    classes = list(dataset.classes or [])
    drawn = False
    for i in range(len(dataset)):
        sample = dataset[i]
        inner = "" if dataset.splits is None else str(dataset.splits[i])
        name = save_picture(sample, folder / "images" / inner, i)
        h, w = sample.image.shape[-2:]
        if sample.segments is not None and sample.boxes is None:
            ids = sample.segments.numpy()
        else:
            ids, drawn = np.zeros((h, w), dtype=np.int64), True
            for k, (corners, cls) in enumerate(boxes_of(sample)):
                if sample.masks is not None:
                    inside = sample.masks[k].numpy()
                else:
                    x1, y1, x2, y2 = corners
                    inside = fill([np.array([[x1, y1], [x2, y1], [x2, y2], [x1, y2]])], (h, w)).numpy()
                ids[inside] = cls + 1
        (folder / "masks" / inner).mkdir(parents=True, exist_ok=True)
        Image.fromarray(ids.astype(np.uint8 if ids.max(initial=0) < 256 else np.uint16)).save(
            folder / "masks" / inner / name
        )
    if classes:
        write_text(folder / "classes.txt", "\n".join((["background"] if drawn else []) + classes) + "\n")


def to_boxes(dataset: Dataset) -> Dataset:
    """A dataset of class maps as boxes and masks: one per connected region of a class; value 0 is background."""
    from scipy import ndimage

    out = Annotations()
    for i in range(len(dataset)):
        segments = dataset.target(i)["segments"].numpy()
        out.row(segments.shape)
        for value in np.unique(segments):
            if value in (0, 255):
                continue
            regions, count = ndimage.label(segments == value)
            for r in range(1, count + 1):
                mask = torch.from_numpy(regions == r)
                out.add(mask_boxes(mask[None])[0].tolist(), int(value) - 1, rle=json.dumps(encode_rle(mask)))
    return Dataset(
        Chosen(dataset.source, dataset._rows, targets=out.finish()),
        name=dataset.name,
        origin=dataset.origin,
        classes=(dataset.classes or [])[1:] or None,
        splits=dataset.splits,
        max_bad=dataset.max_bad,
        layout="masks",
    )
