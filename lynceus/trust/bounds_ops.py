"""The pieces that bounds are propagated through: affine operators and (leaky) ReLUs, forwards, backwards and in
absolute value. Everything else that a network does is written in these by `bounds_graph`.

An operator sees batches (b, *shape) of its inputs and knows how to go back: coefficients c of its output become
coefficients of its inputs, c A. Max-pooling is a tournament of max(a, b) = b + relu(a - b).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

Shape = tuple[int, ...]


@dataclass(eq=False, kw_only=True)
class Node:
    """One operator's place in the network: what it reads, the shape of one sample's output, the layer it came from."""

    op: Operator
    inputs: tuple[int, ...]
    shape: Shape
    layer: str

    @property
    def size(self) -> int:
        return math.prod(self.shape)


class Operator:
    """A step of the network. `affine`: A x + b; otherwise it is a `Relu` (or the network's input)."""

    affine = True
    axis_aligned = False  # every output reads at most one input coordinate

    def run(self, *x: Tensor) -> Tensor:
        """The step itself, on batches."""
        raise NotImplementedError

    def linear(self, *x: Tensor) -> Tensor:
        """A x."""
        raise NotImplementedError

    def absolute(self, r: Tensor) -> Tensor:
        """|A| r, for r >= 0."""
        raise NotImplementedError

    def squared(self, r: Tensor) -> Tensor:
        """(A * A) r."""
        raise NotImplementedError

    def back(self, c: Tensor) -> tuple[Tensor | None, ...]:
        """c (n, *out) -> c A for each input, (n, *in)."""
        raise NotImplementedError

    def interval(self, *boxes: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        ((low, high),) = boxes
        centre, radius = self.run((low + high) / 2), self.absolute((high - low) / 2)
        return centre - radius, centre + radius


class Input(Operator):
    affine = False


class Relu(Operator):
    """max(x, slope * x), 0 <= slope <= 1."""

    affine = False

    def __init__(self, slope: float = 0.0):
        self.slope = slope

    def run(self, *x: Tensor) -> Tensor:
        return F.leaky_relu(x[0], self.slope) if self.slope else F.relu(x[0])

    def interval(self, *boxes: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return self.run(boxes[0][0]), self.run(boxes[0][1])


class Dense(Operator):
    """x W^T + b on the last axis, or on the whole flattened sample (`flat`).

    steps: the operators on maps that this matrix stands for, where all of them have windows (`bounds_patch`)."""

    def __init__(self, weight: Tensor, bias: Tensor | None, *, flat: tuple[Shape, Shape] | None = None):
        self.weight, self.bias, self.flat = weight, bias, flat
        self.steps: Sequence[Node] = ()
        self._absolute: Tensor | None = None

    def linear(self, *x: Tensor) -> Tensor:
        if self.flat is None:
            return x[0] @ self.weight.T
        return (x[0].reshape(len(x[0]), -1) @ self.weight.T).reshape(len(x[0]), *self.flat[1])

    def run(self, *x: Tensor) -> Tensor:
        out = self.linear(x[0])
        if self.bias is None:
            return out
        return out + (self.bias if self.flat is None else self.bias.reshape(self.flat[1]))

    def _positive(self, r: Tensor, matrix: Tensor) -> Tensor:
        if self.flat is None:
            return r @ matrix.T
        return (r.reshape(len(r), -1) @ matrix.T).reshape(len(r), *self.flat[1])

    def absolute(self, r: Tensor) -> Tensor:
        if self._absolute is None:
            self._absolute = self.weight.abs()
        return self._positive(r, self._absolute)

    def squared(self, r: Tensor) -> Tensor:
        return self._positive(r, self.weight.square())

    def back(self, c: Tensor) -> tuple[Tensor | None, ...]:
        if self.flat is None:
            return (c @ self.weight,)
        return ((c.reshape(len(c), -1) @ self.weight).reshape(len(c), *self.flat[0]),)


class Convolution(Operator):
    """Any aten.convolution: one, two or three axes, groups, dilation, transposed."""

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        shape: Shape,
        *,
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        transposed: bool,
        output_padding: Sequence[int],
        groups: int,
    ):
        self.weight, self.bias, self.shape = weight, bias, shape
        self.windows: dict[Shape, Tensor] = {}  # matrices of `bounds_patch`, by the size of a window
        self.rest = (
            list(stride),
            list(padding),
            list(dilation),
            transposed,
            list(output_padding),
            groups,
        )

    def _convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return torch.ops.aten.convolution(x, weight, bias, *self.rest)

    def run(self, *x: Tensor) -> Tensor:
        return self._convolve(x[0], self.weight, self.bias)

    def linear(self, *x: Tensor) -> Tensor:
        return self._convolve(x[0], self.weight)

    def absolute(self, r: Tensor) -> Tensor:
        return self._convolve(r, self.weight.abs())

    def squared(self, r: Tensor) -> Tensor:
        return self._convolve(r, self.weight.square())

    def back(self, c: Tensor) -> tuple[Tensor | None, ...]:
        x = c.new_zeros(()).expand(len(c), *self.shape)
        return (torch.ops.aten.convolution_backward(c, x, self.weight, None, *self.rest, [True, False, False])[0],)


class Scale(Operator):
    """x * factor + shift, broadcast over one sample's shape: batch norm, normalisation, constants."""

    axis_aligned = True

    def __init__(self, factor: Tensor | None, shift: Tensor | None):
        self.factor, self.shift = factor, shift

    def linear(self, *x: Tensor) -> Tensor:
        return x[0] if self.factor is None else x[0] * self.factor

    def run(self, *x: Tensor) -> Tensor:
        out = self.linear(x[0])
        return out if self.shift is None else out + self.shift

    def absolute(self, r: Tensor) -> Tensor:
        return r if self.factor is None else r * self.factor.abs()

    def squared(self, r: Tensor) -> Tensor:
        return r if self.factor is None else r * self.factor.square()

    def back(self, c: Tensor) -> tuple[Tensor | None, ...]:
        return (self.linear(c),)


class Rearrange(Operator):
    """A linear map with weights >= 0 given by a function on batches: views, slices, padding, averages, resizing.

    `moves`: each output is one input (or a constant), so coordinates stay apart."""

    def __init__(self, function: Callable[[Tensor], Tensor], shape: Shape, *, moves: bool, constant: bool = False):
        self.function, self.shape, self.axis_aligned, self.constant = function, shape, moves, constant

    def run(self, *x: Tensor) -> Tensor:
        return self.function(x[0])

    def linear(self, *x: Tensor) -> Tensor:
        if not self.constant:
            return self.function(x[0])
        return self.function(x[0]) - self.function(torch.zeros_like(x[0][:1]))

    def absolute(self, r: Tensor) -> Tensor:
        return self.linear(r)

    def squared(self, r: Tensor) -> Tensor:
        return self.linear(r)  # only asked where coordinates stay apart: the weights are 0 or 1

    def back(self, c: Tensor) -> tuple[Tensor | None, ...]:
        with torch.enable_grad():
            x = c.new_zeros((len(c), *self.shape), requires_grad=True)
            return torch.autograd.grad(self.function(x), x, c)

    def interval(self, *boxes: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return self.function(boxes[0][0]), self.function(boxes[0][1])


class View(Operator):
    """One sample's numbers in another shape."""

    axis_aligned = True

    def __init__(self, before: Shape, after: Shape):
        self.before, self.after = before, after

    def run(self, *x: Tensor) -> Tensor:
        return x[0].reshape(len(x[0]), *self.after)

    def linear(self, *x: Tensor) -> Tensor:
        return self.run(x[0])

    def absolute(self, r: Tensor) -> Tensor:
        return self.run(r)

    def squared(self, r: Tensor) -> Tensor:
        return self.run(r)

    def back(self, c: Tensor) -> tuple[Tensor | None, ...]:
        return (c.reshape(len(c), *self.before),)

    def interval(self, *boxes: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return self.run(boxes[0][0]), self.run(boxes[0][1])


class Sum(Operator):
    """Several inputs of one shape, each times a number."""

    def __init__(self, factors: Sequence[float]):
        self.factors = tuple(float(f) for f in factors)

    def run(self, *x: Tensor) -> Tensor:
        out = x[0] * self.factors[0] if self.factors[0] != 1 else x[0]
        for value, factor in zip(x[1:], self.factors[1:]):
            out = out + value * factor
        return out

    def linear(self, *x: Tensor) -> Tensor:
        return self.run(*x)

    def back(self, c: Tensor) -> tuple[Tensor | None, ...]:
        return tuple(c if f == 1 else c * f for f in self.factors)

    def interval(self, *boxes: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        low = self.run(*(box[0] if f >= 0 else box[1] for box, f in zip(boxes, self.factors)))
        high = self.run(*(box[1] if f >= 0 else box[0] for box, f in zip(boxes, self.factors)))
        return low, high


class Winner(Operator):
    """max(a, b) = b + relu(a - b), read from (b, relu(a - b), a): intervals take the maximum of both ends."""

    def run(self, *x: Tensor) -> Tensor:
        return x[0] + x[1]

    def linear(self, *x: Tensor) -> Tensor:
        return x[0] + x[1]

    def back(self, c: Tensor) -> tuple[Tensor | None, ...]:
        return c, c, None

    def interval(self, *boxes: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        (low, high), _, (low_a, high_a) = boxes
        return torch.maximum(low, low_a), torch.maximum(high, high_a)


class Pick(Operator):
    """Places of a map, (..., h, w) -> (taps, ..., rows, columns): for each tap the indices (rows, columns) into h * w.

    window: kernel, stride and dilation (two numbers each) where every tap of every window lies on the map."""

    def __init__(self, index: Tensor, shape: Shape, *, window: tuple[tuple[int, int], ...] | None = None):
        self.index, self.shape, self.window = index, shape, window
        flat = index.flatten()
        places = shape[-1] * shape[-2]
        self.inverse = flat.argsort() if torch.equal(flat.sort().values, torch.arange(places)) else None

    def run(self, *x: Tensor) -> Tensor:
        out = x[0].flatten(-2)[..., self.index.flatten().to(x[0].device)]
        return out.unflatten(-1, tuple(self.index.shape)).movedim(-3, 1)

    def linear(self, *x: Tensor) -> Tensor:
        return self.run(x[0])

    def absolute(self, r: Tensor) -> Tensor:
        return self.run(r)

    def back(self, c: Tensor) -> tuple[Tensor | None, ...]:
        c = c.movedim(1, -3).flatten(-3)
        if self.inverse is not None:
            out = c[..., self.inverse.to(c.device)]
        else:
            out = c.new_zeros(*c.shape[:-1], self.shape[-1] * self.shape[-2])
            out.index_add_(-1, self.index.flatten().to(c.device), c)
        return (out.unflatten(-1, self.shape[-2:]),)

    def interval(self, *boxes: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return self.run(boxes[0][0]), self.run(boxes[0][1])


class Duels(Operator):
    """Of taps (t, ...): the first `pairs` minus the next `pairs`."""

    def __init__(self, pairs: int, taps: int):
        self.pairs, self.taps = pairs, taps

    def run(self, *x: Tensor) -> Tensor:
        return x[0][:, : self.pairs] - x[0][:, self.pairs : 2 * self.pairs]

    def linear(self, *x: Tensor) -> Tensor:
        return self.run(x[0])

    def back(self, c: Tensor) -> tuple[Tensor | None, ...]:
        rest = c.new_zeros(len(c), self.taps - 2 * self.pairs, *c.shape[2:])
        return (torch.cat([c, -c, rest], 1),)

    def interval(self, *boxes: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        (low, high), n = boxes[0], self.pairs
        return low[:, :n] - high[:, n : 2 * n], high[:, :n] - low[:, n : 2 * n]


class Winners(Operator):
    """The maxima of those pairs, and the taps that were in none: read from the taps and the relu of their duels."""

    def __init__(self, pairs: int):
        self.pairs = pairs

    def run(self, *x: Tensor) -> Tensor:
        taps, lead = x
        return torch.cat([taps[:, self.pairs : 2 * self.pairs] + lead, taps[:, 2 * self.pairs :]], 1)

    def linear(self, *x: Tensor) -> Tensor:
        return self.run(*x)

    def back(self, c: Tensor) -> tuple[Tensor | None, ...]:
        lead = c[:, : self.pairs]
        return torch.cat([torch.zeros_like(lead), c], 1), lead

    def interval(self, *boxes: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        n = self.pairs
        low, high = (torch.cat([torch.maximum(v[:, :n], v[:, n : 2 * n]), v[:, 2 * n :]], 1) for v in boxes[0])
        return low, high


class Concatenate(Operator):
    """Inputs side by side along an axis of the sample."""

    def __init__(self, axis: int, sizes: Sequence[int]):
        self.axis, self.sizes = axis + 1, list(sizes)  # the batch stands before

    def run(self, *x: Tensor) -> Tensor:
        return torch.cat(x, self.axis)

    def linear(self, *x: Tensor) -> Tensor:
        return self.run(*x)

    def back(self, c: Tensor) -> tuple[Tensor | None, ...]:
        return torch.split(c, self.sizes, self.axis)

    def interval(self, *boxes: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return self.run(*(b[0] for b in boxes)), self.run(*(b[1] for b in boxes))


@dataclass(eq=False, kw_only=True)
class Network:
    """A network as bounds see it: operators in order, the last one is the output; `source` and `name` for messages."""

    nodes: list[Node]
    name: str
    dtype: torch.dtype = torch.float64
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    offsets: dict[int, Tensor | None] = field(default_factory=dict)

    @property
    def input_shape(self) -> Shape:
        return self.nodes[0].shape

    @property
    def relus(self) -> list[int]:
        return [i for i, n in enumerate(self.nodes) if isinstance(n.op, Relu)]

    def __call__(self, x: Tensor) -> Tensor:
        return self.values(x)[-1]

    def values(self, x: Tensor) -> list[Tensor]:
        """Every operator's output on a batch."""
        out: list[Tensor] = [x]
        for node in self.nodes[1:]:
            out.append(node.op.run(*(out[i] for i in node.inputs)))
        return out

    def offset(self, index: int) -> Tensor | None:
        """An affine operator's value at zero, (1, *shape); None where it is zero."""
        if index not in self.offsets:
            node = self.nodes[index]
            zeros = [torch.zeros(1, *self.nodes[i].shape, dtype=self.dtype, device=self.device) for i in node.inputs]
            value = node.op.run(*zeros)
            self.offsets[index] = value if bool(value.any()) else None
        return self.offsets[index]
