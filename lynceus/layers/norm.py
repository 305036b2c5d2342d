"""LayerNorm over the channels of a map, and layer scale (CaiT, ICCV 2021, arXiv 2103.17239)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


class LayerNorm2d(nn.LayerNorm):
    """LayerNorm over the channels of a map `b c h w`; state names as nn.LayerNorm."""

    def __init__(self, channels: int, *, eps: float = 1e-6):
        super().__init__(channels, eps=eps)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        x = F.layer_norm(x.permute(0, 2, 3, 1), self.normalized_shape, self.weight, self.bias, self.eps)
        return x.permute(0, 3, 1, 2)


class LayerScale(nn.Module):
    """A learned factor per channel (last axis), `gamma`, on a residual branch."""

    def __init__(self, dim: int, *, value: float = 1e-5):
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), float(value)))

    def forward(self, x: Float[Tensor, "*batch c"]) -> Float[Tensor, "*batch c"]:
        return x * self.gamma
