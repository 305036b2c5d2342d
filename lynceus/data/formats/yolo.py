"""YOLO text labels: data.yaml (path, train, val, test, names), labels/*.txt beside images/*, a line per box:
class cx cy w h in 0..1, or class and a polygon, or class, box and keypoints. No text file means no object.

`path` in data.yaml is relative to the file itself, never to a folder elsewhere.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from lynceus.core.errors import AdviceError, MissingError
from lynceus.core.progress import track
from lynceus.data import cache
from lynceus.data.boxes import Annotations
from lynceus.data.dataset import Dataset
from lynceus.data.folder import Entry, drop_empty, ending, scan
from lynceus.data.formats.options import Options
from lynceus.data.formats.write import boxes_of, fresh, save_picture, write_text
from lynceus.data.sources import Files

SPLITS = ("train", "val", "test")


def detect(path: Path) -> bool:
    """A data.yaml, a folder with one, or a folder with images/ and labels/ where labels holds .txt files."""
    if path.is_file():
        return path.suffix in (".yaml", ".yml")
    return _yaml(path) is not None or ((path / "images").is_dir() and _has_txt(path / "labels"))


def _yaml(folder: Path) -> Path | None:
    names = ("data.yaml", "data.yml", "dataset.yaml", "dataset.yml")
    found = [folder / n for n in names if (folder / n).is_file()]
    if not found:
        found = [f for f in ending(folder, ".yaml", ".yml") if b"names:" in f.read_bytes()]
    return found[0] if found else None


def _has_txt(folder: Path) -> bool:
    return folder.is_dir() and any(f.endswith(".txt") for _, _, files in os.walk(folder) for f in files[:50])


def read(path: Path, options: Options) -> Dataset:
    """A data.yaml or the folder that holds it."""
    file = path if path.is_file() else _yaml(path)
    if file is None:
        names, keypoints, places = None, None, [("", path / "images")]
        inner = [s for s in SPLITS if (path / "images" / s).is_dir()]
        places = [(s, path / "images" / s) for s in inner] or places
        origin = path
    else:
        names, keypoints, places = _read_yaml(file)
        origin = file
    entries: list[Entry] = []
    splits: list[str] = []
    roots: list[str] = []
    for split, place in places:
        found = _listed(place) if place.is_file() else [(str(place), e) for e in scan(place)]
        entries += [e for _, e in found]
        roots += [r for r, _ in found]
        splits += [split] * len(found)
    if not entries:
        raise AdviceError(f"{origin} leads to no picture; looked into {', '.join(str(p) for _, p in places)}.")
    pictures = [e.name if os.path.isabs(e.name) else f"{r}/{e.name}" for r, e in zip(roots, entries)]
    texts = [_label_file(p) for p in pictures]
    labels = _label_folders(texts, origin)
    stats = _stats(labels)
    mark = cache.stamp((t, *stats.get(t, (0, 0))) for t in texts) + repr((names, keypoints))
    arrays = cache.remember(f"yolo {origin}", mark, lambda: _index(texts, stats, names, keypoints, origin))
    annotations = Annotations.of(arrays, relative=True)
    if names is None:
        top = int(annotations.classes.max(initial=-1)) + 1
        names = _classes_txt(path) or [str(i) for i in range(top)]
        if top > len(names):
            raise AdviceError(f"{path}: class index {top - 1}, but classes.txt names only {len(names)} classes.")
    source = Files("", pictures, sizes=[e.size for e in entries], targets=annotations)
    annotations.size_of = source.size
    background = sum(t not in stats for t in texts)
    out = Dataset(
        source,
        name=(file.parent if file else path).name,
        origin=str(origin),
        classes=names,
        splits=splits if any(splits) else None,
        max_bad=options.max_bad,
        layout="yolo",
        notes=[f"{background} of {len(texts)} pictures have no label file and count as background"]
        if background
        else [],
    )
    return drop_empty(out, entries)


def _read_yaml(file: Path) -> tuple[list[str], tuple[int, int] | None, list[tuple[str, Path]]]:
    import yaml

    try:
        record = yaml.safe_load(file.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise AdviceError(f"{file} is no valid YAML: {str(error).splitlines()[0]}.") from None
    if not isinstance(record, dict) or "names" not in record:
        raise AdviceError(
            f"{file} needs `names:`, the list of class names; it has {', '.join(record or {}) or 'nothing'}."
        )
    names = record["names"]
    if isinstance(names, dict):
        if sorted(names) != list(range(len(names))):
            raise AdviceError(
                f"{file}: the keys of names must be 0 .. {len(names) - 1}; they are {sorted(names)[:10]}."
            )
        names = [names[k] for k in sorted(names)]
    names = [str(n) for n in names]
    if "nc" in record and record["nc"] != len(names):
        raise AdviceError(f"{file}: nc is {record['nc']}, but names has {len(names)} entries. Correct one of them.")
    base = Path(os.path.normpath(file.parent / str(record.get("path") or ".").replace("\\", "/")))
    places: list[tuple[str, Path]] = []
    for split in SPLITS:
        given = record.get(split)
        for text in given if isinstance(given, list) else [given] if given else []:
            place = Path(os.path.normpath(base / str(text).replace("\\", "/")))
            beside = Path(os.path.normpath(file.parent / str(text).replace("\\", "/")))
            # files made for tools that start elsewhere say ../train/images for what lies beside them
            stripped = file.parent / str(text).replace("\\", "/").removeprefix("../")
            there = next((p for p in (place, beside, stripped) if p.exists()), None)
            if there is None:
                if split == "test":
                    continue
                raise MissingError(
                    f"{file}: {split}: {text!r} leads to {place}, which is not there (path: "
                    f"{record.get('path') or '.'!r} is "
                    f"taken relative to the file, i.e. {base}). Correct `path` or `{split}`."
                )
            if all(there != p for _, p in places):  # train and val may be the same pictures
                places.append((split, there))
    if not places:
        raise AdviceError(f"{file} names no pictures; give train: and val:, e.g. train: images/train.")
    shape = record.get("kpt_shape")
    return names, (int(shape[0]), int(shape[1])) if shape else None, places


def _listed(file: Path) -> list[tuple[str, Entry]]:
    """The pictures that a text file lists, one per line, relative to it."""
    out = []
    for line in file.read_text(encoding="utf-8").splitlines():
        if line.strip():
            path = Path(os.path.normpath(file.parent / line.strip().replace("\\", "/")))
            if not path.is_file():
                raise MissingError(f"{file} lists {line.strip()!r}; there is no picture {path}.")
            out.append(("", Entry(str(path), path.stat().st_size, path.stat().st_mtime_ns)))
    return out


def _label_file(picture: str) -> str:
    at = picture.rfind("/images/")
    stem = picture[: picture.rfind(".")]
    return f"{stem[:at]}/labels/{stem[at + 8 :]}.txt" if at >= 0 else f"{stem}.txt"


def _label_folders(texts: list[str], origin: Path) -> list[str]:
    folders = sorted({t[: t.rfind("/")] for t in texts})
    if not any(os.path.isdir(f) and any(n.endswith(".txt") for n in os.listdir(f)) for f in folders):
        raise MissingError(
            f"{origin}: there are pictures but no label files; each image.jpg needs image.txt in {folders[0]} "
            "(the folder `labels` beside `images`)."
        )
    return folders


def _stats(folders: list[str]) -> dict[str, tuple[int, int]]:
    out = {}
    for folder in folders:
        if os.path.isdir(folder):
            with os.scandir(folder) as entries:
                for e in entries:
                    if e.name.endswith(".txt"):
                        stat = e.stat()
                        out[f"{folder}/{e.name}"] = (stat.st_size, stat.st_mtime_ns)
    return out


def _index(
    texts: list[str],
    stats: dict[str, tuple[int, int]],
    names: list[str] | None,
    keypoints: tuple[int, int] | None,
    origin: Path,
) -> dict[str, np.ndarray]:
    out = Annotations(relative=True)
    for text in track(texts, "reading labels", unit="files"):
        out.row()
        if text not in stats or stats[text][0] == 0:
            continue
        with open(text, encoding="utf-8") as opened:
            for number, line in enumerate(opened, 1):
                if line.strip():
                    _add(out, line.split(), f"{text}, line {number}", names, keypoints, origin)
    return out.finish().arrays()


def _add(
    out: Annotations, parts: list[str], where: str, names: list[str] | None, shape: tuple[int, int] | None, origin: Path
) -> None:
    try:
        values = [float(p) for p in parts]
    except ValueError:
        raise AdviceError(f"{where}: {' '.join(parts)[:60]!r} is not numbers; a line is: class cx cy w h.") from None
    cls = int(values[0])
    if cls != values[0] or cls < 0:
        raise AdviceError(
            f"{where}: the class {parts[0]!r} is not a whole number from 0 on; a line is: class cx cy w h."
        )
    if names is not None and cls >= len(names):
        raise AdviceError(
            f"{where}: class index {cls}, but {origin} names {len(names)} classes, so that indices go from 0 to "
            f"{len(names) - 1}. Count classes from 0, or add the name."
        )
    rest = values[1:]
    least, most = (min(rest), max(rest)) if rest else (0.0, 0.0)
    if most > 1.5 or least < -0.5:
        raise AdviceError(
            f"{where}: {most if most > 1.5 else least:g} is outside 0..1; coordinates are shares of "
            f"width and height. Divide "
            "pixels by the picture's size."
        )
    extra: dict[str, Any] = {}
    polygons: list[np.ndarray] = []
    if shape is not None and len(rest) == 4 + shape[0] * shape[1]:
        points = np.asarray(rest[4:], np.float32).reshape(shape)
        extra["keypoints"] = points if shape[1] == 3 else np.pad(points, ((0, 0), (0, 1)), constant_values=2)
    elif len(rest) >= 6 and len(rest) % 2 == 0:
        polygons = [np.asarray(rest, np.float32).reshape(-1, 2)]
        (x1, y1), (x2, y2) = polygons[0].min(0), polygons[0].max(0)
        rest = [(x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1]
    elif len(rest) != 4:
        raise AdviceError(
            f"{where}: {len(parts)} numbers; a line is: class cx cy w h, or class and a polygon x y x y ..."
        )
    cx, cy, w, h = rest[:4]
    out.add((cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2), cls, polygons=polygons, **extra)


def _classes_txt(path: Path) -> list[str] | None:
    for file in (path / "classes.txt", path / "labels" / "classes.txt"):
        if file.is_file():
            return [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    return None


def write(dataset: Dataset, folder: Path) -> None:
    """folder/data.yaml, images/<split>/*.png, labels/<split>/*.txt; a background picture has no text file.

    Polygons are written where a box has exactly one, else the box. Without splits everything is both train and val.
    """
    import yaml

    fresh(folder)
    splits = dataset.splits if dataset.splits is not None else np.array(["train"] * len(dataset), dtype=object)
    for i in range(len(dataset)):
        sample, split = dataset[i], str(splits[i])
        name = save_picture(sample, folder / "images" / split, i)
        h, w = sample.image.shape[-2:]
        polygons = sample.extra.get("polygons")
        lines = []
        for k, (corners, cls) in enumerate(boxes_of(sample)):
            if polygons is not None and len(polygons[k]) == 1:
                numbers = (polygons[k][0].double().numpy() / [w, h]).reshape(-1).clip(0, 1)
            else:
                x1, y1, x2, y2 = corners
                numbers = np.array([(x1 + x2) / 2 / w, (y1 + y2) / 2 / h, (x2 - x1) / w, (y2 - y1) / h])
            lines.append(f"{cls} " + " ".join(f"{v:.8f}" for v in numbers))
        if lines:
            write_text(folder / "labels" / split / f"{os.path.splitext(name)[0]}.txt", "\n".join(lines) + "\n")
    present = list(dict.fromkeys(str(s) for s in splits))
    record: dict[str, Any] = {"path": ".", **{s: f"images/{s}" for s in present}}
    record.setdefault("train", record[present[0]])
    record.setdefault("val", record.get("test", record["train"]))
    write_text(
        folder / "data.yaml",
        yaml.safe_dump(record | {"names": dict(enumerate(dataset.classes or []))}, sort_keys=False),
    )
    (folder / "labels").mkdir(exist_ok=True)
