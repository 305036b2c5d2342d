"""Attention on small maps with narrow keys, a depthwise convolution on the queries, and a bias per absolute offset.

LeViT (Graham et al., ICCV 2021, arXiv 2104.01136) with EfficientViT's queries (Liu et al., CVPR 2023, arXiv
2305.07027), as LSNet's last stage uses it. The bias of two places depends on |dy| and |dx| only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from lynceus.layers.conv_norm import ConvNorm
from lynceus.layers.fused import fusable
from lynceus.layers.mixers import Place
from lynceus.layers.position import cubic_matrix


class OffsetAttention(nn.Module):
    """Softmax attention of all places of a map b h w c with all; no residual inside.

    key_dim, value_dim: widths per head of queries and keys, and of values. grid: rows and columns of the map that the
    table `attention_biases` (heads, rows * columns) is made for, row |dy|, column |dx|. On other maps the bias is
    resized bicubically: resize="table" the table, to the map's rows and columns; "matrix" the whole matrix of pairs.
    norm_weight: start of the last norm's weight. fused: the deployment form of its convolutions.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        key_dim: int = 16,
        value_dim: int | None = None,
        grid: tuple[int, int] = (4, 4),
        resize: Literal["table", "matrix"] = "table",
        norm_weight: float = 0.0,
        fused: bool = False,
    ):
        super().__init__()
        self.heads, self.key_dim, self.grid, self.resize = heads, key_dim, grid, resize
        self.value_dim = max(dim // heads, 1) if value_dim is None else value_dim
        keys, values = heads * key_dim, heads * self.value_dim
        self.qkv = ConvNorm(dim, 2 * keys + values, fused=fused)
        self.dw = ConvNorm(keys, keys, 3, groups=keys, fused=fused)
        self.proj = nn.Sequential(nn.ReLU(), ConvNorm(values, dim, norm_weight=norm_weight, fused=fused))
        self.attention_biases = nn.Parameter(torch.zeros(heads, grid[0] * grid[1]))
        self._kept: tuple[tuple[int, int, torch.dtype], Tensor, Tensor] | None = None

    def bias(self, rows: int, columns: int) -> Float[Tensor, "heads n n"]:
        """What is added to the logits of a map of that size."""
        exporting = torch.compiler.is_exporting()
        grid, size = self.grid, (rows, columns)
        precise = self.attention_biases.dtype in (torch.float32, torch.float64)
        table = (self.attention_biases if precise else self.attention_biases.float()).view(-1, *grid)
        same = not exporting and size == grid
        if same or self.resize == "matrix":
            whole = _pairs(table, grid)
            if same:
                return whole
            return _resized(whole, (rows * columns, rows * columns), exporting)
        return _pairs(_resized(table, size, exporting), size)

    def _bias_kept(self, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
        """`bias`, from last time if size and table are still the same."""
        key, table, kept = (rows, columns, dtype), self.attention_biases, self._kept
        if kept is not None and kept[0] == key and kept[1].dtype == table.dtype and torch.equal(kept[1], table):
            return kept[2]
        bias = self.bias(rows, columns).to(dtype)
        self._kept = (key, table.detach().clone(), bias)
        return bias

    def forward(
        self, x: Float[Tensor, "b h w c"], residual: Float[Tensor, "b h w c"] | None = None
    ) -> Float[Tensor, "b h w c"]:
        """residual: added to the result, inside the last kernel where that is possible."""
        b, h, w, _ = x.shape
        keys, values = self.heads * self.key_dim, self.heads * self.value_dim
        q, k, v = self.qkv(x).split([keys, keys, values], dim=3)
        q = self.dw(q)
        q, k, v = (t.reshape(b, h * w, self.heads, -1).transpose(1, 2) for t in (q, k, v))
        lean = fusable(x) and not self.training
        bias = self._bias_kept(h, w, q.dtype) if lean else self.bias(h, w).to(q.dtype)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=self.key_dim**-0.5)
        y = self.proj[0](y.transpose(1, 2).reshape(b, h, w, values))
        made: Tensor = self.proj[1](y, residual=residual)
        return made


@dataclass(frozen=True, kw_only=True, slots=True)
class OffsetAttentionMixer:
    """Attention with a bias per absolute offset in another mixer's place.

    heads: None takes the place's. key_dim: width of queries and keys per head.
    """

    heads: int | None = None
    key_dim: int = 16

    def build(self, place: Place) -> OffsetAttention:
        heads = self.heads or place.heads
        return OffsetAttention(place.dim, heads, key_dim=self.key_dim, grid=place.grid, norm_weight=1.0)


def _pairs(table: Float[Tensor, "heads rows columns"], grid: tuple[int, int]) -> Float[Tensor, "heads n n"]:
    """The table's entry (|dy|, |dx|) of every pair of places, row by row."""
    down, across = (torch.arange(n, device=table.device) for n in grid)
    dy, dx = (down[:, None] - down).abs(), (across[:, None] - across).abs()
    pairs = table[:, dy[:, None, :, None], dx[None, :, None, :]]
    return pairs.reshape(table.shape[0], grid[0] * grid[1], grid[0] * grid[1])


def _resized(maps: Float[Tensor, "heads h w"], size: tuple[int, int], exporting: bool) -> Float[Tensor, "heads H W"]:
    """Bicubic, a = -0.75; under export two products with matrices made on the spot."""
    if not exporting:
        return F.interpolate(maps[None], size=size, mode="bicubic", align_corners=False)[0]
    olds: Any = maps.shape[1:]
    rows, columns = (cubic_matrix(o, n, antialias=False, device=maps.device).to(maps.dtype) for o, n in zip(olds, size))
    heads = maps.shape[0]
    return torch.bmm(torch.bmm(rows.expand(heads, -1, -1), maps), columns.T.expand(heads, -1, -1))
