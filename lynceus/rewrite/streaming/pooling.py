"""Pooling over time and space: space at once, then a reduction over the last frames."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.utils import _ntuple

from lynceus.core.errors import AdviceError
from lynceus.rewrite.streaming.clock import Clock, TracedClock, written
from lynceus.rewrite.streaming.node import Fill, Frames, Held, Node

AVERAGE = (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)
MAXIMUM = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)
GLOBAL_AVERAGE = (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)
GLOBAL_MAXIMUM = (nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d)
_AVG: dict[int, Any] = {1: F.avg_pool1d, 2: F.avg_pool2d}
_MAX: dict[int, Any] = {1: F.max_pool1d, 2: F.max_pool2d}
_AVG_TO: dict[int, Any] = {1: F.adaptive_avg_pool1d, 2: F.adaptive_avg_pool2d}
_MAX_TO: dict[int, Any] = {1: F.adaptive_max_pool1d, 2: F.adaptive_max_pool2d}


class WindowPool(nn.Module):
    """The mean over space and over each `window` time steps: (b, c, t, ...) to (b, c, u, 1, ...).

    A clip of fewer steps is averaged whole.
    """

    def __init__(self, window: int):
        super().__init__()
        self.window = window

    def forward(self, x: Tensor) -> Tensor:
        space = tuple(range(3, x.ndim))
        y = x.mean(space) if space else x
        y = F.avg_pool1d(y, min(self.window, y.shape[2]), 1)
        return y[(..., *[None] * len(space))]

    def stream_node(self, name: str) -> PoolNode | RingPoolNode:
        return ringed(PoolNode(name, kernel=self.window, space=_over_space))

    def extra_repr(self) -> str:
        return f"window={self.window}"


def _over_space(x: Tensor) -> Tensor:
    return x.mean(tuple(range(2, x.ndim)), keepdim=True) if x.ndim > 2 else x


LONG = 8  # frames from which on they are held in one ring, not one by one


class PoolNode(Frames):
    """Average or maximum over the last `kernel` pooled frames, `dilation` apart."""

    def __init__(
        self,
        name: str,
        *,
        kernel: int,
        stride: int = 1,
        padding: int = 0,
        dilation: int = 1,
        largest: bool = False,
        count_padding: bool = True,
        fill: Fill = "zeros",
        space: Any = None,
    ):
        super().__init__(name)
        self.kernel, self.stride, self.padding, self.dilation = kernel, stride, padding, dilation
        self.reach = dilation * (kernel - 1) + 1
        self.width = self.reach - 1
        self.largest, self.count_padding, self.space = largest, count_padding, space
        self.fill = fill if fill == "replicate" else "lowest" if largest else "zeros"

    def seen(self, x: Tensor) -> Tensor:
        return x if self.space is None else self.space(x)

    def run(self, frames: Held, count: Any) -> Tensor:
        picked = frames[:: self.dilation]
        if len(picked) == 1:
            return picked[0]
        stack = torch.stack(picked)
        if self.largest:
            return stack.amax(0)
        if self.count_padding or not self.padding:
            return stack.mean(0)
        real = (count + self.dilation) // self.dilation  # arrivals so far, this one too
        real = real.clamp(max=self.kernel) if isinstance(real, Tensor) else min(real, self.kernel)
        return stack.sum(0) / real

    def many(self, xs: Tensor | None, held: Held, frames: int, end: bool) -> tuple[Tensor | None, Held]:
        if self.count_padding or self.largest or not self.padding or xs is None:
            return super().many(xs, held, frames, end)
        # the mean over what is real: that of the frames over that of ones
        plain = PoolNode(
            self.name, kernel=self.kernel, stride=self.stride, padding=self.padding, dilation=self.dilation
        )
        plain.place(self.enters)
        t, number = len(xs), self.enters.before(frames)
        made, kept = plain.many(self.seen(xs.flatten(0, 1)).unflatten(0, (t, -1)), held, frames, end)
        past = tuple(xs.new_full((1,), float(number - self.width + i >= 0)) for i in range(self.width))
        share, _ = plain.many(xs.new_ones(t, 1), past, frames, end)
        if made is None or share is None:
            return None, kept
        return made / share.view(-1, *[1] * (made.ndim - 1)), kept

    def run_many(self, frames: Tensor) -> Tensor:
        windows = frames.unfold(0, self.reach, self.stride)[..., :: self.dilation]
        return windows.amax(-1) if self.largest else windows.mean(-1)

    def describe(self) -> str:
        return f"{'Max' if self.largest else 'Avg'}Pool({self.kernel},{self.padding},{self.stride},{self.dilation})"


class RingPoolNode(Node):
    """The same over a long window: pooled frames in one ring, whose order does not matter to what is taken of it."""

    width = 1

    def __init__(self, like: PoolNode):
        super().__init__(like.name)
        self.like = like
        self.reach, self.padding, self.stride = like.reach, like.padding, like.stride

    def begin(self, x: Tensor) -> tuple[Held, Tensor]:
        x = self.like.seen(x)
        empty = torch.full_like(x, -torch.inf) if self.like.fill == "lowest" else torch.zeros_like(x)
        return (empty.expand(self.reach, *x.shape).clone(),), x

    def step(self, x: Tensor, held: Held, clock: Clock) -> tuple[Tensor | None, Held]:
        x, ring = self.like.seen(x), held[0]
        if self.like.fill == "replicate":
            if clock.masked:
                assert isinstance(clock, TracedClock)
                ring = torch.where(clock.begins(self.enters).to(x.device), x, ring)
            elif clock.first(self.enters):
                ring = x.expand_as(ring)
        ring = written(ring, clock.slot(self.enters, self.reach), x, 0)
        if not clock.runs(self.leaves):
            return None, (ring,)
        return ring.amax(0) if self.like.largest else ring.mean(0), (ring,)

    def blank(self, like: Tensor) -> Tensor:
        return self.like.blank(like)

    def describe(self) -> str:
        return self.like.describe()


def ringed(node: PoolNode) -> PoolNode | RingPoolNode:
    """The node for a long window, where it can be one."""
    counts = node.largest or node.count_padding or not node.padding
    return RingPoolNode(node) if node.kernel > LONG and node.dilation == 1 and counts else node


def windowed_pool(name: str, module: nn.Module, fill: Fill) -> PoolNode | RingPoolNode:
    """The node of an average or maximum pooling of one to three dimensions, the first of which is time."""
    m: Any = module
    dims = int(type(m).__name__[-2])
    kernel, padding = _ntuple(dims)(m.kernel_size), _ntuple(dims)(m.padding)
    stride = _ntuple(dims)(m.stride if m.stride is not None else m.kernel_size)
    largest = isinstance(m, MAXIMUM)
    dilation = _ntuple(dims)(getattr(m, "dilation", 1))
    if getattr(m, "return_indices", False):
        raise AdviceError(
            f"{name} returns the places of its maxima, which a stream has none for; return_indices=False."
        )
    if getattr(m, "divisor_override", None) is not None:
        raise AdviceError(f"{name} has a divisor_override; leave it out, and scale what comes behind it instead.")
    if m.ceil_mode and (kernel[0] > 1 or stride[0] > 1):
        raise AdviceError(f"{name} rounds up (ceil_mode), which looks past the end of a clip; take ceil_mode=False.")
    count = getattr(m, "count_include_pad", True)
    space = None
    if dims > 1 and any(v != 1 for v in (*kernel[1:], *stride[1:])):
        if largest:

            def space(x: Tensor) -> Tensor:
                y: Tensor = _MAX[dims - 1](x, kernel[1:], stride[1:], padding[1:], dilation[1:], ceil_mode=m.ceil_mode)
                return y
        else:

            def space(x: Tensor) -> Tensor:
                y: Tensor = _AVG[dims - 1](x, kernel[1:], stride[1:], padding[1:], m.ceil_mode, count)
                return y

    node = PoolNode(
        name, kernel=kernel[0], stride=stride[0], padding=padding[0], dilation=dilation[0], largest=largest,
        count_padding=count, fill=fill, space=space,
    )  # fmt: skip
    return ringed(node)


def global_pool(name: str, module: nn.Module, window: int, fill: Fill) -> PoolNode | RingPoolNode:
    """The node of an adaptive pooling to one time step, over the last `window` arrivals."""
    m: Any = module
    dims = int(type(m).__name__[-2])
    size = _ntuple(dims)(m.output_size)
    largest = isinstance(m, GLOBAL_MAXIMUM)
    space = None
    if dims > 1:
        table = _MAX_TO if largest else _AVG_TO

        def space(x: Tensor) -> Tensor:
            y: Tensor = table[dims - 1](x, size[1:])
            return y

    node = ringed(PoolNode(name, kernel=window, largest=largest, fill=fill, space=space))
    node.one_step = True
    return node


def pools_all_time(module: nn.Module) -> bool:
    """Whether an adaptive pooling leaves one time step; an AdviceError when it leaves several."""
    m: Any = module
    dims = int(type(m).__name__[-2])
    first = _ntuple(dims)(m.output_size)[0]
    if first == 1:
        return True
    raise AdviceError(
        f"{type(m).__name__} makes {first} time steps of a clip, whose borders move with its length; pool to 1, or "
        f"take {type(m).__name__.removeprefix('Adaptive')} with a fixed kernel."
    )
