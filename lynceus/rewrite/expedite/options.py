"""The options of `Expedite`, and what they mean for a given map."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from jaxtyping import Float
from torch import Tensor

from lynceus.core.errors import AdviceError
from lynceus.rewrite.expedite.operators import Clustering, Normalise, Route, cluster

SHARE = 0.7  # of the rows and columns of a map, where the clusters are not given (28 of 40 in the paper)


@dataclass(frozen=True, kw_only=True)
class Span:
    """Which blocks run on cluster tokens, and how those are made.

    alpha: blocks that run before the clustering. beta: blocks on cluster tokens; None: all that follow.
    The rest as in `Expedite`.
    """

    alpha: int
    beta: int | None = None
    clusters: tuple[int, int] | None = None
    iterations: int = 5
    window: int = 5
    temperature: float | Literal["auto"] = 0.02
    scale: float = 1.0
    neighbours: int = 20
    normalise: Normalise = "sum"
    rebuild_temperature: float | None = None
    route: Route = "auto"

    def end(self, depth: int) -> int:
        """The first block behind the span."""
        return depth if self.beta is None else min(depth, self.alpha + self.beta)

    def grid(self, size: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of clusters for a map (or window) of that size, never more than it has."""
        wanted = self.clusters or tuple(max(1, round(SHARE * n)) for n in size)
        return min(wanted[0], size[0]), min(wanted[1], size[1])

    def cluster(self, tokens: Float[Tensor, "b n c"], size: tuple[int, int]) -> Clustering:
        return cluster(
            tokens,
            size,
            self.grid(size),
            iterations=self.iterations,
            window=self.window,
            temperature=self.temperature,
            scale=self.scale,
            route=self.route,
        )

    def rebuild(self, found: Clustering, refined: Float[Tensor, "b m c"]) -> Float[Tensor, "b n c"]:
        return found.rebuild(refined, self.neighbours, self.normalise, self.rebuild_temperature)

    def check(self, depth: int, what: str) -> None:
        """AdviceError where the numbers make no sense for `depth` blocks of `what`."""
        if self.alpha < 0:
            raise AdviceError(f"alpha counts the blocks before the clustering, from 0; {self.alpha} is none.")
        if self.beta is not None and self.beta < 1:
            raise AdviceError(f"beta counts the blocks on clusters, from 1; {self.beta} is none. None takes all.")
        if self.alpha + (self.beta or 0) > depth and self.alpha < depth:
            raise AdviceError(
                f"alpha={self.alpha} and beta={self.beta} ask for {self.alpha + (self.beta or 0)} blocks; {what} has "
                f"{depth}. beta={depth - self.alpha} or None goes to the end."
            )
