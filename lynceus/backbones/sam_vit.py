"""The image encoder of Segment Anything (as ViTDet's): windowed and global blocks with decomposed relative positions.

Paper: Kirillov et al., Segment Anything, ICCV 2023, arXiv 2304.02643; Li et al., Exploring Plain Vision Transformer
Backbones for Object Detection, ECCV 2022, arXiv 2203.16527
Code: facebookresearch/segment-anything, whose state names are kept (`mlp.lin1` is `mlp.fc1`, `lin2` is `fc2`)
Licence: Apache-2.0
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from lynceus.backbones._base import Backbone, BackboneConfig
from lynceus.backbones._init import init_linears
from lynceus.core.errors import AdviceError
from lynceus.core.types import Stage
from lynceus.layers.embed import PatchEmbed
from lynceus.layers.fused import linear
from lynceus.layers.mixers import MixerSite, Place
from lynceus.layers.mlp import Mlp
from lynceus.layers.norm import LayerNorm2d
from lynceus.layers.position import resize_position, sincos_table
from lynceus.layers.window import from_windows, to_windows

Window = tuple[int, int] | None


@dataclass(frozen=True, kw_only=True, slots=True)
class SamViTConfig(BackboneConfig):
    """Fields of SAM's encoder.

    image_size: what the tables are made for (any other size works too). patch_size: side of a patch. dim, depth, heads,
    mlp_ratio, qkv_bias: of the blocks. out: channels behind the neck. window: side of the windows, 0 for global blocks
    only. global_blocks: those that see the whole map. absolute: a learned table of places, relative: tables of relative
    rows and columns in every attention. norm_eps: of the blocks' norms. levels: blocks whose maps are given before that
    of the neck; None: the global ones. num_classes: 0, since the released encoders have no classifier; with one it
    reads the mean of the neck's map. init: "small", truncated normals of 0.02; "scratch" learns faster from few small
    images: Xavier, and positions that start as sines and cosines.
    """

    num_classes: int = 0
    image_size: tuple[int, int] = (1024, 1024)
    patch_size: int = 16
    dim: int = 768
    depth: int = 12
    heads: int = 12
    mlp_ratio: float = 4.0
    qkv_bias: bool = True
    out: int = 256
    window: int = 14
    global_blocks: tuple[int, ...] = (2, 5, 8, 11)
    absolute: bool = True
    relative: bool = True
    norm_eps: float = 1e-6
    levels: tuple[int, ...] | None = None
    init: Literal["small", "scratch"] = "small"

    def __post_init__(self) -> None:
        for name, blocks in (("global_blocks", self.global_blocks), ("levels", self.levels or ())):
            if not all(0 <= i < self.depth for i in blocks):
                raise AdviceError(f"{name} {tuple(blocks)} must be blocks from 0 to {self.depth - 1}.")
        if self.init not in ("small", "scratch"):
            raise AdviceError(f"init is 'small' or 'scratch', not {self.init!r}.")

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the tables."""
        high, wide = (max(n // self.patch_size, 1) for n in self.image_size)
        return high, wide

    @property
    def given(self) -> tuple[int, ...]:
        """The blocks whose maps are given."""
        return tuple(sorted(self.global_blocks if self.levels is None else self.levels))


class RelativeAttention(nn.Module):
    """Attention of all cells of a map b h w c, with biases from the query and tables of relative rows and columns.

    size: rows and columns that the tables are made for (None: no tables); for others they are resized linearly.
    """

    rel_pos_h: nn.Parameter
    rel_pos_w: nn.Parameter

    def __init__(self, dim: int, heads: int, *, size: tuple[int, int] | None, qkv_bias: bool):
        super().__init__()
        if dim % heads:
            raise AdviceError(f"dim {dim} cannot be shared by {heads} heads; take a multiple of {heads}.")
        self.heads, self.relative = heads, size is not None
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        if size is not None:
            self.rel_pos_h = nn.Parameter(torch.zeros(2 * size[0] - 1, dim // heads))
            self.rel_pos_w = nn.Parameter(torch.zeros(2 * size[1] - 1, dim // heads))

    def forward(self, x: Float[Tensor, "b h w c"]) -> Float[Tensor, "b h w c"]:
        b, h, w, c = x.shape
        qkv = linear(self.qkv, x).reshape(b, h * w, 3, self.heads, c // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        bias = None
        if self.relative:
            cells, down, across = q.unflatten(2, (h, w)), relative(self.rel_pos_h, h), relative(self.rel_pos_w, w)
            if torch.compiler.is_exporting():  # einsum folds axes, which ties the free sizes to each other
                cells = cells.clone(memory_format=torch.contiguous_format)
                rows = cells @ down.transpose(1, 2)
                columns = (cells.transpose(2, 3) @ across.transpose(1, 2)).transpose(2, 3)
            else:
                rows = torch.einsum("bghwc,hkc->bghwk", cells, down)
                columns = torch.einsum("bghwc,wkc->bghwk", cells, across)
            bias = (rows[..., :, None] + columns[..., None, :]).flatten(4).flatten(2, 3)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        y = y.transpose(1, 2)
        if torch.compiler.is_exporting():
            y = y.clone(memory_format=torch.contiguous_format)
        return linear(self.proj, y.reshape(b, h * w, c)).view(b, h, w, c)


def relative(table: Float[Tensor, "n c"], size: int) -> Float[Tensor, "q k c"]:
    """The rows of a table (2 n - 1, c) for queries and keys at `size` places, resized linearly where needed."""
    table = resize_line(table, 2 * size - 1)
    place = torch.arange(size, device=table.device)
    return table[place[:, None] - place + size - 1]


def resize_line(table: Float[Tensor, "n c"], count: int) -> Float[Tensor, "m c"]:
    """A table with `count` rows, linearly between those that there are."""
    if not torch.compiler.is_exporting() and table.shape[0] == count:  # the same numbers, if it is resized
        return table
    return F.interpolate(table.t()[None], size=count, mode="linear")[0].t()


class Block(nn.Module):
    """Attention inside windows or of the whole map, and a perceptron, each behind a norm and beside a shortcut."""

    def __init__(self, config: SamViTConfig, *, whole: bool):
        super().__init__()
        c = config
        size = (c.grid if whole or not c.window else (c.window, c.window)) if c.relative else None
        self.norm1 = nn.LayerNorm(c.dim, eps=c.norm_eps)
        self.attn = RelativeAttention(c.dim, c.heads, size=size, qkv_bias=c.qkv_bias)
        self.norm2 = nn.LayerNorm(c.dim, eps=c.norm_eps)
        self.mlp = Mlp(c.dim, int(c.dim * c.mlp_ratio))

    def forward(self, x: Float[Tensor, "b h w c"], window: Window = None) -> Float[Tensor, "b h w c"]:
        """window: rows and columns of the windows, None for the whole map."""
        y = self.norm1(x)
        x = x + (self.attn(y) if window is None else self._windows(y, window))
        return self.mlp(self.norm2(x), residual=x)

    def _windows(self, x: Tensor, window: tuple[int, int]) -> Tensor:
        b, h, w, c = x.shape
        if window[0] == window[1]:
            some = self.attn(to_windows(x, window[0]).view(-1, *window, c))
            return from_windows(some.reshape(-1, window[0] * window[1], c), (b, h, w), window[0])
        x = F.pad(x, (0, 0, 0, -w % window[1], 0, -h % window[0]))
        down, across = x.shape[1] // window[0], x.shape[2] // window[1]
        x = x.reshape(b, down, window[0], across, window[1], c).transpose(2, 3)
        x = self.attn(x.reshape(-1, *window, c)).view(b, down, across, *window, c).transpose(2, 3)
        return x.reshape(b, down * window[0], across * window[1], c)[:, :h, :w]


class SamViT(Backbone):
    """SAM's image encoder. Its last map is the neck's; those of `levels` come before it."""

    config: SamViTConfig

    def __init__(self, config: SamViTConfig):
        c = config
        levels = c.given
        super().__init__(
            c, [*(Stage(c.dim, c.patch_size, f"blocks.{i}") for i in levels), Stage(c.out, c.patch_size, "neck")]
        )
        self.levels = levels
        self.patch_embed = PatchEmbed(c.in_chans, c.dim, c.patch_size)
        self.pos_embed = nn.Parameter(torch.zeros(1, *c.grid, c.dim)) if c.absolute else None
        self.blocks = nn.ModuleList(Block(c, whole=i in c.global_blocks) for i in range(c.depth))
        self.neck = nn.Sequential(
            nn.Conv2d(c.dim, c.out, 1, bias=False),
            LayerNorm2d(c.out),
            nn.Conv2d(c.out, c.out, 3, padding=1, bias=False),
            LayerNorm2d(c.out),
        )
        self.head = nn.Linear(c.out, c.num_classes) if c.num_classes else nn.Identity()
        self.init_weights()

    def init_weights(self) -> None:
        """As `config.init` says; tables of relative places start at zero."""
        scratch = self.config.init == "scratch"
        init_linears(self, scratch=scratch, small={self.head})
        if self.pos_embed is not None:
            nn.init.trunc_normal_(self.pos_embed, std=0.02)
            if scratch:
                with torch.no_grad():
                    self.pos_embed.add_(sincos_table(*self.config.grid, self.config.dim).view(self.pos_embed.shape))

    def embed(self, image: Float[Tensor, "b c h w"]) -> Float[Tensor, "b H W d"]:
        """The map that enters the first block."""
        x = self.patch_embed(image)
        if self.pos_embed is None:
            return x
        size = (x.shape[1], x.shape[2])
        return x + resize_position(self.pos_embed.flatten(1, 2), self.config.grid, size).view(1, *size, -1)

    def through(
        self, x: Float[Tensor, "b h w c"], wanted: Iterable[int] = (), *, whole: bool = True, last: int | None = None
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """The map after the last block (or after `last`), and those after the `wanted` ones. whole: of the whole map
        also where a rewrite runs blocks on fewer tokens."""
        kept: dict[int, Tensor] = {}
        side, wanted = self.config.window, set(wanted)
        for i, block in enumerate(self.blocks[: None if last is None else last + 1]):
            x = self.run_block(block, x, None if i in self.config.global_blocks or not side else (side, side))
            if i in wanted:
                kept[i] = x
        return x, kept

    # the contract ----------------------------------------------------------------------------------
    def forward_stages(self, image: Float[Tensor, "b c h w"]) -> list[Float[Tensor, "b ci hi wi"]]:
        return self.stages_up_to(image, len(self.stages) - 1)

    def stages_up_to(self, image: Float[Tensor, "b c h w"], last: int) -> list[Float[Tensor, "b ci hi wi"]]:
        levels = self.levels[: last + 1]
        end = None if last >= len(self.levels) else levels[-1]
        x, kept = self.through(self.embed(image), levels, last=end)
        maps = [kept[i].permute(0, 3, 1, 2) for i in levels]
        return maps if end is not None else [*maps, self.neck(x.permute(0, 3, 1, 2))]

    def keep_levels(self, count: int, *, norm: bool) -> None:
        """Cuts the neck, and the blocks after level `count` - 1."""
        if count == len(self.stages):
            return
        self.levels, self.stages = self.levels[:count], self.stages[:count]
        self.blocks = self.blocks[: self.levels[-1] + 1]
        self.neck = nn.Sequential()
        self.num_features = self.head_hidden_size = self.config.dim

    def mixer_sites(self) -> list[MixerSite]:
        """Attentions, called on windows or, in global blocks, on the whole map."""
        c, sites = self.config, []
        for i in range(len(self.blocks)):
            grid = c.grid if i in c.global_blocks or not c.window else (c.window, c.window)
            place = Place(dim=c.dim, heads=c.heads, grid=grid, index=i, depth=c.depth)
            sites.append(MixerSite(path=f"blocks.{i}.attn", place=place))
        return sites

    def resize_own_table(self, value: Tensor, name: str) -> tuple[Tensor, str] | None:
        """A checkpoint's position table (1, h, w, c) at this model's grid, or its table of relative places at this
        model's length, and what was done."""
        if name == "pos_embed" and self.pos_embed is not None and value.ndim == 4:
            old, new = (int(value.shape[1]), int(value.shape[2])), self.config.grid
            resized = resize_position(value.flatten(1, 2), old, new).view(1, *new, -1)
            return resized, f"resize_positions {old[0]}x{old[1]} -> {new[0]}x{new[1]} (bicubic)"
        if name.endswith(("rel_pos_h", "rel_pos_w")) and value.ndim == 2:
            count = self.get_parameter(name).shape[0]
            return resize_line(value, count), f"resize_line {value.shape[0]} -> {count} (linear)"
        return None

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        return {"stem": r"^pos_embed|^patch_embed", "blocks": [(r"^blocks\.(\d+)", None), (r"^neck\.", (99999,))]}

    def no_weight_decay(self) -> set[str]:
        return {n for n, _ in self.named_parameters() if n == "pos_embed" or "rel_pos_" in n}


def _size(dim: int, depth: int, heads: int) -> SamViTConfig:
    return SamViTConfig(
        dim=dim, depth=depth, heads=heads, global_blocks=tuple(range(depth // 4 - 1, depth, depth // 4))
    )


VARIANTS: dict[str, SamViTConfig] = {
    # for images of 28 to 64 pixels, from scratch
    "sam_vit_nano": SamViTConfig(
        num_classes=1000,
        image_size=(32, 32),
        patch_size=4,
        dim=96,
        depth=6,
        heads=3,
        out=96,
        window=4,
        global_blocks=(2, 5),
        init="scratch",
    ),
    "sam_vit_b": _size(768, 12, 12),
    "sam_vit_l": _size(1024, 24, 16),
    "sam_vit_h": _size(1280, 32, 16),
}


def build(config: SamViTConfig) -> SamViT:
    return SamViT(config)
