"""Names of SAM's image encoder elsewhere -> ours, which are timm's."""

from __future__ import annotations

from lynceus.core.rules import Rule

SOURCES: dict[str, tuple[Rule, ...]] = {
    "authors": (
        Rule(pattern=r"^(?:prompt_encoder|mask_decoder)\.", name=None),  # the rest of a whole SAM
        Rule(pattern=r"^image_encoder\.", name=""),
        Rule(pattern=r"\.mlp\.lin([12])\.", name=r".mlp.fc\1."),
    ),
}
