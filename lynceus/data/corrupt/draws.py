"""Where a corruption's random numbers come from: one torch generator per picture, or numpy in the authors' order.

A picture's numbers depend on its own generator alone, so they are the same alone and inside any batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from lynceus.data.corrupt.filters import levels


class Draws:
    """Random numbers for a batch of `len(generators)` pictures; every shape is per picture, (c, h, w) or (h, w)."""

    def __init__(self, generators: Sequence[torch.Generator], device: torch.device):
        self.generators, self.device = list(generators), device

    def _stack(self, make: Callable[[torch.Generator, int], Tensor]) -> Tensor:
        parts = [make(g, i) for i, g in enumerate(self.generators)]
        return (parts[0][None] if len(parts) == 1 else torch.stack(parts)).to(self.device)

    def normal(self, *shape: int) -> Tensor:
        """Standard normal, (b, *shape)."""
        return self._stack(lambda g, _: torch.randn(shape, generator=g, device=g.device))

    def uniform(self, *shape: int) -> Tensor:
        """Uniform in [0, 1), (b, *shape)."""
        return self._stack(lambda g, _: torch.rand(shape, generator=g, device=g.device))

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        """Whole numbers low .. high - 1, (b, *shape) int64."""
        return self._stack(lambda g, _: torch.randint(low, high, shape, generator=g, device=g.device))

    def poisson(self, x: Tensor, times: float) -> Tensor:
        """Counts with rates x * times, (b, c, h, w); x on the 256 levels of a picture.

        By inversion: a table per level says where to begin, and a few steps up its distribution end at the count.
        """
        begin, cumulative = (t.to(x.device) for t in _poisson_table(float(times)))
        parts, counts = begin.shape[1], cumulative.shape[1]
        begin, cumulative = begin.flatten(), cumulative.flatten()
        u = self.uniform(*x.shape[1:]).flatten()
        level = (x.flatten() * 255).round_().to(torch.int32)
        count = begin.index_select(0, (u * parts).to(torch.int32).add_(level, alpha=parts))
        at = level.mul_(counts).add_(count)
        open_ = (u >= cumulative.index_select(0, at)).nonzero()[:, 0]
        while len(open_):
            count[open_] += 1
            at[open_] += 1
            open_ = open_[u[open_] >= cumulative.index_select(0, at[open_])]
        return count.to(x.dtype).view_as(x)


@lru_cache(maxsize=16)
def _poisson_table(times: float) -> tuple[Tensor, Tensor]:
    """Per level of a picture: the count at the lower edge of each of 1024 parts of [0, 1), and P(count <= k) in float32
    (the last is above every number below 1)."""
    from scipy.special import pdtr

    rate = np.arange(256) / 255 * times
    k = np.arange(int(times + 12 * np.sqrt(times) + 24))
    cumulative = pdtr(k, rate[:, None]).astype(np.float32)
    cumulative[:, -1] = 2.0
    edges = np.arange(1024, dtype=np.float32) / 1024
    begin = np.stack([np.searchsorted(c, edges, side="right") for c in cumulative]).astype(np.int32)
    return torch.from_numpy(begin), torch.from_numpy(cumulative)


class OfficialDraws(Draws):
    """The numbers that the authors' code draws from numpy's legacy generator, for a batch of one picture."""

    def __init__(self, state: np.random.RandomState, device: torch.device):
        super().__init__([], device)
        self.state = state

    def _first(self, values: np.ndarray) -> Tensor:
        # pictures are channels-last there
        tensor = torch.from_numpy(np.ascontiguousarray(values.transpose(2, 0, 1) if values.ndim == 3 else values))
        return (tensor.float() if tensor.is_floating_point() else tensor)[None].to(self.device)

    def normal(self, *shape: int) -> Tensor:
        return self._first(self.state.normal(size=_last(shape)))

    def uniform(self, *shape: int) -> Tensor:
        return self._first(np.asarray(self.state.uniform(size=_last(shape))))

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        return self._first(np.asarray(self.state.randint(low, high, size=_last(shape))).astype(np.int64))

    def poisson(self, x: Tensor, times: float) -> Tensor:
        rate = levels(x)[0].permute(1, 2, 0).cpu().numpy() * times
        return self._first(self.state.poisson(rate)).to(x.dtype)


def _last(shape: Sequence[int]) -> tuple[int, ...]:
    return (shape[1], shape[2], shape[0]) if len(shape) == 3 else tuple(shape)
