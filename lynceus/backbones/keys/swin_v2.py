"""Names of Swin V2's parameters elsewhere -> ours (which are the authors')."""

from __future__ import annotations

from lynceus.backbones.keys.swin import SOURCES as SWIN
from lynceus.core.rules import Rule

_SELF = r"\.attention\.self\."

SOURCES: dict[str, tuple[Rule, ...]] = {
    "authors": (*SWIN["authors"], Rule(pattern=r"\.rpe_mlp\.", name=".cpb_mlp.")),  # rpe_mlp: an old name
    "timm": (*SWIN["timm"], Rule(pattern=r"\.attn\.k_bias$", name=None)),
    "torchvision": (
        *SWIN["torchvision"],
        Rule(pattern=r"\.qkv\.bias$", name=".{q_bias,,v_bias}", transform="split_qkv"),
    ),
    "simmim": (
        *SWIN["authors"],
        Rule(pattern=r"^(?:decoder\..*|encoder\.mask_token)$", name=None),
        Rule(pattern=r"^encoder\.", name=""),
        Rule(pattern=r"\.rpe_mlp\.", name=".cpb_mlp."),
    ),
    "huggingface": (
        *SWIN["authors"],
        Rule(pattern=r"^swinv2\.embeddings\.patch_embeddings\.projection\.", name="patch_embed.proj."),
        Rule(pattern=r"^swinv2\.embeddings\.norm\.", name="patch_embed.norm."),
        Rule(pattern=r"^swinv2\.embeddings\.position_embeddings$", name="absolute_pos_embed"),
        Rule(pattern=r"^swinv2\.layernorm\.", name="norm."),
        Rule(pattern=r"^classifier\.", name="head."),
        Rule(pattern=r"^swinv2\.encoder\.layers\.(\d+)\.", name=r"layers.\1."),
        Rule(pattern=_SELF + r"(?:query|key|value)\.weight$", name=".attn.qkv.weight", transform="merge_qkv"),
        Rule(pattern=_SELF + r"query\.bias$", name=".attn.q_bias"),
        Rule(pattern=_SELF + r"value\.bias$", name=".attn.v_bias"),
        Rule(pattern=_SELF + r"logit_scale$", name=".attn.logit_scale"),
        Rule(pattern=_SELF + r"continuous_position_bias_mlp\.", name=".attn.cpb_mlp."),
        Rule(pattern=r"\.attention\.output\.dense\.", name=".attn.proj."),
        Rule(pattern=r"\.intermediate\.dense\.", name=".mlp.fc1."),
        Rule(pattern=r"\.output\.dense\.", name=".mlp.fc2."),
        Rule(pattern=r"\.layernorm_before\.", name=".norm1."),
        Rule(pattern=r"\.layernorm_after\.", name=".norm2."),
    ),
}
