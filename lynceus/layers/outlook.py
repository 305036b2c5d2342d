"""Outlook attention: each place predicts, from itself alone, how its neighbourhood is mixed (VOLO, arXiv 2106.13112).

A window of kernel x kernel cells stands on every `stride`-th cell. The average of stride x stride cells gives, by one
linear map, a softmaxed matrix from the window's cells to the window's cells, per head; what the windows make of their
values is added up where they overlap, without averaging. Cells outside the map are zeros that the softmax does see.
"""

from __future__ import annotations

from dataclasses import dataclass

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
        logits = linear(self.attn, x).reshape(b, rows, columns, self.heads, cells, cells)
        return (logits * self.scale).softmax(-1)

    def mix(self, x: Float[Tensor, "b h w c"]) -> Float[Tensor, "b h w c"]:
        """What the windows make of their values, added up; without the last projection."""
        b, h, w, c = x.shape
        k, d = self.kernel, c // self.heads
        weights = self.attn_drop(self.weights(x))
        rows, columns = weights.shape[1:3]
        # rows columns heads cells d: the order of the products, so that values are moved once
        v = windows(linear(self.v, x), (rows, columns), k, self.stride, self.padding)
        v = v.reshape(b, rows, columns, k, k, self.heads, d).permute(0, 1, 2, 5, 3, 4, 6)
        count = b * rows * columns * self.heads
        y = torch.bmm(weights.reshape(count, k * k, k * k), v.reshape(count, k * k, d))
        y = y.view(b, rows, columns, self.heads, k, k, d).permute(0, 1, 2, 4, 5, 3, 6)
        return overlap_add(y.reshape(b, rows, columns, k, k, c), (h, w), self.stride, self.padding)

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


def windows(
    x: Float[Tensor, "b h w c"], count: tuple[int, int], kernel: int, stride: int, padding: int
) -> Float[Tensor, "b rows columns k k c"]:
    """A view of `count` (rows, columns) windows, zeros outside the map; window i starts at i * stride - padding."""
    h, w = x.shape[1:3]
    down, across = ((n - 1) * stride + kernel - padding - size for n, size in zip(count, (h, w)))
    x = F.pad(x, (0, 0, padding, across, padding, down))
    return x.unfold(1, kernel, stride).unfold(2, kernel, stride).permute(0, 1, 2, 4, 5, 3)


def overlap_add(
    y: Float[Tensor, "b rows columns k k c"], size: tuple[int, int], stride: int, padding: int
) -> Float[Tensor, "b h w c"]:
    """The sum of all windows on a map of `size`, the reverse way of `windows`."""
    y = _add_lines(y.transpose(2, 3), size[0], stride, padding)  # b h columns k c
    x = _add_lines(y.flatten(0, 1), size[1], stride, padding)  # b*h w c
    return x.view(y.shape[0], size[0], size[1], y.shape[-1])


def _add_lines(y: Tensor, size: int, stride: int, padding: int) -> Tensor:
    """b n k ... -> b size ...: windows of k places, one every `stride`, added up; k is cut into pieces of a stride,
    and piece g of window i lies where piece 0 of window i + g does."""
    b, n, k = y.shape[:3]
    rest = y.shape[3:]
    pieces = -(-k // stride)
    flat = (0, 0) * len(rest)
    if pieces * stride > k:
        y = F.pad(y, (*flat, 0, pieces * stride - k))
    parts = y.reshape(b, n, pieces, stride, *rest)
    total = sum(F.pad(parts[:, :, g], (*flat, 0, 0, g, pieces - 1 - g)) for g in range(pieces))
    assert isinstance(total, Tensor)
    total = total.reshape(b, (n + pieces - 1) * stride, *rest)
    short = padding - (pieces - 1) * stride  # places after the last window, where windows hardly overlap
    if short > 0:
        total = F.pad(total, (*flat, 0, short))
    return total[:, padding : padding + size]


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
