"""Attention, or one linear map per head, inside the windows of a map: the spatial mixers of Swin.

Windows lie on a grid of M x M cells over the map rolled by (-shift, -shift); a map that is no multiple of M is
zero-padded right and bottom before the roll, and padded cells are not masked out. Everything that depends on
the map's size is made on demand from that size, so no mask can be stale and sizes may be free under export.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from lynceus.core.errors import AdviceError
from lynceus.core.shapes import pad_map
from lynceus.layers.fused import autocasting, fusable, hooked, linear
from lynceus.layers.mixers import Place
from lynceus.layers.pieces import PIECE

BLOCKED = -100.0  # added to the logits of pairs that only meet because the map was rolled


def grid(height: int, width: int, window: int) -> tuple[int, int]:
    """Rows and columns of windows over a map."""
    return (height + window - 1) // window, (width + window - 1) // window


def to_windows(x: Float[Tensor, "b h w c"], window: int, shift: int = 0) -> Float[Tensor, "windows cells c"]:
    """Windows in row-major order, image by image: (b * rows * columns, window**2, c)."""
    b, c = x.shape[0], x.shape[3]
    rows, columns = grid(x.shape[1], x.shape[2], window)
    h, w = rows * window, columns * window
    x = pad_map(x, window)
    if _by_index(x, shift):
        place = torch.arange(rows * columns * window * window, device=x.device)
        number, cell = place // (window * window), place % (window * window)
        high, wide, across = _numbers(h, w, columns, device=x.device)
        row = (number // across * window + cell // window + shift) % high
        order = row * wide + (number % across * window + cell % window + shift) % wide
        # flat first: torch.export would ask whether the two leading axes are equal, and they are for one window
        x = x.reshape(-1).view(b, h * w, c).index_select(1, order)
        return x.view(-1).view(b * rows * columns, window * window, c)
    if shift:
        x = torch.roll(x, (-shift, -shift), (1, 2))
    x = x.reshape(b, rows, window, columns, window, c).transpose(2, 3)
    return x.reshape(b * rows * columns, window * window, c)


def from_windows(
    x: Float[Tensor, "windows cells c"], size: tuple[int, int, int], window: int, shift: int = 0
) -> Float[Tensor, "b h w c"]:
    """The reverse of `to_windows` for a map of `size` (b, h, w): un-rolled, without the padding."""
    b, height, width = size
    rows, columns = grid(height, width, window)
    h, w, c = rows * window, columns * window, x.shape[-1]
    if _by_index(x, shift):
        place = torch.arange(height * width, device=x.device)
        high, wide, across, side = _numbers(h, w, columns, width, device=x.device)
        row, column = (place // side + high - shift) % high, (place % side + wide - shift) % wide
        number = row // window * across + column // window
        order = number * (window * window) + row % window * window + column % window
        return x.reshape(-1).view(b, h * w, c).index_select(1, order).view(-1).view(b, height, width, c)
    x = x.reshape(b, rows, columns, window, window, c).transpose(2, 3).reshape(b, h, w, c)
    if shift:
        x = torch.roll(x, (shift, shift), (1, 2))
    return x[:, :height, :width]


def _by_index(x: Tensor, shift: int) -> bool:
    """Cells moved by one gather: one pass over memory instead of three; in an export, no question about free sizes."""
    return (shift > 0 and fusable(x)) or torch.compiler.is_exporting()


def _numbers(*sizes: int, device: torch.device | None) -> list[Tensor]:
    """Sizes as tensors: arithmetic with them exports when they are free."""
    return [torch.full((), n, dtype=torch.int64, device=device) for n in sizes]


def relative_index(window: int) -> Int[Tensor, "cells cells"]:
    """Row of the bias table for query (r1, c1) and key (r2, c2): (r1 - r2 + M - 1)(2M - 1) + (c1 - c2 + M - 1)."""
    r, c = torch.arange(window).repeat_interleave(window), torch.arange(window).repeat(window)
    return (r[:, None] - r + window - 1) * (2 * window - 1) + (c[:, None] - c + window - 1)


def shift_mask(
    rows: int, columns: int, window: int, shift: int, *, device: torch.device | None = None
) -> Float[Tensor, "windows cells cells"]:
    """0 for pairs that were neighbours before the roll, -100 for the others; only last rows and columns hold any."""
    wrapped = torch.arange(window, device=device) >= window - shift
    differ = wrapped[:, None] != wrapped
    cells = window * window
    by_row = differ[:, None, :, None].expand(window, window, window, window).reshape(cells, cells)
    by_column = differ[None, :, None, :].expand(window, window, window, window).reshape(cells, cells)
    number = torch.arange(rows * columns, device=device)[:, None, None]
    down, across = _numbers(rows, columns, device=device)
    blocked = ((number // across == down - 1) & by_row) | ((number % across == across - 1) & by_column)
    return blocked.float() * BLOCKED


def _equal(old: tuple[Tensor, ...], new: tuple[Tensor, ...]) -> bool:
    return all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(old, new))


class AnyWindowAttention(nn.Module):
    """Softmax attention inside each window. A kind of attention adds where the bias of relative positions comes from
    (`table`, from the tensors `sources`) and how windows become queries, keys and values (`heads_of`).
    """

    relative_index: Tensor
    qkv: nn.Linear
    proj: nn.Linear
    scale: float | None = None  # of the logits; None: head width ** -0.5

    def __init__(self, dim: int, heads: int, window: int, *, shift: int, attn_drop: float, proj_drop: float):
        super().__init__()
        if dim % heads:
            raise AdviceError(
                f"dim {dim} cannot be shared by {heads} heads; take a multiple, e.g. {heads * max(dim // heads, 1)}."
            )
        self.heads, self.window, self.shift = heads, window, shift
        self.head_dim = dim // heads
        self.attn_drop = attn_drop
        self.proj_drop = nn.Dropout(proj_drop)
        self.register_buffer("relative_index", relative_index(window).flatten(), persistent=False)
        self._kept: tuple[tuple[int, int, torch.dtype], tuple[Tensor, ...], Tensor] | None = None

    def table(self) -> Float[Tensor, "places heads"]:
        """The bias of each of the (2 window - 1)**2 relative positions, row by row."""
        raise NotImplementedError

    def sources(self) -> tuple[Tensor, ...]:
        """The parameters that `table` is made of."""
        raise NotImplementedError

    def makers(self) -> tuple[nn.Module, ...]:
        """The modules that make `table` from them."""
        return ()

    def heads_of(self, x: Float[Tensor, "windows cells c"]) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, each (windows, heads, cells, c / heads)."""
        raise NotImplementedError

    def bias(self, rows: int, columns: int, dtype: torch.dtype) -> Float[Tensor, "windows heads cells cells"]:
        """What is added to the logits: (1, heads, n, n), or one for each of rows * columns windows when shifted."""
        cells = self.window * self.window
        bias = self.table()[self.relative_index].view(cells, cells, self.heads).permute(2, 0, 1)[None]
        if self.shift:
            mask = shift_mask(rows, columns, self.window, self.shift, device=bias.device)
            bias = bias + mask[:, None].to(bias.dtype)
        return bias.to(dtype).contiguous()

    def _bias_kept(self, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
        """`bias`, from last time if the sizes and every number that it is made of are still the same."""
        key = (rows, columns, dtype) if self.shift else (0, 0, dtype)
        if hooked(*self.makers()):
            return self.bias(rows, columns, dtype)
        sources, kept = self.sources(), self._kept
        if kept is not None and kept[0] == key and _equal(kept[1], sources):
            return kept[2]
        bias = self.bias(rows, columns, dtype)
        self._kept = (key, tuple(t.detach().clone() for t in sources), bias)
        return bias

    def forward(self, x: Float[Tensor, "b h w c"]) -> Float[Tensor, "b h w c"]:
        b, h, w, _ = x.shape
        rows, columns = grid(h, w, self.window)
        lean = fusable(x) and not self.training
        x = to_windows(x, self.window, self.shift)
        if lean:
            x = self._some_at_a_time(x, self._bias_kept(rows, columns, x.dtype), b)
        else:
            x = self.attend(x, self.bias(rows, columns, x.dtype), b)
        return from_windows(self.proj_drop(x), (b, h, w), self.window, self.shift)

    def attend(self, x: Float[Tensor, "windows cells c"], bias: Tensor, batch: int) -> Float[Tensor, "windows cells c"]:
        """Attention inside windows; bias: what `bias` gives for the windows of one image out of `batch`."""
        q, k, v = self.heads_of(x)
        # heads that came in float32 although autocast is on stay in it
        precise = q.dtype == torch.float32 and autocasting(q)
        with torch.autocast(q.device.type, enabled=False) if precise else nullcontext():
            y = self._mix(q, k, v.to(q.dtype), bias.to(q.dtype), batch)
        y = y.transpose(1, 2)
        if torch.compiler.is_exporting():  # the kernel's layout is not that of the plain products it is exported as
            y = y.clone(memory_format=torch.contiguous_format)
        return linear(self.proj, y.flatten(2))

    def _mix(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, batch: int) -> Tensor:
        drop = self.attn_drop if self.training else 0.0
        if torch.is_grad_enabled() and q.device.type == "cpu" and not torch.compiler.is_compiling():
            # no fused kernel there has a gradient for the bias; written out, the bias need not be repeated
            scale = q.shape[-1] ** -0.5 if self.scale is None else self.scale
            logits = (q if scale == 1 else q * scale) @ k.transpose(-2, -1)
            logits = (logits.view(batch, -1, *logits.shape[1:]) + bias).view(logits.shape)
            return F.dropout(logits.softmax(-1), drop, drop > 0) @ v
        if self.shift:
            bias = bias[None].expand(batch, -1, -1, -1, -1).reshape(-1, *bias.shape[1:])
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=drop, scale=self.scale)

    def _some_at_a_time(self, x: Tensor, bias: Tensor, batch: int) -> Tensor:
        """`attend` on no more windows at a time than the cache holds."""
        count, cells, c = x.shape
        most = max(PIECE * torch.get_num_threads() // (cells * 3 * c * x.element_size()), 1)
        if count <= 2 * most or hooked(self.qkv, self.proj):
            return self.attend(x, bias, batch)
        out = torch.empty_like(x)
        each = count // batch
        for start in range(0, count, each):  # image by image, since shifted windows differ inside one only
            for first in range(0, each, most):
                last = min(first + most, each)
                own = bias[first:last] if self.shift else bias
                out[start + first : start + last] = self.attend(x[start + first : start + last], own, 1)
        return out


class WindowAttention(AnyWindowAttention):
    """Multi-head attention inside each window, with a learned bias for every relative position.

    `relative_position_bias_table` is ((2 window - 1)**2, heads); `qkv` packs [3, heads, dim / heads].
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        window: int,
        *,
        shift: int = 0,
        qkv_bias: bool = True,
        scale: float | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
    ):
        super().__init__(dim, heads, window, shift=shift, attn_drop=attn_drop, proj_drop=proj_drop)
        self.scale = scale
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * window - 1) ** 2, heads))
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def table(self) -> Float[Tensor, "places heads"]:
        return self.relative_position_bias_table

    def sources(self) -> tuple[Tensor, ...]:
        return (self.relative_position_bias_table,)

    def heads_of(self, x: Float[Tensor, "windows cells c"]) -> tuple[Tensor, Tensor, Tensor]:
        count, cells, _ = x.shape
        qkv = linear(self.qkv, x).view(count, cells, 3, self.heads, self.head_dim)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        return q, k, v


class WindowMlp(nn.Module):
    """Swin-MLP's mixer: one (window**2 x window**2) matrix and bias per head, shared by the head's channels.

    Shifted windows come from zero padding (window - shift before, shift after), so there is one more per axis; nothing
    is rolled. `spatial_mlp` is kept as the grouped 1x1 convolution of the authors: (heads * n, n, 1).
    """

    def __init__(self, dim: int, heads: int, window: int, *, shift: int = 0):
        super().__init__()
        if dim % heads:
            raise AdviceError(
                f"dim {dim} cannot be shared by {heads} heads; take a multiple, e.g. {heads * max(dim // heads, 1)}."
            )
        self.heads, self.window, self.shift = heads, window, shift
        cells = window * window
        self.spatial_mlp = nn.Conv1d(heads * cells, heads * cells, 1, groups=heads)

    def forward(self, x: Float[Tensor, "b h w c"]) -> Float[Tensor, "b h w c"]:
        b, h, w, c = x.shape
        cells, before, after = self.window * self.window, self.window - self.shift, self.shift
        x = pad_map(x, self.window)
        if self.shift:
            x = F.pad(x, (0, 0, before, after, before, after))
        size = (b, x.shape[1], x.shape[2])
        x = to_windows(x, self.window)
        count = x.shape[0]
        x = x.view(count, cells, self.heads, c // self.heads).transpose(1, 2)
        x = self.spatial_mlp(x.reshape(count, self.heads * cells, c // self.heads))
        x = x.view(count, self.heads, cells, c // self.heads).transpose(1, 2).reshape(count, cells, c)
        x = from_windows(x, size, self.window)
        start = before if self.shift else 0
        return x[:, start : start + h, start : start + w]


def window_of(place: Place, window: int, shift: bool | None) -> tuple[int, int]:
    """(side, shift) of the windows at a place: no larger than its map; odd blocks are shifted if `shift` is None."""
    least = min(place.grid)
    side = min(window, least)
    moved = side < least and (place.index % 2 == 1 if shift is None else shift)
    return side, side // 2 if moved else 0


@dataclass(frozen=True, kw_only=True, slots=True)
class WindowMixer:
    """Window attention. heads: None for those of the place. window: its side, no larger than the place's map. shift:
    whether windows are shifted by half; None: in every second block."""

    heads: int | None = None
    window: int = 7
    shift: bool | None = None
    qkv_bias: bool = True

    def build(self, place: Place) -> nn.Module:
        side, shift = window_of(place, self.window, self.shift)
        return WindowAttention(place.dim, self.heads or place.heads, side, shift=shift, qkv_bias=self.qkv_bias)


@dataclass(frozen=True, kw_only=True, slots=True)
class WindowMlpMixer:
    """Swin-MLP's matrices inside windows; options as WindowMixer's."""

    heads: int | None = None
    window: int = 7
    shift: bool | None = None

    def build(self, place: Place) -> nn.Module:
        side, shift = window_of(place, self.window, self.shift)
        return WindowMlp(place.dim, self.heads or place.heads, side, shift=shift)
