"""The check before training: counts per split and class, and every problem that costs an afternoon when found late."""

from __future__ import annotations

import hashlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from lynceus.core.errors import AdviceError, MissingError
from lynceus.core.progress import progress
from lynceus.core.report import Report
from lynceus.data.dataset import Dataset
from lynceus.data.decode import UnreadableError

SHOWN = 5


def check(dataset: Dataset, *, strict: bool = False, decode: bool = True) -> Report:
    """A Report: a row per split and class with its count, and a row per kind of problem with the first offenders.

    Looked for: unreadable pictures, the same picture twice and in two splits (by its bytes), boxes outside the
    picture or
    without area, class indices that do not exist, masks of another size, classes that a split lacks, empty classes,
    grey,
    CMYK, 16-bit and rotated files (read rightly, but worth knowing). decode=False looks at labels and headers only.
    strict: raise AdviceError with the first five offenders when there is any problem, mere remarks aside.
    """
    rows = _counts(dataset)
    found: dict[str, list[str]] = {}
    fixes: dict[str, str] = {}
    remarks: set[str] = set()

    def add(kind: str, what: str, fix: str, *, remark: bool = False) -> None:
        found.setdefault(kind, []).append(what)
        fixes[kind] = fix
        if remark:
            remarks.add(kind)

    for key, why in dataset.unreadable.items():
        add("unreadable", f"{key} ({why})", "copy these files again or delete them")
    _look_at_pictures(dataset, decode, add)
    _look_at_boxes(dataset, add)
    _look_at_classes(dataset, add)
    for note in dataset.notes:
        add("note", note, "see the note", remark=True)
    for kind, items in found.items():
        rows.append(
            {
                "split": "",
                "class": "",
                "count": len(items),
                "problem": kind,
                "first": "; ".join(items[:SHOWN]) + (" ..." if len(items) > SHOWN else ""),
                "fix": fixes[kind],
            }
        )
    problems = {k: v for k, v in found.items() if k not in remarks}
    summary = {"pictures": float(len(dataset)), "classes": float(len(dataset.classes or []))}
    summary |= {"problems": float(sum(map(len, problems.values())))}
    summary |= {kind: float(len(items)) for kind, items in found.items() if kind != "note"}
    if strict and problems:
        lines = [f"{kind}: {item}" for kind, items in problems.items() for item in items]
        advice = ". ".join(dict.fromkeys(f"For {k}: {fixes[k]}" for k in problems))
        raise AdviceError(
            f"{dataset.origin} has {len(lines)} problem{'s' * (len(lines) > 1)}: {'; '.join(lines[:SHOWN])}"
            f"{' ...' if len(lines) > SHOWN else ''}. {advice}."
        )
    return Report(name=f"data check: {dataset.name}", rows=rows, summary=summary, notes=[f"looked at {dataset.origin}"])


def _counts(dataset: Dataset) -> list[dict[str, Any]]:
    parts = [("all", dataset)]
    if dataset.splits is not None:
        parts = [(s, dataset.subset(dataset.splits == s)) for s in dict.fromkeys(str(s) for s in dataset.splits)]
    rows = []
    for split, part in parts:
        counts = part.counts() or box_counts(part)
        for name, count in (counts or {"(no labels)": len(part)}).items():
            rows.append({"split": split, "class": name, "count": count, "problem": "", "first": "", "fix": ""})
    return rows


def box_counts(dataset: Dataset) -> dict[str, int]:
    """Boxes per class name, and "(background)" for pictures without any; {} when nothing has boxes."""
    if not dataset.source.rich:
        return {}
    number: Counter[int] = Counter()
    bare = boxed = 0
    for i in range(len(dataset)):
        known = dataset.target(i, maps=False)
        if "classes" not in known:
            return {}
        boxed += len(known["classes"])
        bare += len(known["classes"]) == 0
        number.update(known["classes"].tolist())
    if not boxed:
        return {}
    names = dataset.classes or [str(i) for i in range(max(number) + 1)]
    return {n: number[i] for i, n in enumerate(names)} | ({"(background)": bare} if bare else {})


def _look_at_pictures(dataset: Dataset, decode: bool, add: Any) -> None:
    seen: dict[bytes, int] = {}
    splits = dataset.splits
    images = dataset.images
    held = images is not None

    def look(i: int) -> tuple[int, bytes | None, str, list[tuple[str, str]]]:
        try:
            raw = images[i].numpy().tobytes() if images is not None else dataset.raw(i)
            kinds = [] if held or not dataset.path(i) else _kinds(raw)
            if decode and not held:
                dataset.source.read(int(dataset._rows[i]))
            return i, hashlib.blake2b(raw, digest_size=16).digest(), "", kinds
        except UnreadableError as error:
            return i, None, error.why, []
        except (OSError, MissingError) as error:
            return i, None, str(error), []

    with progress(f"checking {dataset.name}", total=len(dataset), unit="images") as bar, ThreadPoolExecutor(4) as pool:
        for i, digest, why, kinds in pool.map(look, range(len(dataset))):
            bar.advance()
            if digest is None:
                add(
                    "unreadable", f"{dataset.path(i) or dataset.id(i)} ({why})", "copy these files again or delete them"
                )
                continue
            for kind, detail in kinds:
                add(kind, f"{dataset.id(i)}{detail}", "read rightly; nothing to do", remark=True)
            first = seen.setdefault(digest, i)
            if first != i:
                pair = f"{dataset.id(first)} = {dataset.id(i)}"
                if splits is not None and splits[first] != splits[i]:
                    text = f"{pair} ({splits[first]} and {splits[i]})"
                    add("duplicate across splits", text, "delete the picture from one of the splits")
                elif dataset.labels is not None and dataset.labels[first] != dataset.labels[i]:
                    names = dataset.classes or []
                    text = f"{pair} ({names[dataset.labels[first]]} and {names[dataset.labels[i]]})"
                    add("one picture, two classes", text, "keep it in the right class only")
                else:
                    add("duplicate", pair, "delete the copies, or know that they count twice", remark=True)


def _kinds(raw: bytes) -> list[tuple[str, str]]:
    """What is unusual about a file, from its header."""
    import io

    from PIL import Image

    try:
        with Image.open(io.BytesIO(raw)) as opened:
            mode, turned = opened.mode, opened.getexif().get(0x0112, 1)
    except Exception:
        return []
    out = []
    if mode.startswith("I") or mode == "F":
        out.append(("16-bit or float", f" ({mode})"))
    elif mode in ("L", "1", "LA"):
        out.append(("grey", ""))
    elif mode == "CMYK":
        out.append(("CMYK", ""))
    if turned not in (0, 1):
        out.append(("EXIF rotated", f" (orientation {turned})"))
    return out


def _look_at_boxes(dataset: Dataset, add: Any) -> None:
    if not dataset.source.rich:
        return
    count = len(dataset.classes) if dataset.classes is not None else None
    for i in range(len(dataset)):
        name = dataset.id(i)
        try:
            known = dataset.target(i, maps=dataset.layout in ("masks", "anomaly"))
            boxes, classes = known.get("boxes"), known.get("classes")
            if boxes is not None and len(boxes):
                h, w = _size(dataset, i)
                wide = ((boxes[:, 2:] - boxes[:, :2]) <= 0).any(1)
                for k in wide.nonzero()[:, 0].tolist():
                    text = f"{name}, box {k} {[round(v, 1) for v in boxes[k].tolist()]}"
                    add("degenerate box", text, "give the box a positive width and height, or delete it")
                limit = boxes.new_tensor([w, h, w, h])
                outside = ((boxes < -1) | (boxes > limit + 1)).any(1) & ~wide
                for k in outside.nonzero()[:, 0].tolist():
                    text = f"{name} ({h} x {w}), box {k} {[round(v, 1) for v in boxes[k].tolist()]}"
                    add("box outside", text, "clip the box, or check that it belongs to this picture")
            if classes is not None and count is not None:
                for value in classes[(classes < 0) | (classes >= count)].tolist():
                    add("class out of range", f"{name}, class {value} of {count}", f"classes go from 0 to {count - 1}")
        except UnreadableError:
            continue
        except AdviceError as error:
            add("bad mask", str(error), "correct the mask")


def _size(dataset: Dataset, i: int) -> tuple[int, int]:
    from lynceus.data.decode import image_size

    if dataset.images is not None:
        return int(dataset.images.shape[-2]), int(dataset.images.shape[-1])
    path = dataset.path(i)
    return image_size(path) if path is not None else image_size(dataset.raw(i), name=dataset.id(i))


def _look_at_classes(dataset: Dataset, add: Any) -> None:
    labels, classes = dataset.labels, dataset.classes
    if labels is None or classes is None:
        return
    beyond = np.flatnonzero(labels >= len(classes))
    for i in beyond[:1000].tolist():
        text = f"{dataset.id(i)}, label {labels[i]} of {len(classes)}"
        add("class out of range", text, f"labels go from 0 to {len(classes) - 1}")
    for name, count in dataset.counts().items():
        if count == 0:
            add("empty class", name, "add pictures of it, or leave it out of the classes")
    if dataset.splits is not None:
        for split in dict.fromkeys(str(s) for s in dataset.splits):
            have = set(labels[dataset.splits == split].tolist())
            lack = [c for k, c in enumerate(classes) if k not in have and (labels == k).any()]
            for name in lack:
                add("class missing in split", f"{name} in {split}", "give every split pictures of every class")
    sizes = np.bincount(labels[(labels >= 0) & (labels < len(classes))], minlength=len(classes))
    if len(sizes) > 1 and sizes.min() > 0 and sizes.max() >= 20 * sizes.min():
        text = f"{classes[int(sizes.argmax())]} {sizes.max()}, {classes[int(sizes.argmin())]} {sizes.min()}"
        add("imbalance", text, "read per-class figures, not accuracy alone", remark=True)
