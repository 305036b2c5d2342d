"""`lynceus doctor`: what this machine has."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lynceus.cli._run import show
from lynceus.cli._schema import parse


@dataclass(frozen=True, kw_only=True)
class Options:
    """Versions, device, threads, memory, disk, write rights, and which extras are missing."""

    out: Path | None = None  # folder for report.html and report.json


def main(argv: Sequence[str]) -> int:
    options = parse(Options, argv, prog="lynceus doctor")
    from lynceus.core.doctor import doctor

    show(doctor(), out=options.out, twin="from lynceus.core.doctor import doctor\nprint(doctor().table())")
    return 0
