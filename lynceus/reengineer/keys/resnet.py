"""ResNet parity: records of torchvision's factories and of its ResNet constructor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lynceus.backbones.keys.resnet import SOURCES as SOURCES
from lynceus.backbones.resnet import VARIANTS, ResNet, ResNetConfig
from lynceus.core.errors import unknown

# torchvision's names -> ours
FIELDS = {
    "num_classes": "num_classes",
    "zero_init_residual": "zero_init_residual",
    "groups": "groups",
    "width_per_group": "width_per_group",
    "replace_stride_with_dilation": "dilate",
    "layers": "depths",
    "block": "block",
    "in_chans": "in_chans",
    "stem": "stem",
    "cifar_stem": "stem",
    "width": "width",
}
IGNORED = {"factory", "arch", "weights", "pretrained", "progress", "norm_layer"}
BLOCKS = {"basicblock": "basic", "basic": "basic", "bottleneck": "bottleneck"}


def translate(config: Mapping[str, Any]) -> ResNetConfig:
    """Our config for torchvision's names; `factory` (or `arch`) gives the start."""
    name = str(config.get("factory", config.get("arch", "resnet50"))).split(".")[0]
    if name not in VARIANTS:
        raise unknown("ResNet factory", name, VARIANTS)
    changes: dict[str, Any] = {}
    for key, value in config.items():
        if key in IGNORED:
            continue
        if key not in FIELDS:
            raise unknown("option of ResNet", key, [*FIELDS, *IGNORED])
        if key == "block":
            value = BLOCKS[str(value).lower()]
        elif key == "cifar_stem":
            value = "cifar" if value else "imagenet"
        elif key == "replace_stride_with_dilation":
            value = tuple(bool(v) for v in value or (False, False, False))
        elif key == "layers":
            value = tuple(value)
        changes[FIELDS[key]] = value
    return replace(VARIANTS[name], **changes)


def build(config: Mapping[str, Any]) -> ResNet:
    return ResNet(translate(config))


def compare(model: ResNet, inputs: Mapping[str, Tensor], record: Mapping[str, Any]) -> dict[str, Tensor]:
    """stem: after the max pool; stage1 to stage4; features: the pooled vector; logits."""
    image = inputs["image"]
    with torch.no_grad():
        maps = model.forward_stages(image)
        out = {f"stage{i + 1}": x for i, x in enumerate(maps)}
        pooled = model.pool(maps[-1])
        out |= {"stem": model.stem(image), "features": pooled, "pooled": pooled}
        return out | {"logits": model.forward_head(maps[-1])}
