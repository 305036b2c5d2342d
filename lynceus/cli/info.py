"""`lynceus info NAME`: the card of one model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

from lynceus.cli._run import show
from lynceus.cli._schema import parse


@dataclass(frozen=True, kw_only=True)
class Options:
    """Paper, licence, options, levels, parameters, MACs, and the records that it was checked against."""

    name: Positional[str]  # a name of `lynceus models`, or timm:NAME
    out: Path | None = None  # folder for report.html and report.json


def main(argv: Sequence[str]) -> int:
    options = parse(Options, argv, prog="lynceus info")
    from lynceus.backbones.catalogue import describe

    twin = f"from lynceus.backbones.catalogue import describe\n\nprint(describe({options.name!r}).table())"
    show(describe(options.name), out=options.out, twin=twin)
    return 0
