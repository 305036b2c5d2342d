"""Layers that treat every time step alike, as nodes: norms, activations, linear layers, flattening."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from lynceus.core.errors import AdviceError
from lynceus.rewrite.streaming.node import PerFrame


class EachFrame(nn.Module):
    """A module of your own on every time step by itself: (b, c, t, ...) in and out, `fn` sees (b t, c, ...).

    It tells a converter that nothing in `fn` looks across time.
    """

    def __init__(self, fn: nn.Module):
        super().__init__()
        self.fn = fn

    def forward(self, x: Float[Tensor, "b c t *space"]) -> Float[Tensor, "b d t *other"]:
        b, t = x.shape[0], x.shape[2]
        y = self.fn(x.transpose(1, 2).flatten(0, 1))
        return y.unflatten(0, (b, t)).transpose(1, 2)


class ChannelLinear(nn.Linear):
    """A linear layer along the channels, axis 1 of a clip or a frame."""

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim == 2:
            return F.linear(x, self.weight, self.bias)
        return F.linear(x.movedim(1, -1), self.weight, self.bias).movedim(-1, 1)

    def stream_node(self, name: str) -> LinearNode:
        return LinearNode(name, self)


class BatchNormNode(PerFrame):
    """A batch norm in eval mode on a frame, whose rank is one less."""

    def __init__(self, name: str, module: nn.modules.batchnorm._BatchNorm):
        super().__init__(name)
        self.module = module

    def run(self, x: Tensor) -> Tensor:
        m = self.module
        return F.batch_norm(x, m.running_mean, m.running_var, m.weight, m.bias, False, 0.0, m.eps)

    def describe(self) -> str:
        return f"BatchNorm({self.module.num_features})"


class AlongAxis(PerFrame):
    """Softmax and its like: `module.dim` counted in the clip, moved to the frame."""

    def __init__(self, name: str, module: Any, dim: int):
        super().__init__(name)
        self.module, self.dim = module, dim
        self.function = {
            nn.Softmax: F.softmax,
            nn.LogSoftmax: F.log_softmax,
            nn.Softmin: F.softmin,
            nn.GLU: F.glu,
        }[type(module)]

    def run(self, x: Tensor) -> Tensor:
        y: Tensor = self.function(x, dim=self.dim)
        return y

    def describe(self) -> str:
        return f"{type(self.module).__name__}({self.dim})"


class FlattenNode(PerFrame):
    """Flattening of space, or of everything behind a pooling over the whole clip."""

    def __init__(self, name: str, start: int, end: int):
        super().__init__(name)
        self.start, self.end = start, end

    def run(self, x: Tensor) -> Tensor:
        return x.flatten(self.start, self.end) if self.end > self.start else x

    def describe(self) -> str:
        return f"Flatten({self.start},{self.end})"


class LinearNode(PerFrame):
    """A linear layer on the last axis."""

    def __init__(self, name: str, module: nn.Linear):
        super().__init__(name)
        self.module = module

    def run(self, x: Tensor) -> Tensor:
        y: Tensor = self.module(x)
        return y

    def describe(self) -> str:
        return f"Linear({self.module.in_features},{self.module.out_features})"


def axis_in_frame(dim: int | None, *, time: int | None, rank: int | None, what: str) -> int:
    """Where axis `dim` of a clip stands in a frame; an AdviceError when it is time itself.

    time: the axis of time in clips, None once it was flattened away. rank: of what is there.
    """
    if dim is None or rank is None:
        raise AdviceError(f"{what} does not say which axis it works along; give it dim=1.")
    at = dim + rank if dim < 0 else dim
    if time is None:
        return at
    if at == time:
        raise AdviceError(
            f"{what} works along time (axis {dim} of {rank}), so it needs the whole clip and cannot be streamed."
        )
    return at - 1 if at > time else at
