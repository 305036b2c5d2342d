"""Names of SpaRTAN's parameters elsewhere -> ours."""

from __future__ import annotations

from lynceus.core.rules import Rule

SOURCES: dict[str, tuple[Rule, ...]] = {
    "authors": (  # 1x1 convolutions there are products here
        Rule(pattern=r"(^|\.)complex$", name=r"\1complex", transform=lambda t: t.reshape(-1, 2)),
        Rule(pattern=r"attn\.squeeze\.", name="attn.fc1."),
        Rule(pattern=r"attn\.expand\.", name="attn.fc2."),
        Rule(
            pattern=r"((?:^|\.)(?:proj(?:_in|_out)?|theta|fc1|fc2)\.weight)$",
            name=r"\1",
            transform="conv_to_linear",
        ),
    ),
}
