"""Parquet files and Hugging Face datasets on disk, read by pyarrow; no code from the hub is run and nothing downloaded.

An Image column is struct{bytes, path} or plain bytes; a ClassLabel's names stand in the schema's metadata. A column of
paths only, as some files of the hub have, is read relative to the file.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lynceus.core.errors import AdviceError, unknown
from lynceus.data.dataset import Dataset
from lynceus.data.sources import Blobs, Files

IMAGES = ("image", "img", "images", "picture", "pixel_values", "jpg", "png", "file_name", "path")
LABELS = ("label", "labels", "fine_label", "class", "target", "category", "cls")


def features(schema: Any) -> dict[str, Any]:
    """The Hugging Face features in the schema's metadata, or {}."""
    meta = (schema.metadata or {}).get(b"huggingface")
    return json.loads(meta).get("info", {}).get("features", {}) if meta else {}


def read_parquet(
    files: Sequence[Path],
    *,
    name: str,
    origin: str,
    splits: Sequence[str] | None = None,
    columns: dict[str, str] | None = None,
    max_bad: int | float = 0.05,
) -> Dataset:
    """One dataset from parquet files of one schema. columns, for unusual names: {"image": ..., "label": ...}."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    tables = []
    for file in files:
        try:
            tables.append(pq.read_table(file))
        except (pa.ArrowInvalid, OSError) as error:
            why = str(error).splitlines()[0][:200]
            raise AdviceError(f"{file} is no readable parquet file: {why} Copy it again.") from None
    table = pa.concat_tables(tables)
    of = None
    if splits is not None:
        of = [s for s, t in zip(splits, tables) for _ in range(t.num_rows)]
    return from_table(
        table, name=name, origin=origin, splits=of, columns=columns, max_bad=max_bad, base=files[0].parent
    )


def from_table(
    table: Any,
    *,
    name: str,
    origin: str,
    splits: Sequence[str] | None = None,
    columns: dict[str, str] | None = None,
    max_bad: int | float = 0.05,
    base: Path | None = None,
) -> Dataset:
    """A dataset from an arrow table with a column of pictures and, if there is one, a column of labels."""
    import pyarrow as pa

    columns = columns or {}
    feats = features(table.schema)
    image = _column(table, "image", columns, IMAGES, feats, "Image")
    if image is None:
        raise AdviceError(
            f"{origin} has no column of pictures; its columns are {', '.join(table.column_names)}. "
            'Say which with columns={"image": "NAME"}.'
        )
    if table.num_rows == 0:
        raise AdviceError(f"{origin} has no rows.")
    label = _column(table, "label", columns, LABELS, feats, "ClassLabel")
    column = table.column(image)
    ids = [f"{i}" for i in range(table.num_rows)]
    paths = None
    if pa.types.is_struct(column.type):
        fields = {column.type.field(i).name: i for i in range(column.type.num_fields)}
        if "bytes" not in fields:
            raise AdviceError(f"The column {image!r} of {origin} is a struct of {', '.join(fields)}; it needs `bytes`.")
        flat = column.flatten()
        blobs = flat[fields["bytes"]]
        paths = flat[fields["path"]] if "path" in fields else None
    elif pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        blobs, paths = None, column
    else:
        blobs = column
    if blobs is not None and blobs.null_count < len(blobs):
        source: Any = Blobs(blobs.combine_chunks() if blobs.num_chunks != 1 else blobs.chunk(0), ids, where=origin)
    elif paths is not None and paths.null_count < len(paths):
        root = str(base or os.getcwd())
        names = [str(p).replace("\\", "/") for p in paths.to_pylist()]
        source = Files(root, names)
        if not os.path.isfile(source.path(0)):
            raise AdviceError(
                f"{origin} holds paths and no bytes, and {source.path(0)} is not there. Put the pictures beside the "
                "file, or save it again with the bytes embedded."
            )
    else:
        raise AdviceError(f"The column {image!r} of {origin} is empty: neither bytes nor paths.")
    labels, classes = (
        (None, None) if label is None else _labels(table.column(label), feats.get(label, {}), label, origin)
    )
    return Dataset(
        source,
        name=name,
        origin=origin,
        classes=classes,
        labels=labels,
        splits=splits,
        max_bad=max_bad,
        layout="parquet",
    )


def _column(
    table: Any, role: str, columns: dict[str, str], usual: Sequence[str], feats: dict[str, Any], kind: str
) -> str | None:
    if role in columns:
        if columns[role] not in table.column_names:
            raise unknown("column", columns[role], table.column_names)
        return columns[role]
    marked = [n for n, f in feats.items() if isinstance(f, dict) and f.get("_type") == kind and n in table.column_names]
    if marked:
        return next((n for n in usual if n in marked), marked[0])
    return next((n for n in usual if n in table.column_names), None)


def _labels(column: Any, feature: dict[str, Any], name: str, origin: str) -> tuple[np.ndarray, list[str]]:
    import pyarrow as pa

    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        values = column.to_pylist()
        classes = sorted({v for v in values if v is not None})
        index = {c: i for i, c in enumerate(classes)}
        return np.array([-1 if v is None else index[v] for v in values], dtype=np.int64), classes
    if not pa.types.is_integer(column.type):
        raise AdviceError(
            f"The label column {name!r} of {origin} holds {column.type}; labels are whole numbers or names. "
            'Say which column with columns={"label": "NAME"}.'
        )
    labels = np.asarray(column.fill_null(-1).to_numpy(), dtype=np.int64)
    names = feature.get("names") if isinstance(feature, dict) else None
    if names is None:
        names = [str(i) for i in range(int(labels.max(initial=-1)) + 1)]
    elif isinstance(names, dict):
        names = [names[k] for k in sorted(names, key=int)]
    top = int(labels.max(initial=-1))
    if top >= len(names):
        row = int(np.argmax(labels >= len(names)))
        raise AdviceError(
            f"{origin}, row {row}: label {top} with only {len(names)} class names; indices go from 0 "
            f"to {len(names) - 1}."
        )
    return labels, list(names)
