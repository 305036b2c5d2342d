"""Names of Hyena N-D's parameters elsewhere -> ours (which are the authors')."""

from __future__ import annotations

from lynceus.core.rules import Rule

_TIME = Rule(pattern=r"(?:^|\.)pos_emb\.t$", name=None)  # made anew for every grid

SOURCES: dict[str, tuple[Rule, ...]] = {
    "authors": (_TIME, Rule(pattern=r"modulation\.[XY]?deltas$", name=None)),  # rates that are not trained
    "authors, trained windows": (_TIME,),
}
