"""Stochastic depth (Huang et al., ECCV 2016, arXiv 1603.09382): training leaves a residual branch out per sample."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class DropPath(nn.Module):
    """Zeroes whole samples with probability `rate` and scales the others by 1 / (1 - rate); identity in eval."""

    def __init__(self, rate: float = 0.0):
        super().__init__()
        self.rate = rate

    @property
    def active(self) -> bool:
        return self.rate > 0.0 and self.training

    def forward(self, x: Tensor) -> Tensor:
        if not self.active:
            return x
        keep = 1.0 - self.rate
        mask = torch.empty((x.shape[0],) + (1,) * (x.ndim - 1), dtype=x.dtype, device=x.device).bernoulli_(keep)
        return x * (mask / keep if keep > 0 else mask)

    def extra_repr(self) -> str:
        return f"rate={self.rate:g}"


def linear_rates(largest: float, depth: int) -> list[float]:
    """Rates of `depth` blocks, growing linearly from 0 to `largest`."""
    return [largest * i / max(depth - 1, 1) for i in range(depth)]
