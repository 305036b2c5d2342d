"""ResNet: residual convolutional networks, with the ResNeXt, Wide, dilated and CIFAR forms.

Paper: He et al., Deep Residual Learning for Image Recognition, CVPR 2016, arXiv 1512.03385
ResNeXt: Xie et al., CVPR 2017, arXiv 1611.05431. Wide: Zagoruyko and Komodakis, BMVC 2016, arXiv 1605.07146
Code: torchvision (the "v1.5" form: the stride is on the 3x3), whose state names are kept
Licence: BSD-3-Clause
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any, Literal

from jaxtyping import Float
from torch import Tensor, nn

from lynceus.backbones._base import Backbone, BackboneConfig
from lynceus.core.errors import AdviceError
from lynceus.core.types import Stage
from lynceus.layers.drop import DropPath, linear_rates
from lynceus.layers.folded import Folds, conv_bn, fold
from lynceus.layers.fused import hooked

EXPANSION = {"basic": 1, "bottleneck": 4}


@dataclass(frozen=True, kw_only=True, slots=True)
class ResNetConfig(BackboneConfig):
    """block: two 3x3 convolutions, or 1x1 - 3x3 - 1x1 with four times the width at the end. depths: blocks per stage.

    width: channels of the stem and first stage, doubled at each stage. groups, width_per_group: of the 3x3 in a
    bottleneck (ResNeXt, Wide). dilate: stages 2 to 4 whose stride is replaced by dilation; their first block keeps the
    dilation of the stage before. zero_init_residual: the last batch norm of each block starts at 0.
    stem: 7x7 stride 2 and max pool, or "cifar", 3x3 stride 1 without pool.
    """

    block: Literal["basic", "bottleneck"] = "bottleneck"
    depths: tuple[int, ...] = (3, 4, 6, 3)
    width: int = 64
    groups: int = 1
    width_per_group: int = 64
    dilate: tuple[bool, ...] = (False, False, False)
    zero_init_residual: bool = False
    stem: Literal["imagenet", "cifar"] = "imagenet"
    image_size: tuple[int, int] = (224, 224)


def conv(inside: int, outside: int, size: int, *, stride: int = 1, groups: int = 1, dilation: int = 1) -> nn.Conv2d:
    """A convolution without bias, padded so that only the stride changes the size."""
    padding = dilation * (size // 2)
    return nn.Conv2d(inside, outside, size, stride, padding, dilation, groups, bias=False)


class Block(nn.Module):
    """What both kinds of block share: the skip, stochastic depth, and the sum."""

    downsample: nn.Sequential | None

    def add_skip(self, inside: int, outside: int, stride: int, drop_path: float) -> None:
        """Last in the constructors, so that parameters stand in torchvision's order."""
        self.relu = nn.ReLU(inplace=True)
        self.downsample = None
        if stride != 1 or inside != outside:
            self.downsample = nn.Sequential(conv(inside, outside, 1, stride=stride), nn.BatchNorm2d(outside))
        self.drop_path = DropPath(drop_path)
        self.folds = Folds()

    def train(self, mode: bool = True) -> Block:
        self.folds.forget()
        return super().train(mode)

    def skip(self, x: Tensor) -> tuple[Tensor, bool]:
        """What is added to the branch, and whether it is a fresh tensor that nobody else holds."""
        if self.downsample is None:
            return x, False
        if len(self.downsample) != 2 or hooked(self.downsample, *self.downsample):
            return self.downsample(x), False
        return conv_bn(x, self.downsample[0], self.downsample[1], folds=self.folds, name="downsample"), True

    def close(self, x: Tensor, y: Tensor, last: nn.Module, bn: nn.Module) -> Tensor:
        """The last convolution of the branch `y`, the sum with the skip of `x`, and the ReLU after it."""
        skip, own = self.skip(x)
        if self.drop_path.active:
            return self.relu(skip + self.drop_path(bn(last(y))))
        return conv_bn(y, last, bn, folds=self.folds, name="last", relu=self.relu, residual=skip, own=own)


class BasicBlock(Block):
    """conv3x3(stride) - BN - ReLU - conv3x3 - BN, plus skip, ReLU."""

    def __init__(self, inside: int, width: int, config: ResNetConfig, *, stride: int, dilation: int, drop_path: float):
        if config.groups != 1 or config.width_per_group != 64:
            raise AdviceError("groups and width_per_group are options of block='bottleneck'.")
        super().__init__()
        self.conv1 = conv(inside, width, 3, stride=stride, dilation=dilation)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = conv(width, width, 3, dilation=dilation)
        self.bn2 = nn.BatchNorm2d(width)
        self.add_skip(inside, width, stride, drop_path)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d H W"]:
        y = conv_bn(x, self.conv1, self.bn1, folds=self.folds, name="first", relu=self.relu)
        return self.close(x, y, self.conv2, self.bn2)


class Bottleneck(Block):
    """conv1x1 - BN - ReLU - conv3x3(stride) - BN - ReLU - conv1x1 - BN, plus skip, ReLU."""

    def __init__(self, inside: int, width: int, config: ResNetConfig, *, stride: int, dilation: int, drop_path: float):
        outside = width * EXPANSION["bottleneck"]
        middle = int(width * (config.width_per_group / 64.0)) * config.groups
        super().__init__()
        self.conv1 = conv(inside, middle, 1)
        self.bn1 = nn.BatchNorm2d(middle)
        self.conv2 = conv(middle, middle, 3, stride=stride, groups=config.groups, dilation=dilation)
        self.bn2 = nn.BatchNorm2d(middle)
        self.conv3 = conv(middle, outside, 1)
        self.bn3 = nn.BatchNorm2d(outside)
        self.add_skip(inside, outside, stride, drop_path)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d H W"]:
        y = conv_bn(x, self.conv1, self.bn1, folds=self.folds, name="first", relu=self.relu)
        y = conv_bn(y, self.conv2, self.bn2, folds=self.folds, name="middle", relu=self.relu)
        return self.close(x, y, self.conv3, self.bn3)


class ResNet(Backbone):
    """Stem and four stages `layer1` to `layer4`; the classifier `fc` reads the mean of the last map.

    At inference on a CPU, convolution, batch norm, sum and ReLU run as one kernel each (`lynceus.layers.folded`).
    """

    config: ResNetConfig
    head_name = "fc"

    def __init__(self, config: ResNetConfig):
        c = config
        if len(c.dilate) != len(c.depths) - 1:
            raise AdviceError(
                f"dilate has an entry per stage after the first: {len(c.depths) - 1}, not {len(c.dilate)}."
            )
        kind = BasicBlock if c.block == "basic" else Bottleneck
        if kind is BasicBlock and any(c.dilate):
            raise AdviceError("dilate is an option of block='bottleneck'.")
        cifar = c.stem == "cifar"
        stride, dilation, inside = (1 if cifar else 4), 1, c.width
        rates = iter(linear_rates(c.drop_path_rate, sum(c.depths)))
        stages, layers = [], []
        for i, depth in enumerate(c.depths):
            width, step, before = c.width * 2**i, (1 if i == 0 else 2), dilation
            if i > 0 and c.dilate[i - 1]:
                dilation, step = dilation * step, 1
            stride *= step
            blocks = []
            for j in range(depth):
                first = j == 0
                blocks.append(
                    kind(
                        inside,
                        width,
                        c,
                        stride=step if first else 1,
                        dilation=before if first else dilation,
                        drop_path=next(rates),
                    )
                )
                inside = width * EXPANSION[c.block]
            layers.append(nn.Sequential(*blocks))
            stages.append(Stage(inside, stride, f"layer{i + 1}"))
        super().__init__(c, stages)
        self.conv1 = conv(c.in_chans, c.width, 3) if cifar else conv(c.in_chans, c.width, 7, stride=2)
        self.bn1 = nn.BatchNorm2d(c.width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.Identity() if cifar else nn.MaxPool2d(3, 2, 1)
        for i, layer in enumerate(layers):
            self.add_module(f"layer{i + 1}", layer)
        self.fc = nn.Linear(inside, c.num_classes) if c.num_classes else nn.Identity()
        self.folds = Folds()
        self.frozen_bn = False
        self.init_weights()

    def init_weights(self) -> None:
        """Convolutions Kaiming normal (fan out, ReLU), batch norms 1 and 0, classifier torch's default."""
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(m, Block) and self.config.zero_init_residual:
                last: Any = m.bn3 if isinstance(m, Bottleneck) else m.bn2
                nn.init.zeros_(last.weight)

    def train(self, mode: bool = True) -> ResNet:
        self.folds.forget()
        super().train(mode)
        if self.frozen_bn:
            for m in self.modules():
                if isinstance(m, nn.BatchNorm2d):
                    m.eval()
        return self

    def freeze_bn(self, frozen: bool = True) -> None:
        """Stops (or resumes) both the learning of scale and shift and the running statistics, also in train mode."""
        self.frozen_bn = frozen
        for m in self.modules():
            if isinstance(m, nn.BatchNorm2d):
                m.requires_grad_(not frozen)
        self.train(self.training)

    def fused(self) -> ResNet:
        """A copy for inference whose batch norms are folded into the convolutions, in any dtype and on any device."""
        if self.training:
            raise AdviceError("Batch norms are folded as they act in eval mode: model.eval().fused().")
        model = copy.deepcopy(self)
        for parent in list(model.modules()):
            pairs = [("0", "1")] if isinstance(parent, nn.Sequential) else [(f"conv{i}", f"bn{i}") for i in (1, 2, 3)]
            for conv_name, bn_name in pairs:
                found, bn = getattr(parent, conv_name, None), getattr(parent, bn_name, None)
                if isinstance(found, nn.Conv2d) and isinstance(bn, nn.BatchNorm2d):
                    kernel, bias = fold(found, bn)
                    found.weight, found.bias = nn.Parameter(kernel.detach()), nn.Parameter(bias.detach())
                    setattr(parent, bn_name, nn.Identity())
        return model

    def layer(self, index: int) -> nn.Module:
        return self.get_submodule(f"layer{index + 1}")

    def stem(self, image: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d H W"]:
        return self.maxpool(conv_bn(image, self.conv1, self.bn1, folds=self.folds, name="stem", relu=self.relu))

    def forward_stages(self, image: Float[Tensor, "b c h w"]) -> list[Float[Tensor, "b ci hi wi"]]:
        return self.stages_up_to(image, len(self.stages) - 1)

    def stages_up_to(self, image: Float[Tensor, "b c h w"], last: int) -> list[Float[Tensor, "b ci hi wi"]]:
        x = self.stem(image)
        maps = []
        for i in range(last + 1):
            x = self.run_layer(self.layer(i), x)
            maps.append(x)
        return maps

    def run_layer(self, layer: nn.Module, x: Tensor) -> Tensor:
        if not self.grad_checkpointing:
            return layer(x)
        for block in layer.children():
            x = self.run_block(block, x)
        return x

    def keep_levels(self, count: int, *, norm: bool) -> None:
        """Cuts the stages from `count` on."""
        for i in range(count, len(self.stages)):
            delattr(self, f"layer{i + 1}")
        self.stages = self.stages[:count]
        self.config = replace(self.config, depths=self.config.depths[:count], dilate=self.config.dilate[: count - 1])

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        return {"stem": r"^conv1|^bn1", "blocks": r"^layer(\d+)" if coarse else r"^layer(\d+)\.(\d+)"}


def _basic(*depths: int, **options: Any) -> ResNetConfig:
    return ResNetConfig(block="basic", depths=depths, **options)


def _deep(*depths: int, **options: Any) -> ResNetConfig:
    return ResNetConfig(depths=depths, **options)


VARIANTS: dict[str, ResNetConfig] = {
    # for images of 28 to 64 pixels, from scratch
    "resnet_nano": _basic(2, 2, 2, 2, width=16, stem="cifar", image_size=(32, 32)),
    "resnet18": _basic(2, 2, 2, 2),
    "resnet18_cifar": _basic(2, 2, 2, 2, stem="cifar", image_size=(32, 32)),
    "resnet34": _basic(3, 4, 6, 3),
    "resnet50": _deep(3, 4, 6, 3),
    "resnet101": _deep(3, 4, 23, 3),
    "resnet152": _deep(3, 8, 36, 3),
    "resnext50_32x4d": _deep(3, 4, 6, 3, groups=32, width_per_group=4),
    "resnext101_32x8d": _deep(3, 4, 23, 3, groups=32, width_per_group=8),
    "resnext101_64x4d": _deep(3, 4, 23, 3, groups=64, width_per_group=4),
    "wide_resnet50_2": _deep(3, 4, 6, 3, width_per_group=128),
    "wide_resnet101_2": _deep(3, 4, 23, 3, width_per_group=128),
}


def build(config: ResNetConfig) -> ResNet:
    return ResNet(config)
