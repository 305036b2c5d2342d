"""Names of ConvNeXt's parameters elsewhere -> ours."""

from __future__ import annotations

from lynceus.core.rules import Rule

SOURCES: dict[str, tuple[Rule, ...]] = {
    "authors": (  # classification, dense (norm0 ...) and isotropic (stem, blocks)
        Rule(pattern=r"^downsample_layers\.", name="downsample."),
        Rule(pattern=r"^stem\.", name="downsample.0.0."),
        Rule(pattern=r"^stages\.", name="layers."),
        Rule(pattern=r"^blocks\.", name="layers.0."),
        Rule(pattern=r"^norm(\d)\.", name=r"norms.\1."),
        Rule(pattern=r"\.pwconv(\d)\.", name=r".mlp.fc\1."),
    ),
    "timm": (
        Rule(pattern=r"^stem\.", name="downsample.0."),
        Rule(pattern=r"^stages\.(\d+)\.downsample\.", name=r"downsample.\1."),
        Rule(pattern=r"^stages\.(\d+)\.blocks\.(\d+)\.", name=r"layers.\1.\2."),
        Rule(pattern=r"\.conv_dw\.", name=".dwconv."),
        Rule(pattern=r"\.mlp\.fc(\d)\.weight$", name=r".mlp.fc\1.weight", transform=lambda t: t.flatten(1)),  # conv_mlp
        Rule(pattern=r"^head\.norm\.", name="norm."),
        Rule(pattern=r"^head\.fc\.", name="head."),
    ),
    "torchvision": (  # even entries of `features` are stem and down-sampling, odd ones the stages
        *(Rule(pattern=rf"^features\.{2 * i}\.", name=f"downsample.{i}.") for i in range(4)),
        *(Rule(pattern=rf"^features\.{2 * i + 1}\.", name=f"layers.{i}.") for i in range(4)),
        Rule(pattern=r"\.layer_scale$", name=".gamma", transform=lambda t: t.flatten()),
        Rule(pattern=r"\.block\.0\.", name=".dwconv."),
        Rule(pattern=r"\.block\.2\.", name=".norm."),
        Rule(pattern=r"\.block\.3\.", name=".mlp.fc1."),
        Rule(pattern=r"\.block\.5\.", name=".mlp.fc2."),
        Rule(pattern=r"^classifier\.0\.", name="norm."),
        Rule(pattern=r"^classifier\.2\.", name="head."),
    ),
}
