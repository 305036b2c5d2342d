"""`lynceus data SOURCE`: what is there, and what is wrong with it, before any training. `data corrupt` makes a copy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

from lynceus.cli._run import show
from lynceus.cli._schema import parse


@dataclass(frozen=True, kw_only=True)
class Options:
    """Counts per split and class, unreadable files, duplicates, boxes and labels out of range.

    `lynceus data corrupt SOURCE --out FOLDER` writes a corrupted copy, like CIFAR-10-C."""

    source: Positional[str] = "digits"  # digits, a folder of class folders, a .parquet, .csv or COCO .json file ...
    split: str | None = None  # train, val or test, where the source has them
    out: Path | None = None  # folder for report.html and report.json


def main(argv: Sequence[str]) -> int:
    if argv and argv[0] == "corrupt":  # a folder of that name is "./corrupt"
        from lynceus.cli.corrupt import main as corrupt

        return corrupt(argv[1:])
    options = parse(Options, argv, prog="lynceus data")
    import lynceus.data

    dataset = lynceus.data.open(options.source, split=options.split)
    twin = (
        f"import lynceus.data\n\nprint(lynceus.data.open({options.source!r}, split={options.split!r}).check().table())"
    )
    show(dataset.check(), out=options.out, twin=twin)
    return 0
