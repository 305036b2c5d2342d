"""Halo attention: blocks of queries, each looking at the window around it; a local mixer, and a drop-in for a conv.

Vaswani et al., Scaling Local Self-Attention for Parameter Efficient Visual Backbones, CVPR 2021, arXiv 2103.12731

Blocks of b x b queries lie on a grid over the map, and the keys of a block are the (b + 2h)^2 cells around it. Cells
outside the map are keys too: keys and values are padded with zeros after their projection and nothing is masked, so
that the logits of such a cell are the position terms alone. A map that is no multiple of b is padded right and bottom
in the same way and cropped afterwards.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from lynceus.core.errors import AdviceError
from lynceus.layers.fused import fusable, linear
from lynceus.layers.mixers import Place
from lynceus.layers.width import divisible

PIECE = 2**22  # bytes of position terms per thread that inference on a CPU makes at a time: they stay in the cache


@dataclass(frozen=True, kw_only=True, slots=True)
class HaloOptions:
    """Options of halo attention.

    block_size: side b of a block of queries. halo_size: cells h that a window reaches beyond its block on each side.
    heads: None: as many as the place has. head_dim: width of a head's queries and keys; None: qk_ratio times the
    width of its values. qkv_bias: the projections have biases. avg_down: a stride is attention at full resolution,
    then 2x2 means. scale_position: the position terms are scaled by head_dim ** -0.5 too.
    """

    block_size: int = 8
    halo_size: int = 3
    heads: int | None = None
    head_dim: int | None = None
    qk_ratio: float = 1.0
    qkv_bias: bool = False
    avg_down: bool = False
    scale_position: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class HaloMixer(HaloOptions):
    """Halo attention as a token mixer. projection: a linear layer over the values of all heads follows, as in ViT."""

    projection: bool = True

    def build(self, place: Place) -> HaloAttention:
        return HaloAttention(
            place.dim,
            heads=self.heads or place.heads,
            head_dim=self.head_dim,
            block_size=self.block_size,
            halo_size=self.halo_size,
            qk_ratio=self.qk_ratio,
            qkv_bias=self.qkv_bias,
            avg_down=self.avg_down,
            scale_position=self.scale_position,
            projection=self.projection,
        )


class RelativePosition(nn.Module):
    """Position terms of queries (block) x keys (window): q . height_rel[Y - y + w - 1] + q . width_rel[X - x + w - 1].

    y, x: index of the query in its block, X, Y: of the key in its window of side w. The offset of the block inside the
    window, and the stride, are left to the tables.
    """

    def __init__(self, block: int, window: int, dim: int):
        super().__init__()
        self.block, self.window = block, window
        self.height_rel = nn.Parameter(torch.empty(2 * window - 1, dim))
        self.width_rel = nn.Parameter(torch.empty(2 * window - 1, dim))

    def index(self) -> Int[Tensor, "block window"]:
        """Row of a table for query index y and key index Y."""
        place = torch.arange(self.window, device=self.height_rel.device)
        return place[None] - place[: self.block, None] + self.window - 1

    def terms(self, q: Float[Tensor, "n g y x d"]) -> tuple[Float[Tensor, "n g y x w"], Float[Tensor, "n g y x w"]]:
        """Those of the key's row and those of its column."""
        if fusable(q):
            return self._skewed(q)
        index = self.index()
        return (
            torch.einsum("ngyxd,ywd->ngyxw", q, self.height_rel[index]),
            torch.einsum("ngyxd,xwd->ngyxw", q, self.width_rel[index]),
        )

    def _skewed(self, q: Tensor) -> tuple[Tensor, Tensor]:
        """The same by one product with all offsets in use; a stride one shorter per query then finds its keys."""
        n, g, b, _, d = q.shape
        first, offsets = self.window - b, self.window + b - 1
        tables = torch.cat([self.height_rel[first : first + offsets], self.width_rel[first : first + offsets]])
        all_offsets = (q.reshape(-1, d) @ tables.t()).contiguous()
        cell = 2 * offsets
        size, outer = (n, g, b, b, self.window), (g * b * b * cell, b * b * cell)
        rows = all_offsets.as_strided(size, (*outer, b * cell - 1, cell, 1), b - 1)
        columns = all_offsets.as_strided(size, (*outer, b * cell, cell - 1, 1), offsets + b - 1)
        return rows, columns


class HaloAttention(nn.Module):
    """Blocked local attention on a map b h w c, after which the map is b ceil(h/stride) ceil(w/stride) out.

    `q` and `kv` are 1x1 convolutions; the channels of `kv` are, head by head, its keys and then its values. stride: 1,
    or 2, where every second cell asks (blocks of odd side, or `avg_down`: all ask and 2x2 means follow).
    """

    def __init__(
        self,
        dim: int,
        *,
        out: int | None = None,
        heads: int = 8,
        head_dim: int | None = None,
        block_size: int = 8,
        halo_size: int = 3,
        stride: int = 1,
        qk_ratio: float = 1.0,
        qkv_bias: bool = False,
        avg_down: bool = False,
        scale_position: bool = False,
        projection: bool = False,
    ):
        out = out or dim
        if out % heads:
            good = heads * max(out // heads, 1)
            raise AdviceError(f"{out} channels cannot be shared by {heads} heads; take a multiple, e.g. {good}.")
        if stride not in (1, 2):
            raise AdviceError(f"Halo attention has stride 1 or 2, not {stride}.")
        if block_size < 1 or halo_size < 0:
            raise AdviceError(
                f"A block has a side of at least 1 and a halo of at least 0, not {block_size}, {halo_size}."
            )
        super().__init__()
        self.heads, self.block, self.halo, self.stride = heads, block_size, halo_size, stride
        self.key_dim = head_dim or max(divisible(out * qk_ratio) // heads, 1)
        self.value_dim = out // heads
        self.window = block_size + 2 * halo_size
        self.pooled = stride == 2 and (avg_down or block_size % 2 == 1)
        self.step = 1 if self.pooled else stride  # of the queries
        self.scale_position = scale_position
        self.q = nn.Conv2d(dim, heads * self.key_dim, 1, self.step, bias=qkv_bias)
        self.kv = nn.Conv2d(dim, heads * (self.key_dim + self.value_dim), 1, bias=qkv_bias)
        self.pos_embed = RelativePosition(block_size // self.step, self.window, self.key_dim)
        self.proj = nn.Linear(out, out) if projection else nn.Identity()
        self.init_weights()

    def init_weights(self) -> None:
        """Projections truncated normal of fan-in ** -0.5, tables of head_dim ** -0.5, biases 0."""
        for conv in (self.q, self.kv):
            nn.init.trunc_normal_(conv.weight, std=conv.in_channels**-0.5)
            if conv.bias is not None:
                nn.init.zeros_(conv.bias)
        for table in (self.pos_embed.height_rel, self.pos_embed.width_rel):
            nn.init.trunc_normal_(table, std=self.key_dim**-0.5)

    def forward(self, x: Float[Tensor, "b h w c"]) -> Float[Tensor, "b H W d"]:
        b, h, w, _ = x.shape
        rows, columns = (h + self.block - 1) // self.block, (w + self.block - 1) // self.block
        x = x.permute(0, 3, 1, 2)
        q = self.to_blocks(self.q(x).permute(0, 2, 3, 1), rows, columns)
        k, v = self.to_windows(self.kv(x).permute(0, 2, 3, 1), rows, columns)
        y = self.attend(q, k, v)
        size = (h + self.step - 1) // self.step, (w + self.step - 1) // self.step
        y = self.from_blocks(y, (b, rows, columns), size)
        if self.pooled:
            y = F.avg_pool2d(y.permute(0, 3, 1, 2), 2, ceil_mode=True, count_include_pad=False).permute(0, 2, 3, 1)
        return linear(self.proj, y) if isinstance(self.proj, nn.Linear) else y

    def to_blocks(self, q: Float[Tensor, "b h w c"], rows: int, columns: int) -> Float[Tensor, "n g y x d"]:
        """Queries by block, blocks row by row image by image."""
        b, h, w, _ = q.shape
        side = self.block // self.step
        if torch.compiler.is_exporting():
            q = _taken(q, rows, columns, side, side, 0)
            return q.view(b * rows * columns, side, side, self.heads, self.key_dim).permute(0, 3, 1, 2, 4)
        q = _pad(q, 0, rows * side - h, 0, columns * side - w)
        q = q.reshape(b, rows, side, columns, side, self.heads, self.key_dim).permute(0, 1, 3, 5, 2, 4, 6)
        return q.reshape(b * rows * columns, self.heads, side, side, self.key_dim)

    def to_windows(
        self, kv: Float[Tensor, "b h w c"], rows: int, columns: int
    ) -> tuple[Float[Tensor, "n g cells d"], Float[Tensor, "n g cells v"]]:
        """Keys and values of each block's window."""
        b, h, w, _ = kv.shape
        side, halo = self.window, self.halo
        n, cells = b * rows * columns, side * side
        if torch.compiler.is_exporting():
            kv = _taken(kv, rows, columns, side, self.block, halo).view(n, cells, self.heads, -1).transpose(1, 2)
        else:
            kv = _pad(kv, halo, rows * self.block - h + halo, halo, columns * self.block - w + halo)
            if torch.is_grad_enabled():  # a faster backward, a slower forward
                place = torch.arange(side, device=kv.device)
                begins = (torch.arange(count, device=kv.device)[:, None] * self.block for count in (rows, columns))
                down, across = (begin + place for begin in begins)
                kv = kv.index_select(1, down.flatten()).index_select(2, across.flatten())
                kv = kv.view(b, rows, side, columns, side, self.heads, -1).permute(0, 1, 3, 5, 2, 4, 6)
            else:
                kv = kv.unflatten(3, (self.heads, -1)).unfold(1, side, self.block).unfold(2, side, self.block)
                kv = kv.permute(0, 1, 2, 3, 5, 6, 4)  # b rows columns g Y X c
        k, v = kv.split((self.key_dim, self.value_dim), -1)
        return k.reshape(n, self.heads, cells, self.key_dim), v.reshape(n, self.heads, cells, self.value_dim)

    def from_blocks(
        self, y: Float[Tensor, "n g cells v"], blocks: tuple[int, int, int], size: tuple[int, int]
    ) -> Float[Tensor, "b H W c"]:
        """The map of `size`, without the padding. blocks: images, rows and columns of blocks."""
        b, rows, columns = blocks
        side, channels = self.block // self.step, self.heads * self.value_dim
        h, w = size
        if torch.compiler.is_exporting():
            y = y.transpose(1, 2).reshape(-1).view(b, rows * columns * side * side, channels)
            (across,) = _numbers(columns, device=y.device)
            row, column = torch.arange(h, device=y.device)[:, None], torch.arange(w, device=y.device)
            order = (row // side * across + column // side) * side * side + row % side * side + column % side
            return y[:, order]
        y = y.reshape(b, rows, columns, self.heads, side, side, self.value_dim).permute(0, 1, 4, 2, 5, 3, 6)
        return y.reshape(b, rows * side, columns * side, channels)[:, :h, :w]

    def attend(
        self, q: Float[Tensor, "n g y x d"], k: Float[Tensor, "n g cells d"], v: Float[Tensor, "n g cells v"]
    ) -> Float[Tensor, "n g queries v"]:
        """softmax(q k / sqrt(d) + position terms) v."""
        n, g, side, _, d = q.shape
        by_row, by_column = self.pos_embed.terms(q)
        scale = d**-0.5
        if self.scale_position:
            by_row, by_column = by_row * scale, by_column * scale
        q = q.reshape(n, g, side * side, d)
        cells = k.shape[2]
        if fusable(q):
            return self._in_pieces(q, k, v, by_row, by_column)
        position = (by_row[..., :, None] + by_column[..., None, :]).reshape(n, g, side * side, cells)
        if q.is_cpu and torch.is_grad_enabled():  # where the fused kernel has no gradient for the position terms
            logits = torch.baddbmm(
                position.flatten(0, 1), q.flatten(0, 1), k.flatten(0, 1).transpose(1, 2), alpha=scale
            )
            return torch.bmm(logits.softmax(-1), v.flatten(0, 1)).view(n, g, side * side, -1)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=position, scale=scale)
        # the kernel's layout is not that of the plain products it is exported as
        return y.clone(memory_format=torch.contiguous_format) if torch.compiler.is_exporting() else y

    def _in_pieces(self, q: Tensor, k: Tensor, v: Tensor, by_row: Tensor, by_column: Tensor) -> Tensor:
        """The same, some blocks at a time."""
        n, g, queries, d = q.shape
        shape = (g, *by_row.shape[2:4], self.window, self.window)
        each = q.element_size() * g * queries * self.window**2
        count = min(max(PIECE * torch.get_num_threads() // each, 1), n)
        position = q.new_empty(count, *shape)
        out = v.new_empty(n, g, queries, v.shape[-1])
        for start in range(0, n, count):
            part = slice(start, min(start + count, n))
            here = position[: part.stop - start]
            torch.add(by_row[part][..., :, None], by_column[part][..., None, :], out=here)
            mask = here.view(-1, g, queries, self.window**2)
            out[part] = F.scaled_dot_product_attention(q[part], k[part], v[part], attn_mask=mask, scale=d**-0.5)
        return out


def _taken(x: Tensor, rows: int, columns: int, side: int, step: int, halo: int) -> Tensor:
    """Squares of `side` cells, one every `step`, begun `halo` before: flat; for free sizes, of which nothing is asked.

    Cells outside the map are zeros: one is put behind the map for all of them.
    """
    b, h, w, c = x.shape
    high, wide, across = _numbers(h, w, columns, device=x.device)
    place = torch.arange(rows * columns * side * side, device=x.device)
    number, cell = place // (side * side), place % (side * side)
    row = number // across * step + cell // side - halo
    column = number % across * step + cell % side - halo
    inside = (row >= 0) & (row < high) & (column >= 0) & (column < wide)
    order = torch.where(inside, row * wide + column, high * wide)
    x = x.clone(memory_format=torch.contiguous_format).view(-1).view(b, h * w, c)
    x = torch.cat([x, x.new_zeros(b, 1, c)], 1)
    return x.index_select(1, order).view(-1)


def _numbers(*sizes: int, device: torch.device | None) -> list[Tensor]:
    """Sizes as tensors: arithmetic with them exports when they are free."""
    return [torch.full((), n, dtype=torch.int64, device=device) for n in sizes]


def _pad(x: Tensor, top: Any, bottom: Any, left: Any, right: Any) -> Tensor:
    """Zeros around a map b h w c."""
    if not torch.compiler.is_compiling() and not (top or bottom or left or right):
        return x
    return F.pad(x, (0, 0, left, right, top, bottom))
