"""Squeeze-and-excitation over video: one gate per channel, from the mean over space and, if wanted, over time.

Hu et al., Squeeze-and-Excitation Networks, CVPR 2018, arXiv 1709.01507.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from lynceus.rewrite.streaming.branches import Residual
from lynceus.rewrite.streaming.node import PerFrame


class SqueezeExcite3d(nn.Module):
    """x (b, c, t, h, w) times a gate.

    window: None: each frame has its own gate, in clips and streams alike. A number: a clip has one gate, the mean over
    all of it; a stream's gate looks at the last `window` frames and applies to the oldest of them.
    """

    def __init__(self, channels: int, reduced: int, *, window: int | None = None):
        super().__init__()
        self.fc1 = nn.Conv3d(channels, reduced, 1)
        self.relu = nn.ReLU()
        self.fc2 = nn.Conv3d(reduced, channels, 1)
        self.sigmoid = nn.Sigmoid()
        self.window = window

    def forward(self, x: Float[Tensor, "b c t h w"]) -> Float[Tensor, "b c t h w"]:
        mean = x.mean((3, 4) if self.window is None else (2, 3, 4), keepdim=True)
        y: Tensor = x * self.sigmoid(self.fc2(self.relu(self.fc1(mean))))
        return y

    def as_containers(self) -> nn.Module | None:
        """The same, for a converter; None: a frame at a time, by its own node."""
        if self.window is None:
            return None
        pool: Any = nn.AdaptiveAvgPool3d(1)
        pool.window = self.window
        return Residual(nn.Sequential(pool, self.fc1, self.relu, self.fc2, self.sigmoid), reduce="mul")

    def stream_node(self, name: str) -> GateNode:
        return GateNode(name, self)


class GateNode(PerFrame):
    """The gate of one frame."""

    def __init__(self, name: str, module: SqueezeExcite3d):
        super().__init__(name)
        self.module = module

    def run(self, x: Tensor) -> Tensor:
        m = self.module
        y = F.linear(x.mean((2, 3)), m.fc1.weight.flatten(1), m.fc1.bias)
        y = F.linear(torch.relu(y), m.fc2.weight.flatten(1), m.fc2.bias)
        return x * torch.sigmoid(y)[:, :, None, None]

    def describe(self) -> str:
        return f"Gate({self.module.fc1.in_channels},{self.module.fc1.out_channels})"
