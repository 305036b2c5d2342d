"""Names of VOLO's parameters elsewhere -> ours, which are the authors' and timm's."""

from __future__ import annotations

from lynceus.core.rules import Rule

SOURCES: dict[str, tuple[Rule, ...]] = {
    "authors": (Rule(pattern=r"^module\.", name=""),),  # checkpoints of several GPUs
}
