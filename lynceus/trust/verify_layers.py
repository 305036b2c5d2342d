"""Layer by layer: the same question asked at the input and then deeper, where one box stands for many.

Safety Verification of Deep Neural Networks, CAV 2017, arXiv 1610.06940, sections 3 and 4. The region of layer k is a
box that surely holds everything which the region of the input becomes there, so "safe" at layer k is "safe" at the
input. The converse fails: a point of layer k may have no pre-image; it is pulled back and replayed, or called spurious.
The manipulations of each layer (dimensions, step, count) follow the paper; their ladders are searched and reported, and
the proof is of the whole box.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from lynceus.core.subject import Subject
from lynceus.trust.bounds import Late, Method, Propagation
from lynceus.trust.bounds_ops import Input, Network, Node, Relu
from lynceus.trust.verify import Budget, Verdict, verify
from lynceus.trust.verify_query import Goal, Query, ask, falsify
from lynceus.trust.verify_search import Limits, batch_of, own_bounder, search_grid, search_region

LEVELS = 64  # a ladder has at most so many steps either way
SIGNS = 12  # dimensions whose sign choices are enumerated


def cuts(network: Network) -> list[int]:
    """The ReLUs that everything later goes through: where the network can be cut in two."""
    out = []
    for i in network.relus:
        if all(min(n.inputs) >= i for n in network.nodes[i + 1 :] if n.inputs):
            out.append(i)
    return out


def tail(network: Network, index: int) -> Network:
    """The network from the output of node `index` on."""
    first = network.nodes[index]
    nodes = [Node(op=Input(), inputs=(), shape=first.shape, layer=first.layer)]
    for node in network.nodes[index + 1 :]:
        nodes.append(Node(op=node.op, inputs=tuple(i - index for i in node.inputs), shape=node.shape, layer=node.layer))
    return Network(nodes=nodes, name=network.name, device=network.device)


def verify_layers(
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
    first: int = 0,
    last: int | None = None,
    width: int = 8,
    network: Network | None = None,
    seed: int = 0,
) -> tuple[Verdict, list[dict[str, Any]]]:
    """`verify`, asked at the layers `first` to `last` (0 is the input) until one of them closes the question.

    Every layer gets an equal share of the time that is left. width: how many dimensions a layer's manipulations have.
    Returns the verdict, whose `layer` says where it closed, and one row per layer: its manipulations, what their
    ladders said, what the whole box said, and what became of a counterexample. Other arguments as in `verify`.
    """
    start = time.perf_counter()
    limits = (budget or Budget()).limits()
    query = ask(subject, x, dims=dims, step=step, count=count, clip=clip, label=label, network=network)
    places = cuts(query.network)
    end = len(places) if last is None else min(last, len(places))
    rows: list[dict[str, Any]] = []
    boxes = 0
    closed: Verdict | None = None
    ladder = _Ladder(query.dims, torch.full((len(query.dims),), float(step), dtype=torch.float64), 0)
    for layer in range(first, end + 1):
        left = limits.until - time.perf_counter()
        if left <= 0 or boxes >= limits.boxes:
            break
        share = Budget(
            seconds=None if math.isinf(left) else left / (end - layer + 1),
            boxes=None if math.isinf(limits.boxes) else max(1, int(limits.boxes - boxes) // (end - layer + 1)),
        )
        if layer == 0:
            got = verify(
                subject,
                x,
                step=step,
                count=count,
                dims=dims,
                clip=clip,
                goal=goal,
                budget=share,
                label=label,
                method=method,
                network=query.plain,
                seed=seed,
            )
            boxes += got.boxes
            rows.append(
                {
                    "layer": "input",
                    "dims": len(query.dims),
                    "step": step,
                    "count": count,
                    "ladders": got.kind if goal == "grid" else "-",
                    "box": "safe" if got.strength == "region" else got.kind if goal == "region" else "-",
                    "boxes": got.boxes,
                    "counterexample": "replayed" if got.kind == "unsafe" else "",
                }
            )
            if got.kind != "unknown":
                closed = replace(got, layer="input")
                break
            continue
        try:
            row, found, ladder = _deeper(query, places, layer, share, method, width, ladder, seed)
        except Late:
            break
        rows.append(row)
        boxes += row["boxes"]
        name = row["layer"]
        if row["box"] == "safe":
            closed = Verdict(kind="safe", strength="region", label=query.label, layer=name)
        elif found is not None:
            with torch.no_grad():
                answer = query.model(found[None])[0]
            other = answer.masked_fill(torch.arange(len(answer)) == query.label, -math.inf)
            closed = Verdict(
                kind="unsafe", strength="none", label=query.label, witness=found, found=int(other.argmax()), layer=name
            )
        if closed is not None or row["box"] == "unsafe":
            break  # deeper boxes hold the image of this one, and of its counterexample
    if closed is None:
        closed = Verdict(
            kind="unknown",
            strength="none",
            label=query.label,
            note="No layer closed the question: " + ", ".join(f"{r['layer']} {r['box']}" for r in rows),
        )
    return replace(closed, boxes=boxes, seconds=time.perf_counter() - start), rows


class _Ladder:
    """The manipulations of a layer: dimensions, steps (one each) and the layer they belong to."""

    def __init__(self, dims: Tensor, steps: Tensor, layer: int):
        self.dims, self.steps, self.layer = dims, steps, layer


def _deeper(
    query: Query,
    places: list[int],
    layer: int,
    share: Budget,
    method: Method,
    width: int,
    before: _Ladder,
    seed: int,
) -> tuple[dict[str, Any], Tensor | None, _Ladder]:
    """One layer: its box, its manipulations, their ladders, the proof, and a counterexample of the input if any."""
    limits = share.limits()
    network, at = query.network, places[layer - 1]
    region = query.box(query.lower[None], query.upper[None])
    with torch.no_grad():
        spread = Propagation(network, region, method=method, until=limits.until)
        read = network.nodes[at].inputs[0]
        op = network.nodes[at].op
        assert isinstance(op, Relu)
        low, high = (op.run(v)[0].flatten() for v in spread.hidden[read])
        values = network.values(query.x.double()[None])
    activation = values[at][0].flatten()
    moving = (high > low).nonzero().flatten()
    rest = tail(network, at)
    name = f"{layer}: {network.nodes[at].layer}"
    row: dict[str, Any] = {"layer": name, "dims": 0, "step": 0.0, "count": 0, "ladders": "-", "counterexample": ""}
    if not len(moving):
        return {**row, "box": "safe", "boxes": 0}, None, before
    inner = Query(
        x=activation.reshape(network.nodes[at].shape),
        dims=moving,
        values=[],
        lower=torch.minimum(low, activation)[moving],
        upper=torch.maximum(high, activation)[moving],
        label=query.label,
        rows=query.rows,
        scale=query.scale,
        plain=rest,
        network=rest,
        model=lambda v: rest(v.double()),
    )
    ladder, steps = _manipulations(query, places, layer, moving, inner, before, width)
    ladders = _ladder_query(inner, ladder, steps)
    bound = own_bounder(ladders, method, limits.until)
    step_limits = Limits(until=limits.until, boxes=min(limits.boxes, 200))
    stepped = search_grid(ladders, bound, step_limits, batch=batch_of(ladders))
    row |= {
        "dims": len(ladder.dims),
        "step": float(ladder.steps.min()),
        "count": max(len(v) for v in ladders.values) // 2,
        "ladders": stepped.kind,
    }
    point = falsify(inner, "region", until=limits.until, seed=seed) if len(moving) else None
    boxes = stepped.boxes
    kind = "unsafe"
    if point is None:
        out = search_region(inner, own_bounder(inner, method, limits.until), limits, batch=batch_of(inner))
        kind, point, boxes = out.kind, out.point, boxes + out.boxes
    if kind != "unsafe" or point is None:
        return {**row, "box": kind, "boxes": boxes}, None, ladder
    sample = _pulled(query, at, inner.samples(point[None])[0], limits.until)
    row["counterexample"] = "spurious or not pulled back" if sample is None else "pulled back and replayed"
    return {**row, "box": "unsafe", "boxes": boxes}, sample, ladder


def _manipulations(
    query: Query, places: list[int], layer: int, moving: Tensor, inner: Query, before: _Ladder, width: int
) -> tuple[_Ladder, Tensor]:
    """Dimensions farthest from the mean activation, among those that move; a step that no choice of signs of the layer
    before steps over: the least |sum of +- w s| over its dimensions."""
    flat = inner.x.flatten()
    order = (flat - flat.mean()).abs()[moving].argsort(descending=True, stable=True)
    dims = moving[order[:width]]
    source = places[before.layer - 1] if before.layer else 0
    at = query.network.nodes[places[layer - 1]].inputs[0]
    origin = query.network.nodes[source]
    part = before.dims[:SIGNS]
    with torch.no_grad():
        base = query.network.values(query.x.double()[None])[source]
        moved = base.flatten().repeat(len(part) + 1, 1)
        moved[torch.arange(len(part)), part] += before.steps[: len(part)]
        out = _between(query.network, source, at, moved.reshape(-1, *origin.shape)).flatten(1)[:, dims]
    change = out[:-1] - out[-1:]
    signs = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=len(part))), dtype=torch.float64)
    step = (signs @ change).abs().amin(0)
    positions = torch.searchsorted(moving, dims)
    half = torch.maximum(inner.upper[positions] - flat[dims], flat[dims] - inner.lower[positions])
    step = torch.maximum(step, half / LEVELS).clamp_min(1e-12)
    step = half / torch.ceil(half / step).clamp_min(1)  # the next smaller step that divides the half-width
    return _Ladder(dims, step, layer), step


def _between(network: Network, source: int, at: int, value: Tensor) -> Tensor:
    """Node `at` from the values of node `source`; everything between reads nothing before it."""
    held: dict[int, Tensor] = {source: value}
    for i in range(source + 1, at + 1):
        node = network.nodes[i]
        if node.inputs and all(j in held for j in node.inputs):
            held[i] = node.op.run(*(held[j] for j in node.inputs))
    return held[at]


def _ladder_query(inner: Query, ladder: _Ladder, steps: Tensor) -> Query:
    positions = torch.searchsorted(inner.dims, ladder.dims)
    low, high, flat = inner.lower[positions], inner.upper[positions], inner.x.flatten()[ladder.dims]
    values = []
    for a, b, c, s in zip(low.tolist(), high.tolist(), flat.tolist(), steps.tolist()):
        below, above = int((c - a) / s + 1e-9), int((b - c) / s + 1e-9)
        points = c + s * torch.arange(-below, above + 1, dtype=torch.float64)
        values.append(points.clamp(a, b).unique())
    return replace(inner, dims=ladder.dims, values=values, lower=low, upper=high)


def _pulled(query: Query, at: int, activation: Tensor, until: float) -> Tensor | None:
    """A float32 sample of the region whose activation comes near and that gets another class, replayed; or None."""
    seconds = min(10.0, until - time.perf_counter())
    if find_spec("z3") is None or seconds <= 0:
        return None
    from lynceus.trust.smt import pull_back

    region = query.box(query.lower[None], query.upper[None])
    scale = float(activation.abs().max()) + 1e-9
    for slack in (1e-3, 0.1):  # the paper allows .1 between layers; what counts is the replay
        sample = pull_back(query.network, at, activation, region, slack=slack * scale, seconds=seconds / 2)
        if sample is not None:
            point = query.to_float32(sample.flatten()[query.dims][None])
            bad, _ = query.judge(point)
            if bool(bad.any()):
                return query.samples(point)[0].float()
    return None
