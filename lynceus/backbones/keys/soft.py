"""Names of SOFT's parameters in the authors' code -> ours."""

from __future__ import annotations

from lynceus.core.rules import Rule

_LAYER = (
    Rule(pattern=r"(^|\.)W_([qv])\.", name=r"\1\2."),
    Rule(pattern=r"(^|\.)attn\.Qlandmark_op\.", name=r"\1landmark."),
    Rule(pattern=r"(^|\.)attn\.Qnorm_act\.0\.", name=r"\1landmark_norm."),
    Rule(pattern=r"(^|\.)attn\.conv\.", name=r"\1conv."),
    Rule(pattern=r"(^|\.)ff\.", name=r"\1proj."),
)

SOURCES: dict[str, tuple[Rule, ...]] = {
    "authors": (
        Rule(pattern=r"^(block4\.\d+\.attn)\.(?:q|kv)\.(weight|bias)$", name=r"\1.qkv.\2", transform="merge_qkv"),
        *(Rule(pattern=r.pattern.replace(r"(^|\.)", r"(\.att\.mha\.)"), name=r.name) for r in _LAYER),
        Rule(pattern=r"\.att\.mha\.", name=".attn."),
        Rule(pattern=r"\.att\.norm([12])\.", name=r".norm\1."),
        Rule(pattern=r"\.att\.ff([12])\.", name=r".mlp.fc\1."),
    ),
    "layer": _LAYER,
}
