"""VOLO: outlook attention on fine tokens, self-attention on coarse ones, class attention at the end.

Paper: Yuan et al., VOLO: Vision Outlooker for Visual Recognition, TPAMI 2022, arXiv 2106.13112
Code: sail-sg/volo
Licence: Apache-2.0

Every token has a classifier of its own beside that of the class token; in use their largest votes count half. Training
by token labels is in `lynceus.recipes.token_label`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lynceus.backbones._base import Backbone, BackboneConfig
from lynceus.core.errors import AdviceError
from lynceus.core.shapes import pad_to
from lynceus.core.types import Stage
from lynceus.layers.attention import Attention
from lynceus.layers.block import MixerBlock
from lynceus.layers.class_attention import ClassBlock
from lynceus.layers.drop import linear_rates
from lynceus.layers.folded import Folds, conv_bn
from lynceus.layers.mixers import MixerSite, Place
from lynceus.layers.outlook import OutlookAttention
from lynceus.layers.position import resize_position
from lynceus.layers.token_mix import Box, swap_box

EPS = 1e-5


@dataclass(frozen=True, kw_only=True, slots=True)
class VOLOConfig(BackboneConfig):
    """Fields of a VOLO; tuples hold one entry per group of blocks.

    image_size: what the position table is made for; any other size works too. patch_size: pixels per fine token, 4, 8
    or 16. stem_width: channels of the three convolutions before. layers, embed_dims, num_heads, mlp_ratios: blocks,
    widths, heads, perceptrons. outlook: which groups use outlook attention, downsamples: which are followed by a 2 x 2
    convolution of stride 2. kernel, stride, padding: windows of outlook attention. qkv_bias, qk_scale: as in every
    attention (None: head width ** -0.5). class_layers: blocks of class attention at the end; 0: no class token, and
    pool="token" then reads the first patch, as the authors' code does. pool: what the classifier reads, the class token
    or the mean of all tokens. dense: a classifier for every patch too. pos_drop, attn_drop: dropout after the position
    table, on attention weights. outlook_drop_path: stochastic depth in outlook blocks too, which the authors' code
    leaves out.
    """

    image_size: tuple[int, int] = (224, 224)
    patch_size: int = 8
    stem_width: int = 64
    layers: tuple[int, ...] = (4, 4, 8, 2)
    embed_dims: tuple[int, ...] = (192, 384, 384, 384)
    num_heads: tuple[int, ...] = (6, 12, 12, 12)
    mlp_ratios: tuple[float, ...] = (3.0, 3.0, 3.0, 3.0)
    outlook: tuple[bool, ...] = (True, False, False, False)
    downsamples: tuple[bool, ...] = (True, False, False, False)
    kernel: int = 3
    stride: int = 2
    padding: int = 1
    qkv_bias: bool = False
    qk_scale: float | None = None
    class_layers: int = 2
    pool: Literal["token", "avg"] = "token"
    dense: bool = True
    token_step: int = 2
    norm_eps: float = EPS
    pos_drop: float = 0.0
    attn_drop: float = 0.0
    outlook_drop_path: bool = False

    def __post_init__(self) -> None:
        counts = {
            name: len(getattr(self, name))
            for name in ("layers", "embed_dims", "num_heads", "mlp_ratios", "outlook", "downsamples")
        }
        if len(set(counts.values())) > 1:
            said = ", ".join(f"{name} {count}" for name, count in counts.items())
            raise AdviceError(f"These describe different numbers of groups ({said}); give one entry of each per group.")
        if self.patch_size not in (4, 8, 16):
            raise AdviceError(f"patch_size is 4, 8 or 16, not {self.patch_size}.")
        if self.dense and self.pool == "avg":
            raise AdviceError("pool='avg' has no classifier per patch beside it; add dense=False.")
        if self.downsamples[-1]:
            raise AdviceError("Nothing follows the last group, so it cannot be downsampled: downsamples[-1]=False.")

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the position table."""
        step = self.patch_size * self.token_step
        return max(self.image_size[0] // step, 1), max(self.image_size[1] // step, 1)

    def steps(self) -> list[int]:
        """Stride of every group."""
        return [self.patch_size * 2 ** sum(self.downsamples[:i]) for i in range(len(self.layers))]


class ConvStem(nn.Module):
    """Three convolutions at half resolution, then patches of `patch_size` pixels; gives a map b h w c."""

    def __init__(self, config: VOLOConfig):
        super().__init__()
        width, side = config.stem_width, config.patch_size // 2
        self.conv = nn.Sequential(
            nn.Conv2d(config.in_chans, width, 7, 2, 3, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True),
            nn.Conv2d(width, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True),
            nn.Conv2d(width, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True),
        )  # fmt: skip
        self.proj = nn.Conv2d(width, config.embed_dims[0], side, side)
        self.folds = Folds()

    def train(self, mode: bool = True) -> ConvStem:
        self.folds.forget()
        return super().train(mode)

    def forward(self, image: Float[Tensor, "b c h w"]) -> Float[Tensor, "b H W d"]:
        x = image
        if not torch.compiler.is_compiling():  # convolutions like this order, and tokens come out in theirs
            x = x.contiguous(memory_format=torch.channels_last)
        for i in (0, 3, 6):
            conv, bn, relu = self.conv[i : i + 3]
            x = conv_bn(x, conv, bn, folds=self.folds, name=str(i), relu=relu)
        return self.proj(x).permute(0, 2, 3, 1)


class Downsample(nn.Module):
    """2 x 2 cells become one; an odd last row or column is left out."""

    def __init__(self, dim: int, out: int):
        super().__init__()
        self.proj = nn.Conv2d(dim, out, 2, 2)

    def forward(self, x: Float[Tensor, "b h w c"]) -> Float[Tensor, "b h//2 w//2 d"]:
        return self.proj(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class VOLO(Backbone):
    """Two-resolution transformer; levels are the groups of blocks, of strides 8, 16, 16, 16.

    Sizes are rounded as by the authors' convolutions: the stem's half resolution up, patches and downsampling down.
    Images smaller than the coarsest stride are zero-padded to it. The position table is resized to the grid.
    """

    config: VOLOConfig
    more_heads = ("aux_head",)

    def __init__(self, config: VOLOConfig):
        c = config
        self.ends: list[int] = []  # place in `network` of every group
        for i in range(len(c.layers)):
            self.ends.append(i + sum(c.downsamples[:i]))
        super().__init__(c, [Stage(d, s, f"network.{e}") for d, s, e in zip(c.embed_dims, c.steps(), self.ends)])
        self.patch_embed = ConvStem(c)
        self.pos_embed = nn.Parameter(torch.zeros(1, *c.grid, c.embed_dims[-1]))
        self.pos_drop = nn.Dropout(c.pos_drop)
        rates = iter(linear_rates(c.drop_path_rate, sum(c.layers)))
        network: list[nn.Module] = []
        for i, count in enumerate(c.layers):
            network.append(nn.Sequential(*[_block(c, i, next(rates)) for _ in range(count)]))
            if c.downsamples[i]:
                network.append(Downsample(c.embed_dims[i], c.embed_dims[i + 1]))
        self.network = nn.ModuleList(network)
        dim = c.embed_dims[-1]
        self.post_network = nn.ModuleList(
            ClassBlock(
                dim,
                c.num_heads[-1],
                int(dim * c.mlp_ratios[-1]),
                eps=c.norm_eps,
                qkv_bias=c.qkv_bias,
                scale=c.qk_scale,
                attn_drop=c.attn_drop,
            )
            for _ in range(c.class_layers)
        )
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim)) if c.class_layers else None
        self.norm = nn.LayerNorm(dim, eps=c.norm_eps)
        self.aux_head: nn.Module = nn.Linear(dim, c.num_classes) if c.dense and c.num_classes else nn.Identity()
        self.head: nn.Module = nn.Linear(dim, c.num_classes) if c.num_classes else nn.Identity()
        for table in (self.pos_embed, self.cls_token):
            if table is not None:
                nn.init.trunc_normal_(table, std=0.02)
        for m in self.modules():
            if isinstance(m, nn.Linear):
                nn.init.trunc_normal_(m.weight, std=0.02)
                if m.bias is not None:
                    nn.init.zeros_(m.bias)

    # maps ------------------------------------------------------------------------------------------
    def embed(self, image: Float[Tensor, "b c h w"]) -> Float[Tensor, "b H W d"]:
        """The map of fine tokens."""
        return self.patch_embed(pad_to(image, self.config.steps()[-1]))

    def run(self, x: Float[Tensor, "b h w c"], last: int | None = None) -> list[Float[Tensor, "b hi wi ci"]]:
        """The maps leaving the groups 0 .. `last` (None: all), from the map of fine tokens."""
        maps = []
        for i in range(len(self.ends) if last is None else last + 1):
            x = self.run_group(self.blocks_of(i), self.entered(x, i), i)
            maps.append(x)
        return maps

    def blocks_of(self, group: int) -> list[nn.Module]:
        return list(self.network[self.ends[group]].children())

    def entered(self, x: Float[Tensor, "b h w c"], group: int) -> Float[Tensor, "b H W d"]:
        """What enters the blocks of a group, from what left the one before: downsampled and with positions, where its
        place says so."""
        for i in range(self.ends[group - 1] + 1 if group else 0, self.ends[group] + 1):
            if i == 2:
                x = self.pos_drop(x + self._position(x.shape[1], x.shape[2]))
            if i < self.ends[group]:
                x = self.network[i](x)
        return x

    def _position(self, height: int, width: int) -> Float[Tensor, "1 h w c"]:
        table = resize_position(self.pos_embed.flatten(1, 2), self.config.grid, (height, width), antialias=False)
        return table.view(1, height, width, -1)

    def resize_own_table(self, value: Tensor, name: str) -> tuple[Tensor, str] | None:
        """The position table of a checkpoint (1, h, w, c) at this model's grid, and what was done."""
        table = self.pos_embed
        if name != "pos_embed" or table is None or value.ndim != 4 or value.shape[3] != table.shape[3]:
            return None
        old, new = (int(value.shape[1]), int(value.shape[2])), self.config.grid
        resized = resize_position(value.flatten(1, 2), old, new, antialias=False).view(1, *new, -1)
        return resized, f"resize_positions {old[0]}x{old[1]} -> {new[0]}x{new[1]} (bicubic)"

    def finish(self, x: Float[Tensor, "b h w c"]) -> Float[Tensor, "b n c"]:
        """The last map as tokens, through class attention and the final norm: class token first, if there is one."""
        x = x.flatten(1, 2)
        if self.cls_token is not None:
            x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], 1)
            for block in self.post_network:
                x = self.run_block(block, x)
        return self.norm(x)

    # the contract ----------------------------------------------------------------------------------
    def forward_stages(self, image: Float[Tensor, "b c h w"]) -> list[Float[Tensor, "b ci hi wi"]]:
        return [m.permute(0, 3, 1, 2) for m in self.run(self.embed(image))]

    def stages_up_to(self, image: Float[Tensor, "b c h w"], last: int) -> list[Float[Tensor, "b ci hi wi"]]:
        return [m.permute(0, 3, 1, 2) for m in self.run(self.embed(image), last)]

    def forward_features(self, image: Float[Tensor, "b c h w"]) -> Float[Tensor, "b n d"]:
        """All tokens after class attention and the final norm: the class token, then the last map row by row."""
        return self.finish(self.run(self.embed(image))[-1])

    def features_and_stages(self, image: Float[Tensor, "b c h w"]) -> tuple[Tensor, list[Tensor]]:
        maps = self.run(self.embed(image))
        return self.finish(maps[-1]), [m.permute(0, 3, 1, 2) for m in maps]

    def pool(self, features: Float[Tensor, "b n c"]) -> Float[Tensor, "b c"]:
        return features[:, 0] if self.config.pool == "token" else features.mean(1)

    def forward_head(self, features: Float[Tensor, "b n c"], pre_logits: bool = False) -> Tensor:
        """Logits: the class token's plus, if `dense`, half the largest of all patches', class by class."""
        x = super().forward_head(features, pre_logits)
        if pre_logits or not self.config.dense or self.num_classes <= 0:
            return x
        return x + 0.5 * self.aux_head(features[:, 1:]).amax(1)

    def token_logits(
        self, image: Float[Tensor, "b c h w"], box: Box | None = None
    ) -> tuple[Float[Tensor, "b k"], Float[Tensor, "b n k"]]:
        """Logits of the class token and of every patch, as training by token labels needs them.

        box: in cells of the last map; the fine tokens inside it are swapped with the batch in reverse order before
        anything else runs (mix-token), and the patches' logits are swapped back.
        """
        if not self.config.dense:
            raise AdviceError("Patches have no classifier here; build the model with dense=True.")
        x = self.embed(image)
        if box is not None:
            x = swap_box(x, box, scale=self.config.token_step)
        last = self.run(x)[-1]
        tokens = self.finish(last)
        patches = self.aux_head(tokens[:, 1:])
        if box is not None:
            patches = swap_box(patches.unflatten(1, last.shape[1:3]), box).flatten(1, 2)
        return super().forward_head(tokens), patches

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        super().reset_classifier(num_classes, global_pool)
        if self.config.dense:
            self.aux_head = self.new_classifier(num_classes)

    def keep_levels(self, count: int, *, norm: bool) -> None:
        """Cuts the groups from `count` on; class attention goes with the last one."""
        if count < len(self.ends):
            self.network = self.network[: self.ends[count - 1] + 1]
            self.post_network, self.cls_token = nn.ModuleList(), None
            self.ends, self.stages = self.ends[:count], self.stages[:count]
            self.num_features = self.stages[-1].channels
            if self.ends[-1] < 2:
                self.pos_embed = None  # type: ignore[assignment]
        if norm or count < len(self.config.layers):
            self.norm = nn.Identity()  # type: ignore[assignment]

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Stem, then block by block; downsampling belongs to the first block after it."""
        merging = [
            (rf"^network\.{i}\.proj\.", (i + 1,) if coarse else (i + 1, 0))
            for i in range(len(self.network))
            if i not in self.ends
        ]
        blocks = (r"^network\.(\d+)\.", None) if coarse else (r"^network\.(\d+)\.(\d+)\.", None)
        after = [(rf"^post_network\.{i}\.", (len(self.network) + i,)) for i in range(len(self.post_network))]
        return {
            "stem": r"^cls_token|^pos_embed|^patch_embed",
            "blocks": [*merging, blocks, *after, (r"^norm\.", (99999,))],
        }

    def no_weight_decay(self) -> set[str]:
        return {"pos_embed", "cls_token"}

    def mixer_sites(self) -> list[MixerSite]:
        c, sites = self.config, []
        depth = sum(c.layers)
        for i, end in enumerate(self.ends):
            grid = tuple(max(side // c.steps()[i], 1) for side in c.image_size)
            for j in range(c.layers[i]):
                place = Place(
                    dim=c.embed_dims[i],
                    heads=c.num_heads[i],
                    grid=(grid[0], grid[1]),
                    index=sum(c.layers[:i]) + j,
                    depth=depth,
                )
                sites.append(MixerSite(path=f"network.{end}.{j}.attn", place=place))
        return sites


def _block(config: VOLOConfig, group: int, rate: float) -> MixerBlock:
    dim, heads = config.embed_dims[group], config.num_heads[group]
    mixer: nn.Module
    if config.outlook[group]:
        mixer = OutlookAttention(
            dim,
            heads,
            kernel=config.kernel,
            stride=config.stride,
            padding=config.padding,
            qkv_bias=config.qkv_bias,
            scale=config.qk_scale,
            attn_drop=config.attn_drop,
        )
        rate = rate if config.outlook_drop_path else 0.0
    else:
        mixer = Attention(dim, heads, qkv_bias=config.qkv_bias, scale=config.qk_scale, attn_drop=config.attn_drop)
    return MixerBlock(dim, mixer, int(dim * config.mlp_ratios[group]), eps=EPS, drop_path=rate)


def _variant(
    layers: tuple[int, ...], widths: tuple[int, int], heads: tuple[int, int], rate: float, **options: Any
) -> VOLOConfig:
    return VOLOConfig(
        layers=layers,
        embed_dims=(widths[0], *[widths[1]] * 3),
        num_heads=(heads[0], *[heads[1]] * 3),
        drop_path_rate=rate,
        **options,
    )


_SIZES: dict[str, VOLOConfig] = {
    "d1": _variant((4, 4, 8, 2), (192, 384), (6, 12), 0.1),
    "d2": _variant((6, 4, 10, 4), (256, 512), (8, 16), 0.2),
    "d3": _variant((8, 8, 16, 4), (256, 512), (8, 16), 0.5),
    "d4": _variant((8, 8, 16, 4), (384, 768), (12, 16), 0.5),
    "d5": _variant((12, 12, 20, 4), (384, 768), (12, 16), 0.75, mlp_ratios=(4.0,) * 4, stem_width=128),
}
VARIANTS: dict[str, VOLOConfig] = {
    # for images of 28 to 64 pixels
    "volo_nano": _variant(
        (2, 2, 2, 1), (64, 128), (2, 4), 0.0, image_size=(32, 32), patch_size=4, stem_width=32, dense=False
    ),
    **{f"volo_{name}": config for name, config in _SIZES.items()},
    **{
        f"volo_{name}_{side}": replace(_SIZES[name], image_size=(side, side))
        for name, sides in {"d1": (224, 384), "d2": (224, 384), "d3": (224, 448), "d4": (224, 448)}.items()
        for side in sides
    },
    **{f"volo_d5_{side}": replace(_SIZES["d5"], image_size=(side, side)) for side in (224, 448, 512)},
}


def build(config: VOLOConfig) -> VOLO:
    return VOLO(config)
