"""Pascal VOC: Annotations/*.xml, JPEGImages/*, ImageSets/Main/*.txt. Boxes count pixels from 1 and include both edges;
here they become xyxy from 0 with the far edge outside the last pixel. `difficult` and `truncated` ride in extra.

Layout: Everingham et al., "The Pascal Visual Object Classes (VOC) Challenge", IJCV 2010.
"""

from __future__ import annotations

import os
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from xml.sax.saxutils import escape

import numpy as np

from lynceus.core.errors import AdviceError, MissingError
from lynceus.core.progress import track
from lynceus.data import cache
from lynceus.data.boxes import Annotations
from lynceus.data.dataset import Dataset
from lynceus.data.folder import scan
from lynceus.data.formats.options import Options
from lynceus.data.formats.write import boxes_of, fresh, save_picture, write_text
from lynceus.data.sources import Files

CLASSES = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog"),
    *("horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)


def detect(path: Path) -> bool:
    return path.is_dir() and _root(path) is not None


def _root(path: Path) -> Path | None:
    """The folder that holds Annotations with XML files: itself, or VOCdevkit/VOC2012 below."""
    for folder in (path, *sorted(path.glob("VOC*")), *sorted(path.glob("VOCdevkit/VOC*"))):
        place = folder / "Annotations"
        if place.is_dir() and any(n.endswith(".xml") for n in os.listdir(place)):
            return folder
    return None


def read(path: Path, options: Options) -> Dataset:
    root = _root(path)
    if root is None:
        raise MissingError(f"{path} has no folder Annotations with .xml files in it.")
    pictures = next((root / n for n in ("JPEGImages", "images", "Images") if (root / n).is_dir()), None)
    if pictures is None:
        raise MissingError(f"{root} has Annotations, but no folder JPEGImages with the pictures.")
    with os.scandir(root / "Annotations") as entries:
        stats = sorted((e.name, e.stat().st_size, e.stat().st_mtime_ns) for e in entries if e.name.endswith(".xml"))
    arrays = cache.remember(f"voc {root}", cache.stamp(stats), lambda: _index(root, [n for n, _, _ in stats]))
    names = cache.unpack(arrays["names"])
    found = {os.path.splitext(e.name)[0]: e for e in scan(pictures)}
    stems = [os.path.splitext(n)[0] for n, _, _ in stats]
    files = []
    for stem, given in zip(stems, names):
        entry = found.get(stem) or found.get(os.path.splitext(given)[0])
        if entry is None:
            raise MissingError(
                f"{root / 'Annotations' / (stem + '.xml')} describes {given!r}, but {pictures} has no such picture. "
                "Copy it there, or delete the XML file."
            )
        files.append(entry)
    classes = cache.unpack(arrays["classes_names"])
    annotations = Annotations.of({k: v for k, v in arrays.items() if k not in ("names", "classes_names")})
    splits, notes = _splits(root, stems)
    bare = len(set(found) - set(stems))
    if bare:
        notes.append(f"{bare} pictures in {pictures} have no XML file and are left out")
    return Dataset(
        Files(pictures, [e.name for e in files], sizes=[e.size for e in files], targets=annotations),
        name=path.name,
        origin=str(root),
        classes=classes,
        splits=splits,
        max_bad=options.max_bad,
        layout="voc",
        notes=notes,
    )


def _splits(root: Path, stems: list[str]) -> tuple[list[str] | None, list[str]]:
    of: dict[str, str] = {}
    for split in ("train", "val", "test"):
        file = root / "ImageSets" / "Main" / f"{split}.txt"
        if file.is_file():
            of |= {line.split()[0]: split for line in file.read_text(encoding="utf-8").splitlines() if line.strip()}
    if not of:
        return None, []
    unknown = sorted(set(of) - set(stems))
    notes = [f"ImageSets name {len(unknown)} pictures without XML file, e.g. {unknown[0]}"] if unknown else []
    return [of.get(s, "none") for s in stems], notes


def _index(root: Path, names: list[str]) -> dict[str, np.ndarray]:
    records = []
    for name in track(names, "reading annotations", unit="files"):
        file = root / "Annotations" / name
        try:
            tree = ElementTree.parse(file).getroot()
        except ElementTree.ParseError as error:
            raise AdviceError(f"{file} is no valid XML: {error}. Was it copied whole?") from None
        size = tree.find("size")
        h, w = (int(float(size.findtext(k) or 0)) for k in ("height", "width")) if size is not None else (0, 0)
        objects = []
        for item in tree.iter("object"):
            box = item.find("bndbox")
            if box is None:
                raise AdviceError(f"{file}: the object {item.findtext('name')!r} has no bndbox.")
            try:
                x1, y1, x2, y2 = (float(box.findtext(k) or "") for k in ("xmin", "ymin", "xmax", "ymax"))
            except ValueError:
                raise AdviceError(f"{file}: the bndbox of {item.findtext('name')!r} is not four numbers.") from None
            flags = [int(item.findtext(k) or 0) for k in ("difficult", "truncated")]
            objects.append(((x1 - 1, y1 - 1, x2, y2), (item.findtext("name") or "").strip(), flags))
        records.append((tree.findtext("filename") or name, (h, w), objects))
    present = {o[1] for r in records for o in r[2]}
    listed = root / "classes.txt"
    if listed.is_file():
        classes = [line.strip() for line in listed.read_text(encoding="utf-8").splitlines() if line.strip()]
        alien = sorted(present - set(classes))
        if alien:
            raise AdviceError(f"{listed} lacks the class {alien[0]!r}, which an XML file uses. Add it.")
    else:
        classes = list(CLASSES) if present and present <= set(CLASSES) else sorted(present)
    position = {c: i for i, c in enumerate(classes)}
    out = Annotations()
    for _, shape, objects in records:
        out.row(shape)
        for corners, cls, flags in objects:
            out.add(corners, position[cls], difficult=flags[0], truncated=flags[1])
    return out.finish().arrays() | {
        "names": cache.pack(r[0] for r in records),
        "classes_names": cache.pack(classes),
    }


def write(dataset: Dataset, folder: Path) -> None:
    """folder/JPEGImages/*.png, Annotations/*.xml, classes.txt and ImageSets/Main. Boxes keep their fractions."""
    fresh(folder)
    splits = dataset.splits
    sets: dict[str, list[str]] = {}
    (folder / "Annotations").mkdir(parents=True, exist_ok=True)
    for i in range(len(dataset)):
        sample = dataset[i]
        name = save_picture(sample, folder / "JPEGImages", i)
        stem = os.path.splitext(name)[0]
        h, w = sample.image.shape[-2:]
        lines = ["<annotation>", f"  <filename>{escape(name)}</filename>"]
        lines += [f"  <size><width>{w}</width><height>{h}</height><depth>3</depth></size>"]
        for k, (corners, cls) in enumerate(boxes_of(sample)):
            x1, y1, x2, y2 = corners
            flags = "".join(
                f"<{f}>{int(sample.extra[f][k])}</{f}>" for f in ("difficult", "truncated") if f in sample.extra
            )
            lines.append(
                f"  <object><name>{escape((dataset.classes or [])[cls])}</name>{flags}<bndbox>"
                f"<xmin>{x1 + 1:.6g}</xmin><ymin>{y1 + 1:.6g}</ymin><xmax>{x2:.6g}</xmax><ymax>{y2:.6g}</ymax>"
                "</bndbox></object>"
            )
        write_text(folder / "Annotations" / f"{stem}.xml", "\n".join([*lines, "</annotation>"]) + "\n")
        sets.setdefault(str(splits[i]) if splits is not None else "trainval", []).append(stem)
    write_text(folder / "classes.txt", "\n".join(dataset.classes or []) + "\n")
    for split, stems in sets.items():
        write_text(folder / "ImageSets" / "Main" / f"{split}.txt", "\n".join(stems) + "\n")
