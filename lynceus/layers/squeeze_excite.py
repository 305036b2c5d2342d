"""Squeeze-and-excitation (Hu et al., CVPR 2018, arXiv 1709.01507) on a channels-last map."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn

from lynceus.layers.fused import linear


class SqueezeExcite(nn.Module):
    """x * sigmoid(fc2(relu(fc1(mean of x over the map)))), a factor per image and channel.

    Hidden width: `hidden`, or `ratio` of the channels, rounded to a multiple of `divisor`, at least one of it.
    """

    def __init__(self, dim: int, *, ratio: float = 0.25, divisor: int = 8, hidden: int | None = None):
        super().__init__()
        if hidden is None:
            hidden = max(divisor, int(dim * ratio + divisor / 2) // divisor * divisor)
        self.fc1 = nn.Linear(dim, hidden)
        self.act = nn.ReLU()
        self.fc2 = nn.Linear(hidden, dim)
        self.gate = nn.Sigmoid()

    def factors(self, x: Float[Tensor, "b h w c"]) -> Float[Tensor, "b c"]:
        y = self.act(linear(self.fc1, x.mean((1, 2))))
        factors: Tensor = self.gate(linear(self.fc2, y))
        return factors

    def forward(self, x: Float[Tensor, "b h w c"]) -> Float[Tensor, "b h w c"]:
        return x * self.factors(x)[:, None, None, :]
