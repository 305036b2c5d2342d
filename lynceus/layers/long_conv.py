"""Causal convolution whose kernel is as large as the grid, in any number of axes, channels last.

    y[p, q] = sum over a <= p, b <= q of kernel[a, b] x[p - a, q - b]        (two axes; per channel)

One operation, three ways, equal up to rounding: "direct" (a depthwise convolution: fastest on small grids without
gradients, and exactly causal), "products" (the Fourier transform as matrix products: fastest forward and backward on
small grids, and nothing complex, so every runtime can hold it), "fft" (large grids, and GPUs).
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
# largest grids, measured on a CPU: cells of one and two axes for "direct" without gradients, sides for "products" with
DIRECT_CELLS, PRODUCT_SIDE = {1: 256, 2: 900}, 16


Waves = tuple[Tensor, Tensor]


@dataclass(frozen=True, slots=True)
class LongKernel:
    """A kernel made ready for one way: what `long_conv` multiplies with. `flipped`: axes whose lags are negative.
    waves: cos and sin for each axis, where the way needs them."""

    way: str
    grid: tuple[int, ...]
    flipped: tuple[int, ...]
    parts: tuple[Tensor, ...]
    waves: tuple[Waves, ...] = ()


def choose(x: Tensor, *, grad: bool) -> str:
    """The fastest way for x (b, *grid, c) on its device; grad: gradients will be asked for."""
    if torch.compiler.is_compiling():  # compilers have no code for complex numbers, and ONNX runtimes odd ones
        return "products"
    grid = x.shape[1:-1]
    if x.device.type != "cpu":
        return "fft"
    if not grad:
        return "direct" if math.prod(grid) <= DIRECT_CELLS.get(len(grid), 0) else "fft"
    return "products" if max(grid) <= PRODUCT_SIDE else "fft"


def prepare(kernel: Float[Tensor, "*grid c"], way: str, flipped: Sequence[int] = ()) -> LongKernel:
    """The kernel in the form that `way` needs. flipped: axes along which it looks forward instead of back."""
    grid, axes = tuple(kernel.shape[:-1]), kernel.ndim - 1
    if way not in WAYS[1:]:
        raise unknown("way", way, WAYS)
    if any(not 0 <= axis < axes for axis in flipped):
        raise AdviceError(f"A kernel of {axes} axes can be flipped along 0 to {axes - 1}, not {list(flipped)}.")
    parts: tuple[Tensor, ...]
    waves: tuple[Waves, ...] = ()
    if way == "direct":
        if axes > 2:
            raise AdviceError("'direct' takes one or two axes; take way='products' or 'fft'.")
        # convolutions of torch look forward, so it is the other axes that turn
        weight = kernel.flip([axis for axis in range(axes) if axis not in flipped])
        weight = weight if axes == 2 else weight[None]
        parts = (weight.permute(2, 0, 1)[:, None].contiguous(),)
    elif way == "products":
        waves = tuple(_waves(n, kernel) for n in grid)
        parts = _transform(kernel[None], waves, flipped)
    else:
        spectrum = _spectrum(kernel, range(axes))
        for axis in flipped:  # e^(+i w a): the spectrum of the kernel turned round along this axis
            if axis == axes - 1:  # the halved axis: conjugate, and turn the others instead
                spectrum = _negated(spectrum.conj(), range(axes - 1))
            else:
                spectrum = _negated(spectrum, [axis])
        parts = (spectrum,)
    return LongKernel(way, grid, tuple(flipped), parts, waves)


def long_conv(x: Float[Tensor, "b *grid c"], kernel: LongKernel) -> Float[Tensor, "b *grid c"]:
    """The convolution of x with a kernel made by `prepare` for its grid."""
    axes = list(range(1, x.ndim - 1))
    if kernel.way == "direct":
        return _direct(x, kernel)
    if kernel.way == "products":
        (a, b), (r, i) = _transform(x, kernel.waves), kernel.parts
        return _inverse(a * r - b * i, a * i + b * r, kernel.waves)
    y = _spectrum(x, axes) * kernel.parts[0]
    for axis in axes[:-1]:  # axis by axis: what lies outside the grid is cut off before the next one
        y = torch.fft.ifft(y, dim=axis).narrow(axis, 0, x.shape[axis])
    return torch.fft.irfft(y, n=2 * x.shape[-2], dim=axes[-1]).narrow(axes[-1], 0, x.shape[-2])


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
def _period(length: int) -> int:
    """Long enough that nothing comes round; in an export even, for then torch can prove that a matrix is not empty."""
    return 2 * length if torch.compiler.is_exporting() else 2 * length - 1


def _waves(length: int, like: Tensor) -> Waves:
    """cos and sin of 2 pi k j / period, (frequencies, length), for frequencies k and places j."""
    k, j = torch.arange(_period(length), device=like.device), torch.arange(length, device=like.device)
    period = torch.full((), _period(length), dtype=torch.int64, device=like.device)  # as a tensor: free sizes export
    angle = (k[:, None] * j % period).to(torch.float64) * (2 * math.pi / period.to(torch.float64))
    return angle.cos().to(like.dtype), angle.sin().to(like.dtype)


def _half(waves: Waves) -> Waves:
    """The lower half of the frequencies, which determines the others; in an export all."""
    cos, sin = waves
    return waves if torch.compiler.is_exporting() else (cos[: cos.shape[1]], sin[: cos.shape[1]])


def _times(matrix: Float[Tensor, "m n"], x: Float[Tensor, "*batch n c"]) -> Float[Tensor, "*batch m c"]:
    """matrix @ x, in an export without questions about free sizes: they cannot be proved to differ from 0 and 1."""
    if not torch.compiler.is_exporting():
        return matrix @ x
    batch, (n, c) = x.shape[:-2], x.shape[-2:]
    count = math.prod(batch)
    flat = x.clone(memory_format=torch.contiguous_format).view(-1).view(count, n, c)
    y = torch.bmm(matrix.expand(count, -1, -1), flat)
    return y.view(-1).view(*batch, matrix.shape[0], c)


def _transform(x: Tensor, waves: Sequence[Waves], flipped: Sequence[int] = ()) -> tuple[Tensor, Tensor]:
    """Real and imaginary part of the transform of x (b, *grid, c) with a period along every axis; of the last axis the
    lower half of the frequencies. Flipped axes turn the other way.

    Axes come out as (last but one, ..., last, first): each product wants its axis next to the channels.
    """
    axes = x.ndim - 2
    cos, sin = _half(waves[-1])
    re, im = _times(cos, x), _times(sin if axes - 1 in flipped else -sin, x)
    for axis in reversed(range(axes - 1)):
        re, im = re.movedim(-2, 1), im.movedim(-2, 1)
        cos, sin = waves[axis]
        sin = -sin if axis in flipped else sin
        re, im = _times(cos, re) + _times(sin, im), _times(cos, im) - _times(sin, re)
    return re, im


def _inverse(re: Tensor, im: Tensor, waves: Sequence[Waves]) -> Tensor:
    """The first cells of the inverse of `_transform`, as a map (b, *grid, c)."""
    for cos, sin in waves[:-1]:
        cos, sin = (cos / cos.shape[0]).T, (sin / cos.shape[0]).T
        re, im = _times(cos, re) - _times(sin, im), _times(cos, im) + _times(sin, re)
        re, im = re.movedim(1, -2), im.movedim(1, -2)
    whole, (cos, sin) = waves[-1][0].shape[0], _half(waves[-1])
    if not torch.compiler.is_exporting():
        twice = torch.full((cos.shape[0], 1), 2.0, dtype=cos.dtype, device=cos.device)  # for its mirror image too
        twice[0] = 1.0
        cos, sin = cos * twice, sin * twice
    return _times((cos / whole).T, re) - _times((sin / whole).T, im)


def _spectrum(x: Tensor, axes: Sequence[int]) -> Tensor:
    """The transform with zeros to twice the side along every axis, of the last one the lower half."""
    y = torch.fft.rfft(x, n=2 * x.shape[axes[-1]], dim=axes[-1])
    for axis in axes[:-1]:
        y = torch.fft.fft(y, n=2 * x.shape[axis], dim=axis)
    return y


def _negated(spectrum: Tensor, axes: Sequence[int]) -> Tensor:
    """Frequencies turned round: index k becomes -k."""
    axes = list(axes)
    return spectrum.flip(axes).roll([1] * len(axes), axes) if axes else spectrum
