"""Outlook attention: each place predicts, from itself alone, how its neighbourhood is mixed (VOLO, arXiv 2106.13112).

A window of kernel x kernel cells stands on every `stride`-th cell. The average of stride x stride cells gives, by one
linear map, a softmaxed matrix from the window's cells to the window's cells, per head; what the windows make of their
values is added up where they overlap, without averaging. Cells outside the map are zeros that the softmax does see.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from lynceus.core.errors import AdviceError
from lynceus.layers.fused import linear
from lynceus.layers.mixers import Place


class OutlookAttention(nn.Module):
    """Outlook attention on a map b h w c; `attn` gives [heads, kernel**2 (to), kernel**2 (from)] per window.

    padding: cells that the first window reaches out of the map; None: half the kernel. scale: of the logits, None for
    head width ** -0.5.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        kernel: int = 3,
        stride: int = 1,
        padding: int | None = None,
        qkv_bias: bool = False,
        scale: float | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
    ):
        super().__init__()
        if dim % heads:
            good = heads * max(dim // heads, 1)
            raise AdviceError(f"dim {dim} cannot be shared by {heads} heads; take a multiple, e.g. dim={good}.")
        if not 1 <= stride <= kernel:
            raise AdviceError(f"stride {stride} would leave gaps between windows of {kernel}; take 1 to {kernel}.")
        self.heads, self.kernel, self.stride = heads, kernel, stride
        self.padding = kernel // 2 if padding is None else padding
        self.scale = scale if scale is not None else (dim // heads) ** -0.5
        self.v = nn.Linear(dim, dim, bias=qkv_bias)
        self.attn = nn.Linear(dim, heads * kernel**4)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def weights(self, x: Float[Tensor, "b h w c"]) -> Float[Tensor, "b rows columns g to source"]:
        """The matrices of all windows, before dropout: rows sum to 1."""
        if self.stride > 1:
            pooled = F.avg_pool2d(x.permute(0, 3, 1, 2), self.stride, self.stride, ceil_mode=True)
            x = pooled.permute(0, 2, 3, 1)
        b, rows, columns, _ = x.shape
        cells = self.kernel**2
        logits = linear(self.attn, x).reshape(b * rows * columns, self.heads * cells, cells)
        # softmax over a few numbers that lie side by side is slow: over the second axis instead
        weights = (logits * self.scale).transpose(1, 2).contiguous().softmax(1).transpose(1, 2)
        return weights.reshape(b, rows, columns, self.heads, cells, cells)

    def mix(self, x: Float[Tensor, "b h w c"]) -> Float[Tensor, "b h w c"]:
        """What the windows make of their values, added up; without the last projection."""
        b, h, w, c = x.shape
        g, cells, d = self.heads, self.kernel**2, c // self.heads
        weights = self.attn_drop(self.weights(x))
        rows, columns = weights.shape[1:3]
        layout = (rows, columns, self.kernel, self.stride, self.padding)
        v = windows(linear(self.v, x).reshape(b, h, w, g, d), layout)
        y = torch.bmm(weights.reshape(-1, cells, cells), v.reshape(-1, cells, d))
        return overlap_add(y.view(v.shape), (h, w), layout).reshape(b, h, w, c)

    def _mix_free_sizes(self, x: Float[Tensor, "b h w c"]) -> Float[Tensor, "b h w c"]:
        """The same by gathers, which ask nothing about sizes that an exported program leaves free."""
        b, h, w, c = x.shape
        g, k, s = self.heads, self.kernel, self.stride
        cells, n = k * k, ((h + s - 1) // s) * ((w + s - 1) // s)
        source, target = _places(h, w, k, s, self.padding, device=x.device)
        v = _gather(self.v(x), source).view(b * n, cells, g, c // g).transpose(1, 2)
        if s > 1:
            inside, _ = _places(h, w, s, s, 0, device=x.device)
            members = (inside < h * w).to(x.dtype).view(n, s * s).sum(1)
            x = _gather(x, inside).view(b, n, s * s, c).sum(2) / members[:, None]
        logits = self.attn(x).reshape(b * n * g, cells, cells)
        y = torch.bmm((logits * self.scale).softmax(-1), v.reshape(b * n * g, cells, c // g))
        y = y.view(b * n, g, cells, c // g).transpose(1, 2).reshape(-1).view(b, n * cells, c)
        return sum(_gather(y, place) for place in target).view(b, h, w, c)  # type: ignore[union-attr]

    def forward(self, x: Float[Tensor, "b h w c"], residual: Tensor | None = None) -> Float[Tensor, "b h w c"]:
        """residual: added to the result, inside the last kernel where that is possible."""
        x = self._mix_free_sizes(x) if torch.compiler.is_exporting() else self.mix(x)
        if self.training and self.proj_drop.p > 0:
            x = self.proj_drop(self.proj(x))
            return x if residual is None else residual + x
        return linear(self.proj, x, residual=residual)


def _gather(x: Tensor, places: Tensor) -> Tensor:
    """Rows of x (b, ..., c), its middle axes as one, at `places`; the place after the last gives zeros."""
    b, c = x.shape[0], x.shape[-1]
    count = x.shape[1] * x.shape[2] if x.ndim == 4 else x.shape[1]
    flat = F.pad(x.reshape(-1).view(b, count, c), (0, 0, 0, 1))
    return flat.index_select(1, places)


def _places(
    h: int, w: int, kernel: int, stride: int, padding: int, *, device: torch.device
) -> tuple[Tensor, list[Tensor]]:
    """Where the cells of all windows lie on the map, and, per way in which a window may cover it, which cell of which
    window lies on every place of the map. What lies outside is numbered one past the end."""
    down, across = (h + stride - 1) // stride, (w + stride - 1) // stride
    high, wide, rows, columns = (torch.full((), n, dtype=torch.int64, device=device) for n in (h, w, down, across))
    cells = kernel * kernel
    place = torch.arange(down * across * cells, device=device)
    number, cell = place // cells, place % cells
    y = number // columns * stride - padding + cell // kernel
    x = number % columns * stride - padding + cell % kernel
    source = torch.where((y >= 0) & (y < high) & (x >= 0) & (x < wide), y * wide + x, high * wide)
    place = torch.arange(h * w, device=device)
    y, x = place // wide + padding, place % wide + padding
    target = []
    for i in range(-(-kernel // stride)):
        for j in range(-(-kernel // stride)):
            row, column = y // stride - i, x // stride - j
            tap_y, tap_x = y % stride + i * stride, x % stride + j * stride
            covers = (row >= 0) & (row < rows) & (tap_y < kernel)
            covers = covers & (column >= 0) & (column < columns) & (tap_x < kernel)
            found = (row * columns + column) * cells + tap_y * kernel + tap_x
            target.append(torch.where(covers, found, rows * columns * cells))
    return source, target


Layout = tuple[int, int, int, int, int]  # rows and columns of windows, kernel, stride, padding


def windows(x: Float[Tensor, "b h w g d"], layout: Layout) -> Float[Tensor, "b rows columns g k k d"]:
    """All windows, moved apart; zeros outside the map. Window i starts at cell i * stride - padding."""
    if torch.is_grad_enabled() and x.requires_grad and not torch.compiler.is_compiling():
        out: Tensor = _Windows.apply(x, layout)
        return out
    return _windows(x, layout)


def overlap_add(
    y: Float[Tensor, "b rows columns g k k d"], size: tuple[int, int], layout: Layout
) -> Float[Tensor, "b h w g d"]:
    """The sum of all windows on a map of `size`, the reverse way of `windows`."""
    if torch.is_grad_enabled() and y.requires_grad and not torch.compiler.is_compiling():
        out: Tensor = _OverlapAdd.apply(y, size, layout)
        return out
    return _overlap_add(y, size, layout)


def _windows(x: Tensor, layout: Layout) -> Tensor:
    rows, columns, kernel, stride, padding = layout
    down, across = (
        (n - 1) * stride + kernel - padding - size for n, size in zip((rows, columns), (x.shape[1], x.shape[2]))
    )
    x = F.pad(x, (0, 0, 0, 0, padding, across, padding, down))
    view = x.unfold(1, kernel, stride).unfold(2, kernel, stride)  # b rows columns g d k k
    return view.permute(0, 1, 2, 3, 5, 6, 4).contiguous()


def _overlap_add(y: Tensor, size: tuple[int, int], layout: Layout) -> Tensor:
    rows, columns, kernel, stride, padding = layout
    down, across = ((n - 1) * stride + 1 for n in (rows, columns))
    high, wide = (max(n + kernel - 1, padding + side) for n, side in zip((down, across), size))
    out = y.new_zeros(y.shape[0], high, wide, y.shape[3], y.shape[6])
    for i in range(kernel):
        for j in range(kernel):
            out[:, i : i + down : stride, j : j + across : stride] += y[:, :, :, :, i, j]
    return out[:, padding : padding + size[0], padding : padding + size[1]]


class _Windows(torch.autograd.Function):
    """`windows` and `overlap_add` are each other's gradient; torch's own would fill a whole map per cell."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layout: Layout) -> Tensor:
        ctx.size, ctx.layout = (x.shape[1], x.shape[2]), layout
        return _windows(x, layout)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return overlap_add(grads[0], ctx.size, ctx.layout), None


class _OverlapAdd(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, size: tuple[int, int], layout: Layout) -> Tensor:
        ctx.layout = layout
        return _overlap_add(y, size, layout)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return windows(grads[0], ctx.layout), None, None


@dataclass(frozen=True, kw_only=True, slots=True)
class OutlookMixer:
    """Outlook attention. kernel, stride: side of the windows, and cells from one to the next. heads: None for those of
    the place."""

    heads: int | None = None
    kernel: int = 3
    stride: int = 1
    qkv_bias: bool = False

    def build(self, place: Place) -> OutlookAttention:
        return OutlookAttention(
            place.dim, self.heads or place.heads, kernel=self.kernel, stride=self.stride, qkv_bias=self.qkv_bias
        )
