"""Depthwise convolution on a channels-last map: the spatial mixer of ConvNeXt."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from lynceus.core.errors import AdviceError
from lynceus.layers.mixers import Place


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
        x = F.conv2d(x, weight, bias, self.stride, self.padding, self.dilation, self.groups)
        return x.permute(0, 2, 3, 1)


@dataclass(frozen=True, kw_only=True, slots=True)
class DepthwiseMixer:
    """ConvNeXt's mixer. kernel: its side, odd."""

    kernel: int = 7

    def build(self, place: Place) -> nn.Module:
        return DepthwiseConv(place.dim, self.kernel)
