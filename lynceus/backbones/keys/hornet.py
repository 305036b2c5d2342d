"""Names of HorNet's parameters elsewhere -> ours."""

from __future__ import annotations

from lynceus.core.rules import Rule

_LINEAR = r"(?:^|\.)(?:proj_in|proj_out|pws\.\d+)\.weight$"  # 1x1 convolutions there, products here
MIXER = (Rule(pattern=rf"({_LINEAR})", name=r"\1", transform="conv_to_linear"),)

SOURCES: dict[str, tuple[Rule, ...]] = {
    "authors": (  # classification and dense (norm0 ...)
        *MIXER,
        Rule(pattern=r"^downsample_layers\.", name="downsample."),
        Rule(pattern=r"^stages\.", name="layers."),
        Rule(pattern=r"^norm(\d)\.", name=r"norms.\1."),
        Rule(pattern=r"\.pwconv(\d)\.", name=r".mlp.fc\1."),
    ),
    "pyramid": (  # the decoders with gated convolutions, in mmcv's bricks
        *MIXER,
        Rule(pattern=r"(^|\.)bn\.", name=r"\1norm."),
        Rule(pattern=r"^psp_modules\.(\d+)\.1\.", name=r"pooling.convs.\1."),
        Rule(pattern=r"^lateral_convs\.", name="laterals."),
        Rule(pattern=r"^fpn_convs\.", name="outputs."),
        Rule(pattern=r"^fpn_bottleneck\.", name="fusion."),
        Rule(pattern=r"^conv_seg\.", name="head."),
    ),
}
