"""Attention whose queries, keys and values come from convolutions of the map: the token mixer of CvT.

A depthwise convolution and a batch norm stand before each linear layer; keys and values are sub-sampled by its stride,
which cuts the cost of attention by the stride's square. The convolutions also tell tokens where they are, so there is
no position table and any size goes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from lynceus.core.errors import AdviceError
from lynceus.layers.folded import Folds, conv_bn
from lynceus.layers.fused import linear
from lynceus.layers.mixers import Place

Projection = Literal["dw_bn", "avg", "linear"]
OFFERED = ("dw_bn", "avg", "linear")


class ConvBn(nn.Module):
    """Depthwise convolution and batch norm of a map b h w c; folded into one at inference on a CPU."""

    def __init__(self, dim: int, kernel: int, stride: int, padding: int):
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, kernel, stride, padding, groups=dim, bias=False)
        self.bn = nn.BatchNorm2d(dim)
        self._folds = Folds()

    def train(self, mode: bool = True) -> ConvBn:
        super().train(mode)
        self._folds.forget()
        return self

    def forward(self, x: Float[Tensor, "b h w c"]) -> Float[Tensor, "b H W c"]:
        x = conv_bn(x.permute(0, 3, 1, 2), self.conv, self.bn, folds=self._folds, name="conv")
        return x.permute(0, 2, 3, 1)


class Average(nn.Module):
    """Average pooling of a map b h w c: sizes rounded up, padding counted as zeros."""

    def __init__(self, kernel: int, stride: int, padding: int):
        super().__init__()
        self.avg = nn.AvgPool2d(kernel, stride, padding, ceil_mode=True)

    def forward(self, x: Float[Tensor, "b h w c"]) -> Float[Tensor, "b H W c"]:
        return self.avg(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class ConvProjection(nn.Module):
    """Multi-head attention over a map, with an optional class token that passes the convolutions by.

    projection: "dw_bn", depthwise convolution and batch norm for each of q, k, v; "avg", pooling for k and v, nothing
    for q; "linear", nothing. kernel: side of both. stride_q, stride_kv, padding_q, padding_kv: of queries, and of keys
    and values. Logits are scaled by dim ** -0.5, the full width's (not the head's). State names are the authors'.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        projection: Projection = "dw_bn",
        kernel: int = 3,
        stride_q: int = 1,
        stride_kv: int = 2,
        padding_q: int = 1,
        padding_kv: int = 1,
        qkv_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
    ):
        super().__init__()
        if dim % heads:
            good = heads * max(dim // heads, 1)
            raise AdviceError(f"dim {dim} cannot be shared by {heads} heads; take a multiple, e.g. dim={good}.")
        if projection not in OFFERED:
            raise AdviceError(f"projection is one of {', '.join(OFFERED)}, not {projection!r}.")
        if projection == "dw_bn" and (stride_q != 1 or kernel != 2 * padding_q + 1):
            raise AdviceError(
                f"Queries must keep the map's size for the shortcut: stride_q=1 and kernel = 2 padding_q + 1, not "
                f"stride_q={stride_q}, kernel={kernel}, padding_q={padding_q}."
            )
        self.heads = heads
        self.scale = dim**-0.5
        self.conv_proj_q = self._make("linear" if projection == "avg" else projection, dim, kernel, stride_q, padding_q)
        self.conv_proj_k = self._make(projection, dim, kernel, stride_kv, padding_kv)
        self.conv_proj_v = self._make(projection, dim, kernel, stride_kv, padding_kv)
        self.proj_q = nn.Linear(dim, dim, bias=qkv_bias)
        self.proj_k = nn.Linear(dim, dim, bias=qkv_bias)
        self.proj_v = nn.Linear(dim, dim, bias=qkv_bias)
        self.attn_drop = attn_drop
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    @staticmethod
    def _make(projection: str, dim: int, kernel: int, stride: int, padding: int) -> nn.Module:
        if projection == "dw_bn":
            return ConvBn(dim, kernel, stride, padding)
        return Average(kernel, stride, padding) if projection == "avg" else nn.Identity()

    def forward(
        self, x: Float[Tensor, "b *n c"], size: tuple[int, int] | None = None, *, residual: Tensor | None = None
    ) -> Float[Tensor, "b *n c"]:
        """x: a map b h w c; or, with its size (h, w), tokens b n c that end with it and begin with extra ones.

        residual: added to the result, inside the last kernel where that is possible.
        """
        b, c = x.shape[0], x.shape[-1]
        if size is None:
            extra, token, grid = 0, None, x
        else:
            extra = x.shape[1] - size[0] * size[1]
            token, grid = x[:, :extra], x[:, extra:].contiguous().view(b, *size, c)
        q, k, v = (
            self._heads(linear(layer, self._join(token, projection(grid))))
            for projection, layer in (
                (self.conv_proj_q, self.proj_q),
                (self.conv_proj_k, self.proj_k),
                (self.conv_proj_v, self.proj_v),
            )
        )
        drop = self.attn_drop if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=drop, scale=self.scale)
        y = y.transpose(1, 2).reshape(x.shape)
        if self.training and self.proj_drop.p > 0:
            y = self.proj_drop(self.proj(y))
            return y if residual is None else residual + y
        return linear(self.proj, y, residual=residual)

    @staticmethod
    def _join(token: Tensor | None, grid: Tensor) -> Float[Tensor, "b n c"]:
        tokens = grid.flatten(1, 2)
        return tokens if token is None else torch.cat([token, tokens], 1)

    def _heads(self, x: Float[Tensor, "b n c"]) -> Float[Tensor, "b g n d"]:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


@dataclass(frozen=True, kw_only=True, slots=True)
class ConvProjectionMixer:
    """CvT's attention. heads: None for those of the place. projection, kernel (odd), stride_kv: see ConvProjection."""

    heads: int | None = None
    projection: Projection = "dw_bn"
    kernel: int = 3
    stride_kv: int = 2
    qkv_bias: bool = True

    def build(self, place: Place) -> nn.Module:
        return ConvProjection(
            place.dim,
            self.heads or place.heads,
            projection=self.projection,
            kernel=self.kernel,
            stride_kv=self.stride_kv,
            padding_q=self.kernel // 2,
            padding_kv=self.kernel // 2,
            qkv_bias=self.qkv_bias,
        )
