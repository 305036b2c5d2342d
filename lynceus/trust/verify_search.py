"""Branch and bound over boxes of the input: prove a box by linear bounds, refute it by a point, or split it.

Grid: boxes are ranges of grid indices, so that no point is missed or visited twice; a box of few points is enumerated.
Region: boxes are real; a box in which no ReLU is undecided is exact, and stubborn small boxes go to Z3 where installed.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from lynceus.trust.bounds import Box, Late, Method, Propagation
from lynceus.trust.verify_query import Query, witness

FEW = 16  # a grid box of at most so many points is enumerated
BATCH = 256
DEPTH = 8  # splits after which a stubborn real box may go to the solver
UNDECIDED = 10  # ReLUs that the solver may be left with
Bounder = Callable[[Box, Tensor], tuple[Tensor, Tensor | None, Tensor]]
Solver = Callable[[Box, float], tuple[Literal["safe", "unsafe", "unknown"], Tensor | None]]


@dataclass(kw_only=True)
class Outcome:
    """What a search found. `between`: real boxes between the grid points that nobody proved yet, (lower, upper)."""

    kind: Literal["safe", "unsafe", "unknown"] = "unknown"
    point: Tensor | None = None
    boxes: int = 0
    doubtful: int = 0
    solved: int = 0
    between: list[tuple[Tensor, Tensor]] = field(default_factory=list)


@dataclass(kw_only=True)
class Limits:
    """When to stop: a moment (time.perf_counter) and a number of boxes."""

    until: float = math.inf
    boxes: float = math.inf

    def over(self, boxes: int) -> bool:
        return boxes >= self.boxes or time.perf_counter() >= self.until


def own_bounder(query: Query, method: Method, until: float) -> Bounder:
    """Margins, their coefficients on the changing coordinates, and the number of undecided ReLUs of each box."""

    def bound(box: Box, rows: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        found = Propagation(query.network, box, method=method, until=until)
        last = len(query.network.nodes) - 1
        ends, constant = found.pull(last, rows.expand(len(box), -1, -1))
        slopes = ends[0].expand(len(box), -1, *query.x.shape) if 0 in ends else None
        if slopes is None:
            least = constant.expand(len(box), -1)
        else:
            least = box.least(slopes) + constant
            slopes = slopes.flatten(2)[..., query.dims]
        least = torch.maximum(least, found.backward(last, rows.expand(len(box), -1, -1), to_input=False))
        counts = [((low < 0) & (high > 0)).flatten(1).sum(1) for low, high in found.hidden.values()]
        undecided = torch.stack(counts).sum(0) if counts else torch.zeros(len(box), dtype=torch.long)
        return least, slopes, undecided.expand(len(box))

    return bound


def search_grid(query: Query, bound: Bounder, limits: Limits, *, batch: int) -> Outcome:
    """Every grid point, by boxes of indices."""
    out = Outcome()
    levels = torch.tensor([len(v) for v in query.values])
    table = torch.full((len(levels), int(levels.max())), math.inf, dtype=torch.float64)
    for i, v in enumerate(query.values):
        table[i, : len(v)] = v
    axis = torch.arange(len(levels))
    low, high = torch.zeros(1, len(levels), dtype=torch.long), (levels - 1)[None]
    worst = torch.zeros(1, dtype=torch.float64)
    while len(low):
        if limits.over(out.boxes):
            return out
        order = worst.argsort()
        take, rest = order[:batch], order[batch:]
        a, b = low[take], high[take]
        low, high, worst = low[rest], high[rest], worst[rest]
        out.boxes += len(a)
        few = (b - a + 1).double().prod(1) <= FEW
        if bool(few.any()) and out.boxes > 1:
            bad = _enumerate(query, table, a[few], b[few], out)
            if bad is not None:
                out.kind, out.point = "unsafe", bad
                return out
            a, b = a[~few], b[~few]
        if not len(a):
            continue
        low_value, high_value = table[axis, a], table[axis, b]
        try:
            least, slopes, _ = bound(query.box(*_ends(query, table, a, b)), query.rows[None])
        except Late:
            return out
        open_ = ~(least > query.tolerance).all(1)
        a, b, least, low_value, high_value = (v[open_] for v in (a, b, least, low_value, high_value))
        if not len(a):
            continue
        slope = _worst_slope(least, slopes[open_] if slopes is not None else None, low_value)
        corner = torch.where(slope > 0, low_value, high_value)
        middle = table[axis, (a + b) // 2]
        bad = _refute(query, torch.cat([corner, middle]))
        if bad is not None:
            out.kind, out.point = "unsafe", bad
            return out
        single = (a == b).all(1)
        if bool(single.any()):
            bad = _enumerate(query, table, a[single], b[single], out)
            if bad is not None:
                out.kind, out.point = "unsafe", bad
                return out
            a, b, least, slope, low_value, high_value = (
                v[~single] for v in (a, b, least, slope, low_value, high_value)
            )
        if not len(a):
            continue
        width = high_value - low_value
        at = ((slope.abs() + 1e-9) * width).masked_fill(a == b, -1).argmax(1, keepdim=True)
        cut = (a.gather(1, at) + b.gather(1, at)) // 2
        left_high, right_low = b.scatter(1, at, cut), a.scatter(1, at, cut + 1)
        gap_low, gap_high = _ends(query, table, a, b)
        out.between.append(
            (
                gap_low.scatter(1, at, table[at[:, 0], cut[:, 0]][:, None]),
                gap_high.scatter(1, at, table[at[:, 0], cut[:, 0] + 1][:, None]),
            )
        )
        low, high = torch.cat([low, a, right_low]), torch.cat([high, left_high, b])
        worst = torch.cat([worst, least.amin(1), least.amin(1)])
    out.kind = "unknown" if out.doubtful else "safe"
    return out


def search_region(
    query: Query,
    bound: Bounder,
    limits: Limits,
    *,
    batch: int,
    start: tuple[Tensor, Tensor] | None = None,
    solve: Solver | None = None,
) -> Outcome:
    """Every real point of the region, or of the boxes `start` (n, d) each."""
    out = Outcome()
    low, high = start if start is not None else (query.lower[None], query.upper[None])
    worst = torch.zeros(len(low), dtype=torch.float64)
    depth = torch.zeros(len(low), dtype=torch.long)
    whole = (query.upper - query.lower).clamp_min(1e-30)
    while len(low):
        if limits.over(out.boxes):
            return out
        order = worst.argsort()
        take, rest = order[:batch], order[batch:]
        a, b, deep = low[take], high[take], depth[take]
        low, high, worst, depth = low[rest], high[rest], worst[rest], depth[rest]
        out.boxes += len(a)
        try:
            least, slopes, undecided = bound(query.box(a, b), query.rows[None])
        except Late:
            return out
        open_ = ~(least > query.tolerance).all(1)
        a, b, deep, least, undecided = (v[open_] for v in (a, b, deep, least, undecided))
        if not len(a):
            continue
        slope = _worst_slope(least, slopes[open_] if slopes is not None else None, a)
        corner = torch.where(slope > 0, a, b)
        bad = _refute(query, query.to_float32(torch.cat([corner, (a + b) / 2])))
        if bad is not None:
            out.kind, out.point = "unsafe", bad
            return out
        # no undecided ReLU: the bound is the minimum itself, and its corner did not replay: rounding decides there
        stuck = (undecided == 0) | (((b - a) / whole).amax(1) < 1e-7)
        out.doubtful += int(stuck.sum())
        keep = ~stuck
        if solve is not None:
            for i in ((undecided <= UNDECIDED) & (deep >= DEPTH) & keep).nonzero().flatten().tolist():
                if limits.over(out.boxes):
                    return out
                verdict, point = solve(query.box(a[i : i + 1], b[i : i + 1]), limits.until)
                out.solved += 1
                if verdict == "safe":
                    keep[i] = False
                elif verdict == "unsafe" and point is not None:
                    bad = _refute(query, query.to_float32(point[None]))
                    if bad is not None:
                        out.kind, out.point = "unsafe", bad
                        return out
        a, b, deep, least, slope = (v[keep] for v in (a, b, deep, least, slope))
        if not len(a):
            continue
        at = ((slope.abs() + 1e-9) * (b - a)).argmax(1, keepdim=True)
        cut = (a.gather(1, at) + b.gather(1, at)) / 2
        low, high = torch.cat([low, a, a.scatter(1, at, cut)]), torch.cat([high, b.scatter(1, at, cut), b])
        worst = torch.cat([worst, least.amin(1), least.amin(1)])
        depth = torch.cat([depth, deep + 1, deep + 1])
    out.kind = "unknown" if out.doubtful else "safe"
    return out


def _ends(query: Query, table: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """The real boxes (n, d) of boxes of indices; at the rim the region itself, which float32 points may miss by less
    than one unit in the last place."""
    axis = torch.arange(low.shape[1])
    last = torch.tensor([len(v) - 1 for v in query.values])
    a, b = table[axis, low], table[axis, high]
    return torch.where(low == 0, torch.minimum(a, query.lower), a), torch.where(
        high == last, torch.maximum(b, query.upper), b
    )


def _worst_slope(least: Tensor, slopes: Tensor | None, like: Tensor) -> Tensor:
    """The linear lower bound's coefficients (n, d) of the margin that is worst off."""
    if slopes is None:
        return torch.ones_like(like)
    at = least.argmin(1)
    return slopes[torch.arange(len(least)), at]


def _refute(query: Query, points: Tensor) -> Tensor | None:
    """A point among (n, d) that gets another class."""
    margin = query.margins(points).amin(1)
    low = margin <= 0
    if not bool(low.any()):
        return None
    return witness(query, points[low][margin[low].argsort()][:16])


def _enumerate(query: Query, table: Tensor, low: Tensor, high: Tensor, out: Outcome) -> Tensor | None:
    """Evaluates every point of grid boxes; returns one that gets another class, and counts those that rounding
    decides. Boxes of several points remain to be proven between their points."""
    points = []
    for a, b in zip(low.tolist(), high.tolist()):
        ranges = [table[i, p : q + 1] for i, (p, q) in enumerate(zip(a, b))]
        points.append(torch.cartesian_prod(*ranges).reshape(-1, len(a)))
    if not points:
        return None
    every = torch.cat(points)
    margin = query.margins(every).amin(1)
    near = margin <= query.tolerance
    if bool(near.any()):
        bad, good = query.judge(every[near])
        if bool(bad.any()):
            return every[near][bad][0]
        out.doubtful += int((~good).sum())
    several = (high > low).any(1)
    if bool(several.any()):
        out.between.append(_ends(query, table, low[several], high[several]))
    return None


def batch_of(query: Query) -> int:
    """Boxes per pass: as many as stay within some hundred megabytes."""
    widest = max(n.size for n in query.network.nodes)
    hidden = sum(query.network.nodes[i].size for i in query.network.relus) + 1
    return max(1, min(BATCH, (1 << 26) // (widest * min(hidden, 4096)), (1 << 24) // widest))


def corners(low: Tensor, high: Tensor) -> Tensor:
    """The 2^d corners of one box, (d,) each."""
    return torch.tensor(list(itertools.product(*zip(low.tolist(), high.tolist()))), dtype=low.dtype)
