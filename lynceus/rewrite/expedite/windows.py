"""Clusters inside the windows of a map: our Swin and Swin V2, and the windowed ViT of SAM."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from lynceus.backbones.swin import Swin, WindowPyramid, WindowStage
from lynceus.backbones.swin_v2 import SwinV2
from lynceus.core.shapes import pad_map
from lynceus.layers.window import WindowAttention, relative_index
from lynceus.layers.window_cosine import WindowCosineAttention, log_coordinates
from lynceus.rewrite.expedite.operators import Clustering
from lynceus.rewrite.expedite.options import Span
from lynceus.rewrite.expedite.sam_vit import SamViT


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
        tokens = span.rebuild(self.found, split(x, self.found.size))
        return joined(tokens, self.grid, self.window)[:, : self.size[0], : self.size[1]]


def clustered(x: Float[Tensor, "b h w c"], window: tuple[int, int], span: Span) -> tuple[Tensor, Windowed]:
    """The map of clusters, and what brings the whole back. Padded like window attention: zeros right and bottom."""
    size = (x.shape[1], x.shape[2])
    x = pad_both(x, window)
    grid = (x.shape[1] // window[0], x.shape[2] // window[1])
    found = span.cluster(split(x, window), window)
    return joined(found.centres, grid, found.size), Windowed(size=size, grid=grid, window=window, found=found)


def pad_both(x: Float[Tensor, "b h w c"], window: tuple[int, int]) -> Float[Tensor, "b H W c"]:
    if window[0] == window[1]:
        return pad_map(x, window[0])
    return F.pad(x, (0, 0, 0, -x.shape[2] % window[1], 0, -x.shape[1] % window[0]))


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

    def stages_of(self, x: Float[Tensor, "b h w c"]) -> list[Float[Tensor, "b ci hi wi"]]:
        if self.config.ape:
            x = x + self._position(x.shape[1], x.shape[2])
        x = self.pos_drop(x)
        maps = []
        for i, stage in enumerate(cast(Iterable[WindowStage], self.layers)):
            x = self._stage(x, stage, i)
            if i in self.config.levels:
                out = x.permute(0, 3, 1, 2)
                maps.append(getattr(self, f"norm{i}")(out) if self.config.dense else out)
            if stage.downsample is not None:
                x = stage.downsample(x)
        return maps

    def _stage(self, x: Tensor, stage: WindowStage, number: int) -> Tensor:
        held: Windowed | None = None
        end = self.span.end(len(stage.blocks))
        for j, block in enumerate(stage.blocks):
            if number == self.stage and j == self.span.alpha:
                side = self.config.window(number)[0]
                x, held = clustered(x, (side, side), self.span)
            x = self.run_block(block, x)
            if held is not None and j == end - 1:
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
    as_released = False  # True: a map of clusters that has the size of the map is left as it is

    def through(
        self, x: Float[Tensor, "b h w c"], wanted: Iterable[int] = (), *, whole: bool = True
    ) -> tuple[Tensor, dict[int, Tensor]]:
        kept: dict[int, Tensor] = {}
        held: Windowed | None = None
        wanted, side = set(wanted), self.config.window
        size, end = (x.shape[1], x.shape[2]), self.span.end(len(self.blocks))
        for i, block in enumerate(self.blocks):
            if i == self.span.alpha:
                x, held = clustered(x, (side, side) if side else size, self.span)
            window = held.found.size if held is not None and side else (side, side)
            x = self.run_block(block, x, window if i not in self.config.global_blocks and side else None)
            if i in wanted:
                kept[i] = x if held is None or not whole else held.rebuild(x, self.span)
            if held is not None and i == end - 1:
                same = self.as_released and (x.shape[1], x.shape[2]) == size
                x, held = x if same else held.rebuild(x, self.span), None
        return x, kept
