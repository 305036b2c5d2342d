"""Hugging Face datasets on disk: what save_to_disk wrote (arrow files), and folders of parquet files, one or more per
split. Read by pyarrow alone: no code of the hub runs and nothing is downloaded."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from lynceus.core.errors import AdviceError, MissingError
from lynceus.data.dataset import Dataset
from lynceus.data.folder import ending, inner_folders
from lynceus.data.formats.options import Options
from lynceus.data.formats.write import fresh
from lynceus.data.table import from_table, read_parquet


def detect(path: Path) -> bool:
    if path.is_file():
        return path.suffix == ".parquet"
    return any((path / n).is_file() for n in ("dataset_dict.json", "state.json")) or bool(_parquets(path))


def _parquets(folder: Path) -> list[Path]:
    inner = (f for n in inner_folders(folder) for f in ending(folder / n, ".parquet"))
    return ending(folder, ".parquet") or list(inner)


def read(path: Path, options: Options) -> Dataset:
    columns = dict(options.columns)
    if path.is_file():
        return read_parquet([path], name=path.stem, origin=str(path), columns=columns, max_bad=options.max_bad)
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        return _read_saved(path, columns, options)
    files = _parquets(path)
    splits = [_split(f, path) for f in files]
    named = splits if len(set(splits)) > 1 else None
    return read_parquet(files, name=path.name, origin=str(path), splits=named, columns=columns, max_bad=options.max_bad)


def _split(file: Path, root: Path) -> str:
    """train of train-00000-of-00002.parquet or of train/0000.parquet."""
    found = re.match(r"(.+?)(-\d+-of-\d+.*)?$", file.stem)
    stem = found[1] if found else file.stem
    return file.parent.name if re.fullmatch(r"\d+", stem) and file.parent != root else stem


def _read_saved(path: Path, columns: dict[str, str], options: Options) -> Dataset:
    import pyarrow as pa

    if (path / "dataset_dict.json").is_file():
        names = json.loads((path / "dataset_dict.json").read_text())["splits"]
        folders = [(n, path / n) for n in names]
    else:
        folders = [("", path)]
    tables, splits = [], []
    for name, folder in folders:
        if not (folder / "state.json").is_file():
            raise MissingError(
                f"{path / 'dataset_dict.json'} names the split {name!r}, but {folder} was not saved whole."
            )
        state = json.loads((folder / "state.json").read_text())
        parts = []
        for record in state["_data_files"]:
            file = folder / record["filename"]
            try:
                with pa.memory_map(str(file)) as mapped:
                    parts.append(pa.ipc.open_stream(mapped).read_all())
            except FileNotFoundError:
                raise MissingError(
                    f"{folder / 'state.json'} names {file.name}, which is not there. Copy it too."
                ) from None
            except pa.ArrowInvalid as error:
                raise AdviceError(
                    f"{file} is no readable arrow file: {str(error).splitlines()[0]} Copy it again."
                ) from None
        table = pa.concat_tables(parts)
        for record in state.get("_indices_files") or []:
            with pa.memory_map(str(folder / record["filename"])) as mapped:
                table = table.take(pa.ipc.open_stream(mapped).read_all().column(0).combine_chunks())
        tables.append(table)
        splits += [name] * table.num_rows
    whole = pa.concat_tables(tables)
    named = splits if len(folders) > 1 else None
    return from_table(
        whole, name=path.name, origin=str(path), splits=named, columns=columns, max_bad=options.max_bad, base=path
    )


def is_hub_dataset(value: Any) -> bool:
    """Whether it is a datasets.Dataset or DatasetDict, without importing that package."""
    return any(
        f"{c.__module__}.{c.__name__}".startswith(("datasets.arrow", "datasets.dataset_dict"))
        for c in type(value).__mro__
    )


def wrap(value: Any, options: Options) -> Dataset:
    """A datasets.Dataset, or a DatasetDict with its splits."""
    import pyarrow as pa

    parts = list(value.items()) if isinstance(value, dict) else [("", value)]
    tables = [(name, part.with_format("arrow")[:]) for name, part in parts]
    meta = parts[0][1].features.arrow_schema.metadata
    whole = pa.concat_tables([t for _, t in tables]).replace_schema_metadata(meta)
    splits = [name for name, t in tables for _ in range(t.num_rows)] if len(parts) > 1 else None
    return from_table(
        whole,
        name="dataset",
        origin="a datasets.Dataset",
        splits=splits,
        columns=dict(options.columns),
        max_bad=options.max_bad,
    )


def write(dataset: Dataset, folder: Path) -> None:
    """folder/<split>-00000-of-00001.parquet with the columns image {bytes, path} and label, names in the metadata."""
    import io

    import pyarrow as pa
    import pyarrow.parquet as pq
    from PIL import Image

    fresh(folder)
    classes = dataset.classes
    info: dict[str, Any] = {"image": {"_type": "Image"}}
    if dataset.labels is not None:
        info["label"] = {"names": classes, "_type": "ClassLabel"}
    meta = {b"huggingface": json.dumps({"info": {"features": info}}).encode()}
    splits = dataset.splits
    of: dict[str, list[int]] = {}
    for i in range(len(dataset)):
        of.setdefault("train" if splits is None else str(splits[i]), []).append(i)
    for split, members in of.items():
        blobs = []
        for i in members:
            buffer = io.BytesIO()
            Image.fromarray(dataset[i].image.permute(1, 2, 0).numpy()).save(buffer, "PNG")
            blobs.append({"bytes": buffer.getvalue(), "path": f"{i:06d}.png"})
        kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
        columns: dict[str, Any] = {"image": pa.array(blobs, type=kind)}
        if dataset.labels is not None:
            columns["label"] = pa.array(dataset.labels[members].tolist(), type=pa.int64())
        table = pa.table(columns).replace_schema_metadata(meta)
        pq.write_table(table, folder / f"{split}-00000-of-00001.parquet")
