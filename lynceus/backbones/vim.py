"""Vim: Vision Mamba, a plain backbone of selective scans in both directions with a class token amid the patches.

Paper: Zhu et al., Vision Mamba: Efficient Visual Representation Learning with Bidirectional State Space Model,
ICML 2024, arXiv 2401.09417
Code: hustvl/Vim, whose state names are kept
Licence: Apache-2.0
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from lynceus.backbones._base import Backbone, BackboneConfig
from lynceus.core.errors import AdviceError
from lynceus.core.shapes import to_map
from lynceus.core.types import Stage
from lynceus.layers.drop import DropPath, linear_rates
from lynceus.layers.embed import PatchEmbed
from lynceus.layers.mamba import Direction, Mamba, StepInit
from lynceus.layers.mixers import MixerSite, Place
from lynceus.layers.position import resize_position
from lynceus.layers.rotary import rotary_tables, rotate_pairs

Where = Literal["middle", "first", "ends", "none"]


@dataclass(frozen=True, kw_only=True, slots=True)
class VimConfig(BackboneConfig):
    """Fields of a Vim.

    image_size: what the position table is made for (any other size works too). patch_size, stride: side and distance
    of the patches. states, conv, expand, rank: of the mixers (rank None: dim / 16, rounded up). steps: how their steps
    start. direction: "none" forward only, "v1" both ways with shared weights, "v2" both ways with own ones. halve: "v2"
    takes the mean of both ways. layer_scale: start of a factor behind each mixer, None for none.
    class_token: before patch M // 2 of M ("middle"), "first", at both "ends" (two tokens, averaged), or "none".
    pool: without class token, the "mean", or the "max" of the logits of all tokens, "last" token, or "all" (logits per
    token). position: a learned table. rms_norm: RMSNorm, else LayerNorm; norm_eps: of it.
    rotary, rotary_residual: the block's input, and the residual beside it, are rotated by place before every block;
    rotary_grid: side of the map that rotations were made for. paired: blocks go in twos, the second on the reversed
    sequence, and are added. flip_ratio: share of batches whose sequence is reversed (in eval mode too).
    levels: blocks whose maps are `stages`; None: four, evenly spaced.
    """

    image_size: tuple[int, int] = (224, 224)
    patch_size: int = 16
    stride: int = 16
    dim: int = 192
    depth: int = 24
    states: int = 16
    conv: int = 4
    expand: float = 2.0
    rank: int | None = None
    direction: Direction = "v2"
    halve: bool = True
    layer_scale: float | None = None
    mixer_bias: bool = False
    conv_bias: bool = True
    steps: StepInit | None = None
    class_token: Where = "middle"
    pool: Literal["mean", "max", "last", "all"] = "mean"
    position: bool = True
    position_drop: float = 0.0
    rms_norm: bool = True
    norm_eps: float = 1e-5
    rotary: bool = False
    rotary_residual: bool = False
    rotary_grid: int = 14
    paired: bool = False
    flip_ratio: float = -1.0
    levels: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.class_token not in ("middle", "first", "ends", "none"):
            raise AdviceError(f"class_token is 'middle', 'first', 'ends' or 'none', not {self.class_token!r}.")
        if self.pool not in ("mean", "max", "last", "all"):
            raise AdviceError(f"pool is 'mean', 'max', 'last' or 'all', not {self.pool!r}.")
        if self.paired and self.depth % 2:
            raise AdviceError(f"paired blocks come in twos; depth {self.depth} is odd, take depth={self.depth + 1}.")

    @property
    def extra(self) -> int:
        """Tokens that are no patches."""
        return {"none": 0, "ends": 2}.get(self.class_token, 1)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches at `image_size`."""
        high, wide = ((max(side, self.patch_size) - self.patch_size) // self.stride + 1 for side in self.image_size)
        return high, wide


class Block(nn.Module):
    """Adds the mixer's last output to the residual stream, and mixes its norm: (hidden, residual) -> the next two."""

    def __init__(self, config: VimConfig, *, drop_path: float):
        super().__init__()
        c = config
        self.mixer = Mamba(
            c.dim,
            states=c.states,
            conv=c.conv,
            expand=c.expand,
            rank=c.rank,
            direction=c.direction,
            halve=c.halve,
            layer_scale=c.layer_scale,
            conv_bias=c.conv_bias,
            bias=c.mixer_bias,
            steps=c.steps,
        )
        self.norm = _norm(c)
        self.drop_path = DropPath(drop_path)

    def forward(
        self, hidden: Float[Tensor, "b n c"], residual: Float[Tensor, "b n c"] | None, size: tuple[int, int]
    ) -> tuple[Float[Tensor, "b n c"], Float[Tensor, "b n c"]]:
        residual = hidden if residual is None else residual + self.drop_path(hidden)
        return self.mixer(self.norm(residual), size), residual


class Vim(Backbone):
    """Vim. Maps are the patches' part of mixer output plus residual after the blocks of `levels`, before the norm."""

    cls_token: nn.Parameter
    cls_token_head: nn.Parameter
    cls_token_tail: nn.Parameter

    def __init__(self, config: VimConfig):
        c = config
        self.levels = tuple(sorted(spread(c.depth, paired=c.paired) if c.levels is None else c.levels))
        if not self.levels or not all(0 <= i < c.depth for i in self.levels):
            raise AdviceError(f"levels {self.levels} must be blocks from 0 to {c.depth - 1}.")
        super().__init__(c, [Stage(c.dim, c.stride, f"layers.{i}") for i in self.levels])
        self.grid = c.grid
        self.patch_embed = PatchEmbed(c.in_chans, c.dim, c.patch_size, stride=c.stride)
        for name in {"middle": ["cls_token"], "first": ["cls_token"], "none": []}.get(
            c.class_token, ["cls_token_head", "cls_token_tail"]
        ):
            self.register_parameter(name, nn.Parameter(torch.zeros(1, 1, c.dim)))
        self.pos_embed = None
        if c.position:
            self.pos_embed = nn.Parameter(torch.zeros(1, self.grid[0] * self.grid[1] + c.extra, c.dim))
        self.pos_drop = nn.Dropout(c.position_drop)
        # the rates are those of the output before: one block later than usual, and once more behind the last
        rates = [0.0, *linear_rates(c.drop_path_rate, c.depth)]
        self.layers = nn.ModuleList([Block(c, drop_path=rate) for rate in rates[: c.depth]])
        self.drop_path = DropPath(c.drop_path_rate)
        self.norm_f = _norm(c)
        self.head = nn.Linear(c.dim, c.num_classes) if c.num_classes else nn.Identity()
        self.init_weights()

    def init_weights(self) -> None:
        """Patches LeCun normal; tables, tokens and classifier truncated normals of 0.02; out_proj / sqrt(depth)."""
        patches = self.patch_embed.proj
        std = patches.weight[0].numel() ** -0.5 / 0.87962566103423978  # of what is then cut at two of it
        nn.init.trunc_normal_(patches.weight, std=std, a=-2 * std, b=2 * std)
        nn.init.zeros_(patches.bias)  # type: ignore[arg-type]
        for name, p in self.named_parameters():
            if name.startswith(("cls_token", "pos_embed")) or name == "head.weight":
                nn.init.trunc_normal_(p, std=0.02)
            elif name.endswith("out_proj.weight"):
                with torch.no_grad():
                    p.div_(len(self.layers) ** 0.5)
            elif name.endswith(("in_proj.bias", "out_proj.bias", "head.bias")):
                nn.init.zeros_(p)

    # tokens ----------------------------------------------------------------------------------------
    def embed(self, image: Float[Tensor, "b c h w"]) -> tuple[Float[Tensor, "b n d"], tuple[int, int]]:
        """The tokens that enter the first block, and the grid of patches."""
        c = self.config
        if not torch.compiler.is_exporting() and tuple(image.shape[-2:]) == tuple(c.image_size):
            # at the size it is made for, the table says that what fills no patch is left out
            used = [c.patch_size + (n - 1) * c.stride for n in self.grid]
            if all(u <= n for u, n in zip(used, c.image_size)):
                image = image[..., : used[0], : used[1]]
        x = self.patch_embed(image)
        size = (x.shape[1], x.shape[2])
        x = self.with_class_token(x.flatten(1, 2))
        if self.pos_embed is not None:
            x = self.pos_drop(x + self.positions(size))
        return x, size

    def with_class_token(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b m d"]:
        where = self.config.class_token
        if where == "none":
            return x
        if where == "ends":
            ends = (t.expand(x.shape[0], -1, -1) for t in (self.cls_token_head, self.cls_token_tail))
            return torch.cat([next(ends), x, next(ends)], 1)
        at = self.place(x.shape[1])
        return torch.cat([x[:, :at], self.cls_token.expand(x.shape[0], -1, -1), x[:, at:]], 1)

    def place(self, patches: int) -> int:
        """Where the class token stands among the patches."""
        return patches // 2 if self.config.class_token == "middle" else 0

    def patches(self, x: Float[Tensor, "b m d"], size: tuple[int, int]) -> Float[Tensor, "b n d"]:
        """The sequence without its class tokens."""
        where, count = self.config.class_token, size[0] * size[1]
        if where == "none":
            return x
        if where == "ends":
            return x[:, 1:-1]
        at = self.place(count)
        return torch.cat([x[:, :at], x[:, at + 1 :]], 1) if at else x[:, 1:]

    def positions(self, size: tuple[int, int]) -> Float[Tensor, "1 m d"]:
        """The table for a grid of patches, with the class tokens' rows in their places."""
        assert self.pos_embed is not None
        if not torch.compiler.is_exporting() and size == self.grid:
            return self.pos_embed
        return self._resized(self.pos_embed, self.grid, size)

    def _resized(
        self, table: Float[Tensor, "1 m d"], old: tuple[int, int], size: tuple[int, int]
    ) -> Float[Tensor, "1 k d"]:
        grid = resize_position(self.patches(table, old), old, size, antialias=False)
        where = self.config.class_token
        if where == "none":
            return grid
        if where == "ends":
            return torch.cat([table[:, :1], grid, table[:, -1:]], 1)
        at, here = self.place(old[0] * old[1]), self.place(size[0] * size[1])
        return torch.cat([grid[:, :here], table[:, at : at + 1], grid[:, here:]], 1)

    def resize_own_table(self, value: Tensor, name: str) -> tuple[Tensor, str] | None:
        """A checkpoint's square position table for this model's grid, class tokens kept where they stand."""
        if name != "pos_embed" or value.ndim != 3:
            return None
        side = math.isqrt(max(value.shape[1] - self.config.extra, 0))
        if side == 0 or side * side + self.config.extra != value.shape[1]:
            return None
        done = f"resize_positions {side}x{side} -> {self.grid[0]}x{self.grid[1]} (bicubic, class token kept)"
        return self._resized(value, (side, side), self.grid), done

    def run(
        self, image: Float[Tensor, "b c h w"], wanted: Sequence[int] = (), *, stop: bool = False
    ) -> tuple[Tensor, Tensor, list[Tensor], tuple[int, int]]:
        """(hidden, residual) after the last block run, their sums after the `wanted` blocks in that order, the grid.

        stop: nothing behind the last wanted block is computed.
        """
        x, size = self.embed(image)
        c = self.config
        flip = c.flip_ratio > 0 and bool(torch.rand(()) < c.flip_ratio)
        hidden: Tensor = x.flip(1) if flip else x
        residual: Tensor | None = None
        kept: dict[int, Tensor] = {}
        last = max(wanted) if stop and wanted else len(self.layers) - 1
        tables = rotary_tables(size, c.dim, made_for=c.rotary_grid, like=x) if c.rotary else None
        for i, block in enumerate(self.layers):
            if i > last:
                break
            if c.paired and i % 2:
                continue
            if tables is not None:
                hidden = self.rotate(hidden, tables, flip=flip)
                if residual is not None and c.rotary_residual:
                    residual = self.rotate(residual, tables, flip=flip)
            if c.paired:
                back = None if residual is None else residual.flip(1)
                ahead = self.run_block(block, hidden, residual, size)
                behind = self.run_block(self.layers[i + 1], hidden.flip(1), back, size)
                hidden, residual = (a + b.flip(1) for a, b in zip(ahead, behind))
                i += 1
            else:
                hidden, residual = self.run_block(block, hidden, residual, size)
            if i in wanted:
                kept[i] = hidden + residual
        assert residual is not None
        return hidden, residual, [kept[i] for i in wanted], size

    def rotate(self, x: Tensor, tables: tuple[Tensor, Tensor], *, flip: bool) -> Tensor:
        """By place, but for the first token where there is one class token, wherever that stands (as the authors)."""
        x = x.flip(1) if flip and not self.config.paired else x
        if self.config.extra == 1:
            x = torch.cat([x[:, :1], rotate_pairs(x[:, 1:], tables)], 1)
        elif self.config.extra == 0:
            x = rotate_pairs(x, tables)
        else:
            raise AdviceError("Rotations are defined for one class token or none; class_token='ends' has two.")
        return x.flip(1) if flip and not self.config.paired else x

    # the contract ----------------------------------------------------------------------------------
    def forward_stages(self, image: Float[Tensor, "b c h w"]) -> list[Float[Tensor, "b ci hi wi"]]:
        _, _, found, size = self.run(image, self.levels, stop=True)
        return [to_map(self.patches(x, size), *size) for x in found]

    def forward_features(self, image: Float[Tensor, "b c h w"]) -> Float[Tensor, "b n d"]:
        """All tokens after the final norm, class tokens in their places."""
        hidden, residual, _, _ = self.run(image)
        return self.norm_f(residual + self.drop_path(hidden))

    def features_and_stages(self, image: Float[Tensor, "b c h w"]) -> tuple[Tensor, list[Tensor]]:
        hidden, residual, found, size = self.run(image, self.levels)
        maps = [to_map(self.patches(x, size), *size) for x in found]
        return self.norm_f(residual + self.drop_path(hidden)), maps

    def norm_level(self, x: Float[Tensor, "b c h w"], index: int) -> Float[Tensor, "b c h w"]:
        return self.norm_f(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    def pool(self, features: Float[Tensor, "b n d"]) -> Float[Tensor, "b d"]:
        """The class token or tokens; without them as `pool` says ("max", "all": the largest of every channel)."""
        where, how = self.config.class_token, self.config.pool
        if where == "ends":
            return (features[:, 0] + features[:, -1]) / 2
        if where != "none":
            return features[:, self.place(features.shape[1] - 1)]
        if how == "last":
            return features[:, -1]
        return features.mean(1) if how == "mean" else features.amax(1)

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits (b, classes); (b, n, classes) for pool "all"."""
        c = self.config
        if pre_logits or c.class_token != "none" or c.pool not in ("max", "all"):
            return super().forward_head(features, pre_logits)
        if c.drop_rate:
            features = F.dropout(features, c.drop_rate, self.training)
        logits: Tensor = self.head(features)
        return logits.amax(1) if c.pool == "max" else logits

    def keep_levels(self, count: int, *, norm: bool) -> None:
        """Cuts the blocks after level `count` - 1."""
        self.levels = self.levels[:count]
        self.layers = self.layers[: self.levels[-1] + 1]
        self.stages = self.stages[:count]
        self.config = replace(self.config, depth=len(self.layers), levels=self.levels)
        if norm:
            self.norm_f = nn.Identity()

    def mixer_sites(self) -> list[MixerSite]:
        c, depth = self.config, len(self.layers)
        if c.class_token == "ends":
            return []
        where: Literal["prefix", "middle"] = "middle" if c.class_token == "middle" else "prefix"
        return [
            MixerSite(
                path=f"layers.{i}.mixer",
                place=Place(dim=c.dim, grid=self.grid, index=i, depth=depth),
                call="tokens",
                extra=c.extra,
                where=where,
            )
            for i in range(depth)
        ]

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        return {
            "stem": r"^cls_token|^pos_embed|^patch_embed",
            "blocks": [(r"^layers\.(\d+)", None), (r"^norm_f\.", (99999,))],
        }

    def no_weight_decay(self) -> set[str]:
        kept = (".A_log", ".A_b_log", ".D", ".D_b", "cls_token", "cls_token_head", "cls_token_tail", "pos_embed")
        return {
            name for name, _ in self.named_parameters() if f".{name}".endswith(tuple(f".{k.strip('.')}" for k in kept))
        }


def _norm(config: VimConfig) -> nn.Module:
    return (nn.RMSNorm if config.rms_norm else nn.LayerNorm)(config.dim, eps=config.norm_eps)


def spread(depth: int, count: int = 4, *, paired: bool = False) -> tuple[int, ...]:
    """`count` evenly spaced block numbers, the last one included; paired: the second of each pair."""
    numbers = {max(0, round(depth * (i + 1) / count) - 1) for i in range(count)}
    return tuple(sorted({i | 1 for i in numbers} if paired else numbers))


def _variants() -> dict[str, VimConfig]:
    table = {
        "vim_nano": VimConfig(
            image_size=(32, 32),
            patch_size=4,
            stride=4,
            dim=128,
            depth=4,
            states=8,
            class_token="none",
            pool="mean",
        )
    }
    long = "bimambav2_final_pool_mean_abs_pos_embed_with_midclstok_div2"
    for size, dim in {"tiny": 192, "small": 384, "base": 768}.items():
        table[f"vim_{size}"] = VimConfig(dim=dim)
        table[f"vim_{size}_stride8"] = VimConfig(dim=dim, stride=8)
        table[f"vim_{size}_patch16_224_{long}"] = table[f"vim_{size}"]
        table[f"vim_{size}_patch16_stride8_224_{long}"] = table[f"vim_{size}_stride8"]
    base = "vim_base_patch16_224_bimambav2_final_pool_mean_abs_pos_embed_with_middle_cls_token_div2"
    table[base] = table["vim_base"]
    return table


VARIANTS: dict[str, VimConfig] = _variants()


def build(config: VimConfig) -> Vim:
    return Vim(config)
