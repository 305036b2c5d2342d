"""The modernisation ladder of ConvNeXt (CVPR 2022, arXiv 2201.03545): thirteen networks from ResNet-50 to ConvNeXt-T.

Reference: the paper's section 2 and figure 2; only its two ends exist in the authors' code (facebookresearch/ConvNeXt,
MIT), so the rungs between them follow the text. Each rung changes one flag of one block builder:

    from lynceus.backbones.convnext_ladder import RUNGS, Ladder
    model = Ladder(RUNGS["kernel"])
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lynceus.backbones._base import Backbone, BackboneConfig
from lynceus.backbones.convnext import EPS
from lynceus.core.shapes import pad_to
from lynceus.core.types import Stage
from lynceus.layers.drop import DropPath, linear_rates
from lynceus.layers.norm import LayerNorm2d


@dataclass(frozen=True, kw_only=True, slots=True)
class LadderConfig(BackboneConfig):
    """One rung. depths: blocks per stage. width: channels of the spatial convolution in the first stage.

    patchify: a 4x4 stride 4 stem instead of 7x7 stride 2 and max-pooling. depthwise: one spatial kernel per channel.
    inverted: the block is thin outside and four times wider inside. depthwise_first: the spatial convolution stands
    before the two 1x1. kernel_size: of the spatial convolution. activation, norm: their kinds. one_activation: only
    between the 1x1s. one_norm: only before the first 1x1. separate_downsampling: norm and 2x2 stride 2 convolution
    between the stages, and a norm before the head. layer_scale: initial gamma, 0 for none.
    """

    depths: tuple[int, ...] = (3, 4, 6, 3)
    width: int = 64
    patchify: bool = False
    depthwise: bool = False
    inverted: bool = False
    depthwise_first: bool = False
    kernel_size: int = 3
    activation: Literal["relu", "gelu"] = "relu"
    one_activation: bool = False
    one_norm: bool = False
    norm: Literal["batch", "layer"] = "batch"
    separate_downsampling: bool = False
    layer_scale: float = 0.0
    image_size: tuple[int, int] = (224, 224)

    def channels(self, stage: int) -> int:
        """Channels of the map that leaves a stage."""
        return self.width * (1 << stage) * (1 if self.inverted else 4)

    def make_norm(self, channels: int) -> nn.Module:
        return nn.BatchNorm2d(channels) if self.norm == "batch" else LayerNorm2d(channels, eps=EPS)

    def make_act(self) -> nn.Module:
        return nn.ReLU() if self.activation == "relu" else nn.GELU()


class Block(nn.Module):
    """A residual block of any rung: three convolutions in the order that the flags ask for."""

    def __init__(self, config: LadderConfig, stage: int, before: int, *, stride: int, drop_path: float):
        super().__init__()
        out = config.channels(stage)
        inside = 4 * out if config.inverted else config.width * 2**stage
        spatial = before if config.depthwise_first else inside  # channels that the spatial convolution sees
        order = ("spatial", "first", "second") if config.depthwise_first else ("first", "spatial", "second")
        kernels = {
            "first": (before, inside, 1, 1, 1),
            "spatial": (spatial, spatial, config.kernel_size, stride, spatial if config.depthwise else 1),
            "second": (inside, out, 1, 1, 1),
        }
        parts: list[nn.Module] = []
        for i, name in enumerate(order):
            a, b, kernel, step, groups = kernels[name]
            normed = not config.one_norm or order[(i + 1) % 3] == "first"
            bias = not normed or config.norm == "layer"
            parts.append(nn.Conv2d(a, b, kernel, step, kernel // 2, groups=groups, bias=bias))
            if normed:
                parts.append(config.make_norm(b))
            if name == "first" if config.one_activation else i < 2:
                parts.append(config.make_act())
        self.body = nn.Sequential(*parts)
        self.gamma = nn.Parameter(config.layer_scale * torch.ones(out, 1, 1)) if config.layer_scale else None
        self.drop_path = DropPath(drop_path)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or before != out:
            self.shortcut = nn.Sequential(
                nn.Conv2d(before, out, 1, stride, bias=config.norm == "layer"), config.make_norm(out)
            )
        self.after = nn.Identity() if config.one_activation else config.make_act()

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d H W"]:
        y = self.body(x)
        if self.gamma is not None:
            y = y * self.gamma
        out: Tensor = self.after(self.shortcut(x) + self.drop_path(y))
        return out


class Ladder(Backbone):
    """A rung. Maps have strides 4 to 32; images smaller than 32 pixels are zero-padded to that."""

    def __init__(self, config: LadderConfig):
        count = len(config.depths)
        super().__init__(config, [Stage(config.channels(i), 4 * 2**i, f"layers.{i}") for i in range(count)])
        first = config.width
        if config.patchify:
            stem: list[nn.Module] = [nn.Conv2d(config.in_chans, first, 4, 4, bias=config.norm == "layer")]
        else:
            stem = [nn.Conv2d(config.in_chans, first, 7, 2, 3, bias=False)]
        stem.append(config.make_norm(first))
        if not config.one_activation:
            stem.append(config.make_act())
        if not config.patchify:
            stem.append(nn.MaxPool2d(3, 2, 1))
        self.stem = nn.Sequential(*stem)
        rates = iter(linear_rates(config.drop_path_rate, sum(config.depths)))
        self.downsample, self.layers = nn.ModuleList(), nn.ModuleList()
        before = first
        for i, depth in enumerate(config.depths):
            out = config.channels(i)
            down: nn.Module = nn.Identity()
            if i and config.separate_downsampling:
                down = nn.Sequential(config.make_norm(before), nn.Conv2d(before, out, 2, 2))
                before = out
            self.downsample.append(down)
            blocks: list[nn.Module] = []
            for j in range(depth):
                stride = 2 if i and j == 0 and not config.separate_downsampling else 1
                blocks.append(Block(config, i, before, stride=stride, drop_path=next(rates)))
                before = out
            self.layers.append(nn.Sequential(*blocks))
        self.norm = nn.LayerNorm(before, eps=EPS) if config.separate_downsampling else nn.Identity()
        self.head = nn.Linear(before, config.num_classes) if config.num_classes > 0 else nn.Identity()
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                if config.norm == "batch" and isinstance(module, nn.Conv2d):
                    nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                else:
                    nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward_stages(self, image: Float[Tensor, "b c h w"]) -> list[Float[Tensor, "b ci hi wi"]]:
        x = self.stem(pad_to(image, self.stages[-1].stride))
        maps = []
        for down, blocks in zip(self.downsample, cast(Iterable[nn.Sequential], self.layers)):
            x = down(x)
            for block in blocks:
                x = self.run_block(block, x)
            maps.append(x)
        return maps

    def pool(self, features: Tensor) -> Float[Tensor, "b c"]:
        vector: Tensor = self.norm(features.mean((-2, -1)))
        return vector

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        blocks = r"^(?:layers|downsample)\.(\d+)" if coarse else r"^(?:layers|downsample)\.(\d+)\.(\d+)"
        return {"stem": r"^stem\.", "blocks": blocks}


def _rungs() -> dict[str, LadderConfig]:
    """Start, then one change after the other; the last also brings layer scale, as ConvNeXt-T has it."""
    changes: dict[str, dict[str, Any]] = {
        "ratio": {"depths": (3, 3, 9, 3)},
        "patchify": {"patchify": True},
        "depthwise": {"depthwise": True},
        "width": {"width": 96},
        "inverted": {"inverted": True},
        "depthwise_first": {"depthwise_first": True},
        "kernel": {"kernel_size": 7},
        "gelu": {"activation": "gelu"},
        "one_activation": {"one_activation": True},
        "one_norm": {"one_norm": True},
        "layer_norm": {"norm": "layer"},
        "downsampling": {"separate_downsampling": True, "layer_scale": 1e-6},
    }
    rungs = {"resnet50": LadderConfig()}
    config = rungs["resnet50"]
    for name, change in changes.items():
        config = replace(config, **change)
        rungs[name] = config
    return rungs


RUNGS: dict[str, LadderConfig] = _rungs()


def narrow(config: LadderConfig, width: int) -> LadderConfig:
    """The rung at another width: `width` before the width rung, half as much again after it, as 64 and 96 are."""
    return replace(config, width=width if config.width == RUNGS["resnet50"].width else width * 3 // 2)
