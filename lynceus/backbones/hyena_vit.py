"""Hyena ViT: a DeiT without class token whose blocks mix by Hyena N-D, by attention, or by both in turn.

Paper: Zimerman and Wolf, Multi-Dimensional Hyena for Spatial Inductive Bias, AISTATS 2024, arXiv 2309.13600
Code: Itamarzimm/HyenaND, whose state names are kept
Licence: Apache-2.0
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lynceus.backbones._base import Backbone, BackboneConfig
from lynceus.core.errors import unknown
from lynceus.core.types import Stage
from lynceus.layers.attention import AttentionMixer
from lynceus.layers.block import MixerBlock
from lynceus.layers.drop import linear_rates
from lynceus.layers.embed import PatchEmbed
from lynceus.layers.hyena import Decay, Direction, Form, HyenaMixer
from lynceus.layers.mixers import MixerSite, Place
from lynceus.layers.position import resize_position, sincos_table

METHODS = ("hyena", "attention", "hyena2dattn", "attnhyena2d", "onebyone")
EPS = 1e-6


@dataclass(frozen=True, kw_only=True, slots=True)
class HyenaViTConfig(BackboneConfig):
    """image_size: what the position table and the filters are made for (any other size works too). patch_size: side of
    a patch. dim, depth, heads, mlp_ratio, qkv_bias: as in ViT.

    method: "hyena" or "attention" in all blocks; "hyena2dattn": Hyena in blocks 0 to depth // 2, then attention;
    "attnhyena2d": the reverse; "onebyone": Hyena in even blocks, attention in odd ones.
    axes: 2, or 1 to mix the rows laid end to end as one causal sequence (1-D Hyena).
    order, form, width, decay, sqrt_decay, direction: of the Hyena layers; direction="seq" turns in even blocks.
    pool: the classifier reads the mean of the tokens, or the first one (top left), as the authors' does.
    proj_drop: dropout of gates, perceptrons, projections and positions; attn_drop: of attention weights.
    init: "small" is the papers', truncated normals of 0.02; "scratch" learns faster from few small images.
    """

    image_size: tuple[int, int] = (224, 224)
    patch_size: int = 16
    dim: int = 192
    depth: int = 12
    heads: int = 3
    mlp_ratio: float = 4.0
    qkv_bias: bool = True
    method: Literal["hyena", "attention", "hyena2dattn", "attnhyena2d", "onebyone"] = "hyena"
    axes: Literal[1, 2] = 2
    order: int = 2
    form: Form = "joint"
    width: int = 64
    decay: Decay = "standard"
    sqrt_decay: bool = False
    direction: Direction = "seq"
    pool: Literal["avg", "token"] = "avg"
    proj_drop: float = 0.0
    attn_drop: float = 0.0
    init: Literal["small", "scratch"] = "small"

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise unknown("method", self.method, METHODS)

    def hyena(self, index: int) -> bool:
        """Whether block `index` mixes by Hyena."""
        half = self.depth // 2
        first = {"hyena": True, "attention": False, "onebyone": index % 2 == 0, "hyena2dattn": index <= half}
        return first.get(self.method, index > half)

    @property
    def grid(self) -> tuple[int, int]:
        return -(-self.image_size[0] // self.patch_size), -(-self.image_size[1] // self.patch_size)


class HyenaViT(Backbone):
    """Columnar network over patches without a class token; every level has the stride of a patch.

    Maps are those leaving four evenly spaced blocks, before the final norm. Images that are no multiple of the patch
    are zero-padded right and bottom; the position table is resized to the grid, and filters are made for it.
    """

    config: HyenaViTConfig

    def __init__(self, config: HyenaViTConfig):
        c = config
        levels = spread(c.depth)
        super().__init__(c, [Stage(c.dim, c.patch_size, f"blocks.{i}") for i in levels])
        self.levels: tuple[int, ...] = levels
        self.patch_embed = PatchEmbed(c.in_chans, c.dim, c.patch_size)
        self.pos_embed = nn.Parameter(torch.zeros(1, c.grid[0] * c.grid[1], c.dim))
        self.pos_drop = nn.Dropout(c.proj_drop)
        attention = AttentionMixer(qkv_bias=c.qkv_bias, attn_drop=c.attn_drop, proj_drop=c.proj_drop)
        hyena = HyenaMixer(
            axes=c.axes,
            order=c.order,
            form=c.form,
            width=c.width,
            decay=c.decay,
            sqrt_decay=c.sqrt_decay,
            direction=c.direction,
            drop=c.proj_drop,
        )
        self.blocks = nn.Sequential(
            *[
                MixerBlock(
                    c.dim,
                    (hyena if c.hyena(i) else attention).build(self._place(i)),
                    int(c.dim * c.mlp_ratio),
                    eps=EPS,
                    drop=c.proj_drop,
                    drop_path=rate,
                )
                for i, rate in enumerate(linear_rates(c.drop_path_rate, c.depth))
            ]
        )
        self.norm: nn.Module = nn.LayerNorm(c.dim, eps=EPS)
        self.head = nn.Linear(c.dim, c.num_classes) if c.num_classes else nn.Identity()
        self.init_weights()

    def _place(self, index: int) -> Place:
        c = self.config
        return Place(dim=c.dim, heads=c.heads, grid=c.grid, index=index, depth=c.depth)

    def init_weights(self) -> None:
        """As `config.init` says; biases 0, filter networks and classifier always small."""
        scratch = self.config.init == "scratch"
        for name, m in self.named_modules():
            if isinstance(m, nn.Linear):
                if scratch and m is not self.head and "filter_fn" not in name:
                    nn.init.xavier_uniform_(m.weight)
                else:
                    nn.init.trunc_normal_(m.weight, std=0.02)
                if m.bias is not None:
                    nn.init.zeros_(m.bias)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        if scratch:
            with torch.no_grad():
                self.pos_embed.add_(sincos_table(*self.config.grid, self.config.dim))

    def embed(self, image: Float[Tensor, "b c h w"]) -> Float[Tensor, "b H W d"]:
        """The map that enters the first block."""
        x = self.patch_embed(image)
        size = (x.shape[1], x.shape[2])
        return self.pos_drop(x + resize_position(self.pos_embed, self.config.grid, size).view(1, *size, -1))

    # the contract ----------------------------------------------------------------------------------
    def forward_stages(self, image: Float[Tensor, "b c h w"]) -> list[Float[Tensor, "b ci hi wi"]]:
        return self.stages_up_to(image, len(self.levels) - 1)

    def stages_up_to(self, image: Float[Tensor, "b c h w"], last: int) -> list[Float[Tensor, "b ci hi wi"]]:
        x = self.embed(image)
        maps = []
        for i, block in enumerate(self.blocks[: self.levels[last] + 1]):
            x = self.run_block(block, x)
            if i in self.levels:
                maps.append(x.permute(0, 3, 1, 2))
        return maps

    def norm_level(self, x: Float[Tensor, "b c h w"], index: int) -> Float[Tensor, "b c h w"]:
        return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    def pool(self, features: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c"]:
        x: Tensor = features.permute(0, 2, 3, 1)
        if self.config.pool == "token":
            return self.norm(x[:, 0, 0])
        return self.norm(x).mean((1, 2))

    def keep_levels(self, count: int, *, norm: bool) -> None:
        """Cuts the blocks after level `count` - 1."""
        self.levels = self.levels[:count]
        self.blocks = self.blocks[: self.levels[-1] + 1]
        self.stages = self.stages[:count]
        if norm:
            self.norm = nn.Identity()

    def mixer_sites(self) -> list[MixerSite]:
        return [MixerSite(path=f"blocks.{i}.attn", place=self._place(i)) for i in range(len(self.blocks))]

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        return {"stem": r"^pos_embed|^patch_embed", "blocks": [(r"^blocks\.(\d+)", None), (r"^norm\.", (99999,))]}

    def no_weight_decay(self) -> set[str]:
        """Positions, and all that makes a filter."""
        return {n for n, _ in self.named_parameters() if n == "pos_embed" or ".filter_fn." in n}


def spread(depth: int, count: int = 4) -> tuple[int, ...]:
    """`count` evenly spaced block numbers, the last one included."""
    return tuple(sorted({max(0, round(depth * (i + 1) / count) - 1) for i in range(count)}))


_SIZES = {
    "tiny": HyenaViTConfig(),
    "small": HyenaViTConfig(dim=384, heads=6),
    "base": HyenaViTConfig(dim=768, heads=12),
}
VARIANTS: dict[str, HyenaViTConfig] = {
    "hyena_vit_nano": HyenaViTConfig(
        image_size=(32, 32), patch_size=4, dim=96, depth=6, heads=3, width=32, init="scratch"
    ),
}
VARIANTS |= {f"hyena_vit_{size}": config for size, config in _SIZES.items()}
VARIANTS |= {f"hyena_vit_{size}_hybrid": replace(config, method="hyena2dattn") for size, config in _SIZES.items()}


def build(config: HyenaViTConfig) -> HyenaViT:
    return HyenaViT(config)
