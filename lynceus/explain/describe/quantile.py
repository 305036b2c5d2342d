"""A quantile of a stream for many units at once: exact while the sample is small, then a sketch of fixed size.

Sketch: Karnin, Lang, Liberty, Optimal Quantile Approximation in Streams, FOCS 2016, arXiv 1603.05346, all units in
step: a full buffer is sorted and every other value goes up one level, where it counts twice as much.
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from lynceus.core.errors import AdviceError
from lynceus.core.rng import generator


class RunningQuantile:
    """Adds samples (n, units) and gives quantiles (units,). Memory does not grow with the number of samples.

    exact: up to this many samples per unit all are kept. size: values per level of the sketch behind that; the rank is
    then off by about 1 / size. seed: which half of a full buffer goes up is drawn.
    """

    def __init__(self, units: int, *, exact: int = 6144, size: int = 2048, seed: int = 0):
        if exact < 2 or size < 2:
            raise AdviceError(f"A running quantile keeps at least two values, not {min(exact, size)}.")
        self.exact, self.size = exact, size
        self.count = 0
        self._draw = generator(seed, "quantile")
        self._parts: list[Tensor] = []
        self._held = 0
        self._units = units
        self._levels: list[Tensor] = []  # level i: (units, at most `size`) values that count 2^i each
        self._sketched = False

    def add(self, values: Float[Tensor, "n units"]) -> None:
        """Takes in `n` samples of every unit."""
        if values.ndim != 2 or values.shape[1] != self._units:
            raise AdviceError(f"Samples are (n, {self._units}), not {tuple(values.shape)}.")
        self.count += len(values)
        for part in values.detach().cpu().split(self.size):
            self._parts.append(part)
            self._held += len(part)
            limit = self.size if self._sketched else self.exact
            if self._held > limit:
                self._sketched = True
                self._push(torch.cat(self._parts).T.contiguous(), 0)
                self._parts, self._held = [], 0

    def quantile(self, share: float) -> Float[Tensor, " units"]:
        """The value below which `share` of the samples lie: sample i of N, sorted, stands at (i - 0.5) / N, straight
        lines between, the least and greatest beyond (Hazen's rule)."""
        if not 0 < share < 1:
            raise AdviceError(f"A quantile is a share between 0 and 1, not {share}.")
        if not self.count:
            raise AdviceError("There is no sample to take a quantile of.")
        if not self._sketched:
            return torch.from_numpy(np.quantile(torch.cat(self._parts).numpy(), share, axis=0, method="hazen"))
        kept = [(v, 2.0**i) for i, v in enumerate(self._levels) if v.shape[1]]
        if self._parts:
            kept.append((torch.cat(self._parts).T, 1.0))
        values = torch.cat([v for v, _ in kept], 1)
        weight = torch.cat([torch.full((v.shape[1],), w, dtype=torch.float64) for v, w in kept])
        values, order = values.sort(1)
        heavy = weight[order]
        middle = (heavy.cumsum(1) - heavy / 2) / heavy.sum(1, keepdim=True)
        above = torch.searchsorted(middle, torch.full((len(values), 1), share, dtype=torch.float64))
        above = above.clamp(1, values.shape[1] - 1)
        low, high = middle.gather(1, above - 1), middle.gather(1, above)
        part = ((share - low) / (high - low)).clamp(0, 1).to(values.dtype)
        return torch.lerp(values.gather(1, above - 1), values.gather(1, above), part)[:, 0]

    def _push(self, values: Tensor, level: int) -> None:
        while True:
            if level == len(self._levels):
                self._levels.append(values.new_empty(self._units, 0))
            values = torch.cat([self._levels[level], values], 1)
            if values.shape[1] <= self.size:
                self._levels[level] = values
                return
            values = values.sort(1).values
            odd = values.shape[1] % 2  # one stays behind so that no weight is lost
            self._levels[level] = values[:, :odd]
            start = odd + int(torch.randint(2, (), generator=self._draw))
            values, level = values[:, start::2], level + 1
