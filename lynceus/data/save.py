"""Writing a dataset in another format: `save(dataset, folder, layout)`."""

from __future__ import annotations

import os
from pathlib import Path

from lynceus.core.errors import AdviceError, unknown
from lynceus.data.dataset import Dataset
from lynceus.data.formats import arrays, coco, csv_table, hub, masks, shards, voc, yolo
from lynceus.data.formats.write import class_folder, fresh, save_picture

_WRITERS = {
    "array": arrays.write,
    "coco": coco.write,
    "csv": csv_table.write,
    "masks": masks.write,
    "parquet": hub.write,
    "voc": voc.write,
    "webdataset": shards.write,
    "yolo": yolo.write,
}


def save(dataset: Dataset, folder: str | os.PathLike[str], layout: str) -> Path:
    """Writes the dataset into an empty or new folder and returns its full path. Pictures become PNG, without loss.

    layout: "array" (.npz), "coco", "csv", "folder", "masks", "parquet", "voc", "webdataset" or "yolo". What a layout
    has
    no place for is not written: masks of VOC, labels of YOLO, boxes of csv. Raises AdviceError rather than overwrite.
    """
    target = Path(os.path.abspath(os.path.expanduser(folder)))
    if layout == "folder":
        _write_folder(dataset, target)
    elif layout in _WRITERS:
        if layout in ("coco", "yolo", "voc") and not dataset.source.rich:
            raise AdviceError(
                f"{dataset.name} has no boxes, which {layout} is for. Save it as folder, csv, parquet or webdataset."
            )
        _WRITERS[layout](dataset, target)
    else:
        raise unknown("layout to write", layout, [*_WRITERS, "folder"])
    return target


def _write_folder(dataset: Dataset, folder: Path) -> None:
    """folder/[split/]class/*.png; pictures without a label right in the (split) folder."""
    if dataset.multilabels is not None:
        raise AdviceError(
            f"{dataset.name} has several labels per picture, which no class folder can hold. Save it as csv."
        )
    fresh(folder)
    for i in range(len(dataset)):
        sample = dataset[i]
        place = folder if dataset.splits is None else folder / str(dataset.splits[i])
        if sample.label is not None:
            place = class_folder(place, (dataset.classes or [])[int(sample.label)])
        save_picture(sample, place, i)
