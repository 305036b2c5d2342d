"""ConViT: a ViT whose first blocks start as convolutions and may learn to look further.

Paper: d'Ascoli et al., ConViT: Improving Vision Transformers with Soft Convolutional Inductive Biases, ICML 2021,
arXiv 2103.10697
Code: facebookresearch/convit
Licence: Apache-2.0 (its file headers speak of CC BY-NC)

The first `local_layers` blocks mix the map of patches by gated positional attention; then the class token joins, and
plain attention follows. Maps may be of any size and shape.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lynceus.backbones._base import Backbone, BackboneConfig
from lynceus.backbones._init import init_linears
from lynceus.backbones.vit import spread
from lynceus.core.errors import AdviceError
from lynceus.core.shapes import to_map
from lynceus.core.types import Stage
from lynceus.layers.attention import Attention
from lynceus.layers.block import MixerBlock
from lynceus.layers.drop import linear_rates
from lynceus.layers.embed import PatchEmbed
from lynceus.layers.gated_position import GatedPositionAttention
from lynceus.layers.mixers import MixerSite, Place
from lynceus.layers.position import resize_position, sincos_table


@dataclass(frozen=True, kw_only=True, slots=True)
class ConViTConfig(BackboneConfig):
    """Fields of a ConViT.

    image_size: what the position table is made for; any other size works too. patch_size: side of a patch. dim, depth,
    heads: width, blocks, heads. local_layers: blocks of gated positional attention, before the class token joins.
    locality: strength of their local start. qkv_bias, qk_scale: as in the attention (None: head width ** -0.5).
    position: a learned table on the patches. pool: what the classifier reads, the class token or the mean of the
    patches. With no plain block left (local_layers >= depth) the class token never joins, and "token" reads the first
    patch, as the authors' code does; "avg" is the better choice there. proj_drop: dropout of the patches, in
    perceptrons and projections; attn_drop: on attention weights. init: "small" is the paper's, truncated normals of
    0.02; "scratch" learns faster from few small images: Xavier, and positions that start as sines and cosines; both
    leave the local start as it is. levels: blocks whose maps are `stages`; None: four, evenly spaced.
    """

    image_size: tuple[int, int] = (224, 224)
    patch_size: int = 16
    dim: int = 192
    depth: int = 12
    heads: int = 4
    local_layers: int = 10
    locality: float = 1.0
    mlp_ratio: float = 4.0
    qkv_bias: bool = False
    qk_scale: float | None = None
    position: bool = True
    pool: Literal["token", "avg"] = "token"
    norm_eps: float = 1e-6
    proj_drop: float = 0.0
    attn_drop: float = 0.0
    init: Literal["small", "scratch"] = "small"
    levels: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.pool not in ("token", "avg"):
            raise AdviceError(f"pool is 'token' or 'avg', not {self.pool!r}.")
        if self.init not in ("small", "scratch"):
            raise AdviceError(f"init is 'small' or 'scratch', not {self.init!r}.")
        if self.local_layers < 0:
            raise AdviceError(f"local_layers cannot be below 0; it is {self.local_layers}. 0 leaves a plain ViT.")


class ConViT(Backbone):
    """Columnar transformer over patches; every level has the stride of a patch.

    Images that are no multiple of the patch are zero-padded right and bottom, and the position table is resized to the
    grid; relative positions need no table.
    """

    config: ConViTConfig

    def __init__(self, config: ConViTConfig):
        c = config
        levels = c.levels if c.levels is not None else spread(c.depth)
        if not levels or list(levels) != sorted(set(levels)) or levels[0] < 0 or levels[-1] >= c.depth:
            raise AdviceError(f"levels are increasing block numbers from 0 to {c.depth - 1}, not {levels}.")
        super().__init__(c, [Stage(c.dim, c.patch_size, f"blocks.{i}") for i in levels])
        self.levels: tuple[int, ...] = tuple(levels)
        self.patch_embed = PatchEmbed(c.in_chans, c.dim, c.patch_size)
        self.grid = self.patch_embed.grid(*c.image_size)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, c.dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, self.grid[0] * self.grid[1], c.dim)) if c.position else None
        self.pos_drop = nn.Dropout(c.proj_drop)
        self.blocks = nn.ModuleList(
            MixerBlock(
                c.dim, self._mixer(i), int(c.dim * c.mlp_ratio), eps=c.norm_eps, drop=c.proj_drop, drop_path=rate
            )
            for i, rate in enumerate(linear_rates(c.drop_path_rate, c.depth))
        )
        self.norm = nn.LayerNorm(c.dim, eps=c.norm_eps)
        self.head = nn.Linear(c.dim, c.num_classes) if c.num_classes else nn.Identity()
        self.init_weights()

    def _mixer(self, index: int) -> nn.Module:
        c = self.config
        if index < c.local_layers:
            return GatedPositionAttention(
                c.dim,
                c.heads,
                qkv_bias=c.qkv_bias,
                scale=c.qk_scale,
                locality=c.locality,
                attn_drop=c.attn_drop,
                proj_drop=c.proj_drop,
            )
        return Attention(
            c.dim, c.heads, qkv_bias=c.qkv_bias, scale=c.qk_scale, attn_drop=c.attn_drop, proj_drop=c.proj_drop
        )

    def init_weights(self) -> None:
        """As `config.init` says, zero biases; the local start comes last, so that nothing overwrites it."""
        scratch = self.config.init == "scratch"
        small = {self.head, *(m.pos_proj for m in self.modules() if isinstance(m, GatedPositionAttention))}
        init_linears(self, scratch=scratch, small=small)
        for table in (self.pos_embed, self.cls_token):
            if table is not None:
                nn.init.trunc_normal_(table, std=0.02)
        if scratch and self.pos_embed is not None:
            with torch.no_grad():
                self.pos_embed.add_(sincos_table(*self.grid, self.config.dim))
        for m in self.modules():
            if isinstance(m, GatedPositionAttention):
                m.local_init()

    # tokens ----------------------------------------------------------------------------------------
    def embed(self, image: Float[Tensor, "b c h w"]) -> Float[Tensor, "b H W d"]:
        """The map of patches that enters the first block."""
        x = self.patch_embed(image)
        if self.pos_embed is not None:
            size = (x.shape[1], x.shape[2])
            x = x + resize_position(self.pos_embed, self.grid, size).view(1, *size, x.shape[3])
        return self.pos_drop(x)

    def run(self, image: Tensor, wanted: Sequence[int], *, stop: bool = False) -> tuple[Tensor, list[Tensor]]:
        """What leaves the last block run, and the `wanted` ones, in that order: maps b h w d before the class token
        joins, tokens b 1+n d from there on."""
        x = self.embed(image)
        size = (x.shape[1], x.shape[2])
        kept: dict[int, Tensor] = {}
        last = max(wanted) if stop and wanted else len(self.blocks) - 1
        for i, block in enumerate(self.blocks):
            if i > last:
                break
            if i == self.config.local_layers:
                x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x.flatten(1, 2)], 1)
            x = self.run_block(block, x) if x.ndim == 4 else self.run_block(block, x, size)
            if i in wanted:
                kept[i] = x
        return x, [kept[i] for i in wanted]

    def _as_map(self, x: Tensor, image: Tensor) -> Float[Tensor, "b d h w"]:
        if x.ndim == 4:
            return x.permute(0, 3, 1, 2)
        return to_map(x[:, 1:], *self.patch_embed.grid(image.shape[-2], image.shape[-1]))

    def _finish(self, x: Tensor) -> Float[Tensor, "b n d"]:
        return self.norm(x.flatten(1, 2) if x.ndim == 4 else x)

    # the contract ----------------------------------------------------------------------------------
    def forward_stages(self, image: Float[Tensor, "b c h w"]) -> list[Float[Tensor, "b ci hi wi"]]:
        return [self._as_map(x, image) for x in self.run(image, self.levels, stop=True)[1]]

    def stages_up_to(self, image: Float[Tensor, "b c h w"], last: int) -> list[Float[Tensor, "b ci hi wi"]]:
        return [self._as_map(x, image) for x in self.run(image, self.levels[: last + 1], stop=True)[1]]

    def forward_features(self, image: Float[Tensor, "b c h w"]) -> Float[Tensor, "b n d"]:
        """All tokens after the final norm: class token (if a plain block let it join), then patches row by row."""
        return self._finish(self.run(image, ())[0])

    def features_and_stages(self, image: Float[Tensor, "b c h w"]) -> tuple[Tensor, list[Tensor]]:
        x, found = self.run(image, self.levels)
        return self._finish(x), [self._as_map(t, image) for t in found]

    def norm_level(self, x: Float[Tensor, "b c h w"], index: int) -> Float[Tensor, "b c h w"]:
        return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    def pool(self, features: Float[Tensor, "b n d"]) -> Float[Tensor, "b d"]:
        if self.config.pool == "token":
            return features[:, 0]
        return features[:, int(self.config.local_layers < len(self.blocks)) :].mean(1)

    def keep_levels(self, count: int, *, norm: bool) -> None:
        """Cuts the blocks after level `count` - 1."""
        self.levels = self.levels[:count]
        self.blocks = self.blocks[: self.levels[-1] + 1]
        self.stages = self.stages[:count]
        self.config = replace(self.config, depth=len(self.blocks), levels=self.levels)
        if norm:
            self.norm = nn.Identity()  # type: ignore[assignment]

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        return {
            "stem": r"^cls_token|^pos_embed|^patch_embed",
            "blocks": [(r"^blocks\.(\d+)", None), (r"^norm\.", (99999,))],
        }

    def no_weight_decay(self) -> set[str]:
        return {"pos_embed", "cls_token"}

    def mixer_sites(self) -> list[MixerSite]:
        c, depth = self.config, len(self.blocks)
        sites = []
        for i in range(depth):
            path, place = f"blocks.{i}.attn", Place(dim=c.dim, heads=c.heads, grid=self.grid, index=i, depth=depth)
            if i < c.local_layers:
                sites.append(MixerSite(path=path, place=place))
            else:
                sites.append(MixerSite(path=path, place=place, call="tokens", extra=1))
        return sites


VARIANTS: dict[str, ConViTConfig] = {
    # for images of 28 to 64 pixels, from scratch
    "convit_nano": ConViTConfig(
        image_size=(32, 32), patch_size=4, dim=96, depth=6, heads=4, local_layers=4, pool="avg", init="scratch"
    ),
    **{
        f"convit_{size}": ConViTConfig(dim=48 * heads, heads=heads, drop_path_rate=0.1)
        for size, heads in {"tiny": 4, "small": 9, "base": 16}.items()
    },
}


def build(config: ConViTConfig) -> ConViT:
    return ConViT(config)
