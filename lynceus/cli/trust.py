"""`lynceus trust MODEL DATA`: the whole trust wing on one model, as `lynceus check all`."""

from __future__ import annotations

from collections.abc import Sequence

from lynceus.cli.check import run


def main(argv: Sequence[str]) -> int:
    return run("all", argv, prog="lynceus trust")
