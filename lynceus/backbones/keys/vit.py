"""Foreign parameter names of ViT -> ours, which are timm's. Every source is tried in this order."""

from __future__ import annotations

from lynceus.core.rules import Rule

SOURCES: dict[str, tuple[Rule, ...]] = {
    "timm": (),
    "torchvision": (
        Rule(pattern=r"^class_token$", name="cls_token"),
        Rule(pattern=r"^conv_proj\.", name="patch_embed.proj."),
        Rule(pattern=r"^encoder\.pos_embedding$", name="pos_embed"),
        Rule(pattern=r"^encoder\.ln\.", name="norm."),
        Rule(pattern=r"^encoder\.layers\.encoder_layer_(\d+)\.", name=r"blocks.\1."),
        Rule(pattern=r"\.ln_([12])\.", name=r".norm\1."),
        Rule(pattern=r"\.self_attention\.in_proj_", name=r".attn.qkv."),
        Rule(pattern=r"\.self_attention\.out_proj\.", name=r".attn.proj."),
        Rule(pattern=r"\.mlp\.(?:0|linear_1)\.", name=r".mlp.fc1."),
        Rule(pattern=r"\.mlp\.(?:3|linear_2)\.", name=r".mlp.fc2."),
        Rule(pattern=r"^heads\.head\.", name="head."),
    ),
    "dinov2": (
        Rule(pattern=r"^mask_token$", name=None),
        Rule(pattern=r"^register_tokens$", name="reg_token"),
        Rule(pattern=r"^blocks\.\d+\.(\d+)\.", name=r"blocks.\1."),
    ),
}
