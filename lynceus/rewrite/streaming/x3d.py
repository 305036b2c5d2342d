"""X3D, and CoX3D as its stream: a video network expanded from a tiny one along depth, width, frames and pixels.

Feichtenhofer, X3D: Expanding Architectures for Efficient Video Recognition, CVPR 2020, arXiv 2004.04730; in continual
form: Hedegaard, Iosifidis, Continual 3D Convolutional Neural Networks, ECCV 2022, arXiv 2106.00050.
Reference code: LukasHedegaard/co3d (Apache-2.0); parameters carry the names of the published X3D weights.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import dataclass
from typing import Literal

from jaxtyping import Float
from torch import Tensor, nn

from lynceus.core.errors import AdviceError
from lynceus.rewrite.streaming.branches import Parallel, Residual
from lynceus.rewrite.streaming.gate import SqueezeExcite3d
from lynceus.rewrite.streaming.pointwise import ChannelLinear, EachFrame
from lynceus.rewrite.streaming.pooling import WindowPool


@dataclass(frozen=True, kw_only=True, slots=True)
class X3DConfig:
    """frames, image_size: of a clip. pool_frames: the window of the head's average in a stream (None: `frames`), to be
    raised at no cost. depth, width, bottleneck: the factors of the paper; stem, head: channels before the width factor.
    squeeze: what squeeze-and-excitation averages over: the whole "clip", as X3D is trained, or each "frame", as a
    stream can; with "frame" clip and stream agree exactly. depthwise: else the 3x3x3 convolutions are dense."""

    num_classes: int = 400
    in_chans: int = 3
    frames: int = 16
    image_size: int = 224
    pool_frames: int | None = None
    stem: int = 12
    head: int = 2048
    width: float = 2.0
    depth: float = 2.2
    bottleneck: float = 2.25
    se_ratio: float = 1 / 16
    squeeze: Literal["frame", "clip"] = "frame"
    depthwise: bool = True
    dropout: float = 0.5
    head_norm: bool = False
    activation: Literal["softmax", "sigmoid", "none"] = "softmax"

    def __post_init__(self) -> None:
        if self.squeeze not in ("frame", "clip"):
            raise AdviceError(f"squeeze is 'frame' or 'clip', not {self.squeeze!r}.")
        if self.activation not in ("softmax", "sigmoid", "none"):
            raise AdviceError(f"activation is 'softmax', 'sigmoid' or 'none', not {self.activation!r}.")
        if min(self.frames, self.image_size, self.num_classes, self.pool_frames or 1) < 1:
            raise AdviceError("frames, image_size, num_classes and pool_frames are at least 1.")


def rounded(width: float, factor: float, divisor: int = 8) -> int:
    """width x factor as a multiple of `divisor`, never below nine tenths of it."""
    if not factor:
        return int(width)
    width *= factor
    new = max(divisor, int(width + divisor / 2) // divisor * divisor)
    return int(new + divisor if new < 0.9 * width else new)


class EvalActivation(nn.Module):
    """Softmax or sigmoid over the channels, in eval mode only."""

    def __init__(self, kind: str):
        super().__init__()
        self.kind = kind

    def forward(self, x: Tensor) -> Tensor:
        if self.training or self.kind == "none":
            return x
        return x.softmax(1) if self.kind == "softmax" else x.sigmoid()

    def extra_repr(self) -> str:
        return self.kind


class X3DBlock(nn.Module):
    """Inverted bottleneck with a 3x3x3 convolution, squeeze-and-excitation in every second one, and a shortcut."""

    def __init__(self, inputs: int, outputs: int, inner: int, stride: int, gated: bool, config: X3DConfig):
        super().__init__()
        groups = inner if config.depthwise else 1
        around = (1, stride, stride)
        layers: list[tuple[str, nn.Module]] = [
            ("a", nn.Conv3d(inputs, inner, 1, bias=False)),
            ("a_bn", nn.BatchNorm3d(inner)),
            ("a_relu", nn.ReLU()),
            ("b", nn.Conv3d(inner, inner, 3, stride=around, padding=1, groups=groups, bias=False)),
            ("b_bn", nn.BatchNorm3d(inner)),
        ]
        if gated and config.se_ratio > 0:
            reduced = rounded(inner, config.se_ratio)
            window = config.frames if config.squeeze == "clip" else None
            layers.append(("se", SqueezeExcite3d(inner, reduced, window=window)))
        layers += [
            ("b_relu", nn.SiLU()),
            ("c", nn.Conv3d(inner, outputs, 1, bias=False)),
            ("c_bn", nn.BatchNorm3d(outputs)),
        ]
        self.branch2 = nn.Sequential(OrderedDict(layers))
        self.branch1: nn.Module | None = None
        if inputs != outputs or stride != 1:
            self.branch1 = nn.Conv3d(inputs, outputs, 1, stride=around, bias=False)
            self.branch1_bn = nn.BatchNorm3d(outputs)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        short = x if self.branch1 is None else self.branch1_bn(self.branch1(x))
        y: Tensor = self.relu(short + self.branch2(x))
        return y

    def as_containers(self) -> nn.Module:
        """The same, for a converter."""
        if self.branch1 is None:
            return nn.Sequential(Residual(self.branch2), self.relu)
        short = nn.Sequential(OrderedDict(branch1=self.branch1, branch1_bn=self.branch1_bn))
        return nn.Sequential(Parallel(short, self.branch2), self.relu)


class X3D(nn.Module):
    """A video (b, 3, t, h, w), normalised, to class probabilities (b, classes, u): one for each `pool_frames` of the
    clip; raw scores in training mode."""

    time_axis = 2
    clip_rank = 5
    builder = "lynceus.rewrite.streaming.x3d:build"
    mean, std = (0.45, 0.45, 0.45), (0.225, 0.225, 0.225)

    def __init__(self, config: X3DConfig, name: str = "x3d"):
        super().__init__()
        self.config, self.name = config, name
        width = rounded(config.stem, config.width)
        conv_xy = nn.Conv3d(config.in_chans, width, (1, 3, 3), stride=(1, 2, 2), padding=(0, 1, 1), bias=False)
        conv = nn.Conv3d(width, width, (5, 1, 1), padding=(2, 0, 0), groups=width, bias=False)
        stem = OrderedDict(conv_xy=conv_xy, conv=conv, bn=nn.BatchNorm3d(width), relu=nn.ReLU())
        self.s1 = nn.Sequential(OrderedDict(pathway0_stem=nn.Sequential(stem)))
        base, inner = config.stem, width
        for number, count in enumerate((1, 2, 5, 3), 2):
            outputs = rounded(base, config.width)
            inner = int(config.bottleneck * outputs)
            blocks: OrderedDict[str, nn.Module] = OrderedDict()
            for i in range(math.ceil(config.depth * count)):
                blocks[f"pathway0_res{i}"] = X3DBlock(width, outputs, inner, 2 if i == 0 else 1, i % 2 == 0, config)
                width = outputs
            self.add_module(f"s{number}", nn.Sequential(blocks))
            base = rounded(base, 2)
        head: list[tuple[str, nn.Module]] = [
            ("conv_5", nn.Conv3d(width, inner, 1, bias=False)),
            ("conv_5_bn", nn.BatchNorm3d(inner)),
            ("conv_5_relu", nn.ReLU()),
            ("avg_pool", WindowPool(config.pool_frames or config.frames)),
            ("lin_5", nn.Conv3d(inner, config.head, 1, bias=False)),
        ]
        if config.head_norm:
            head.append(("lin_5_bn", nn.BatchNorm3d(config.head)))
        head += [
            ("lin_5_relu", nn.ReLU()),
            ("dropout", nn.Dropout(config.dropout)),
            ("projection", ChannelLinear(config.head, config.num_classes)),
            ("act", EachFrame(EvalActivation(config.activation))),
            ("flat", EachFrame(nn.Flatten())),
        ]
        self.head = nn.Sequential(OrderedDict(head))
        self.reset()

    def reset(self) -> None:
        """Kaiming for convolutions, the last gain of each block 0, the classifier N(0, 0.01)."""
        for m in self.modules():
            if isinstance(m, nn.Conv3d):
                nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")
                if m.bias is not None:
                    nn.init.zeros_(m.bias)
            elif isinstance(m, nn.Linear):
                nn.init.normal_(m.weight, 0, 0.01)
                nn.init.zeros_(m.bias)
            elif isinstance(m, X3DBlock):
                nn.init.zeros_(m.branch2.c_bn.weight)  # type: ignore[union-attr, arg-type]

    def parts(self) -> nn.Sequential:
        return nn.Sequential(OrderedDict((n, getattr(self, n)) for n in ("s1", "s2", "s3", "s4", "s5", "head")))

    def as_containers(self) -> nn.Module:
        """The same, for a converter."""
        return self.parts()

    def forward_stages(self, x: Float[Tensor, "b c t h w"]) -> list[Float[Tensor, "b d t i j"]]:
        """Stem and the four stages."""
        maps = []
        for part in (self.s1, self.s2, self.s3, self.s4, self.s5):
            x = part(x)  # type: ignore[operator]
            maps.append(x)
        return maps

    def forward(self, x: Float[Tensor, "b c t h w"]) -> Float[Tensor, "b classes u"]:
        y: Tensor = self.head(self.forward_stages(x)[-1])
        return y


VARIANTS: dict[str, X3DConfig] = {
    "x3d_nano": X3DConfig(num_classes=10, frames=4, image_size=32, stem=4, head=32, depth=1.0),
    "x3d_xs": X3DConfig(frames=4, image_size=160),
    "x3d_s": X3DConfig(frames=13, image_size=160),
    "x3d_m": X3DConfig(frames=16, image_size=224),
    "x3d_l": X3DConfig(frames=16, image_size=312, depth=5.0),
}


def build(config: X3DConfig, name: str = "x3d") -> X3D:
    return X3D(config, name)


def frame_shape(config: X3DConfig) -> tuple[int, ...]:
    """(c, h, w) of a frame that the network was made for."""
    return config.in_chans, config.image_size, config.image_size
