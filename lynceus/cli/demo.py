"""`lynceus demo`: the gauntlet of a small backbone of every family on real handwritten digits, from scratch."""

from __future__ import annotations

from collections.abc import Sequence

from lynceus.cli import gauntlet


def main(argv: Sequence[str]) -> int:
    """The options are those of `lynceus gauntlet`; its demo preset gives the defaults."""
    return gauntlet.main(argv, verb="demo", preset="demo")
