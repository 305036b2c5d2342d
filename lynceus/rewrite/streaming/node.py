"""What a layer is in a stream: it takes one arrival and what it holds, and gives an output (or nothing yet) and what it
holds next. Nodes own no weights: they read those of the clip model's modules. They never write to what they are given.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lynceus.rewrite.streaming.clock import Clock, Rate, TracedClock

Held = tuple[Tensor, ...]
Fill = Literal["zeros", "replicate"]
FIRST = Rate()


class Node:
    """One layer in a stream.

    name: of its module. reach: arrivals that one output depends on. padding: zeros assumed before the first. stride:
    each so many-th output is kept. width: tensors that it holds. enters, leaves: when arrivals come and outputs go.
    """

    reach = 1
    padding = 0
    stride = 1
    width = 0
    one_step = False  # whether a clip has one time step behind it

    def __init__(self, name: str):
        self.name = name
        self.enters = self.leaves = FIRST

    def place(self, enters: Rate) -> Rate:
        """Told when arrivals come, says when outputs go."""
        self.enters = enters
        self.leaves = enters.through(reach=self.reach, padding=self.padding, stride=self.stride)
        return self.leaves

    def begin(self, x: Tensor) -> tuple[Held, Tensor]:
        """What it holds before the first arrival, which will look like `x`; and what outputs look like."""
        raise NotImplementedError

    def step(self, x: Tensor, held: Held, clock: Clock) -> tuple[Tensor | None, Held]:
        raise NotImplementedError

    def many(self, xs: Tensor | None, held: Held, frames: int, end: bool) -> tuple[Tensor | None, Held]:
        """Several arrivals (t, b, ...) at once: the outputs (u, b, ...), and what is held after them.

        frames: those that the stream saw before. end: the stream ends here, so padding follows, as in a clip.
        """
        number, outs = self.enters.before(frames), []
        arrivals = [] if xs is None else list(xs)
        if end and self.padding and (arrivals or held):
            arrivals += [self.blank(arrivals[0] if arrivals else held[0])] * self.padding
        for i, x in enumerate(arrivals):
            y, held = self.step(x, held, Clock(self.enters.at(number + i)))
            if y is not None:
                outs.append(y)
        return torch.stack(outs) if outs else None, held

    def blank(self, like: Tensor) -> Tensor:
        """What padding puts behind the last arrival."""
        return torch.zeros_like(like)

    def __call__(self, x: Tensor, held: Held, clock: Clock) -> tuple[Tensor | None, Held]:
        y, new = self.step(x, held, clock)
        if clock.masked and new:
            new = masked(clock, self.enters, new, held)
        return y, new

    def describe(self) -> str:
        """What a state must agree with, in words."""
        return f"{type(self).__name__}({self.reach},{self.padding},{self.stride})"


def masked(clock: Clock, rate: Rate, new: Sequence[Tensor], old: Sequence[Tensor]) -> Held:
    """`new` where something arrived, else `old`; for traced clocks only."""
    assert isinstance(clock, TracedClock)
    if rate == FIRST or (rate.delay == 0 and rate.stride == 1):
        return tuple(new)
    on = clock.arrived(rate)
    return tuple(torch.where(on.to(n.device), n, o) for n, o in zip(new, old))


class Frames(Node):
    """A node that holds the arrivals before this one, newest last; tensors are handed on, never copied or written."""

    fill: Fill | Literal["lowest"] = "zeros"

    def run(self, frames: Held, count: Any) -> Tensor:
        """The output for the last `width` + 1 arrivals. count: arrivals before this one; a tensor in graphs."""
        raise NotImplementedError

    def seen(self, x: Tensor) -> Tensor:
        """What is held of an arrival."""
        return x

    def run_many(self, frames: Tensor) -> Tensor:
        """The outputs for consecutive arrivals (n, b, ...), from their first window on."""
        raise NotImplementedError

    def blank(self, like: Tensor) -> Tensor:
        return torch.full_like(like, -torch.inf) if self.fill == "lowest" else torch.zeros_like(like)

    def many(self, xs: Tensor | None, held: Held, frames: int, end: bool) -> tuple[Tensor | None, Held]:
        number = self.enters.before(frames)
        if xs is None or (number == 0 and self.fill == "replicate"):
            return super().many(xs, held, frames, end)
        t = len(xs)
        seen = self.seen(xs.flatten(0, 1)).unflatten(0, (t, -1))
        everything = torch.cat([torch.stack(held), seen]) if held else seen
        kept = everything[t:].unbind() if held else ()
        if end and self.padding:
            blank = self.blank(seen[:1])
            everything = torch.cat([everything, *[blank] * self.padding])
        late = self.reach - 1 - self.padding - number  # arrivals until the first window counts
        first = late if late >= 0 else late % self.stride
        if len(everything) - first < self.reach:
            return None, kept
        return self.run_many(everything[first:]), kept

    def begin(self, x: Tensor) -> tuple[Held, Tensor]:
        x = self.seen(x)
        empty = torch.full_like(x, -torch.inf) if self.fill == "lowest" else torch.zeros_like(x)
        held = (empty,) * self.width
        return held, self.run((*held, x), 0)

    def step(self, x: Tensor, held: Held, clock: Clock) -> tuple[Tensor | None, Held]:
        x = self.seen(x)
        if self.fill == "replicate" and held:
            if clock.masked:
                assert isinstance(clock, TracedClock)
                start = clock.begins(self.enters).to(x.device)
                held = tuple(torch.where(start, x, h) for h in held)
            elif clock.first(self.enters):
                held = (x,) * len(held)
        frames = (*held, x)
        y = self.run(frames, clock.slot(self.enters, 2**62)) if clock.runs(self.leaves) else None
        return y, frames[1:]


class PerFrame(Node):
    """A node without memory."""

    def run(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def begin(self, x: Tensor) -> tuple[Held, Tensor]:
        return (), self.run(x)

    def step(self, x: Tensor, held: Held, clock: Clock) -> tuple[Tensor | None, Held]:
        return self.run(x), ()

    def many(self, xs: Tensor | None, held: Held, frames: int, end: bool) -> tuple[Tensor | None, Held]:
        if xs is None:
            return None, ()
        return self.run(xs.flatten(0, 1)).unflatten(0, (len(xs), -1)), ()


class Applied(PerFrame):
    """A module that takes a frame as it is, as activations and dropout do."""

    def __init__(self, name: str, module: nn.Module):
        super().__init__(name)
        self.module = module

    def run(self, x: Tensor) -> Tensor:
        y: Tensor = self.module(x)
        return y

    def describe(self) -> str:
        return type(self.module).__name__


class Chain(Node):
    """Nodes one after the other; the first that gives nothing ends the step."""

    def __init__(self, name: str, nodes: Sequence[Node]):
        super().__init__(name)
        self.nodes = list(nodes)
        self.width = sum(n.width for n in self.nodes)
        self.one_step = any(n.one_step for n in self.nodes)

    def place(self, enters: Rate) -> Rate:
        self.enters = self.leaves = enters
        for node in self.nodes:
            self.leaves = node.place(self.leaves)
        return self.leaves

    def begin(self, x: Tensor) -> tuple[Held, Tensor]:
        held: Held = ()
        for node in self.nodes:
            more, x = node.begin(x)
            held += more
        return held, x

    def step(self, x: Tensor, held: Held, clock: Clock) -> tuple[Tensor | None, Held]:
        new: list[Tensor] = []
        at, y = 0, x
        for node in self.nodes:
            width = node.width
            got, kept = node(y, held[at : at + width], clock)
            new.extend(kept)
            at += width
            if got is None:
                return None, (*new, *held[at:])
            y = got
        return y, tuple(new)

    def many(self, xs: Tensor | None, held: Held, frames: int, end: bool) -> tuple[Tensor | None, Held]:
        new: list[Tensor] = []
        at = 0
        for node in self.nodes:
            xs, kept = node.many(xs, held[at : at + node.width], frames, end)
            new.extend(kept)
            at += node.width
        return xs, tuple(new)

    def __call__(self, x: Tensor, held: Held, clock: Clock) -> tuple[Tensor | None, Held]:
        return self.step(x, held, clock)  # its nodes mask their own

    def describe(self) -> str:
        return f"[{' '.join(n.describe() for n in self.nodes)}]"
