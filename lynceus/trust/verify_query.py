"""What is asked: one decision of one network, a region around it, the grid that discretises it, and the replay of
points.

The grid is held as float32 numbers, which are what the network really sees: a point of it is evaluated as it stands,
and boxes between grid points are boxes between these numbers. When image and step lie on the 8-bit grid k / 255, so
does every grid point.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lynceus.core.errors import AdviceError, unknown
from lynceus.core.rng import generator
from lynceus.core.subject import Subject
from lynceus.trust.bounds import Box, margin_rows
from lynceus.trust.bounds_graph import fused, trace
from lynceus.trust.bounds_ops import Network

Goal = Literal["grid", "region"]
SLACK = 1e-6  # proofs are about real arithmetic: margins must exceed this share of the logits' scale
LEVELS = 255


@dataclass(frozen=True, kw_only=True)
class Query:
    """Is every point of the region given the class `label`?

    x: one sample (*shape), float32. dims: indices into the flattened sample, the coordinates that change.
    values: for each of them its grid points in increasing order (float32 numbers, held in float64).
    lower, upper: the real region, (d,) float64. rows: (k - 1, k), margins of the label. scale: of the logits at x.
    plain: the traced network; network: the same with affine runs fused. model: what is replayed, in float32.
    """

    x: Tensor
    dims: Tensor
    values: list[Tensor]
    lower: Tensor
    upper: Tensor
    label: int
    rows: Tensor
    scale: float
    plain: Network
    network: Network
    model: Any

    @property
    def tolerance(self) -> float:
        """A proof needs margins above this."""
        return SLACK * self.scale

    @property
    def points(self) -> int:
        """How many points the grid has."""
        return math.prod(len(v) for v in self.values)

    def samples(self, coordinates: Tensor) -> Tensor:
        """(n, d) values of the changing coordinates -> (n, *shape) whole samples, float64."""
        out = self.x.double().flatten().repeat(len(coordinates), 1)
        out[:, self.dims] = coordinates
        return out.reshape(-1, *self.x.shape)

    def box(self, low: Tensor, high: Tensor) -> Box:
        """Boxes over the changing coordinates, (n, d) each, as boxes of whole samples."""
        return Box(self.samples(low), self.samples(high))

    def margins(self, coordinates: Tensor) -> Tensor:
        """(n, k - 1) margins in float64, in pieces."""
        with torch.no_grad():
            parts = [self.network(self.samples(p)) @ self.rows.T for p in coordinates.split(4096)]
        return torch.cat(parts)

    def to_float32(self, coordinates: Tensor) -> Tensor:
        """The float32 points nearest to (n, d) real ones that still lie in the region; float64 numbers again."""
        low, high = (_inward(v, up) for v, up in ((self.lower, True), (self.upper, False)))
        return coordinates.float().double().clamp(low, high)

    def judge(self, coordinates: Tensor) -> tuple[Tensor, Tensor]:
        """(bad, good), (n,) bool: the class of float32 points on the original network alone in its batch and on the
        float64 one. Bad on both, ties included; good on both; or neither, where rounding decides."""
        if len(coordinates) == 0:
            none = torch.zeros(0, dtype=torch.bool)
            return none, none
        exact = self.margins(coordinates).amin(1)
        x = self.samples(coordinates).float()
        with torch.no_grad():
            logits = torch.cat([self.model(p) for p in x.split(1)]) if len(x) <= 64 else self.model(x)
        if not bool(torch.isfinite(logits).all()):
            raise AdviceError("The network gives logits that are not finite inside the region; nothing can be proven.")
        rough = (logits.double().cpu() @ self.rows.T.cpu()).amin(1).to(exact.device)
        return (exact <= 0) & (rough <= 0), (exact > 0) & (rough > 0)

    def snapped(self, coordinates: Tensor) -> Tensor:
        """The grid points nearest to (n, d) real ones."""
        out = torch.empty_like(coordinates)
        for i, values in enumerate(self.values):
            at = torch.searchsorted(values, coordinates[:, i].contiguous()).clamp(max=len(values) - 1)
            below = (at - 1).clamp(min=0)
            nearer = (coordinates[:, i] - values[below]).abs() < (values[at] - coordinates[:, i]).abs()
            out[:, i] = torch.where(nearer, values[below], values[at])
        return out


def ask(
    subject: Subject | nn.Module,
    x: Tensor,
    *,
    dims: Sequence[int] | Tensor | None,
    step: float,
    count: int,
    clip: tuple[float, float] | None,
    label: int | None,
    network: Network | None = None,
) -> Query:
    """The query of `verify`; every mistake in it is an AdviceError, raised before any search."""
    x = torch.as_tensor(x).detach()
    inner = subject.model if isinstance(subject, Subject) else subject
    if isinstance(inner, nn.Module) and inner.training:
        raise AdviceError(
            "The model is in training mode: batch norm and dropout would change its answers. Call model.eval() first."
        )
    shape = network.input_shape if network is not None else tuple(x.shape)
    if isinstance(subject, Subject) and network is None and x.ndim == 4 and len(x) == 1:
        shape = tuple(x.shape[1:])
    if math.prod(shape) != x.numel():
        raise AdviceError(f"verify looks at one sample at a time; the network takes {shape} and x is {tuple(x.shape)}.")
    if x.dtype == torch.uint8:
        x = x.float() / 255
    x = x.reshape(shape).float()
    if not bool(torch.isfinite(x).all()):
        raise AdviceError("The sample holds values that are not finite.")
    if clip is not None and (float(x.min()) < clip[0] or float(x.max()) > clip[1]):
        raise AdviceError(
            f"The sample has values from {float(x.min()):.3g} to {float(x.max()):.3g}, outside clip={clip}. Pixels are "
            "in [0, 1] (divide bytes by 255); for inputs of another range give clip=(low, high) or None."
        )
    if not step > 0 or count < 1:
        raise AdviceError(f"The region needs step > 0 and count >= 1, not {step} and {count}.")
    size = x.numel()
    chosen = torch.arange(size) if dims is None else torch.as_tensor(dims, dtype=torch.long).flatten()
    if len(chosen) == 0 or len(chosen.unique()) != len(chosen) or int(chosen.min()) < 0 or int(chosen.max()) >= size:
        raise AdviceError(f"dims are different indices into the {size} values of the flattened sample.")
    plain = trace(subject, shape) if network is None else network
    values, lower, upper = _grid(x.flatten()[chosen].double(), step, count, clip)
    model = subject
    with torch.no_grad():
        logits = model(x[None])
    if logits.ndim != 2 or not bool(torch.isfinite(logits).all()):
        raise AdviceError("The network's answer to the sample is not a row of finite logits; nothing can be proven.")
    answer = int(logits[0].argmax()) if label is None else int(label)
    rows = margin_rows(answer, 1, logits.shape[1])[0]
    return Query(
        x=x,
        dims=chosen,
        values=values,
        lower=lower,
        upper=upper,
        label=answer,
        rows=rows.to(plain.device),
        scale=max(float(logits.double().abs().max()), 1e-12),
        plain=plain,
        network=fused(plain),
        model=model,
    )


def _grid(x: Tensor, step: float, count: int, clip: tuple[float, float] | None) -> tuple[list[Tensor], Tensor, Tensor]:
    """Grid points for each coordinate, and the real region. Steps that leave the clip end on its border."""
    offsets = step * torch.arange(-count, count + 1, dtype=torch.float64)
    raw = x[:, None] + offsets[None]
    lower, upper = raw[:, 0], raw[:, -1]
    levels, stride = x * LEVELS, step * LEVELS
    eight_bit = bool(((levels - levels.round()).abs() < 1e-3).all()) and abs(stride - round(stride)) < 1e-6
    if eight_bit and clip == (0.0, 1.0):
        points = (levels.round()[:, None] + round(stride) * torch.arange(-count, count + 1)) / LEVELS
        points = points.clamp(0, 1).float().double()
        lower, upper = points[:, 0], points[:, -1]
    else:
        points = raw.float().double()
        toward = torch.nextafter(points.float(), x.float()[:, None].expand_as(points)).double()
        points = torch.where((points - x[:, None]).abs() > offsets.abs()[None], toward, points)
    if clip is not None:
        lower, upper = lower.clamp(*clip), upper.clamp(*clip)
        ends = torch.tensor(clip, dtype=torch.float64)
        points = points.clamp(float(_inward(ends, True)[0]), float(_inward(ends, False)[1]))
    return [p.unique() for p in points], lower, upper


def _inward(value: Tensor, up: bool) -> Tensor:
    """The nearest float32 number that is not below (`up`) or not above a float64 one."""
    near = value.float()
    wrong = near.double() < value if up else near.double() > value
    direction = torch.full_like(near, math.inf if up else -math.inf)
    return torch.where(wrong, torch.nextafter(near, direction), near).double()


def check_goal(goal: str) -> None:
    """Raises for a goal that is neither "grid" nor "region"."""
    if goal not in ("grid", "region"):
        raise unknown("goal", goal, ("grid", "region"))


def falsify(
    query: Query, goal: Goal, *, starts: int = 32, steps: int = 12, until: float = math.inf, seed: int = 0
) -> Tensor | None:
    """A point (d,) of the region (of the grid for that goal) that gets another class, or None: descent on the margin
    from the sample, the centre and random points, by signs, with steps that halve from half the region's width."""
    width = query.upper - query.lower
    draw = generator(seed, "falsify")
    x = query.lower + width * torch.rand(starts, len(width), generator=draw, dtype=torch.float64).to(width.device)
    x[0] = query.x.double().flatten()[query.dims]
    x[1 % starts] = (query.lower + query.upper) / 2
    reach = width / 2
    for round_ in range(steps + 1):
        x = query.snapped(x) if goal == "grid" else query.to_float32(x)
        place = x.clone().requires_grad_(round_ < steps)
        with torch.enable_grad():
            base = query.x.double().flatten().repeat(len(x), 1)
            whole = base.index_copy(1, query.dims, place).reshape(-1, *query.x.shape)
            margin = (query.network(whole) @ query.rows.T).amin(1)
            found = margin.detach() <= 0
            if bool(found.any()):
                bad = witness(query, x[found][margin[found].argsort()][:8])
                if bad is not None:
                    return bad
            if round_ == steps or time.perf_counter() > until:
                return None
            (gradient,) = torch.autograd.grad(margin.sum(), place)
        x = (x - reach * gradient.sign()).clamp(query.lower, query.upper)
        reach = reach * 0.7
    return None


def witness(query: Query, points: Tensor) -> Tensor | None:
    """The first of (n, d) float32 points that gets another class on the original network and in float64."""
    bad, _ = query.judge(points)
    return points[bad][0] if bool(bad.any()) else None
