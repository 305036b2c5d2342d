"""`lynceus parity FILE.json ...`: our models against records measured on the authors' own code, in float64."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

from lynceus.cli._run import show
from lynceus.cli._schema import parse


@dataclass(frozen=True, kw_only=True)
class Options:
    """Rebuilds each record's model, fills it by the authors' parameter names, and prints per output the largest
    difference in units of the output's standard deviation. Exit code 0 only if all agree."""

    records: Positional[tuple[Path, ...]]  # parity records (.json)
    out: Path | None = None  # folder for report.html and report.json


def main(argv: Sequence[str]) -> int:
    options = parse(Options, argv, prog="lynceus parity")
    from lynceus.core.progress import progress
    from lynceus.reengineer.parity import exit_code, parity

    with progress("parity", total=len(options.records), unit="records") as bar:
        report = parity(options.records, progress=lambda done, total, name: bar.advance(done - bar.done, record=name))
    names = [str(p) for p in options.records]
    show(
        report, out=options.out, twin=f"from lynceus.reengineer.parity import parity\nprint(parity({names!r}).table())"
    )
    return exit_code(report)
