"""Names of LSNet's parameters in the authors' code -> ours."""

from __future__ import annotations

from lynceus.core.rules import Rule

SOURCES: dict[str, tuple[Rule, ...]] = {
    "authors": (
        Rule(pattern=r"(?:^|\.)attention_bias_idxs$", name=None),  # rebuilt
        Rule(pattern=r"(^|\.)(mixer|ffn)\.m\.", name=r"\1\2."),
        Rule(pattern=r"((?:^|\.)se\.fc[12])\.weight$", name=r"\1.weight", transform="conv_to_linear"),
        Rule(pattern=r"^head\.bn\.", name="norm."),
        Rule(pattern=r"^head\.l\.", name="head."),
        Rule(pattern=r"^head_dist\.bn\.", name="norm_dist."),
        Rule(pattern=r"^head_dist\.l\.", name="head_dist."),
    ),
}
