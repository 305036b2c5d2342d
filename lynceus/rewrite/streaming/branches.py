"""Parallel branches in time: residual connections and their like, as modules of clip models and as nodes of streams.

Branches that look further ahead answer later, so in a stream the others wait for them. In a clip there is nothing to
wait for, only edges to cut when a branch shrinks time.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from functools import reduce as fold
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lynceus.core.errors import AdviceError, unknown
from lynceus.rewrite.streaming.clock import Clock, Rate
from lynceus.rewrite.streaming.node import Held, Node, masked

Reduce = Literal["sum", "concat", "mul", "max"]
Shrink = Literal["centred", "lagging", "leading"]
REDUCE: dict[str, Callable[[Sequence[Tensor]], Tensor]] = {
    "sum": lambda parts: fold(operator.add, parts),
    "concat": lambda parts: torch.cat(list(parts), 1),
    "mul": lambda parts: fold(operator.mul, parts),
    "max": lambda parts: fold(torch.maximum, parts),
}
SHRINK = ("centred", "lagging", "leading")


def _check(reduce: str, shrink: str | None) -> None:
    if reduce not in REDUCE:
        raise unknown("way to join branches", reduce, REDUCE)
    if shrink is not None and shrink not in SHRINK:
        raise unknown("way to cut the identity", shrink, SHRINK)


class Parallel(nn.Module):
    """Several modules on one input (b, c, t, ...), joined by `reduce`.

    Where they shrink time by different amounts, shrink says which part of the longer ones is kept: the middle
    ("centred"), the beginning ("lagging") or the end ("leading"); None: equal lengths are asked for. A branch whose
    output has one time step (global pooling) is repeated.
    """

    def __init__(self, *branches: nn.Module, reduce: Reduce = "sum", shrink: Shrink | None = None):
        super().__init__()
        _check(reduce, shrink)
        if len(branches) < 2:
            raise AdviceError("Parallel joins at least two modules; Residual(module) adds the input itself.")
        self.branches = nn.ModuleList(branches)
        self.reduce, self.shrink = reduce, shrink

    def forward(self, x: Float[Tensor, "b c t *space"]) -> Float[Tensor, "b d u *other"]:
        return joined([f(x) for f in self.branches], self.reduce, self.shrink)

    def extra_repr(self) -> str:
        return f"reduce={self.reduce!r}, shrink={self.shrink!r}"


class Residual(nn.Module):
    """x + fn(x), or another `reduce` of the two; shrink as in `Parallel`, for an `fn` without padding in time.

    x (b, c, t, ...), with a temporal stride of 1.
    """

    def __init__(self, fn: nn.Module, *, reduce: Reduce = "sum", shrink: Shrink | None = None):
        super().__init__()
        _check(reduce, shrink)
        self.fn = fn
        self.reduce, self.shrink = reduce, shrink

    def forward(self, x: Float[Tensor, "b c t *space"]) -> Float[Tensor, "b d u *other"]:
        return joined([x, self.fn(x)], self.reduce, self.shrink)

    def extra_repr(self) -> str:
        return f"reduce={self.reduce!r}, shrink={self.shrink!r}"


def joined(parts: Sequence[Tensor], reduce: str, shrink: str | None) -> Tensor:
    lengths = {p.shape[2] for p in parts if p.shape[2] > 1 or shrink is not None}
    if len(lengths) > 1:
        if shrink is None:
            raise AdviceError(
                f"The branches give {sorted(lengths)} time steps; pad them alike, or say what to keep: "
                "shrink='centred'."
            )
        short = min(lengths)
        parts = [p.narrow(2, _lead(p.shape[2] - short, shrink), short) for p in parts]
    return REDUCE[reduce](parts)


def _lead(surplus: int, shrink: str | None) -> int:
    """How many of the surplus steps are cut at the start."""
    if shrink == "centred":
        if surplus % 2:
            raise AdviceError(
                f"A branch that is {surplus} time steps longer has no middle to keep; take kernels of odd size, or "
                "shrink='lagging'."
            )
        return surplus // 2
    return surplus if shrink == "leading" else 0


class Identity(Node):
    """A branch that hands its input on."""

    def begin(self, x: Tensor) -> tuple[Held, Tensor]:
        return (), x

    def step(self, x: Tensor, held: Held, clock: Clock) -> tuple[Tensor | None, Held]:
        return x, ()

    def many(self, xs: Tensor | None, held: Held, frames: int, end: bool) -> tuple[Tensor | None, Held]:
        return xs, ()


class Branches(Node):
    """Nodes side by side. The earlier ones wait in queues for the latest."""

    def __init__(self, name: str, nodes: Sequence[Node], *, reduce: str, shrink: str | None):
        super().__init__(name)
        self.nodes = list(nodes)
        self.reduce, self.shrink = reduce, shrink
        self.join = REDUCE[reduce]

    def place(self, enters: Rate) -> Rate:
        self.enters = enters
        rates = [n.place(enters) for n in self.nodes]
        if len({r.stride for r in rates}) > 1:
            raise AdviceError(
                f"The branches of {self.name} have temporal strides of {[r.stride // enters.stride for r in rates]}; "
                "give them one."
            )
        # two outputs belong together when what they have seen has the same place: see the cut in the clip
        spans = [r.lost for r in rates]
        gate = self.reduce == "mul" and any(n.one_step for n in self.nodes)  # repeated along the other branch
        if self.shrink is None and len(set(spans)) > 1 and not gate:
            raise AdviceError(
                f"The branches of {self.name} shrink time by different amounts; pad them alike, or say what to keep of "
                "the longer ones: shrink='centred'."
            )
        if self.shrink is not None:
            # steps by which each is longer than the shortest
            longer = [(max(spans) - s) // r.stride for s, r in zip(spans, rates)]
            self.skips = [_lead(n, self.shrink) for n in longer]
        else:
            self.skips = [0] * len(rates)
        self.rates = [r.skipping(n) for r, n in zip(rates, self.skips)]
        last = max(r.delay for r in self.rates)
        self.waits = [-(-(last - r.delay) // r.stride) for r in self.rates]
        self.width = sum(n.width for n in self.nodes) + sum(self.waits)
        reach, padding = max(r.reach for r in rates), max(r.padding for r in rates)
        lost = min(spans) if gate else max(spans)
        self.leaves = Rate(delay=last, stride=rates[0].stride, reach=reach, padding=padding, lost=lost)
        return self.leaves

    def begin(self, x: Tensor) -> tuple[Held, Tensor]:
        held: Held = ()
        outs = []
        for node, wait in zip(self.nodes, self.waits):
            more, y = node.begin(x)
            held += (*more, *[torch.zeros_like(y)] * wait)
            outs.append(y)
        return held, self.join(outs)

    def step(self, x: Tensor, held: Held, clock: Clock) -> tuple[Tensor | None, Held]:
        new: list[Tensor] = []
        parts: list[Tensor] = []
        at = 0
        runs = clock.runs(self.leaves)
        for node, rate, wait in zip(self.nodes, self.rates, self.waits):
            y, kept = node(x, held[at : at + node.width], clock)
            at += node.width
            new.extend(kept)
            queue = held[at : at + wait]
            at += wait
            if runs:
                parts.append(queue[0] if wait else y)  # type: ignore[arg-type]
            if wait:
                came = y is not None and clock.runs(rate)
                after = (*queue[1:], y) if came else queue
                if clock.masked:
                    after = masked(clock, rate, after, queue)  # type: ignore[arg-type]
                new.extend(after)  # type: ignore[arg-type]
        return self.join(parts) if runs else None, tuple(new)

    def many(self, xs: Tensor | None, held: Held, frames: int, end: bool) -> tuple[Tensor | None, Held]:
        new: list[Tensor] = []
        parts: list[Tensor] = []
        at = 0
        for node, rate, wait in zip(self.nodes, self.rates, self.waits):
            ys, kept = node.many(xs, held[at : at + node.width], frames, end)
            at += node.width
            new.extend(kept)
            queue = list(held[at : at + wait])
            at += wait
            # outputs that this branch gave before, less those that were dropped or joined already
            given, joint = rate.before(frames), self.leaves.before(frames)
            came = [] if ys is None else list(ys[self._dropped(node, rate, frames) :])
            waiting = queue[len(queue) - (given - joint) :] if given > joint else []
            parts.append(torch.stack([*waiting, *came]) if waiting or came else torch.empty(0))
            queue = [*queue, *came]
            new.extend(queue[len(queue) - wait :] if wait else [])
        count = min(len(p) for p in parts)
        if not count:
            return None, tuple(new)
        return self.join_many([p[:count] for p in parts]), tuple(new)

    def _dropped(self, node: Node, rate: Rate, frames: int) -> int:
        """How many of the outputs that come now are before the first that counts."""
        skipped = (rate.delay - node.leaves.delay) // rate.stride
        return max(0, skipped - node.leaves.before(frames))

    def join_many(self, parts: Sequence[Tensor]) -> Tensor:
        """Joins (t, b, c, ...) along the channels or elementwise."""
        flat = self.join([p.flatten(0, 1) for p in parts])
        return flat.unflatten(0, (len(parts[0]), -1))

    def __call__(self, x: Tensor, held: Held, clock: Clock) -> tuple[Tensor | None, Held]:
        return self.step(x, held, clock)

    def describe(self) -> str:
        return f"{self.reduce}({' '.join(n.describe() for n in self.nodes)}){self.shrink or ''}"
