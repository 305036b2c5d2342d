"""Large-small convolution: a large depthwise neighbourhood decides, place by place, the weights of a small one.

Wang et al., LSNet: See Large, Focus Small, CVPR 2025, arXiv 2503.23135. Channels that are congruent modulo
dim / groups share a kernel, so on channels-last maps a kernel is one contiguous run beside `groups` runs of channels.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd import forward_ad

from lynceus.core.errors import AdviceError
from lynceus.layers.conv_norm import ConvNorm
from lynceus.layers.mixers import Place


def aggregate(x: Float[Tensor, "b h w c"], kernels: Float[Tensor, "b h w t k"]) -> Float[Tensor, "b h w c"]:
    """out[b, y, x, c] = sum over taps t = (i, j) of x[b, y + i - r, x + j - r, c] * kernels[b, y, x, t, c mod k].

    t: side**2 taps row by row of an odd side = 2 r + 1; k divides c; outside the map x is zero. Works tap by tap in
    place: nothing of the size taps x map is ever made, and backward keeps `x` and `kernels` only.
    """
    c, (taps, k) = x.shape[3], kernels.shape[3:]
    side = round(taps**0.5)
    if side * side != taps or side % 2 == 0 or c % k:
        raise AdviceError(
            f"{taps} taps and {k} kernels do not fit {c} channels: taps are an odd side squared, and the number of "
            f"kernels divides the channels, e.g. {(c // max(c // k, 1), 9)}."
        )
    if not _eager():
        return _padded(x, kernels, side)
    if torch.is_grad_enabled() and (x.requires_grad or kernels.requires_grad):
        made: Tensor = _Aggregate.apply(x, kernels, side)
        return made
    return _forward(x, kernels, side)


class LargeSmall(nn.Module):
    """The mixer: `lkp` looks at a large kernel's neighbourhood and gives small kernels, `aggregate` applies them.

    bn(aggregate(x, lkp(x))) on a map b h w c. dim: a multiple of groups; `dim / groups` kernels per place.
    """

    def __init__(self, dim: int, *, large_kernel: int = 7, small_kernel: int = 3, groups: int = 8, fused: bool = False):
        super().__init__()
        self.lkp = Perception(dim, large_kernel=large_kernel, small_kernel=small_kernel, groups=groups, fused=fused)
        self.bn = nn.BatchNorm2d(dim)

    def forward(
        self, x: Float[Tensor, "b h w c"], residual: Float[Tensor, "b h w c"] | None = None
    ) -> Float[Tensor, "b h w c"]:
        """residual: added to the result."""
        y = aggregate(x, self.lkp(x))
        y = self.bn(y.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return y if residual is None else y + residual


class Perception(nn.Module):
    """1x1, large depthwise, 1x1, 1x1 and GroupNorm: the kernels b h w t k of every place.

    The norm is over each kernel's taps and the whole map, so kernels depend on everything in view, padding included.
    """

    def __init__(self, dim: int, *, large_kernel: int, small_kernel: int, groups: int, fused: bool = False):
        super().__init__()
        if dim % groups or dim % 2:
            step = groups if groups % 2 == 0 else 2 * groups
            near = max(step, dim // step * step)
            raise AdviceError(f"dim {dim} must be even and a multiple of groups={groups}; take e.g. {near}.")
        for kernel in (large_kernel, small_kernel):
            if kernel % 2 == 0:
                raise AdviceError(f"A kernel of {kernel} has no centre; take an odd one, e.g. {kernel + 1}.")
        self.taps, self.kernels = small_kernel**2, dim // groups
        self.cv1 = ConvNorm(dim, dim // 2, fused=fused)
        self.act = nn.ReLU()
        self.cv2 = ConvNorm(dim // 2, dim // 2, large_kernel, groups=dim // 2, fused=fused)
        self.cv3 = ConvNorm(dim // 2, dim // 2, fused=fused)
        self.cv4 = nn.Conv2d(dim // 2, self.taps * self.kernels, 1)
        self.norm = nn.GroupNorm(self.kernels, self.taps * self.kernels)

    def forward(self, x: Float[Tensor, "b h w c"]) -> Float[Tensor, "b h w t k"]:
        x = self.cv3(self.cv2(self.cv1(x, relu=self.act)), relu=self.act)
        w = self.norm(self.cv4(x.permute(0, 3, 1, 2)))
        b, _, height, width = w.shape
        return w.reshape(b, self.kernels, self.taps, height, width).permute(0, 3, 4, 2, 1)


@dataclass(frozen=True, kw_only=True, slots=True)
class LargeSmallMixer:
    """Large-small convolution in another's place.

    large_kernel: side of the neighbourhood that decides. small_kernel: side of the one that is added up. groups:
    channels that share a kernel; must divide the channels.
    """

    large_kernel: int = 7
    small_kernel: int = 3
    groups: int = 8

    def build(self, place: Place) -> LargeSmall:
        return LargeSmall(place.dim, large_kernel=self.large_kernel, small_kernel=self.small_kernel, groups=self.groups)


def _eager() -> bool:
    """True where slices may be written in place and a hand-written backward may be used."""
    return not (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch._C._functorch.maybe_current_level() is not None
        or forward_ad._current_level >= 0
    )


def _padded(x: Tensor, kernels: Tensor, side: int) -> Tensor:
    """`aggregate` in plain operators that trace with free sizes."""
    _, h, w, c = x.shape
    k, r = kernels.shape[4], side // 2
    padded = F.pad(x, (0, 0, r, r, r, r)).unflatten(3, (c // k, k))
    out: Any = 0
    for t in range(side * side):
        i, j = t // side, t % side
        out = out + padded[:, i : i + h, j : j + w] * kernels[:, :, :, t, None]
    made: Tensor = out.flatten(3)
    return made


def _taps(side: int, h: int, w: int) -> Iterator[tuple[int, tuple[Any, Any], tuple[Any, Any]]]:
    """(tap, places of the result, places read) of every tap that touches a map h w, the central one first."""
    r = side // 2
    for t in sorted(range(side * side), key=lambda t: abs(t - side * side // 2)):
        i, j = t // side - r, t % side - r
        if abs(i) < h and abs(j) < w:
            here = (slice(max(0, -i), h - max(0, i)), slice(max(0, -j), w - max(0, j)))
            there = (slice(max(0, i), h - max(0, -i)), slice(max(0, j), w - max(0, -j)))
            yield t, here, there


def _forward(x: Tensor, kernels: Tensor, side: int) -> Tensor:
    b, h, w, c = x.shape
    k = kernels.shape[4]
    kernels = kernels.contiguous()
    x = x.reshape(b, h, w, c // k, k)
    out = torch.empty(0)
    for t, (rows, columns), (up, across) in _taps(side, h, w):
        if t == side * side // 2:
            out = x * kernels[:, :, :, t, None]
        else:
            out[:, rows, columns].addcmul_(x[:, up, across], kernels[:, rows, columns, t, None])
    return out.reshape(b, h, w, c)


class _Aggregate(torch.autograd.Function):
    """`_forward` with a backward in as few passes: autograd's own would make a zero-padded map per tap."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, kernels: Tensor, side: int) -> Tensor:
        kernels = kernels.contiguous()
        ctx.save_for_backward(x, kernels)
        ctx.side = side
        return _forward(x, kernels, side)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, kernels = ctx.saved_tensors
        b, h, w, c = x.shape
        k = kernels.shape[4]
        x, grad = (t.reshape(b, h, w, c // k, k) for t in (x, grad))
        to_x = torch.zeros_like(x)
        to_kernels = torch.zeros_like(kernels)
        for t, (rows, columns), (up, across) in _taps(ctx.side, h, w):
            part = grad[:, rows, columns]
            to_x[:, up, across].addcmul_(part, kernels[:, rows, columns, t, None])
            to_kernels[:, rows, columns, t] = (part * x[:, up, across]).sum(3)
        return to_x.reshape(b, h, w, c), to_kernels, None
