"""How sparse each layer becomes: one Lagrangian slope for all, so that multiply-adds meet a budget at least distortion
plus cost.

LPViT: Low-Power Semi-structured Pruning for Vision Transformers, ECCV 2024, arXiv 2407.02068.
Code: Akimoto-Cris/LPViT (no licence; facts only). It charges the *pruned* share of the power; here, as in the paper's
objective, what is kept is charged, so costly layers are pruned more.

Minimised: sum delta(s) + beta sum P(s), subject to MACs(s) <= budget; beta gives both sums the same mean largest slope.
At a slope mu every layer takes the largest s at which the slope of its curve's lower convex hull is at most mu.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from lynceus.core.errors import AdviceError

H = 4  # grid steps of the five-point stencil
CLOSE = 0.02  # of the multiply-adds: how far from the budget the result may be


@dataclass(frozen=True)
class Allocation:
    """index: the place of each layer on the grid. share: of the multiply-adds that is left. mu: the slope. beta: weight
    of the cost. objective: delta + beta P of every layer as its convex hull (layers, grid)."""

    index: np.ndarray
    share: float
    mu: float
    beta: float
    objective: np.ndarray


def smoothed(curves: Float[np.ndarray, "l s"], weight: float = 0.5) -> Float[np.ndarray, "l s"]:
    """Exponential moving average along the grid, without the bias of its start; what begins at 0 begins at 0."""
    if not 0 <= weight < 1:
        raise AdviceError(f"smooth is at least 0 and below 1, not {weight}.")
    out, mean = np.empty_like(curves), np.zeros(len(curves))
    for i in range(curves.shape[1]):
        mean = weight * mean + (1 - weight) * curves[:, i]
        out[:, i] = mean / (1 - weight ** (i + 1))
    return out


def slopes(curves: Float[np.ndarray, "l s"], h: int = H) -> Float[np.ndarray, "l s"]:
    """d/ds by the five-point stencil of width h, one-sided differences of that width at the ends."""
    n = curves.shape[1]
    step = h / (n - 1)
    out = np.empty_like(curves)
    i = np.arange(h, n - h)
    half = h // 2
    f = curves
    out[:, i] = (-f[:, i + h] + 8 * f[:, i + half] - 8 * f[:, i - half] + f[:, i - h]) / (6 * step)
    first, last = np.arange(h), np.arange(n - h, n)
    out[:, first] = (f[:, first + h] - f[:, first]) / step
    out[:, last] = (f[:, last] - f[:, last - h]) / step
    return out


def balance(distortion: Float[np.ndarray, "l s"], cost: Float[np.ndarray, "l s"]) -> float:
    """beta: the mean over layers of the largest slope of the distortion, by that of the cost."""
    least = np.abs(slopes(cost)).max(1).mean()
    return float(np.abs(slopes(distortion)).max(1).mean() / least) if least > 0 else 0.0


def hull(curve: Float[np.ndarray, " s"]) -> Float[np.ndarray, " s"]:
    """The lower convex hull of a curve, on its own grid."""
    kept: list[int] = []
    for i in range(len(curve)):
        while len(kept) > 1:
            a, b = kept[-2], kept[-1]
            if (curve[b] - curve[a]) * (i - a) < (curve[i] - curve[a]) * (b - a):
                break
            kept.pop()
        kept.append(i)
    return np.interp(np.arange(len(curve)), kept, curve[kept])


def allocate(
    distortion: Float[np.ndarray, "l s"],
    cost: Float[np.ndarray, "l s"],
    macs: Float[np.ndarray, "l s"],
    *,
    flops: float,
    fixed: float = 0.0,
    power: bool = True,
    min_keep: float | None = None,
) -> Allocation:
    """The place of every layer on the grid of sparsities 0 .. 1.

    distortion, cost: smoothed curves of the layers. macs: what is left of each at every sparsity. fixed: multiply-adds
    that stay whatever is pruned. flops: share of all that shall be left, in (0, 1]. power: whether cost is charged.
    min_keep: least share kept of a layer; None: min(.05, (1 - flops) / 2). AdviceError when the budget is out of reach.
    """
    n = distortion.shape[1]
    dense = float(macs[:, 0].sum()) + fixed
    keep = min(0.05, (1 - flops) / 2) if min_keep is None else min_keep
    last = int(np.floor((1 - keep) * (n - 1) + 1e-9))
    rows = np.arange(len(macs))

    def share(index: np.ndarray) -> float:
        return float(macs[rows, index].sum() + fixed) / dense

    least = share(np.full(len(macs), last))
    if least > flops + CLOSE:
        raise AdviceError(
            f"flops={flops} is out of reach: with {keep:.0%} of every pruned layer kept, and what is not pruned, "
            f"{least:.1%} of the multiply-adds are left. Ask for flops={np.ceil(least * 100) / 100:.2f}, take smaller "
            "blocks, or exclude fewer layers."
        )
    beta = balance(distortion, cost) if power else 0.0
    objective = np.stack([hull(f[: last + 1]) for f in distortion + beta * cost])
    rise = np.diff(objective, axis=1)  # of a convex curve: never falling
    levels = np.unique(rise)

    def at(mu: float) -> np.ndarray:
        return (rise <= mu).sum(1)

    low, high = -1, len(levels) - 1  # places in levels; -1: nothing is pruned
    while high - low > 1:
        middle = (low + high) // 2
        if share(at(levels[middle])) > flops:
            low = middle
        else:
            high = middle
    before = at(levels[low]) if low >= 0 else np.zeros(len(macs), dtype=int)
    index = _between(before, at(levels[high]), share, flops)
    return Allocation(index, share(index), float(levels[high]) * (n - 1), beta, objective)


def _between(before: np.ndarray, after: np.ndarray, share: Callable[[np.ndarray], float], flops: float) -> np.ndarray:
    """Straight parts of a hull have one slope, so any place on them is as good: the one closest to the budget."""
    index = before.copy()
    best, far = index.copy(), abs(share(index) - flops)
    for layer in np.flatnonzero(before != after):
        for place in range(int(before[layer]) + 1, int(after[layer]) + 1):
            index[layer] = place
            off = abs(share(index) - flops)
            if off < far:
                best, far = index.copy(), off
            if share(index) <= flops:
                return best
    return best


def uniform(macs: Float[np.ndarray, "l s"], *, flops: float, fixed: float = 0.0) -> np.ndarray:
    """The one sparsity for all layers that comes closest to the budget, as places on the grid."""
    shares = (macs.sum(0) + fixed) / (macs[:, 0].sum() + fixed)
    return np.full(len(macs), int(np.abs(shares - flops).argmin()))
