"""Efficient channel attention (Wang et al., ECA-Net, CVPR 2020, arXiv 1910.03151) on a channels-last map."""

from __future__ import annotations

import math

from jaxtyping import Float
from torch import Tensor, nn


class EfficientChannelAttention(nn.Module):
    """x * sigmoid(a convolution along the channels of the mean of x over the map).

    kernel: its size; None: the odd number near (log2(channels) + 1) / 2, at least 3.
    """

    def __init__(self, dim: int, *, kernel: int | None = None):
        super().__init__()
        if kernel is None:
            size = int((math.log2(dim) + 1) / 2)
            kernel = max(size + (size % 2 == 0), 3)
        self.conv = nn.Conv1d(1, 1, kernel, padding=kernel // 2, bias=False)

    def forward(self, x: Float[Tensor, "b h w c"]) -> Float[Tensor, "b h w c"]:
        return x * self.conv(x.mean((1, 2))[:, None]).sigmoid()[:, :, None]
