"""SpaRTAN: a small convolutional pyramid that mixes space in two receptive fields and channels as waves.

Paper: Pay et al., SpaRTAN: Spatial Reinforcement Token-based Aggregation Network for Visual Recognition, IJCNN 2025,
    arXiv 2507.10999
Code: henry-pay/SpaRTAN
Licence: Apache-2.0

Blocks and down-samplings stand in one flat sequence `layers`, as in the authors' code. The norms are over the whole map
of an image, so features depend on all of it: tiles or padding change the result.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lynceus.backbones._base import Backbone, BackboneConfig
from lynceus.core.errors import AdviceError
from lynceus.core.shapes import pad_to
from lynceus.core.types import Stage
from lynceus.layers.conv_norm_act import ConvNormAct
from lynceus.layers.drop import DropPath
from lynceus.layers.fused import fusable, hooked
from lynceus.layers.mixers import MixerSite, Place
from lynceus.layers.wave import TwoFieldMixer, WaveMixer

EPS = 1e-6


@dataclass(frozen=True, kw_only=True, slots=True)
class SpaRTANConfig(BackboneConfig):
    """Fields of a SpaRTAN.

    depths, dims, ratios: blocks, channels (a multiple of 8) and widening of the channel mixer (at least 2) of each
    stage. A stage without blocks also leaves out the down-sampling behind it, and its channels are those before it.
    stem_strides: of the two 3x3 convolutions at the start. drop_path_rate: grows by rate / number of blocks from 0.
    image_size: what the variant was made for.
    """

    depths: tuple[int, ...] = (3, 3, 12, 2)
    dims: tuple[int, ...] = (32, 64, 128, 256)
    ratios: tuple[int, ...] = (4, 4, 2, 2)
    stem_strides: tuple[int, int] = (2, 2)
    drop_path_rate: float = 0.1
    image_size: tuple[int, int] = (256, 256)

    def __post_init__(self) -> None:
        counts = {n: len(getattr(self, n)) for n in ("depths", "dims", "ratios")}
        if len(set(counts.values())) != 1:
            told = ", ".join(f"{n} has {c}" for n, c in counts.items())
            raise AdviceError(f"depths, dims and ratios hold one entry per stage: {told}.")


class GlobalNorm(nn.GroupNorm):
    """Zero mean and unit variance over all numbers of an image's map b h w c, then weight and bias per channel."""

    def __init__(self, dim: int):
        super().__init__(1, dim, eps=EPS)

    def forward(self, x: Float[Tensor, "b h w c"]) -> Float[Tensor, "b h w c"]:
        return super().forward(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class Block(nn.Module):
    """Spatial and channel mixer, each behind a norm over the whole map and beside a shortcut, on a map b h w c."""

    def __init__(self, dim: int, *, ratio: int, early: bool, drop_path: float):
        super().__init__()
        self.smixer: nn.Module = TwoFieldMixer(dim, depthwise=not early)
        self.cmixer: nn.Module = WaveMixer(dim, ratio=ratio, depthwise=early)
        self.norm_1, self.norm_2 = GlobalNorm(dim), GlobalNorm(dim)
        self.scale_1 = nn.Parameter(torch.full((1, dim, 1, 1), 1e-5))
        self.scale_2 = nn.Parameter(torch.full((1, dim, 1, 1), 1e-5))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Float[Tensor, "b h w c"]) -> Float[Tensor, "b h w c"]:
        x = self._add(x, self.smixer(self.norm_1(x)), self.scale_1)
        return self._add(x, self.cmixer(self.norm_2(x)), self.scale_2)

    def _add(self, x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
        if self.drop_path.active:
            return x + self.drop_path(scale.view(-1) * y)
        own = type(self.smixer) is TwoFieldMixer and not hooked(self.smixer, self.cmixer)
        if own and fusable(x):  # nobody else holds y
            return torch.addcmul(x, y, scale.view(-1), out=y)
        return torch.addcmul(x, y, scale.view(-1))


class SpaRTAN(Backbone):
    """SpaRTAN. Maps are those just before each down-sampling and the last one; the classifier reads its mean.

    Sizes are rounded up by the stem and down by the 2x2 convolutions after it; a map too small for one is zero-padded.
    """

    head_name = "linear"

    def __init__(self, config: SpaRTANConfig):
        c = config
        dim, stride, number, total = c.dims[0], math.prod(c.stem_strides), 0, sum(c.depths)
        layers: list[nn.Module] = []
        places: list[tuple[int, int]] = []  # index in `layers`, stride
        stages: list[Stage] = []
        for i, (depth, ratio) in enumerate(zip(c.depths, c.ratios)):
            for _ in range(depth):
                places.append((len(layers), stride))
                early = i < len(c.depths) // 2
                layers.append(Block(dim, ratio=ratio, early=early, drop_path=c.drop_path_rate * number / total))
                number += 1
            if depth and i < len(c.depths) - 1:
                stages.append(Stage(dim, stride, f"layers.{len(layers) - 1}"))
                layers.append(ConvNormAct(dim, c.dims[i + 1], 2, stride=2, padding=0, norm_eps=EPS, act=nn.SiLU()))
                dim, stride = c.dims[i + 1], 2 * stride
        stages.append(Stage(dim, stride, f"layers.{len(layers) - 1}" if layers else "conv"))
        super().__init__(c, stages)
        self.places = tuple(places)
        first, second = c.stem_strides
        self.conv = nn.Sequential(
            ConvNormAct(c.in_chans, c.dims[0] // 2, 3, stride=first, norm_eps=EPS, act=nn.GELU()),
            ConvNormAct(c.dims[0] // 2, c.dims[0], 3, stride=second, norm_eps=EPS, act=nn.GELU()),
        )
        self.layers = nn.ModuleList(layers)
        self.linear = nn.Linear(dim, c.num_classes) if c.num_classes else nn.Identity()
        self.apply(_init)

    def forward_stages(self, image: Float[Tensor, "b c h w"]) -> list[Float[Tensor, "b ci hi wi"]]:
        x, maps = self.conv(image).permute(0, 2, 3, 1), []
        for layer in self.layers:
            if isinstance(layer, Block):
                x = self.run_block(layer, x)
            else:
                x = x.permute(0, 3, 1, 2)
                maps.append(x)
                x = layer(pad_to(x, 2)).permute(0, 2, 3, 1)
        return [*maps, x.permute(0, 3, 1, 2)]

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Stem first, then every entry of `layers`; coarse: a group per stage, opened by its down-sampling."""
        if not coarse:
            return {"stem": r"^conv\.", "blocks": [(r"^layers\.(\d+)\.", None)]}
        groups, stage = [], 0
        for i, layer in enumerate(self.layers):
            stage += not isinstance(layer, Block)
            groups.append((rf"^layers\.{i}\.", (stage,)))
        return {"stem": r"^conv\.", "blocks": groups}

    def no_weight_decay(self) -> set[str]:
        """The authors': whatever has `norm` or `gamma` in its name; scales and rotations are decayed."""
        return {n for n, _ in self.named_parameters() if "norm" in n or "gamma" in n}

    def mixer_sites(self) -> list[MixerSite]:
        rows, columns = self.config.image_size
        sites = []
        for number, (i, stride) in enumerate(self.places):
            block = self.layers[i]
            assert isinstance(block, Block)
            grid = (max(rows // stride, 1), max(columns // stride, 1))
            place = Place(dim=block.scale_1.shape[1], grid=grid, index=number, depth=len(self.places))
            sites.append(MixerSite(path=f"layers.{i}.smixer", place=place))
        return sites


def _init(module: nn.Module) -> None:
    """3x3 and 1x1 convolutions (linear layers inside blocks) normal of variance 2 / fan out, biases 0."""
    if isinstance(module, (nn.Conv2d, nn.Linear)):
        fan = module.weight.shape[0] * math.prod(module.weight.shape[2:])
        nn.init.normal_(module.weight, 0.0, math.sqrt(2 / (fan // getattr(module, "groups", 1))))
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, SpaRTAN) and isinstance(module.linear, nn.Linear):
        nn.init.trunc_normal_(module.linear.weight, std=0.02)


VARIANTS: dict[str, SpaRTANConfig] = {
    "spartan_nano": SpaRTANConfig(
        depths=(1, 1, 1, 1),
        dims=(32, 64, 64, 160),
        ratios=(4, 4, 2, 2),
        stem_strides=(2, 1),
        drop_path_rate=0.0,
        image_size=(32, 32),
    ),
    "spartan_tiny": SpaRTANConfig(),
}


def build(config: SpaRTANConfig) -> SpaRTAN:
    return SpaRTAN(config)
