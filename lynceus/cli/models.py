"""`lynceus models PATTERN`: find a model by name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from lynceus.cli._run import show
from lynceus.cli._schema import parse


@dataclass(frozen=True, kw_only=True)
class Options:
    """Names that match a pattern, with parameters, levels, input size, the paper and the licence of the reference
    code."""

    pattern: Positional[str] = "*"  # shell pattern: '*nano*', 'swin_*', 'timm:*convnext*'
    task: Literal["classify", "classification"] | None = None  # models that can do this task
    macs: bool = False  # count multiply-adds too (a few seconds per model)
    sort: str = "name"  # column to sort by
    out: Path | None = None  # folder for report.html and report.json


def main(argv: Sequence[str]) -> int:
    options = parse(Options, argv, prog="lynceus models")
    from lynceus.backbones.catalogue import catalogue

    report = catalogue(options.pattern, macs=options.macs, sort=options.sort)
    twin = (
        "from lynceus.backbones.catalogue import catalogue\n\n"
        f"print(catalogue({options.pattern!r}, macs={options.macs}, sort={options.sort!r}).table())"
    )
    show(report, out=options.out, twin=twin)
    return 0
