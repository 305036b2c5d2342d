"""A columnar backbone (all levels of one stride) as a pyramid, for decoders that want several strides.

Exploring Plain Vision Transformer Backbones for Object Detection, ECCV 2022, arXiv 2203.16527 (simple feature pyramid).
Reference code: detectron2 (projects/ViTDet), Apache-2.0; written from the paper.
"""

from __future__ import annotations

from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from lynceus.backbones._base import Backbone
from lynceus.backbones._groups import inside
from lynceus.core.errors import AdviceError
from lynceus.core.types import Stage


class ChannelNorm(nn.Module):
    """LayerNorm over the channels of a map (b, c, h, w)."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = nn.LayerNorm(channels)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Pyramid(Backbone):
    """`trunk`'s last map at four strides: s/4, s/2, s, 2s, by transposed convolutions and a maximum.

    The trunk stays as it is and classifies as before; the layers of the pyramid start from random weights. A trunk of
    stride 2 or less loses the levels that would be finer than the image.
    """

    def __init__(self, trunk: Backbone):
        c, s = trunk.stages[-1].channels, trunk.stages[-1].stride
        if not is_columnar(trunk):
            raise AdviceError(f"{trunk.name} has levels of several strides already; use it as it is.")
        scales = [k for k in (4, 2, 1) if s % k == 0]
        stages = [Stage(c // k, s // k, f"ups.{i}") for i, k in enumerate(scales)]
        super().__init__(trunk.config, [*stages, Stage(c, 2 * s, "down")])
        self.trunk = trunk
        self.name = f"{trunk.name}_pyramid"
        self.mean, self.std = trunk.mean, trunk.std
        self.num_features, self.head_hidden_size = trunk.num_features, trunk.head_hidden_size
        self.head_name = f"trunk.{trunk.head_name}"
        self.ups = nn.ModuleList(_up(c, k) for k in scales)
        self.down = nn.MaxPool2d(2, 2, ceil_mode=True)

    @property
    def input_size(self) -> tuple[int, int]:
        return self.trunk.input_size

    def features_and_stages(self, image: Float[Tensor, "b c h w"]) -> tuple[Tensor, list[Tensor]]:
        features, maps = self.trunk.features_and_stages(image)
        last = maps[-1]
        return features, [*(up(last) for up in self.ups), self.down(last)]

    def forward_stages(self, image: Float[Tensor, "b c h w"]) -> list[Float[Tensor, "b ci hi wi"]]:
        return self.features_and_stages(image)[1]

    def forward_features(self, image: Float[Tensor, "b c h w"]) -> Tensor:
        return self.trunk.forward_features(image)

    def pool(self, features: Tensor) -> Float[Tensor, "b c"]:
        return self.trunk.pool(features)

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        return self.trunk.forward_head(features, pre_logits)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        self.trunk.reset_classifier(num_classes, global_pool)
        self.num_classes, self.config = num_classes, self.trunk.config

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.trunk.set_grad_checkpointing(enable)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        return inside(self.trunk.group_matcher(coarse), "trunk")

    def no_weight_decay(self) -> set[str]:
        return {f"trunk.{n}" for n in self.trunk.no_weight_decay()}


def is_columnar(backbone: Backbone) -> bool:
    """True when every level has the same stride."""
    return len({s.stride for s in backbone.stages}) == 1


def as_pyramid(backbone: Backbone) -> Backbone:
    """The backbone itself when its levels differ in stride, else a Pyramid over it."""
    return Pyramid(backbone) if is_columnar(backbone) else backbone


def _up(channels: int, factor: int) -> nn.Module:
    if factor == 1:
        return nn.Identity()
    half = channels // 2
    layers: list[nn.Module] = [nn.ConvTranspose2d(channels, half, 2, 2)]
    if factor == 4:
        layers += [ChannelNorm(half), nn.GELU(), nn.ConvTranspose2d(half, channels // 4, 2, 2)]
    return nn.Sequential(*layers)
