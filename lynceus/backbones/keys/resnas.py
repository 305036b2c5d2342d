"""Names of ViT-Res's parameters in the authors' code -> ours, which are theirs."""

from __future__ import annotations

from lynceus.core.rules import Rule

SOURCES: dict[str, tuple[Rule, ...]] = {"authors": (Rule(pattern=r"^module\.", name=""),)}
