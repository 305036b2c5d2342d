"""`lynceus inspect FILE`: what is in a checkpoint, without running code from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

from lynceus.cli._run import show
from lynceus.cli._schema import parse


@dataclass(frozen=True, kw_only=True)
class Options:
    """Names, shapes, kinds, parameter count, guessed family and source of a checkpoint; equal blocks are folded."""

    file: Positional[Path]  # .safetensors, .pth, .pt, .bin, .npz, .h5
    expand: bool = False  # one row per tensor
    out: Path | None = None  # folder for report.html and report.json


def main(argv: Sequence[str]) -> int:
    options = parse(Options, argv, prog="lynceus inspect")
    from lynceus.reengineer.inspect import inspect

    report = inspect(options.file, expand=options.expand)
    show(
        report,
        out=options.out,
        twin=f"from lynceus.reengineer.inspect import inspect\nprint(inspect({str(options.file)!r}).table())",
    )
    return 0
