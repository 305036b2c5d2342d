"""Is one decision safe? A proof that no point of a region gets another class, a point that does, or "unknown".

Safety Verification of Deep Neural Networks, CAV 2017, arXiv 1610.06940 (code: VeriDeep/DLV, not copied): the same
question, one input, a region and a family of small changes, answered soundly. First points are tried; then boxes are
proven by linear bounds, refuted, or split (`verify_search`); what stays small and stubborn goes to Z3 (`smt`).

Proofs are about the network in real arithmetic with a margin above 1e-6 of the logits' scale, so that they hold for its
float32 runs too; counterexamples are replayed on the original network in float32 and in float64. Equal logits count as
another class.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Literal

import torch
from jaxtyping import Int
from torch import Tensor, nn

from lynceus.core.errors import AdviceError, unknown
from lynceus.core.subject import Subject
from lynceus.trust.bounds import METHODS, Late, Method, Propagation
from lynceus.trust.bounds_ops import Network
from lynceus.trust.verify_query import Goal, Query, ask, check_goal, falsify
from lynceus.trust.verify_search import (
    Bounder,
    Limits,
    Outcome,
    Solver,
    batch_of,
    own_bounder,
    search_grid,
    search_region,
)

Kind = Literal["safe", "unsafe", "unknown"]
Strength = Literal["region", "grid", "none"]
Engine = Literal["own", "auto_lirpa"]


@dataclass(frozen=True, kw_only=True)
class Budget:
    """How much a verification may cost: wall seconds and boxes; None is no limit."""

    seconds: float | None = 60.0
    boxes: int | None = None

    def limits(self) -> Limits:
        """The moment and the number at which to stop, counted from now."""
        until = math.inf if self.seconds is None else time.perf_counter() + self.seconds
        return Limits(until=until, boxes=math.inf if self.boxes is None else self.boxes)


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What is known about one decision.

    kind: "safe", "unsafe" or "unknown". strength: of a "safe": "region" holds for every real point, "grid" for the grid
      points; "none" otherwise. witness: a sample that gets another class, float32, in x's shape; found: its class.
    label: the class that was asked about. boxes: how many were looked at. unstable: ReLUs undecided over the whole
    region. solved: leaf boxes that went to Z3. layer: where the proof closed, in layer mode. note: what is to be known.
    """

    kind: Kind
    strength: Strength
    label: int
    witness: Tensor | None = None
    found: int | None = None
    boxes: int = 0
    seconds: float = 0.0
    unstable: int = 0
    solved: int = 0
    layer: str | None = None
    note: str = ""

    def __bool__(self) -> bool:
        return self.kind == "safe"


def verify(
    subject: Subject | nn.Module,
    x: Tensor,
    *,
    step: float,
    count: int = 1,
    dims: Sequence[int] | Tensor | None = None,
    clip: tuple[float, float] | None = (0.0, 1.0),
    goal: Goal = "grid",
    budget: Budget | None = None,
    label: int | None = None,
    method: Method = "crown",
    engine: Engine = "own",
    solver: bool = True,
    raise_to_region: bool = True,
    network: Network | None = None,
    seed: int = 0,
) -> Verdict:
    """Does every point of a region around one sample keep its class?

    subject: a subject (x is pixels in [0, 1]) or a module on any input. x: one sample, (*shape) or (1, *shape).
    dims: the coordinates that may change, as indices into the flattened sample; None: all.
    step, count: each of them moves by up to `count` steps of `step` either way, on a grid of (2 count + 1)^d points.
    clip: values that inputs may have; the region is cut there (a step beyond ends on the border). None: any.
    goal: "grid" asks about the grid points, and raises the answer to the whole region where every cell between them is
      proven too (`raise_to_region`); "region" asks about every real point from the start.
    label: the class to keep; None: the network's own answer at x.
    method: of the bounds. engine: "auto_lirpa" takes that library's bounds, where it is installed. solver: small
      stubborn boxes go to Z3, where that is installed (goal "region").
    network: `trace(subject, shape)`, so that many samples of one model are read once.
    Raises AdviceError, before any search, for samples outside the clip, labels outside the classes, logits that are not
    finite, and layers that bounds do not know.
    """
    start = time.perf_counter()
    check_goal(goal)
    if method not in METHODS:
        raise unknown("method", str(method), METHODS)
    if engine not in ("own", "auto_lirpa"):
        raise unknown("engine", str(engine), ("own", "auto_lirpa"))
    if engine == "auto_lirpa":
        from lynceus.trust.lirpa import need

        need()
    limits = (budget or Budget()).limits()
    query = ask(subject, x, dims=dims, step=step, count=count, clip=clip, label=label, network=network)
    here = query.x.double().flatten()[query.dims][None]
    bad, _ = query.judge(here)
    if bool(bad.any()):
        return _verdict(query, Outcome(kind="unsafe", point=here[0]), start, 0, "none", "The sample itself is not.")
    point = falsify(query, goal, until=limits.until, seed=seed)
    if point is not None:
        return _verdict(query, Outcome(kind="unsafe", point=point), start, 0, "none", "")
    bound = _bounder(query, method, engine, limits.until)
    undecided = _undecided(query, method, limits.until)
    batch = batch_of(query)
    if goal == "region":
        out = search_region(query, bound, limits, batch=batch, solve=_solver(query) if solver else None)
        return _verdict(query, out, start, undecided, "region", "")
    out = search_grid(query, bound, limits, batch=batch)
    strength: Strength = "grid"
    note = ""
    if out.kind == "safe" and not out.between:
        strength = "region"
    elif out.kind == "safe" and raise_to_region:
        cells = _cells(out)
        more = Limits(until=limits.until, boxes=4 * (out.boxes + 64))
        rest = search_region(query, bound, more, batch=batch, start=cells, solve=None)
        out.boxes += rest.boxes
        if rest.kind == "safe":
            strength = "region"
        elif rest.kind == "unsafe":
            note = "Between the grid points another class was found: the whole region is not safe."
    return _verdict(query, out, start, undecided, strength, note)


def _cells(out: Outcome) -> tuple[Tensor, Tensor]:
    low, high = zip(*out.between)
    return torch.cat(low), torch.cat(high)


def _bounder(query: Query, method: Method, engine: Engine, until: float) -> Bounder:
    if engine == "own":
        return own_bounder(query, method, until)
    from lynceus.trust.lirpa import lirpa_bounder

    return lirpa_bounder(query, method)


def _solver(query: Query) -> Solver | None:
    if find_spec("z3") is None:
        return None
    from lynceus.trust.smt import leaf_solver

    return leaf_solver(query)


def _undecided(query: Query, method: Method, until: float) -> int:
    box = query.box(query.lower[None], query.upper[None])
    try:
        with torch.no_grad():
            hidden = Propagation(query.network, box, method=method, until=until).hidden
    except Late:
        return -1
    return int(sum(((low < 0) & (high > 0)).sum() for low, high in hidden.values()))


def _verdict(query: Query, out: Outcome, start: float, undecided: int, strength: Strength, note: str) -> Verdict:
    if out.kind != "safe":
        strength = "none"
    sample = found = None
    if out.kind == "unsafe" and out.point is not None:
        sample = query.samples(out.point[None])[0].float()
        with torch.no_grad():
            logits = query.model(sample[None])[0].double().cpu()
        other = logits.clone()
        other[query.label] = -math.inf
        found = int(other.argmax())
    if out.kind == "unknown":
        why = f"{out.doubtful} small boxes or points are decided by rounding alone." if out.doubtful else ""
        note = note or why or "The budget ended before the region was searched."
    return Verdict(
        kind=out.kind,
        strength=strength,
        label=query.label,
        witness=sample,
        found=found,
        boxes=out.boxes,
        seconds=time.perf_counter() - start,
        unstable=max(undecided, 0),
        solved=out.solved,
        note=note,
    )


def largest(x: Tensor, count: int) -> Int[Tensor, " d"]:
    """The `count` coordinates of the flattened sample that are farthest from its mean, in increasing order."""
    flat = x.flatten().double()
    if not 1 <= count <= len(flat):
        raise AdviceError(f"A sample of {len(flat)} values has 1 to {len(flat)} coordinates to change, not {count}.")
    order = (flat - flat.mean()).abs().argsort(descending=True, stable=True)
    return order[:count].sort().values


@dataclass(frozen=True, kw_only=True)
class Radius:
    """How far one decision holds: half-widths of boxes (in the input's units).

    proven: the largest that was proven safe, 0 if none. refuted: the smallest with a counterexample, inf if none.
    witness: that counterexample."""

    proven: float
    refuted: float
    witness: Tensor | None = None
    seconds: float = 0.0


def radius(
    subject: Subject | nn.Module,
    x: Tensor,
    *,
    largest: float = 1.0,
    precision: float = 1 / 1024,
    dims: Sequence[int] | Tensor | None = None,
    clip: tuple[float, float] | None = (0.0, 1.0),
    budget: Budget | None = None,
    label: int | None = None,
    method: Method = "crown",
    network: Network | None = None,
    seed: int = 0,
) -> Radius:
    """The largest proven and the smallest refuted half-width of the box around one sample, by bisection.

    largest: half-widths up to this are looked at. precision: bisection stops when the two are this close. budget: for
    all steps together; a step that stays unknown is halved towards what is proven. Other arguments as in `verify`.
    """
    start = time.perf_counter()
    allowed = budget or Budget()
    limits = allowed.limits()
    proven, refuted, top, point, trial = 0.0, math.inf, largest, None, largest
    while time.perf_counter() < limits.until and top - proven > precision and trial > 0:
        left = limits.until - time.perf_counter()
        got = verify(
            subject,
            x,
            step=trial,
            dims=dims,
            clip=clip,
            goal="region",
            budget=Budget(seconds=None if math.isinf(left) else left / 3, boxes=allowed.boxes or 2000),
            label=label,
            method=method,
            network=network,
            seed=seed,
        )
        if got.kind == "safe":
            proven = trial
        else:
            top = trial
        if got.witness is not None:
            sample = torch.as_tensor(x).detach()
            sample = sample.float() / 255 if sample.dtype == torch.uint8 else sample
            reach = float((got.witness.double() - sample.reshape(got.witness.shape).double()).abs().max())
            if reach < refuted:
                refuted, point = reach, got.witness
            top = min(top, max(refuted, proven))
        trial = (proven + top) / 2
    return Radius(proven=proven, refuted=refuted, witness=point, seconds=time.perf_counter() - start)
