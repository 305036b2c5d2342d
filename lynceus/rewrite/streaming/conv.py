"""Convolution over time as a node: the k - 1 frames before this one are held, and convolved with it once.

Frames that were never there are zeros that are not computed with twice: one output costs one convolution over k frames,
as in the clip. The batch norm and activation behind a convolution belong to its node, so that inference can fold them.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lynceus.core.errors import AdviceError
from lynceus.rewrite.streaming.kernels import Kernels
from lynceus.rewrite.streaming.node import Fill, Frames, Held
from lynceus.rewrite.streaming.pointwise import BatchNormNode

_CONV: dict[int, Any] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


class ConvNode(Frames):
    """A convolution of one to three dimensions, the first of which is time; then `norm` and `act` where given."""

    def __init__(self, name: str, module: nn.modules.conv._ConvNd, fill: Fill = "zeros"):
        super().__init__(name)
        self.module = module
        self.dims = len(module.kernel_size)
        padding = _padding(name, module)
        if module.padding_mode != "zeros" and any(padding):
            raise AdviceError(f"{name} pads with {module.padding_mode!r}; only padding_mode='zeros' can be streamed.")
        self.kernel, self.dilation = module.kernel_size[0], module.dilation[0]
        self.reach = self.dilation * (self.kernel - 1) + 1
        self.padding, self.space_padding = padding[0], padding[1:]
        self.stride = module.stride[0]
        self.width = self.reach - 1
        self.fill = fill
        if self.padding > self.reach - 1:
            raise AdviceError(
                f"{name} pads {self.padding} time steps, more than its {self.reach} can see ahead; a stream would "
                "have to answer before its first frame."
            )
        self.norm: BatchNormNode | None = None
        self.act: nn.Module | None = None
        self.kernels = Kernels(self)

    def run(self, frames: Held, count: Any) -> Tensor:
        picked = frames[:: self.dilation]
        fast = self.kernels.run(picked)
        return self.plain(picked) if fast is None else fast

    def plain(self, frames: Held) -> Tensor:
        m = self.module
        if self.kernel == 1:
            y = self._space(frames[0], m.weight.squeeze(2))
        else:
            clip = torch.stack(frames, 2)
            y = _CONV[self.dims](
                clip, m.weight, m.bias, (1, *m.stride[1:]), (0, *self.space_padding), (1, *m.dilation[1:]), m.groups
            ).squeeze(2)
        y = y if self.norm is None else self.norm.run(y)
        return y if self.act is None else self.act(y)

    def run_many(self, frames: Tensor) -> Tensor:
        m = self.module
        stride, dilation = (self.stride, *m.stride[1:]), (self.dilation, *m.dilation[1:])
        y = _CONV[self.dims](
            frames.movedim(0, 2), m.weight, m.bias, stride, (0, *self.space_padding), dilation, m.groups
        )
        y = y if self.norm is None else self.norm.run(y)
        y = y if self.act is None else self.act(y)
        return y.movedim(2, 0)

    def _space(self, x: Tensor, weight: Tensor) -> Tensor:
        """The convolution of one frame, which has one dimension less than the clip's."""
        m = self.module
        if self.dims == 1:
            if m.groups == 1:
                return F.linear(x, weight, m.bias)
            return F.conv1d(x.unsqueeze(2), weight.unsqueeze(2), m.bias, groups=m.groups).squeeze(2)
        y: Tensor = _CONV[self.dims - 1](x, weight, m.bias, m.stride[1:], self.space_padding, m.dilation[1:], m.groups)
        return y

    def describe(self) -> str:
        m = self.module
        what = (m.in_channels, m.out_channels, m.kernel_size, m.stride, self.padding, m.dilation, m.groups)
        return f"Conv{what}{self.fill}".replace(" ", "")


def _padding(name: str, module: nn.modules.conv._ConvNd) -> tuple[int, ...]:
    """Padding at each side, per axis."""
    if not isinstance(module.padding, str):
        return tuple(int(p) for p in module.padding)
    if module.padding == "valid":
        return (0,) * len(module.kernel_size)
    whole = [d * (k - 1) for k, d in zip(module.kernel_size, module.dilation)]
    if any(n % 2 for n in whole):
        raise AdviceError(
            f"{name} pads 'same' around a kernel of even size, more at the end; give the padding in numbers."
        )
    return tuple(n // 2 for n in whole)
