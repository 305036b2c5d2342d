"""Clusters inside the windows of a map: our Swin and Swin V2, and the windowed ViT of SAM."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from lynceus.backbones.sam_vit import SamViT
from lynceus.backbones.swin import Swin, WindowPyramid
from lynceus.backbones.swin_v2 import SwinV2
from lynceus.layers.window import WindowAttention, relative_index
from lynceus.layers.window_cosine import WindowCosineAttention, log_coordinates
from lynceus.rewrite.expedite.operators import Clustering
from lynceus.rewrite.expedite.options import Span


@dataclass(frozen=True, kw_only=True)
class Windowed:
    """A map whose windows were clustered. size: of the whole map. grid: windows down and across. window: rows and
    columns of cells in each. found: the clusters of every window."""

    size: tuple[int, int]
    grid: tuple[int, int]
    window: tuple[int, int]
    found: Clustering

    def rebuild(self, x: Float[Tensor, "b h w c"], span: Span) -> Float[Tensor, "b H W d"]:
        """The whole map, out of what became of the map of clusters."""
        x = stretched(x, (self.grid[0] * self.found.size[0], self.grid[1] * self.found.size[1]))
        tokens = span.rebuild(self.found, split(x, self.found.size))
        return joined(tokens, self.grid, self.window)[:, : self.size[0], : self.size[1]]


def clustered(
    x: Float[Tensor, "b h w c"], window: tuple[int, int], span: Span, *, as_released: bool = False
) -> tuple[Tensor, Windowed]:
    """The map of clusters, and what brings the whole back.

    The last windows may reach over the edge of the map, where cells repeat the edge; clusters of such cells alone are
    left out, so that window attention pads the map of clusters as it pads the map. as_released: the authors' way, which
    makes tokens of the padding: zeros right and bottom, and all clusters."""
    size = (x.shape[1], x.shape[2])
    grid = (-(-size[0] // window[0]), -(-size[1] // window[1]))
    all_ = (grid[0] * window[0], grid[1] * window[1])
    if as_released:
        x = F.pad(x, (0, 0, 0, all_[1] - size[1], 0, all_[0] - size[0]))
    found = span.cluster(split(stretched(x, all_), window), window)
    made = joined(found.centres, grid, found.size)
    if not as_released:
        high, wide = (-(-n * m // side) for n, m, side in zip(size, found.size, window))
        made = made[:, :high, :wide]
    return made, Windowed(size=size, grid=grid, window=window, found=found)


def stretched(x: Float[Tensor, "b h w c"], size: tuple[int, int]) -> Float[Tensor, "b H W c"]:
    """A map of `size`, whose last row and column stand for those that it has not."""
    for axis, (have, want) in enumerate(zip(x.shape[1:3], size), 1):
        if have != want:
            x = x.index_select(axis, torch.arange(want, device=x.device).clamp(max=have - 1))
    return x


def split(x: Float[Tensor, "b h w c"], window: tuple[int, int]) -> Float[Tensor, "windows cells c"]:
    """Windows of whole maps, image by image, row by row."""
    b, h, w, c = x.shape
    x = x.reshape(b, h // window[0], window[0], w // window[1], window[1], c).transpose(2, 3)
    return x.reshape(-1, window[0] * window[1], c)


def joined(
    x: Float[Tensor, "windows cells c"], grid: tuple[int, int], window: tuple[int, int]
) -> Float[Tensor, "b h w c"]:
    """The reverse of `split` for maps of `grid` windows."""
    x = x.reshape(-1, *grid, *window, x.shape[-1]).transpose(2, 3)
    return x.reshape(x.shape[0], grid[0] * window[0], grid[1] * window[1], -1)


# Swin ------------------------------------------------------------------------------------------------
class ExpeditedPyramid(WindowPyramid):
    """A Swin with some blocks of stage `stage` on cluster tokens; they are rebuilt before the maps are given."""

    span: Span
    stage: int

    def run_group(
        self, blocks: Sequence[nn.Module], x: Tensor, group: int, size: tuple[int, int] | None = None
    ) -> Tensor:
        if group != self.stage:
            return super().run_group(blocks, x, group, size)
        held: Windowed | None = None
        end, side = self.span.end(len(blocks)), self.config.window(group)[0]
        for i, block in enumerate(blocks):
            if i == self.span.alpha:
                x, held = clustered(x, (side, side), self.span)
            x = self.run_block(block, x)
            if held is not None and i == end - 1:
                x, held = held.rebuild(x, self.span), None
        return x


class ExpeditedSwin(ExpeditedPyramid, Swin):
    """See `ExpeditedPyramid`."""


class ExpeditedSwinV2(ExpeditedPyramid, SwinV2):
    """See `ExpeditedPyramid`."""


class SmallerWindowAttention(WindowAttention):
    """Window attention whose table was made for windows of side `made_for`, resized to `window`."""

    made_for: int

    def table(self) -> Float[Tensor, "places heads"]:
        return resize_table(self.relative_position_bias_table, self.made_for, self.window)


class SmallerWindowCosineAttention(WindowCosineAttention):
    """The same for Swin V2, whose table comes from coordinates."""

    made_for: int

    def table(self) -> Float[Tensor, "places heads"]:
        like = self.logit_scale
        places = log_coordinates(self.made_for, self.pretrained, device=like.device).to(like.dtype)
        return resize_table(16 * torch.sigmoid(self.cpb_mlp(places).view(-1, self.heads)), self.made_for, self.window)


SMALLER: dict[type, type] = {
    WindowAttention: SmallerWindowAttention,
    WindowCosineAttention: SmallerWindowCosineAttention,
}


def resize_table(table: Float[Tensor, "places heads"], old: int, new: int) -> Float[Tensor, "fewer heads"]:
    """A table of the relative positions in windows of side `old`, for windows of side `new`: bicubic."""
    if old == new:
        return table
    map_ = table.reshape(1, 2 * old - 1, 2 * old - 1, -1).permute(0, 3, 1, 2)
    resized = F.interpolate(map_, (2 * new - 1, 2 * new - 1), mode="bicubic", align_corners=False)
    return resized.flatten(2)[0].t()


def shrink(attn: Any, side: int) -> None:
    """Makes the attention of a block work in windows of `side`, shifted by half as before; its state stays."""
    if type(attn) not in SMALLER:
        return  # a mixer that was put there and takes maps of any size
    attn.made_for, shifted = attn.window, attn.shift > 0
    attn.__class__ = SMALLER[type(attn)]
    attn.window, attn.shift = side, side // 2 if shifted else 0
    index = relative_index(side).flatten().to(attn.relative_index.device)
    attn.register_buffer("relative_index", index, persistent=False)
    attn._kept = None


# SAM -------------------------------------------------------------------------------------------------
class ExpeditedSamViT(SamViT):
    """SAM's encoder with some blocks on the clusters of every window; windowed ones among them work in the smaller
    windows. Maps, and what the neck reads, are rebuilt."""

    span: Span
    as_released = (
        False  # True: padding is made tokens of, and a map of clusters of the size of the map is left as it is
    )

    def through(
        self, x: Float[Tensor, "b h w c"], wanted: Iterable[int] = (), *, whole: bool = True, last: int | None = None
    ) -> tuple[Tensor, dict[int, Tensor]]:
        kept: dict[int, Tensor] = {}
        held: Windowed | None = None
        wanted, side = set(wanted), self.config.window
        size, end = (x.shape[1], x.shape[2]), self.span.end(len(self.blocks))
        for i, block in enumerate(self.blocks[: None if last is None else last + 1]):
            if i == self.span.alpha:
                x, held = clustered(x, (side, side) if side else size, self.span, as_released=self.as_released)
            window = held.found.size if held is not None and side else (side, side)
            x = self.run_block(block, x, window if i not in self.config.global_blocks and side else None)
            if i in wanted:
                kept[i] = x if held is None or not whole else held.rebuild(x, self.span)
            if held is not None and i == end - 1:
                same = self.as_released and (x.shape[1], x.shape[2]) == size
                x, held = x if same else held.rebuild(x, self.span), None
        return x, kept
