"""Gated positional self-attention: content and a learned position in one attention, mixed by a gate per head (ConViT).

Attention is (1 - s) content + s position with s = sigmoid(gate). Position is softmax_j of a linear function of
(dx, dy, dx^2 + dy^2), where dx and dy lead from cell i to cell j of the map. Such a softmax is the product of one over
rows and one over columns, so position is applied as two small products per head, whatever the batch, and no table of
all pairs exists. Any rectangle goes; d'Ascoli et al., ICML 2021, arXiv 2103.10697.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from lynceus.core.errors import AdviceError
from lynceus.core.shapes import pooling_matrix
from lynceus.layers.fused import fusable, linear
from lynceus.layers.mixers import Place


class GatedPositionAttention(nn.Module):
    """Gated positional self-attention on a map b h w c.

    `qk` packs [2, heads, c / heads]; `pos_proj` holds the weights of (dx, dy, dx^2 + dy^2) per head and a bias without
    effect (a softmax does not see it); `gating_param` one gate per head. locality: strength a of the start, in which
    head k looks at one offset of a floor(sqrt(heads))-sided square, as -a |delta - offset_k|^2; heads beyond the square
    start at random. scale: of the content logits, None for head width ** -0.5.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        qkv_bias: bool = False,
        scale: float | None = None,
        locality: float = 1.0,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
    ):
        super().__init__()
        if dim % heads:
            good = heads * max(dim // heads, 1)
            raise AdviceError(f"dim {dim} cannot be shared by {heads} heads; take a multiple, e.g. dim={good}.")
        self.heads, self.locality = heads, locality
        self.scale = scale if scale is not None else (dim // heads) ** -0.5
        self.qk = nn.Linear(dim, 2 * dim, bias=qkv_bias)
        self.v = nn.Linear(dim, dim, bias=qkv_bias)
        self.attn_drop = attn_drop
        self.proj = nn.Linear(dim, dim)
        self.pos_proj = nn.Linear(3, heads)
        self.proj_drop = nn.Dropout(proj_drop)
        self.gating_param = nn.Parameter(torch.ones(heads))
        self._kept: tuple[Any, tuple[Tensor, ...], tuple[Tensor, Tensor]] | None = None
        for layer in (self.qk, self.v, self.proj, self.pos_proj):
            nn.init.trunc_normal_(layer.weight, std=0.02)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
        self.local_init()

    @torch.no_grad()
    def local_init(self) -> None:
        """The start as a convolution: identity values, heads on a square of offsets; call it after any other init."""
        nn.init.eye_(self.v.weight)
        side = math.isqrt(self.heads)
        head = torch.arange(side * side, device=self.pos_proj.weight.device)
        centre = (side - 1) / 2
        weight = self.pos_proj.weight[: side * side]
        weight[:, 0] = 2 * (head // side - centre)
        weight[:, 1] = 2 * (head % side - centre)
        weight[:, 2] = -1
        self.pos_proj.weight.mul_(self.locality)

    # position ---------------------------------------------------------------------------------------
    def position(
        self, height: int, width: int, of: tuple[int, int] | None = None
    ) -> tuple[Float[Tensor, "g h h"], Float[Tensor, "g w w"]]:
        """Positional attention over rows and over columns, at least float32; their product is that over cells.

        of: rows and columns of a finer map that the cells are averages of (None: none). A cell then asks as its parts
        do on average, and gets the sum of what they get.

        Elementwise on purpose: squared distances are too large for half precision, in which autocast would multiply.
        """
        weight, bias = (p.to(torch.promote_types(p.dtype, torch.float32)) for p in self.pos_proj.parameters())
        across, down, square = (w[:, None, None] for w in weight.unbind(1))
        y, x = (_offsets(n, like=weight) for n in of or (height, width))
        rows = (down * y + square * y * y + bias[:, None, None]).softmax(-1)
        columns = (across * x + square * x * x).softmax(-1)
        if of is not None and of != (height, width):
            rows, columns = _coarser(rows, height), _coarser(columns, width)
        return rows, columns

    @property
    def gate(self) -> Float[Tensor, " g"]:
        """Share of position in the attention of each head, in [0, 1]."""
        return torch.sigmoid(self.gating_param)

    def attention(self, x: Float[Tensor, "b h w c"], of: tuple[int, int] | None = None) -> Float[Tensor, "b g n n"]:
        """The attention of every cell to every cell, as one table: for inspection, and for dropout of its entries."""
        b, h, w, _ = x.shape
        q, k = self._heads(linear(self.qk, x), b, h * w, 2)
        content = ((q * self.scale) @ k.transpose(-2, -1)).softmax(-1)
        rows, columns = self.position(h, w, of)
        position = torch.einsum("gyv,gxu->gyxvu", rows, columns).reshape(self.heads, h * w, h * w).to(x.dtype)
        gate = self.gate.to(x.dtype)[:, None, None]
        mixed = (1 - gate) * content + gate * position
        return mixed / mixed.sum(-1, keepdim=True)

    def _heads(self, x: Tensor, b: int, n: int, parts: int) -> tuple[Tensor, ...]:
        return x.reshape(b, n, parts, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)

    def _gated(self, size: tuple[int, int], of: tuple[int, int] | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """`position`, the gate already in the second factor."""
        rows, columns = self.position(*size, of)
        return rows.to(dtype), (columns * self.gate.to(columns.dtype)[:, None, None]).to(dtype)

    def _gated_kept(
        self, size: tuple[int, int], of: tuple[int, int] | None, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """The same, from last time if the sizes and every number that it comes from are still equal."""
        key, kept = (size, of, dtype), self._kept
        sources = (self.pos_proj.weight, self.gating_param)
        if kept is not None and kept[0] == key and all(torch.equal(a, b) for a, b in zip(kept[1], sources)):
            return kept[2]
        made = self._gated(size, of, dtype)
        self._kept = (key, tuple(p.detach().clone() for p in sources), made)
        return made

    def _apply_position(
        self, v: Float[Tensor, "b h w c"], of: tuple[int, int] | None = None
    ) -> Float[Tensor, "b n g d"]:
        """gate * (positional attention @ v): first along columns of the map, then along its rows."""
        b, h, w, c = v.shape
        g, d = self.heads, c // self.heads
        lean = fusable(v) and not self.training
        rows, columns = (self._gated_kept if lean else self._gated)((h, w), of, v.dtype)
        x = v.reshape(b, h, w, g, d).permute(3, 1, 0, 2, 4).reshape(g, h, b * w * d)
        x = torch.bmm(rows, x).view(g, h, b, w, d).permute(0, 3, 1, 2, 4).reshape(g, w, h * b * d)
        x = torch.bmm(columns, x).view(g, w, h, b, d).permute(3, 2, 1, 0, 4)
        return x.reshape(b, h * w, g, d)

    def forward(
        self, x: Float[Tensor, "b h w c"], of: tuple[int, int] | None = None, *, residual: Tensor | None = None
    ) -> Float[Tensor, "b h w c"]:
        """of: rows and columns of the map that the cells of x are averages of; None: x is that map. residual: added to
        the result, inside the last kernel where that is possible."""
        b, h, w, c = x.shape
        v = linear(self.v, x)
        if self.training and self.attn_drop > 0:
            attention = F.dropout(self.attention(x, of), self.attn_drop)
            x = (attention @ self._heads(v, b, h * w, 1)[0]).transpose(1, 2)
        else:
            q, k = self._heads(linear(self.qk, x), b, h * w, 2)
            content = F.scaled_dot_product_attention(q, k, self._heads(v, b, h * w, 1)[0], scale=self.scale)
            content = content.transpose(1, 2)
            x = torch.addcmul(self._apply_position(v, of), content, (1 - self.gate).to(v.dtype)[:, None])
        x = x.reshape(b, h, w, c)
        if self.training and self.proj_drop.p > 0:
            x = self.proj_drop(self.proj(x))
            return x if residual is None else residual + x
        return linear(self.proj, x, residual=residual)

    # what it has learnt -----------------------------------------------------------------------------
    def centres(self) -> Float[Tensor, "g 2"]:
        """(dx, dy) that each head looks at by position: -w / (2 w3), the peak of its quadratic logits."""
        weight = self.pos_proj.weight.detach()
        return weight[:, :2] * self.spans()[:, None] / 2

    def spans(self) -> Float[Tensor, " g"]:
        """Squared width of each head's positional attention, -1 / w3."""
        return -1 / self.pos_proj.weight.detach()[:, 2]


def _offsets(n: int, *, like: Tensor) -> Float[Tensor, "n n"]:
    """Entry (i, j): steps from place i to place j of a line."""
    place = torch.arange(n, device=like.device).to(like.dtype)
    return place - place[:, None]


def _coarser(attention: Float[Tensor, "g n n"], count: int) -> Float[Tensor, "g m m"]:
    """Attention between places of a line, for `count` adaptive averages of them: mean over those that ask, sum over
    those that answer. A place that lies in two cells counts half in each."""
    asking = pooling_matrix(attention.shape[-1], count, attention)
    inside = (asking > 0).to(attention.dtype)
    return asking @ attention @ (inside / inside.sum(0)).t()


def distances(height: int, width: int, *, device: torch.device | None = None) -> Float[Tensor, "n n"]:
    """Euclidean distance between cells of a map, row by row, in steps of the grid."""
    y, x = (_offsets(n, like=torch.zeros((), device=device)) for n in (height, width))
    return (y[:, None, :, None].square() + x[None, :, None, :].square()).sqrt().reshape(height * width, -1)


def non_locality(attention: Float[Tensor, "b g n n"], height: int, width: int) -> Float[Tensor, " g"]:
    """How far each head looks: mean over images and queries of sum_j attention_ij * distance_ij, in grid steps."""
    far = distances(height, width, device=attention.device).to(attention.dtype)
    return (attention.mean(0) * far).sum(-1).mean(-1)


@dataclass(frozen=True, kw_only=True, slots=True)
class GatedPositionMixer:
    """Gated positional self-attention. locality: strength of the local start. heads: None for those of the place."""

    heads: int | None = None
    locality: float = 1.0
    qkv_bias: bool = False

    def build(self, place: Place) -> GatedPositionAttention:
        return GatedPositionAttention(
            place.dim, self.heads or place.heads, qkv_bias=self.qkv_bias, locality=self.locality
        )
