"""Names of Vim's parameters elsewhere -> ours, which are the authors'."""

from __future__ import annotations

from lynceus.core.rules import Rule

SOURCES: dict[str, tuple[Rule, ...]] = {
    "authors": (Rule(pattern=r"^rope\.freqs_(?:cos|sin)$", name=None),),  # computed
}
