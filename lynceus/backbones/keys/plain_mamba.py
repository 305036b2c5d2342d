"""Names of PlainMamba's parameters elsewhere -> ours: the authors' inside their classifier, detector or segmenter."""

from __future__ import annotations

from lynceus.core.rules import Rule

SOURCES: dict[str, tuple[Rule, ...]] = {
    "authors": (Rule(pattern=r"^backbone\.", name=""), Rule(pattern=r"^head\.fc\.", name="head.")),
}
