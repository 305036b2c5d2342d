"""HorNet: a pyramid whose mixer multiplies the input with itself, recursively (gated convolution g^nConv).

Paper: Rao et al., HorNet: Efficient High-Order Spatial Interactions with Recursive Gated Convolutions, NeurIPS 2022,
    arXiv 2207.14284
Code: raoyongming/HorNet
Licence: MIT

Stem, down-sampling, perceptrons and classifier are ConvNeXt's. The gates go through a depthwise 7x7 or, in the late
stages of the GF models, through a filter as large as the map (`lynceus.layers.global_filter`). Training needs clipped
gradients: a norm of 1 for GF, 5 to 100 for 7x7.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lynceus.backbones._base import Backbone, BackboneConfig
from lynceus.backbones.convnext import downsampling, init_weights, map_sites
from lynceus.core.errors import AdviceError
from lynceus.core.shapes import pad_to
from lynceus.core.types import Stage
from lynceus.layers.drop import DropPath, linear_rates
from lynceus.layers.fused import fusable, hooked
from lynceus.layers.gated_conv import GatedConv
from lynceus.layers.mixers import MixerSite
from lynceus.layers.mlp import Mlp
from lynceus.layers.norm import LayerNorm2d

EPS = 1e-6
Table = tuple[int, int] | None


@dataclass(frozen=True, kw_only=True, slots=True)
class HorNetConfig(BackboneConfig):
    """Fields of a HorNet.

    depths, dims: blocks and channels of each stage. orders: of the gated convolution in each stage; 2^(order - 1)
    divides the channels. tables: per stage, None for a depthwise filter of `kernel_size`, or rows and columns of the
    global filter's half spectrum (14, 8 for a map of 14x14); maps of other sizes resize it. scale: of the gates.
    patch_size: stride of the stem; every later stage halves the map. layer_scale: initial value of gamma1 and gamma2,
    0 for none. dense: every map given leaves through a LayerNorm of its own, and there is no classifier;
    out_indices: the levels given (None: all). uniform_init: Xavier uniform instead of truncated normal .02.
    head_init_scale: factor on the fresh classifier. image_size: what the variant was made for.
    """

    depths: tuple[int, ...] = (2, 3, 18, 2)
    dims: tuple[int, ...] = (64, 128, 256, 512)
    orders: tuple[int, ...] = (2, 3, 4, 5)
    tables: tuple[Table, ...] = (None, None, None, None)
    kernel_size: int = 7
    scale: float = 1 / 3
    patch_size: int = 4
    layer_scale: float = 1e-6
    dense: bool = False
    out_indices: tuple[int, ...] | None = None
    uniform_init: bool = False
    head_init_scale: float = 1.0
    image_size: tuple[int, int] = (224, 224)

    def __post_init__(self) -> None:
        counts = {n: len(getattr(self, n)) for n in ("depths", "dims", "orders", "tables")}
        if len(set(counts.values())) != 1:
            told = ", ".join(f"{n} has {c}" for n, c in counts.items())
            raise AdviceError(f"depths, dims, orders and tables hold one entry per stage: {told}.")
        if self.out_indices is not None and not self.dense:
            raise AdviceError("out_indices belongs to the dense form: dense=True.")
        if self.out_indices is not None and not set(self.out_indices) <= set(range(len(self.depths))):
            raise AdviceError(f"out_indices {self.out_indices} must lie in 0 .. {len(self.depths) - 1}.")

    @property
    def levels(self) -> tuple[int, ...]:
        """Stages whose maps are given."""
        return tuple(range(len(self.depths))) if self.out_indices is None else tuple(sorted(self.out_indices))


class Block(nn.Module):
    """Gated convolution and perceptron, each behind a LayerNorm and beside a shortcut, on a map b h w c."""

    def __init__(self, config: HorNetConfig, stage: int, *, drop_path: float):
        super().__init__()
        dim, value = config.dims[stage], config.layer_scale
        self.norm1 = nn.LayerNorm(dim, eps=EPS)
        self.gnconv: nn.Module = GatedConv(
            dim,
            order=config.orders[stage],
            kernel=config.kernel_size,
            table=config.tables[stage],
            scale=config.scale,
        )
        self.norm2 = nn.LayerNorm(dim, eps=EPS)
        self.mlp = Mlp(dim, 4 * dim)
        self.gamma1 = nn.Parameter(value * torch.ones(dim)) if value > 0 else None
        self.gamma2 = nn.Parameter(value * torch.ones(dim)) if value > 0 else None
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Float[Tensor, "b h w c"]) -> Float[Tensor, "b h w c"]:
        x = self._add(x, self.gnconv(self.norm1(x)), self.gamma1, own=type(self.gnconv) is GatedConv)
        if self.gamma2 is None and not self.drop_path.active:
            return self.mlp(self.norm2(x), residual=x)
        return self._add(x, self.mlp(self.norm2(x)), self.gamma2, own=True)

    def _add(self, x: Tensor, y: Tensor, gamma: Tensor | None, *, own: bool) -> Tensor:
        """x + gamma * y, with stochastic depth; own: nobody else holds `y`, so inference may write over it."""
        if self.drop_path.active or gamma is None:
            return x + self.drop_path(y if gamma is None else y * gamma)
        if own and fusable(x) and y.is_contiguous() and not hooked(self.gnconv, self.mlp):
            return torch.addcmul(x, y, gamma, out=y)
        return torch.addcmul(x, y, gamma)


class HorNet(Backbone):
    """HorNet in its classification and dense forms.

    Maps are those leaving each stage, un-normed in the classification form, after `norms` in the dense one; sizes are
    floored, and a map too small for the next convolution is zero-padded to it. The classifier reads LayerNorm of the
    global mean.
    """

    def __init__(self, config: HorNetConfig):
        c = config
        super().__init__(c, [Stage(c.dims[i], c.patch_size * 2**i, f"layers.{i}") for i in c.levels])
        self.downsample = downsampling(c.in_chans, c.dims, c.patch_size)
        rates = iter(linear_rates(c.drop_path_rate, sum(c.depths)))
        self.layers = nn.ModuleList(
            nn.ModuleList(Block(c, i, drop_path=next(rates)) for _ in range(depth)) for i, depth in enumerate(c.depths)
        )
        self.norms = nn.ModuleList(LayerNorm2d(dim, eps=EPS) for dim in c.dims) if c.dense else None
        self.norm = nn.Identity() if c.dense else nn.LayerNorm(c.dims[-1], eps=EPS)
        self.num_classes = 0 if c.dense else c.num_classes
        head = nn.Linear(c.dims[-1], self.num_classes) if self.num_classes > 0 else nn.Identity()
        self.head = head
        self.apply(_xavier if c.uniform_init else init_weights)
        if isinstance(head, nn.Linear):
            head.weight.data.mul_(c.head_init_scale)
            head.bias.data.mul_(c.head_init_scale)

    def forward_stages(self, image: Float[Tensor, "b c h w"]) -> list[Float[Tensor, "b ci hi wi"]]:
        x, maps = image, []
        for i, (down, blocks) in enumerate(zip(self.downsample, cast(Iterable[nn.ModuleList], self.layers))):
            x = down(pad_to(x, 2 if i else self.config.patch_size)).permute(0, 2, 3, 1)
            for block in blocks:
                x = self.run_block(block, x)
            x = x.permute(0, 3, 1, 2)
            if i in self.config.levels:
                maps.append(x if self.norms is None else self.norms[i](x))
        return maps

    def pool(self, features: Tensor) -> Float[Tensor, "b c"]:
        vector: Tensor = self.norm(features.mean((-2, -1)))
        return vector

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Stem first, then block by block; down-sampling belongs to the first block after it."""
        later = range(1, len(self.config.depths))
        down = [(rf"^downsample\.{i}\.", (i,) if coarse else (i, 0)) for i in later]
        blocks = (r"^layers\.(\d+)\.", None) if coarse else (r"^layers\.(\d+)\.(\d+)\.", None)
        return {"stem": r"^downsample\.0\.", "blocks": [*down, blocks, (r"^norms?\.", (99999,))]}

    def mixer_sites(self) -> list[MixerSite]:
        c = self.config
        rows, columns = (n // c.patch_size for n in c.image_size)
        return map_sites("gnconv", c.depths, c.dims, (rows, columns))


def _xavier(module: nn.Module) -> None:
    if isinstance(module, (nn.Conv2d, nn.Linear)):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def _variant(
    width: int, drop_path: float, *, size: int = 224, tables: tuple[Table, Table] = (None, None)
) -> HorNetConfig:
    return HorNetConfig(
        dims=tuple(width * 2**i for i in range(4)),
        tables=(None, None, *tables),
        image_size=(size, size),
        drop_path_rate=drop_path,
    )


GF224: tuple[Table, Table] = ((14, 8), (7, 4))
GF384: tuple[Table, Table] = ((24, 13), (12, 7))
VARIANTS: dict[str, HorNetConfig] = {
    "hornet_nano": HorNetConfig(
        depths=(1, 1, 3, 1),
        dims=(32, 64, 128, 160),
        orders=(2, 3, 4, 5),
        patch_size=2,
        layer_scale=1.0,
        image_size=(32, 32),
    ),
    "hornet_tiny_7x7": _variant(64, 0.2),
    "hornet_tiny_gf": _variant(64, 0.2, tables=GF224),
    "hornet_small_7x7": _variant(96, 0.4),
    "hornet_small_gf": _variant(96, 0.4, tables=GF224),
    "hornet_base_7x7": _variant(128, 0.5),
    "hornet_base_gf": _variant(128, 0.5, tables=GF224),
    "hornet_base_gf_img384": _variant(128, 0.5, size=384, tables=GF384),
    "hornet_large_7x7": _variant(192, 0.2),
    "hornet_large_gf": _variant(192, 0.2, tables=GF224),
    "hornet_large_gf_img384": _variant(192, 0.2, size=384, tables=GF384),
}
VARIANTS["hornet_nano_gf"] = replace(VARIANTS["hornet_nano"], tables=(None, None, (4, 3), (2, 2)))


def build(config: HorNetConfig) -> HorNet:
    return HorNet(config)
