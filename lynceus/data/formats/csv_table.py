"""CSV and TSV: columns path and label, several labels separated by |, optionally split; paths relative to the file."""

from __future__ import annotations

import csv
import os
from pathlib import Path

import numpy as np

from lynceus.core.errors import AdviceError, MissingError, unknown
from lynceus.data.dataset import Dataset
from lynceus.data.decode import is_image
from lynceus.data.folder import Entry, drop_empty, ending
from lynceus.data.formats.options import Options
from lynceus.data.formats.write import fresh, save_picture, write_text
from lynceus.data.sources import Files

NAMES = {
    "path": ("path", "image", "file", "filename", "file_name", "image_path", "filepath", "img", "picture", "name"),
    "label": ("label", "labels", "class", "target", "category", "classes", "tag", "tags", "y"),
    "split": ("split", "subset", "fold", "set", "partition"),
}
USUAL = ("labels.csv", "labels.tsv", "annotations.csv", "metadata.csv", "train.csv", "data.csv", "train_labels.csv")


def detect(path: Path) -> bool:
    """A .csv or .tsv file, or a folder that holds labels.csv or the like and no class folders."""
    if path.is_file():
        return path.suffix.lower() in (".csv", ".tsv")
    return usual(path) is not None


def usual(folder: Path) -> Path | None:
    found = next((folder / n for n in USUAL if (folder / n).is_file()), None)
    if found is None:
        tables = ending(folder, ".csv", ".tsv", ".CSV", ".TSV")
        found = tables[0] if len(tables) == 1 else None
    return found


def read(path: Path, options: Options) -> Dataset:
    file = path if path.is_file() else usual(path)
    assert file is not None
    rows, columns = _rows(file, options)
    if not rows:
        raise AdviceError(f"{file} has no rows; it needs a header such as path,label and a row per picture.")
    paths = [r[columns["path"]].strip() for r in rows]
    texts = [r[columns["label"]].strip() for r in rows] if "label" in columns and options.labels is not False else None
    entries, notes = _find(file, paths, texts)
    labels = multi = classes = None
    if texts is not None:
        several = [[p.strip() for p in t.split("|") if p.strip()] for t in texts]
        classes = sorted({p for parts in several for p in parts})
        if all(c.lstrip("-").isdigit() for c in classes):
            classes = sorted(classes, key=int)
        if len(classes) < 2:
            only = f"only one class, {classes[0]!r}" if classes else "no label at all"
            raise AdviceError(
                f"{file} has {only} in column {columns['label'] + 1}; at least two are needed to tell them apart."
            )
        position = {c: i for i, c in enumerate(classes)}
        if any(len(parts) > 1 for parts in several):
            multi = np.zeros((len(rows), len(classes)), dtype=np.uint8)
            for i, parts in enumerate(several):
                multi[i, [position[p] for p in parts]] = 1
        else:
            labels = [position[parts[0]] if parts else -1 for parts in several]
    out = Dataset(
        Files(file.parent, [e.name for e in entries], sizes=[e.size for e in entries]),
        name=file.stem if path.is_file() else path.name,
        origin=str(file),
        classes=classes,
        labels=labels,
        multilabels=multi,
        splits=[r[columns["split"]].strip().lower() for r in rows] if "split" in columns else None,
        max_bad=options.max_bad,
        layout="csv",
        notes=notes,
    )
    return drop_empty(out, entries)


def _rows(file: Path, options: Options) -> tuple[list[list[str]], dict[str, int]]:
    """The rows without the header, and which column is what."""
    with open(file, newline="", encoding="utf-8-sig", errors="replace") as opened:
        head = opened.readline()
        delimiter = "\t" if "\t" in head else ";" if ";" in head and "," not in head else ","
        opened.seek(0)
        rows = [r for r in csv.reader(opened, delimiter=delimiter) if r]
    if not rows:
        raise AdviceError(f"{file} is empty; it needs a header such as path,label and a row per picture.")
    header = [c.strip().lower() for c in rows[0]]
    columns: dict[str, int] = {}
    for role, usual_names in NAMES.items():
        given = options.columns.get("image" if role == "path" else role) or options.columns.get(role)
        if given is not None:
            if given.lower() not in header:
                raise unknown("column", given, [c.strip() for c in rows[0]], how=f"({file})")
            columns[role] = header.index(given.lower())
        else:
            found = next((n for n in usual_names if n in header), None)
            if found is not None:
                columns[role] = header.index(found)
    if "path" not in columns:
        if any(is_image(c.replace("\\", "/")) for c in rows[0]):  # no header
            columns = {"path": 0, "label": 1} if len(rows[0]) > 1 else {"path": 0}
            columns |= {"split": 2} if len(rows[0]) > 2 and rows[0][2].lower() in ("train", "val", "test") else {}
            rows = [[], *rows]
        else:
            raise AdviceError(
                f"{file} has no column of paths; its columns are {', '.join(rows[0])}. Call one `path`, or say which: "
                f'columns={{"path": {rows[0][0]!r}}}.'
            )
    width = max(columns.values()) + 1
    for number, row in enumerate(rows[1:], 2):
        if len(row) < width:
            raise AdviceError(
                f"{file}, line {number}: {len(row)} columns, the header has {len(header)}: {delimiter.join(row)}"
            )
    return rows[1:], columns


def _find(file: Path, paths: list[str], texts: list[str] | None) -> tuple[list[Entry], list[str]]:
    base, entries, missing = str(file.parent), [], []
    turned = 0
    for number, text in enumerate(paths, 2):
        name = text
        full = name if os.path.isabs(name) else f"{base}/{name}"
        try:
            stat = os.stat(full)
        except OSError:
            stat = None
        if stat is None and "\\" in name:
            name = name.replace("\\", "/")
            full = name if os.path.isabs(name) else f"{base}/{name}"
            turned += os.path.exists(full)
            stat = os.stat(full) if os.path.exists(full) else None
        if stat is None or os.path.isdir(full):
            missing.append((number, text, full))
            continue
        entries.append(Entry(name, stat.st_size, stat.st_mtime_ns))
    notes = []
    if turned:
        notes.append(
            f"{turned} paths in {file} have Windows separators, e.g. "
            f"{next(p for p in paths if chr(92) in p)!r}; they were read "
            "with / instead. Write / to be understood everywhere."
        )
    if missing:
        _complain(file, paths, texts, missing)
    return entries, notes


def _complain(file: Path, paths: list[str], texts: list[str] | None, missing: list[tuple[int, str, str]]) -> None:
    number, text, full = missing[0]
    if texts is not None and len(missing) == len(paths) and is_image(texts[0]):
        raise AdviceError(
            f"{file}: the columns seem to be swapped: line 2 has the path {text!r} and the label "
            f"{texts[0]!r}. Swap the names in "
            'the header, or say which is which with columns={"path": ..., "label": ...}.'
        )
    if os.path.exists(text) and not os.path.isabs(text):
        hint = f"Paths are relative to the file, not to {os.getcwd()}, where it would be found."
    else:
        hint = "Paths are relative to the file. Correct the path, or delete the row."
    more = f" ({len(missing)} of {len(paths)} rows name pictures that are not there)" if len(missing) > 1 else ""
    raise MissingError(f"{file}, line {number}: there is no picture {full}{more}. {hint}")


def write(dataset: Dataset, folder: Path) -> None:
    """folder/images/*.png and labels.csv with path, label and, when there are any, split."""
    fresh(folder)
    lines = [["path", "label"] + (["split"] if dataset.splits is not None else [])]
    classes = dataset.classes or []
    for i in range(len(dataset)):
        sample = dataset[i]
        name = save_picture(sample, folder / "images", i)
        if dataset.multilabels is not None:
            label = "|".join(classes[k] for k in np.flatnonzero(dataset.multilabels[i]))
        else:
            label = "" if sample.label is None else classes[int(sample.label)]
        lines.append([f"images/{name}", label] + ([str(dataset.splits[i])] if dataset.splits is not None else []))
    rows = []
    for line in lines:
        rows.append(",".join('"' + c.replace('"', '""') + '"' if set(c) & set(',"\n') else c for c in line))
    write_text(folder / "labels.csv", "\n".join(rows) + "\n")
