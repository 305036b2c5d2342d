"""Names of Swin's parameters elsewhere -> ours (which are the authors')."""

from __future__ import annotations

from lynceus.core.rules import Rule

_MADE = (Rule(pattern=r"(?:^|\.)(?:attn_mask|relative_position_index|relative_coords_table)$", name=None),)  # rebuilt

SOURCES: dict[str, tuple[Rule, ...]] = {
    "authors": (*_MADE, Rule(pattern=r"\.spatial_mlp\.", name=".attn.spatial_mlp.")),
    "timm": (  # its merging stands at the start of the next stage
        *_MADE,
        *(Rule(pattern=rf"^layers\.{i + 1}\.downsample\.", name=f"layers.{i}.downsample.") for i in range(3)),
        Rule(pattern=r"^head\.fc\.", name="head."),
    ),
    "torchvision": (  # features.0 is the patches, odd entries the stages, even ones the merging
        *_MADE,
        Rule(pattern=r"^features\.0\.0\.", name="patch_embed.proj."),
        Rule(pattern=r"^features\.0\.2\.", name="patch_embed.norm."),
        *(Rule(pattern=rf"^features\.{2 * i + 1}\.(\d+)\.", name=rf"layers.{i}.blocks.\1.") for i in range(4)),
        *(Rule(pattern=rf"^features\.{2 * i + 2}\.", name=f"layers.{i}.downsample.") for i in range(3)),
        Rule(pattern=r"\.mlp\.0\.", name=".mlp.fc1."),
        Rule(pattern=r"\.mlp\.3\.", name=".mlp.fc2."),
    ),
}
