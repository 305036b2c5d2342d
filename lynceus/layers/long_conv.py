"""Causal convolution whose kernel is as large as the grid, in any number of axes, channels last.

    y[p, q] = sum over a <= p, b <= q of kernel[a, b] x[p - a, q - b]        (two axes; per channel)

One operation, three ways, equal up to rounding: "direct" (a depthwise convolution: fastest on small grids without
gradients, and exactly causal), "products" (the Fourier transform as matrix products: fast forward and backward on
medium grids, and nothing complex, so every runtime can hold it), "fft" (large grids, and GPUs).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from lynceus.core.errors import AdviceError, unknown

Way = Literal["auto", "direct", "products", "fft"]
WAYS: tuple[str, ...] = ("auto", "direct", "products", "fft")
# largest grids, measured on a CPU: cells for "direct" without gradients, sides for "products" without and with them
DIRECT_CELLS, PRODUCT_SIDE, PRODUCT_SIDE_TRAINING = 576, 40, 64


@dataclass(frozen=True, slots=True)
class LongKernel:
    """A kernel made ready for one way: what `long_conv` multiplies with. `flipped`: axes whose lags are negative."""

    way: str
    grid: tuple[int, ...]
    flipped: tuple[int, ...]
    parts: tuple[Tensor, ...]


def choose(x: Tensor, *, grad: bool) -> str:
    """The fastest way for x (b, *grid, c) on its device; grad: gradients will be asked for."""
    if torch.compiler.is_exporting():
        return "products"
    grid = x.shape[1:-1]
    if x.device.type != "cpu":
        return "fft"
    if not grad and len(grid) <= 2 and math.prod(grid) <= DIRECT_CELLS:
        return "direct"
    return "products" if max(grid) <= (PRODUCT_SIDE_TRAINING if grad else PRODUCT_SIDE) else "fft"


def prepare(kernel: Float[Tensor, "*grid c"], way: str, flipped: Sequence[int] = ()) -> LongKernel:
    """The kernel in the form that `way` needs. flipped: axes along which it looks forward instead of back."""
    grid, axes = tuple(kernel.shape[:-1]), kernel.ndim - 1
    if way not in WAYS[1:]:
        raise unknown("way", way, WAYS)
    if any(not 0 <= axis < axes for axis in flipped):
        raise AdviceError(f"A kernel of {axes} axes can be flipped along 0 to {axes - 1}, not {list(flipped)}.")
    parts: tuple[Tensor, ...]
    if way == "direct":
        if axes > 2:
            raise AdviceError("'direct' takes one or two axes; take way='products' or 'fft'.")
        # convolutions of torch look forward, so it is the other axes that turn
        weight = kernel.flip([axis for axis in range(axes) if axis not in flipped])
        weight = weight if axes == 2 else weight[None]
        parts = (weight.permute(2, 0, 1)[:, None].contiguous(),)
    elif way == "products":
        parts = _transform(kernel[None], flipped)
    else:
        sizes = [2 * n for n in grid]
        spectrum = torch.fft.rfftn(kernel, s=sizes, dim=list(range(axes)))
        for axis in flipped:  # e^(+i w a): the spectrum of the kernel turned round along this axis
            if axis == axes - 1:  # the halved axis: conjugate, and turn the others instead
                spectrum = _negated(spectrum.conj(), range(axes - 1))
            else:
                spectrum = _negated(spectrum, [axis])
        parts = (spectrum,)
    return LongKernel(way, grid, tuple(flipped), parts)


def long_conv(x: Float[Tensor, "b *grid c"], kernel: LongKernel) -> Float[Tensor, "b *grid c"]:
    """The convolution of x with a kernel made by `prepare` for its grid."""
    axes = list(range(1, x.ndim - 1))
    if kernel.way == "direct":
        return _direct(x, kernel)
    if kernel.way == "products":
        (a, b), (r, i) = _transform(x), kernel.parts
        return _inverse(a * r - b * i, a * i + b * r, x.shape[1:-1])
    sizes = [2 * n for n in x.shape[1:-1]]
    y = torch.fft.irfftn(torch.fft.rfftn(x, s=sizes, dim=axes) * kernel.parts[0], s=sizes, dim=axes)
    for axis in axes:
        y = y.narrow(axis, 0, x.shape[axis])
    return y


def causal_conv(
    x: Float[Tensor, "b *grid c"], kernel: Float[Tensor, "*grid c"], *, flipped: Sequence[int] = (), way: Way = "auto"
) -> Float[Tensor, "b *grid c"]:
    """The convolution at the top of this file; along `flipped` axes (from 0) it looks forward instead of back."""
    if tuple(kernel.shape) != tuple(x.shape[1:]):
        raise AdviceError(f"The kernel of a grid {tuple(x.shape[1:])} has that shape, not {tuple(kernel.shape)}.")
    grad = torch.is_grad_enabled() and (x.requires_grad or kernel.requires_grad)
    return long_conv(x, prepare(kernel, choose(x, grad=grad) if way == "auto" else way, flipped))


# direct ----------------------------------------------------------------------------------------------
def _direct(x: Tensor, kernel: LongKernel) -> Tensor:
    image = x.movedim(-1, 1) if x.ndim == 4 else x.movedim(-1, 1)[:, :, None]
    pads: list[int] = []
    for axis in reversed(range(len(kernel.grid))):
        reach = kernel.grid[axis] - 1
        pads += [0, reach] if axis in kernel.flipped else [reach, 0]
    y = F.conv2d(F.pad(image, pads), kernel.parts[0].to(x.dtype), groups=x.shape[-1])
    return (y if x.ndim == 4 else y[:, :, 0]).movedim(1, -1)


# the transform as matrix products -----------------------------------------------------------------------
def _angles(rows: int, columns: int, period: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin of 2 pi j k / period, for j < rows and k < columns; whole periods are taken off before rounding."""
    j = torch.arange(rows, device=like.device)[:, None] * torch.arange(columns, device=like.device)
    angle = (j % period).to(torch.float64) * (2 * math.pi / period)
    return angle.cos().to(like.dtype), angle.sin().to(like.dtype)


def _transform(x: Tensor, flipped: Sequence[int] = ()) -> tuple[Tensor, Tensor]:
    """Real and imaginary part of the transform of x (b, *grid, c) with period 2 n - 1 along every axis of n cells;
    of the first axis the frequencies 0 .. n - 1, which determine the others. Flipped axes turn the other way."""
    b, n, c = x.shape[0], x.shape[1], x.shape[-1]
    rest = x.shape[2:-1]
    cos, sin = _angles(n, n, 2 * n - 1, x)
    width = c * math.prod(rest)
    sign = 1.0 if 0 in flipped else -1.0
    y = torch.matmul(torch.cat([cos, sign * sin]), x.reshape(b, n, width))  # b (2 n) rest
    y = y.reshape(b, 2, n, width)
    before, after = n, width
    for axis, m in enumerate(rest, start=1):
        after = after // m
        cos, sin = _angles(2 * m - 1, m, 2 * m - 1, x)
        sin = -sin if axis in flipped else sin
        turn = torch.cat([torch.cat([cos, sin], 1), torch.cat([-sin, cos], 1)])
        y = y.reshape(b, 2, before, m, after).transpose(1, 2).reshape(b * before, 2 * m, after)
        y = torch.matmul(turn, y).reshape(b, before, 2, (2 * m - 1) * after).transpose(1, 2)
        before = before * (2 * m - 1)
    y = y.reshape(b, 2, before, c)
    return y[:, 0], y[:, 1]


def _inverse(real: Tensor, imaginary: Tensor, grid: Sequence[int]) -> Tensor:
    """The first cells of the inverse of `_transform`, as a map (b, *grid, c)."""
    b, before, c = real.shape
    y = torch.stack([real, imaginary], 1)
    after = c
    for m in reversed(grid[1:]):
        period = 2 * m - 1
        before = before // period
        cos, sin = _angles(m, period, period, real)
        turn = torch.cat([torch.cat([cos, -sin], 1), torch.cat([sin, cos], 1)]) / period
        y = y.reshape(b, 2, before, period * after).transpose(1, 2).reshape(b * before, 2 * period, after)
        y = torch.matmul(turn, y).reshape(b, before, 2, m * after).transpose(1, 2)
        after = after * m
    n = grid[0]
    cos, sin = _angles(n, n, 2 * n - 1, real)
    twice = torch.full((n,), 2.0, dtype=real.dtype, device=real.device) - (torch.arange(n, device=real.device) == 0).to(
        real.dtype
    )
    back = torch.cat([cos * twice, -sin * twice], 1) / (2 * n - 1)
    return torch.matmul(back, y.reshape(b, 2 * n, after)).reshape(b, *grid, c)


def _negated(spectrum: Tensor, axes: Sequence[int]) -> Tensor:
    """Frequencies turned round: index k becomes -k."""
    axes = list(axes)
    return spectrum.flip(axes).roll([1] * len(axes), axes) if axes else spectrum
