"""When things happen in a stream: a function of the number of frames seen, and of nothing else.

A layer's inputs arrive at the frames delay, delay + stride, delay + 2 stride, ... That schedule is known when a model
is converted, so no layer keeps a counter: every ring index, warm-up and temporal stride follows from the one number of
frames in the state.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Rate:
    """Arrivals at the frames delay + j stride; reach and padding (both in frames) say what arrival j has seen: frames
    j stride - padding to j stride - padding + reach - 1, so that delay = reach - 1 - padding. lost: frames by which a
    clip gets shorter."""

    delay: int = 0
    stride: int = 1
    reach: int = 1
    padding: int = 0
    lost: int = 0

    def through(self, *, reach: int, padding: int, stride: int) -> Rate:
        """The rate behind a layer that looks at `reach` arrivals, is padded with `padding` and keeps each stride-th."""
        return Rate(
            delay=self.delay + self.stride * (reach - 1 - padding),
            stride=self.stride * stride,
            reach=self.reach + self.stride * (reach - 1),
            padding=self.padding + self.stride * padding,
            lost=self.lost + self.stride * (reach - 1 - 2 * padding),
        )

    def skipping(self, count: int) -> Rate:
        """The rate when the first `count` arrivals are dropped."""
        return replace(self, delay=self.delay + self.stride * count)

    def before(self, frames: int) -> int:
        """How many arrivals a stream had in its first so many frames."""
        return max(0, -(-(frames - self.delay) // self.stride))

    def at(self, number: int) -> int:
        """The frame of an arrival."""
        return self.delay + self.stride * number

    def arrivals(self, frames: int) -> int:
        """How many there are in a clip of so many frames (padded at both ends)."""
        return max(0, (frames - self.lost - 1) // self.stride + 1)


class Clock:
    """What a step knows of time, in eager mode: an int."""

    masked = False

    def __init__(self, frames: int):
        self.frames: Any = frames

    def runs(self, rate: Rate) -> bool:
        """Whether the step computes what arrives at this rate."""
        return bool(self.frames >= rate.delay and (self.frames - rate.delay) % rate.stride == 0)

    def first(self, rate: Rate) -> bool:
        return bool(self.frames == rate.delay)

    def slot(self, rate: Rate, size: int) -> Any:
        """The place in a ring of `size` of what arrives now."""
        return (self.frames - rate.delay) // rate.stride % size


class TracedClock(Clock):
    """The same for a graph in which the number of frames is a tensor: everything is computed at every step, and masks
    keep what has not arrived out of the state."""

    masked = True

    def __init__(self, frames: Tensor):
        self.frames = frames

    def runs(self, rate: Rate) -> bool:
        return True

    def first(self, rate: Rate) -> bool:
        return False

    def arrived(self, rate: Rate) -> Tensor:
        """A boolean of no axes: whether something arrives at this frame."""
        on: Tensor = self.frames >= rate.delay
        return on if rate.stride == 1 else on & ((self.frames - rate.delay) % rate.stride == 0)

    def begins(self, rate: Rate) -> Tensor:
        on: Tensor = self.frames == rate.delay
        return on

    def slot(self, rate: Rate, size: int) -> Any:
        return torch.div(self.frames - rate.delay, rate.stride, rounding_mode="floor") % size


class SteadyClock(TracedClock):
    """The same once every layer has seen its whole reach, for one phase of the temporal strides: no masks, and what
    does not arrive in this phase is left out of the graph."""

    masked = False

    def __init__(self, frames: Tensor, phase: int):
        super().__init__(frames)
        self.phase = phase

    def runs(self, rate: Rate) -> bool:
        return (self.phase - rate.delay) % rate.stride == 0


def written(ring: Tensor, place: int | Tensor, value: Tensor, axis: int) -> Tensor:
    """A copy of `ring` with `value` (one axis less) at `place` of `axis`; the ring itself stays as it is."""
    if isinstance(place, Tensor):
        return ring.index_copy(axis, place.reshape(1).to(ring.device), value.unsqueeze(axis))
    made = ring.clone()
    made.select(axis, place).copy_(value)
    return made
