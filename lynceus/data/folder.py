"""Image folders: root/[split/]class/**/*.jpg, and flat folders and lists of pictures without labels.

Classes are sorted by name as torchvision does ("10" before "2", which is said in a note). Hidden files are skipped.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lynceus.core.errors import AdviceError, MissingError
from lynceus.data.dataset import Dataset
from lynceus.data.decode import EXTENSIONS, is_image
from lynceus.data.sources import Files

SPLITS = ("train", "training", "val", "valid", "validation", "dev", "test", "testing")
EMPTY = "the file is empty (0 bytes); copy it again or delete it"


class Entry(NamedTuple):
    """One picture file: path relative to the root with slashes, bytes, modification time in ns."""

    name: str
    size: int
    mtime: int


def scan(root: str | Path) -> Iterator[Entry]:
    """Every picture under `root`, hidden files and folders left out, in sorted order of folders and names."""
    stack = [("", str(root))]
    while stack:
        prefix, folder = stack.pop()
        found, below = [], []
        with os.scandir(folder) as entries:
            for entry in entries:
                name = entry.name
                if name[0] == "." or name == "__MACOSX":
                    continue
                if entry.is_dir():
                    below.append(name)
                elif name[name.rfind(".") :].lower() in EXTENSIONS:
                    stat = entry.stat()
                    found.append(Entry(f"{prefix}{name}", stat.st_size, stat.st_mtime_ns))
        yield from sorted(found, key=lambda e: e.name)
        stack.extend((f"{prefix}{name}/", os.path.join(folder, name)) for name in sorted(below, reverse=True))


def inner_folders(folder: Path) -> list[str]:
    """The names of the folders right in `folder`, sorted, hidden ones left out."""
    if not os.path.isdir(folder):
        return []
    with os.scandir(folder) as entries:
        return sorted(e.name for e in entries if e.is_dir() and not e.name.startswith((".", "__MACOSX")))


def ending(folder: Path, *suffixes: str) -> list[Path]:
    """The files right in `folder` with one of these endings, sorted, hidden ones left out; [] without the folder."""
    try:
        names = os.listdir(folder)
    except (FileNotFoundError, NotADirectoryError):
        return []
    return [folder / n for n in sorted(names) if n.endswith(suffixes) and not n.startswith(".")]


def split_folders(root: Path) -> list[str]:
    """The names of the folders in `root` that are splits, when all its folders are."""
    names = inner_folders(root)
    named = [n for n in names if n.lower() in SPLITS]
    return named if named and len(named) == len(names) else []


def class_folders(root: Path) -> bool:
    """Whether `root`, or a split folder in it, has at least two folders with pictures right inside."""
    for place in [root / s for s in split_folders(root)] or [root]:
        count = 0
        for name in inner_folders(place):
            with os.scandir(place / name) as entries:
                count += any(is_image(e.name) for e in entries)
        if count > 1:
            return True
    return False


def read_folder(root: Path, *, max_bad: int | float = 0.05, labelled: bool | None = None) -> Dataset:
    """An image folder. labelled: None decides by whether pictures lie in class folders.

    Raises AdviceError for a folder without pictures, with one class only, or with its class folders a level too deep.
    """
    entries = list(scan(root))
    if not entries:
        raise _empty(root)
    splits = split_folders(root)
    depth = 1 if splits else 0
    parts = [e.name.split("/") for e in entries]
    in_folders = [len(p) > depth + 1 for p in parts]
    if labelled is None:
        labelled = any(in_folders)
    files = Files(root, [e.name for e in entries], sizes=[e.size for e in entries])
    split_of = [p[0].lower() for p in parts] if splits else None
    if not labelled:
        out = Dataset(
            files, name=root.name, origin=str(root), splits=split_of, max_bad=max_bad, layout="flat", notes=[]
        )
        return drop_empty(out, entries)
    loose = [e.name for e, inside in zip(entries, in_folders) if not inside]
    notes = []
    if loose:
        notes.append(
            f"{len(loose)} pictures lie outside the class folders and have no label: {', '.join(loose[:5])}"
            + (" ..." if len(loose) > 5 else "")
            + ". Move them into a class folder, or delete them."
        )
    of = [p[depth] if inside else None for p, inside in zip(parts, in_folders)]
    present = {c for c in of if c is not None}
    on_disk = sorted({c for s in (splits or [""]) for c in inner_folders(root / s)})
    classes = sorted(present)
    empty = [c for c in on_disk if c not in present]
    if empty:
        notes.append(f"class folders without a picture are left out: {', '.join(empty)}")
    if len(classes) < 2:
        raise _single(root, classes[0], empty, parts, depth)
    index = {c: i for i, c in enumerate(classes)}
    if any(c.isdigit() for c in classes) and classes != sorted(classes, key=lambda c: (len(c), c)):
        notes.append(
            'class folders are sorted by name as text, so that "10" comes before "2", as in torchvision; '
            "give classes=[...] or pad the names with zeros for another order"
        )
    if split_of is not None:
        by = {s: {c for c, t in zip(of, split_of) if t == s.lower()} for s in splits}
        for s in splits:
            missing = sorted(present - by[s] - {None})
            if missing:
                notes.append(f"split {s} has no picture of: {', '.join(missing[:10])}")
    labels = np.array([-1 if c is None else index[c] for c in of], dtype=np.int64)
    out = Dataset(
        files,
        name=root.name,
        origin=str(root),
        classes=classes,
        labels=labels,
        splits=split_of,
        max_bad=max_bad,
        layout="folder",
        notes=notes,
    )
    return drop_empty(out, entries)


def drop_empty(dataset: Dataset, entries: Sequence[Entry]) -> Dataset:
    """Leaves out files of 0 bytes, which are known before anything is read, and counts them as unreadable."""
    from lynceus.data.decode import UnreadableError

    bad = [i for i, e in enumerate(entries) if e.size == 0]
    for i in bad:
        dataset.skip(UnreadableError(dataset.path(i) or "", EMPTY), index=i)
    return dataset.subset(np.setdiff1d(np.arange(len(dataset)), bad)) if bad else dataset


def _empty(root: Path) -> AdviceError:
    names = sorted(os.listdir(root))
    if not names:
        return AdviceError(f"The folder {root} is empty. Put pictures there, one folder per class: {root}/cat/1.jpg.")
    archives = [n for n in names if n.lower().endswith((".zip", ".tar", ".gz", ".tgz", ".7z", ".rar"))]
    if archives:
        module = "zipfile" if archives[0].lower().endswith(".zip") else "tarfile"
        return AdviceError(
            f"There is no picture under {root}, but the archive {archives[0]}. Unpack it there first: "
            f"python -m {module} -e {root / archives[0]} {root}"
        )
    shown = ", ".join(names[:8]) + (" ..." if len(names) > 8 else "")
    return AdviceError(
        f"There is no picture under {root} (it holds: {shown}). Pictures end in .jpg, .png, .webp, .tif, .bmp, .gif ..."
    )


def _single(root: Path, name: str, empty: list[str], parts: list[list[str]], depth: int) -> AdviceError:
    deeper = sorted({p[depth + 1] for p in parts if len(p) > depth + 2})
    if len(deeper) > 1:
        inner = root / name if depth == 0 else root
        where = inner if depth == 0 else f"{root}/<split>/{name}"
        return AdviceError(
            f"The class folders lie one level too deep: {root} holds only {name!r}, and the folders "
            f"{', '.join(deeper[:6])} are inside it. Open {where} instead."
        )
    if empty:
        more = f" The folders {', '.join(empty[:6])} hold no picture."
    else:
        more = ""
    return AdviceError(
        f"{root} has only one class, {name!r}; there must be at least two, one folder each.{more} "
        "To use the pictures without labels, open it with labels=False."
    )


def read_paths(paths: Sequence[str | Path], *, max_bad: int | float = 0.05, name: str = "pictures") -> Dataset:
    """Pictures given one by one, without labels. Raises MissingError naming the first that is not there."""
    if not paths:
        raise AdviceError("The list of pictures is empty.")
    full = []
    for p in paths:
        absolute = os.path.abspath(os.path.expanduser(p))
        if not os.path.isfile(absolute):
            raise MissingError(f"There is no picture {absolute} ({str(p)!r}, looked from {os.getcwd()}).")
        full.append(absolute)
    origin = full[0] if len(full) == 1 else f"{len(full)} paths, the first {full[0]}"
    sizes = [os.path.getsize(p) for p in full]
    out = Dataset(Files("", full, sizes=sizes), name=name, origin=origin, max_bad=max_bad, layout="list")
    return drop_empty(out, [Entry(p, s, 0) for p, s in zip(full, sizes)])
