"""Depthwise convolution on a channels-last map: the spatial mixer of ConvNeXt.

The gradient of a large depthwise kernel is itself a depthwise convolution, of the input by the gradient of the output,
a kernel as large as the map. oneDNN runs that 2 to 20 times as fast as its own backward of 7x7 weights (its own is the
faster one for 3x3), so eager float32 training on a CPU takes this way.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd import forward_ad

from lynceus.core.errors import AdviceError
from lynceus.layers.mixers import Place

LARGE = 5  # side of the kernel from which the correlation is the faster way
ROOM = 2**18  # numbers of the images that are correlated at once: their maps stay in the cache


def depthwise_conv2d(
    x: Float[Tensor, "b c h w"], weight: Float[Tensor, "c 1 k k"], bias: Float[Tensor, " c"] | None = None
) -> Float[Tensor, "b c h w"]:
    """F.conv2d with "same" zero padding and a group per channel, k odd; its backward is fast for large kernels too."""
    if _corresponds(x, weight):
        y: Tensor = _Depthwise.apply(x, weight, bias)
        return y
    return F.conv2d(x, weight, bias, padding=weight.shape[-1] // 2, groups=weight.shape[0])


def _corresponds(x: Tensor, weight: Tensor) -> bool:
    return (
        weight.shape[-1] >= LARGE
        and not torch.compiler.is_compiling()
        and torch.is_grad_enabled()
        and weight.requires_grad
        and type(x) is Tensor
        and x.is_cpu
        and x.dtype == weight.dtype == torch.float32
        and x.numel() > 0
        and torch.backends.mkldnn.is_available()
        and not torch.jit.is_tracing()
        and not torch.is_autocast_enabled("cpu")
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._functorch.maybe_current_level() is None
        and forward_ad._current_level < 0
    )


class _Depthwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.conv2d(x, weight, bias, padding=weight.shape[-1] // 2, groups=weight.shape[0])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        channels, side = weight.shape[0], weight.shape[-1]
        need = ctx.needs_input_grad
        if torch.is_grad_enabled():  # a gradient of this gradient is wanted: torch's own has one
            pad, one = [side // 2] * 2, [1, 1]
            return torch.ops.aten.convolution_backward(
                grad, x, weight, [channels] if need[2] else None, one, pad, one, False, [0, 0], channels, list(need)
            )
        dx = F.conv2d(grad, weight.flip(2, 3), padding=side // 2, groups=channels) if need[0] else None
        return dx, correlation(x, grad, side) if need[1] else None, grad.sum((0, 2, 3)) if need[2] else None


def correlation(x: Float[Tensor, "b c h w"], grad: Float[Tensor, "b c h w"], side: int) -> Float[Tensor, "c 1 k k"]:
    """The gradient of a depthwise kernel of this side: sum over images and places of grad times the shifted x."""
    _, c, h, w = x.shape
    found: Tensor | None = None
    together = max(1, ROOM // (c * h * w))
    for some, pull in zip(x.split(together), grad.split(together)):
        n = len(some)
        part = F.conv2d(
            some.reshape(1, n * c, h, w), pull.reshape(n * c, 1, h, w), padding=side // 2, groups=n * c
        ).view(n, c, side, side)
        found = part.sum(0) if found is None else found.add_(part.sum(0))
    assert found is not None
    return found[:, None]


class DepthwiseConv(nn.Conv2d):
    """One k x k kernel per channel, "same" zero padding, on a map b h w c; state names as nn.Conv2d.

    The map is seen as b c h w in channels-last memory, so nothing is copied on the way in or out.
    """

    def __init__(self, channels: int, kernel: int, *, bias: bool = True):
        if kernel % 2 == 0:
            raise AdviceError(f"A depthwise kernel of {kernel} has no centre; take an odd one, e.g. {kernel + 1}.")
        super().__init__(channels, channels, kernel, padding=kernel // 2, groups=channels, bias=bias)

    def forward(self, x: Float[Tensor, "b h w c"], scale: float = 1.0) -> Float[Tensor, "b h w c"]:
        """scale: a factor on the result, taken on kernel and bias, which are smaller than the map."""
        weight, bias = self.weight, self.bias
        if scale != 1.0:
            weight, bias = weight * scale, None if bias is None else bias * scale
        x = x.permute(0, 3, 1, 2)
        return depthwise_conv2d(x, weight, bias).permute(0, 2, 3, 1)


@dataclass(frozen=True, kw_only=True, slots=True)
class DepthwiseMixer:
    """ConvNeXt's mixer. kernel: its side, odd."""

    kernel: int = 7

    def build(self, place: Place) -> nn.Module:
        return DepthwiseConv(place.dim, self.kernel)
