"""Names of CvT's parameters elsewhere -> ours (which are the authors')."""

from __future__ import annotations

from lynceus.core.rules import Rule

_HERE = r"\.attention\.attention\."

SOURCES: dict[str, tuple[Rule, ...]] = {
    "authors": (),
    "huggingface": (
        Rule(pattern=r"^cvt\.encoder\.stages\.(\d+)\.", name=r"stage\1."),
        Rule(pattern=r"\.embedding\.convolution_embeddings\.projection\.", name=".patch_embed.proj."),
        Rule(pattern=r"\.embedding\.convolution_embeddings\.normalization\.", name=".patch_embed.norm."),
        Rule(pattern=r"\.layers\.(\d+)\.", name=r".blocks.\1."),
        *(
            rule
            for long, short in (("query", "q"), ("key", "k"), ("value", "v"))
            for rule in (
                Rule(
                    pattern=_HERE + rf"convolution_projection_{long}\.convolution_projection\.convolution\.",
                    name=f".attn.conv_proj_{short}.conv.",
                ),
                Rule(
                    pattern=_HERE + rf"convolution_projection_{long}\.convolution_projection\.normalization\.",
                    name=f".attn.conv_proj_{short}.bn.",
                ),
                Rule(pattern=_HERE + rf"projection_{long}\.", name=f".attn.proj_{short}."),
            )
        ),
        Rule(pattern=r"\.attention\.output\.dense\.", name=".attn.proj."),
        Rule(pattern=r"\.intermediate\.dense\.", name=".mlp.fc1."),
        Rule(pattern=r"\.output\.dense\.", name=".mlp.fc2."),
        Rule(pattern=r"\.layernorm_before\.", name=".norm1."),
        Rule(pattern=r"\.layernorm_after\.", name=".norm2."),
        Rule(pattern=r"^layernorm\.", name="norm."),
        Rule(pattern=r"^classifier\.", name="head."),
    ),
}
