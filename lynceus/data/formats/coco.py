"""COCO JSON: images, annotations, categories. Boxes xywh become xyxy; category ids, which have gaps, become indices and
`Dataset.inverse` keeps the way back; polygons, run lengths and crowds are read; pictures without annotation are kept.

Layout: Lin et al., "Microsoft COCO: Common Objects in Context", ECCV 2014, arXiv 1405.0312.
"""

from __future__ import annotations

import json
import re
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from lynceus.core.errors import AdviceError, MissingError
from lynceus.data import cache
from lynceus.data.boxes import Annotations, encode_rle
from lynceus.data.dataset import Dataset
from lynceus.data.folder import ending, inner_folders
from lynceus.data.formats.options import Options
from lynceus.data.formats.write import boxes_of, fresh, save_picture, write_text
from lynceus.data.sources import Files

NEEDED = ("images", "annotations", "categories")


def detect(path: Path) -> bool:
    """A COCO .json, or a folder that holds one where COCO files usually are."""
    if path.is_file():
        return path.suffix == ".json" and _looks(path)
    return bool(_jsons(path))


def _jsons(folder: Path) -> list[Path]:
    places = (folder, folder / "annotations", *(folder / n for n in inner_folders(folder)))
    return [f for p in dict.fromkeys(places) for f in ending(p, ".json") if _looks(f)]


def _looks(file: Path) -> bool:
    with open(file, "rb") as opened:
        head = opened.read(1 << 16)
        if file.stat().st_size > 1 << 16:
            opened.seek(-(1 << 14), 2)
            head += opened.read()
    return b'"images"' in head or (b'"annotations"' in head and b'"bbox"' in head)


def read(path: Path, options: Options) -> Dataset:
    """A .json file, or a folder with one per split."""
    if path.is_file():
        return _read_files([path], path.stem, path, options)
    files = _jsons(path)
    boxes = [f for f in files if not re.search(r"caption|keypoint|panoptic|stuff", f.stem)]
    return _read_files(boxes or files, path.name, path, options)


def _split(file: Path) -> str:
    """The split that a file's name or folder speaks of: instances_train2017.json, train/_annotations.coco.json."""
    for text in (file.stem, file.parent.name):
        found = re.search(r"(train|valid|val|test)", text.lower())
        if found:
            return "val" if found[1] == "valid" else found[1]
    return file.stem


def _read_files(files: list[Path], name: str, origin: Path, options: Options) -> Dataset:
    indices = [cache.remember(f"coco {f}", cache.file_stamp(f), partial(_index, f)) for f in files]
    categories = [json.loads(i["categories"].tobytes()) for i in indices]
    if any(c != categories[0] for c in categories):
        here, there = (
            {c["name"] for c in cs} for cs in (categories[0], next(c for c in categories if c != categories[0]))
        )
        raise AdviceError(
            f"The categories of the files in {origin} differ: {files[0].name} alone has "
            f"{sorted(here - there)[:5]}, the "
            f"other alone has {sorted(there - here)[:5]} (or ids differ). Write one list of "
            f"categories into all of them."
        )
    names: list[str] = []
    for file, index in zip(files, indices):
        found = cache.unpack(index["names"])
        folder = _pictures(file, found)
        names += [str(folder / n) for n in found]
    arrays = indices[0] if len(indices) == 1 else _join(indices)
    annotations = Annotations.of({k: v for k, v in arrays.items() if k not in ("names", "categories")})
    source = Files("", names, targets=annotations)
    splits = (
        [_split(f) for f, i in zip(files, indices) for _ in range(len(i["starts"]) - 1)] if len(files) > 1 else None
    )
    missing = [n for n in names[:: max(1, len(names) // 64)] if not Path(n).is_file()]
    notes = []
    if missing:
        notes.append(f"pictures that the annotations name are not there, e.g. {missing[0]}")
    return Dataset(
        source,
        name=name,
        origin=str(origin),
        classes=[c["name"] for c in categories[0]],
        splits=splits,
        max_bad=options.max_bad,
        layout="coco",
        notes=notes,
        inverse={i: c["id"] for i, c in enumerate(categories[0])},
    )


def _pictures(file: Path, names: list[str]) -> Path:
    """The folder that the file's names are relative to."""
    split = _split(file)
    year = re.sub(r"^.*?((train|val|test)\d*)$", r"\1", file.stem)
    here, above = file.parent, file.parent.parent
    tried = [here, here / "images", here / year, here / split, above / "images", above / year, above / split]
    tried += [above / "images" / year, above / "images" / split, here / "images" / split, above]
    for folder in tried:
        if names and (folder / names[0]).is_file():
            return folder
    for folder in tried:
        if any((folder / n).is_file() for n in names[:20]):
            return folder
    if not names:
        return here
    shown = ", ".join(str(t) for t in dict.fromkeys(tried) if t.is_dir())
    raise MissingError(
        f"{file} names {len(names)} pictures, the first {names[0]!r}, and no folder beside it holds "
        f"them (looked into {shown}). "
        f"Put them into {above / 'images' if here.name == 'annotations' else here / 'images'}."
    )


def _index(file: Path) -> dict[str, np.ndarray]:
    try:
        record = json.loads(file.read_bytes())
    except json.JSONDecodeError as error:
        raise AdviceError(f"{file}, line {error.lineno}: no valid JSON ({error.msg}). Was it copied whole?") from None
    lack = [k for k in NEEDED if k not in record] if isinstance(record, dict) else list(NEEDED)
    if lack:
        raise AdviceError(
            f"{file} is no COCO file: {', '.join(lack)} missing at its top; COCO needs {', '.join(NEEDED)}."
        )
    if not record["images"]:
        raise AdviceError(f"{file} lists no picture.")
    categories = sorted(record["categories"], key=lambda c: c["id"])
    position = {c["id"]: i for i, c in enumerate(categories)}
    of: dict[Any, list[dict[str, Any]]] = {image["id"]: [] for image in record["images"]}
    for a in record["annotations"]:
        if a["image_id"] not in of:
            raise AdviceError(
                f"{file}: annotation {a.get('id')} belongs to picture {a['image_id']}, which is not among its images. "
                "Add the picture to images, or delete the annotation."
            )
        of[a["image_id"]].append(a)
    out = Annotations()
    keypoints = any("keypoints" in a for a in record["annotations"])
    for image in record["images"]:
        out.row((int(image.get("height") or 0), int(image.get("width") or 0)))
        for a in of[image["id"]]:
            if a["category_id"] not in position:
                raise AdviceError(
                    f"{file}: annotation {a.get('id')} has category {a['category_id']}, which is not "
                    f"among its categories "
                    f"({', '.join(str(c['id']) for c in categories[:10])}{' ...' if len(categories) > 10 else ''})."
                )
            _add(out, a, position[a["category_id"]], keypoints)
    slim = [{"id": c["id"], "name": str(c.get("name", c["id"]))} for c in categories]
    return out.finish().arrays() | {
        "names": cache.pack(i["file_name"].replace("\\", "/") for i in record["images"]),
        "categories": np.frombuffer(json.dumps(slim).encode(), dtype=np.uint8),
    }


def _add(out: Annotations, a: dict[str, Any], cls: int, keypoints: bool) -> None:
    outline = a.get("segmentation")
    rings = [np.asarray(p, np.float32).reshape(-1, 2) for p in outline] if isinstance(outline, list) else []
    rle = json.dumps(outline) if isinstance(outline, dict) else ""
    if "bbox" in a:
        x, y, w, h = a["bbox"]
    else:
        points = np.concatenate(rings) if rings else np.zeros((1, 2), np.float32)
        (x, y), (w, h) = points.min(0), points.max(0) - points.min(0)
    extra: dict[str, Any] = {"iscrowd": int(a.get("iscrowd", 0)), "area": float(a.get("area", w * h))}
    if keypoints:
        extra["keypoints"] = np.asarray(a.get("keypoints", []), np.float32).reshape(-1, 3)
    out.add((x, y, x + w, y + h), cls, polygons=rings, rle=rle, **extra)


def _join(indices: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Indices of several files one after the other."""
    extras = set.intersection(*({k for k in i if k.startswith("extra_")} for i in indices))
    out = {k: np.concatenate([i[k] for i in indices]) for k in ("boxes", "classes", "sizes", "points", *sorted(extras))}
    for key in ("starts", "rings", "ring_starts"):
        total, parts = 0, [np.zeros(1, np.int64)]
        for i in indices:
            parts.append(i[key][1:] + total)
            total += int(i[key][-1])
        out[key] = np.concatenate(parts)
    if any("rle" in i for i in indices):
        texts = [cache.unpack(i["rle"]) if "rle" in i else [""] * len(i["classes"]) for i in indices]
        out["rle"] = cache.pack([t for part in texts for t in part])
    return out


def write(dataset: Dataset, folder: Path) -> None:
    """folder/images/* and folder/annotations/instances_<split>.json; crowds and masks as run lengths."""
    fresh(folder)
    classes = dataset.classes or []
    ids = [dataset.inverse[i] if dataset.inverse else i + 1 for i in range(len(classes))]
    categories = [{"id": k, "name": n} for k, n in zip(ids, classes)]
    splits = dataset.splits if dataset.splits is not None else np.array(["all"] * len(dataset), dtype=object)
    records: dict[str, dict[str, Any]] = {}
    count = 0
    for i in range(len(dataset)):
        sample, split = dataset[i], str(splits[i])
        record = records.setdefault(split, {"images": [], "annotations": [], "categories": categories})
        name = save_picture(sample, folder / "images", i)
        h, w = sample.image.shape[-2:]
        record["images"].append({"id": i + 1, "file_name": name, "height": h, "width": w})
        for k, (corners, cls) in enumerate(boxes_of(sample)):
            count += 1
            x1, y1, x2, y2 = corners
            a: dict[str, Any] = {"id": count, "image_id": i + 1, "category_id": ids[cls]}
            a |= {"bbox": [x1, y1, x2 - x1, y2 - y1], "area": (x2 - x1) * (y2 - y1), "iscrowd": 0}
            polygons = sample.extra.get("polygons")
            if polygons is not None and polygons[k]:
                a["segmentation"] = [p.reshape(-1).tolist() for p in polygons[k]]
            elif sample.masks is not None:
                a["segmentation"], a["area"] = encode_rle(sample.masks[k]), int(sample.masks[k].sum())
            for name_ in ("iscrowd", "area"):
                if name_ in sample.extra:
                    a[name_] = sample.extra[name_][k].item()
            if "keypoints" in sample.extra:
                a["keypoints"] = sample.extra["keypoints"][k].reshape(-1).tolist()
            record["annotations"].append(a)
    for split, record in records.items():
        write_text(folder / "annotations" / f"instances_{split}.json", json.dumps(record))
