"""timm's names of HaloNet's parameters -> ours."""

from __future__ import annotations

from lynceus.core.rules import Rule

SOURCES: dict[str, tuple[Rule, ...]] = {
    "timm": (
        Rule(pattern=r"^stages\.", name="layers."),
        Rule(pattern=r"^stem\.(conv|bn)\.", name=r"stem.conv1.\1."),  # a stem without pool
        Rule(pattern=r"\.shortcut\.conv\.(conv|bn)\.", name=r".shortcut.\1."),  # behind means
        Rule(pattern=r"\.bn\.", name=".norm."),
        Rule(pattern=r"^(.*\.attn\.fc[12])\.weight$", name=r"\1.weight", transform="conv_to_linear"),
        Rule(pattern=r"^head\.fc\.", name="head."),
    ),
}
