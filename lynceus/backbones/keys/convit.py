"""Names of ConViT's parameters elsewhere -> ours, which are the authors' and timm's."""

from __future__ import annotations

from lynceus.core.rules import Rule

SOURCES: dict[str, tuple[Rule, ...]] = {
    "authors": (Rule(pattern=r"\.rel_indices$", name=None),),  # rebuilt
}
