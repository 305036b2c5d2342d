"""From a model to the network that bounds are propagated through: run once, recorded on a torch.fx graph, lowered to
affine operators and ReLUs (`bounds_ops`).

The recording sees what torch executes (aten), so that modules, functions, residual connections and code with branches
on shapes all come out alike; batch norm is read with its running statistics, dropout in eval mode is nothing. A layer
that bounds cannot go through is an error that names it, raised before any bound is computed. The recorded network is
then compared with the model on random input.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.fx
from torch import Tensor, nn

from lynceus.core.errors import AdviceError
from lynceus.core.subject import Subject
from lynceus.trust.bounds_fuse import fused as fused
from lynceus.trust.bounds_ops import (
    Concatenate,
    Convolution,
    Dense,
    Duels,
    Input,
    Network,
    Node,
    Operator,
    Pick,
    Rearrange,
    Relu,
    Scale,
    Shape,
    Sum,
    View,
    Winner,
    Winners,
)
from lynceus.trust.bounds_record import BATCH, Constant, record

KNOWN = (
    "linear, convolution, batch norm in eval mode, ReLU, leaky ReLU, ReLU6, clamp, abs, average, adaptive average and "
    "max pooling, add, sub, products with constants, concatenation, padding, resizing, views, dropout in eval mode"
)
aten = torch.ops.aten

# shape-keeping steps that are nothing here
_SAME = {"alias", "detach", "clone", "contiguous", "_to_copy", "lift_fresh", "positive"}
# one sample's numbers in another shape
_VIEWS = {"view", "_unsafe_view", "reshape", "_reshape_alias", "squeeze", "unsqueeze", "squeeze_"}
# weights >= 0, told by the operator itself: name -> every output is an input of its own (or a constant)
_REARRANGE = {
    "permute": True,
    "transpose": True,
    "slice": True,
    "select": True,
    "flip": True,
    "roll": True,
    "index_select": False,
    "pixel_shuffle": True,
    "pixel_unshuffle": True,
    "constant_pad_nd": True,
    "reflection_pad2d": False,
    "replication_pad2d": False,
    "mean": False,
    "sum": False,
    "avg_pool1d": False,
    "avg_pool2d": False,
    "_adaptive_avg_pool2d": False,
    "adaptive_avg_pool1d": False,
    "upsample_nearest2d": False,
    "upsample_bilinear2d": False,
    "_upsample_bilinear2d_aa": False,
}


def trace(model: Subject | nn.Module | Network, shape: Sequence[int], *, fuse: bool = False) -> Network:
    """The network of `model` for inputs of one sample's `shape`, in float64.

    model: a Subject (its resizing and normalisation belong to the network), a module, or a network already traced.
    fuse: runs of affine operators become one matrix where that is small: fewer steps and tighter intervals.
    Raises AdviceError that names the layer when the model does something that bounds do not know.
    """
    if isinstance(model, Network):
        return model
    call, name = _double(model)
    graph = record(call, tuple(shape), name)
    network = _lower(graph, name)
    _compare(network, call, name)
    return fused(network) if fuse else network


def _double(model: Any) -> tuple[Any, str]:
    """A float64 copy of the model as a function of batches, with its modules; and what to call it."""
    inner = model.model if isinstance(model, Subject) else model
    name = getattr(model, "name", None) or type(inner).__name__
    if not isinstance(inner, nn.Module):
        raise AdviceError(
            f"Bounds need the network itself, and {name} is only known by its answers; pass a torch module."
        )
    inner = copy.deepcopy(inner).double().eval().requires_grad_(False)

    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = inner

        def forward(self, x: Tensor) -> Any:
            out = inner(model.prepare(x) if isinstance(model, Subject) else x)
            return out.get("logits", out.get("out")) if isinstance(out, dict) else out

    return Whole(), str(name)


def _lower(graph: torch.fx.Graph, name: str) -> Network:
    """A recorded graph in operators and ReLUs."""
    final: Any = graph.output_node().args[0]
    live: set[torch.fx.Node] = set()
    stack = [final]
    while stack:
        node = stack.pop()
        if node not in live:
            live.add(node)
            stack.extend(node.all_input_nodes)
    lowering = _Lowering(name)
    for node in graph.nodes:
        if node in live:
            lowering.step(node)
    lowering.end(lowering.place[final])
    x = lowering.nodes
    return Network(nodes=x, name=name, device=lowering.device)


class _Lowering:
    """Translates one recorded step after the other; `place`: recorded step -> index of the node that holds it."""

    def __init__(self, name: str):
        self.name = name
        self.nodes: list[Node] = []
        self.place: dict[Any, int] = {}
        self.layer = ""
        self.device = torch.device("cpu")

    def add(self, op: Operator, inputs: Sequence[int], shape: Sequence[int]) -> int:
        self.nodes.append(Node(op=op, inputs=tuple(inputs), shape=tuple(shape), layer=self.layer))
        return len(self.nodes) - 1

    def end(self, last: int) -> None:
        """The output stands last."""
        if last != len(self.nodes) - 1:
            shape = self.nodes[last].shape
            self.add(View(shape, shape), (last,), shape)

    def step(self, node: torch.fx.Node) -> None:
        if node.op == "placeholder":
            self.layer = "input"
            self.place[node] = self.add(Input(), (), node.meta["shape"][1:])
            return
        kind = node.meta["name"]
        if kind in ("split", "split_with_sizes", "chunk", "unbind"):
            return  # its parts say what they take
        self.layer = node.meta.get("layer") or "the model's own forward"
        rule = getattr(self, f"_{kind.strip('_')}", None)
        if kind in _SAME:
            self.place[node] = self.of(node.args[0])
        elif kind in _VIEWS:
            self.place[node] = self.view(node)
        elif kind in _REARRANGE:
            self.place[node] = self.rearrange(node, _REARRANGE[kind])
        elif rule is not None:
            self.place[node] = rule(node)
        else:
            raise self.unknown(kind)

    def unknown(self, what: str, why: str = "") -> AdviceError:
        return AdviceError(
            f"Layer {self.layer!r} of {self.name} does {what}, which bounds cannot go through"
            f"{f' ({why})' if why else ''}. They know {KNOWN}. Use a network of these, or a check that asks only for "
            "answers."
        )

    def of(self, value: Any) -> int:
        """The node that holds a recorded value."""
        if value not in self.place:
            raise self.unknown("something with a constant in the place of its input")
        return self.place[value]

    def own(self, node: torch.fx.Node) -> Shape:
        """The shape of one sample of a recorded value; (b * n, c) is read as (n, c)."""
        shape = tuple(node.meta["shape"])
        if not shape or shape[0] % BATCH or shape[0] == 0:
            raise self.unknown(f"{node.meta['name']}", "it mixes the samples of a batch")
        return shape[1:] if shape[0] == BATCH else (shape[0] // BATCH, *shape[1:])

    def view(self, node: torch.fx.Node) -> int:
        source = self.of(node.args[0])
        before, after = self.nodes[source].shape, self.own(node)
        if math.prod(before) != math.prod(after):
            raise self.unknown(node.meta["name"])
        return source if before == after else self.add(View(before, after), (source,), after)

    def rearrange(self, node: torch.fx.Node, moves: bool) -> int:
        source = self.of(node.args[0])
        rest, named = _values(node.args[1:]), _values(node.kwargs)
        target = node.target

        def function(x: Tensor) -> Tensor:
            return target(x, *rest, **named)  # type: ignore[operator]

        if node.meta["name"] in ("mean", "sum") and not rest and "dim" not in named:
            raise self.unknown(node.meta["name"], "it mixes the samples of a batch")
        constant = node.meta["name"] == "constant_pad_nd"
        return self.per_sample(function, source, self.own(node), moves=moves, constant=constant)

    def per_sample(
        self, function: Callable[[Tensor], Tensor], source: int, shape: Shape, *, moves: bool, constant: bool = False
    ) -> int:
        """Adds a function on batches, after seeing that it treats each sample alone."""
        before = self.nodes[source].shape
        x = torch.rand(2, *before, dtype=torch.float64)
        try:
            both = function(x)
            alone = all(torch.equal(function(x[i : i + 1]), both[i : i + 1]) for i in range(2))
        except (RuntimeError, IndexError):
            alone, both = False, x
        if not alone or tuple(both.shape[1:]) != shape:
            raise self.unknown("something along the batch axis")
        return self.add(Rearrange(function, before, moves=moves, constant=constant), (source,), shape)

    def expanded(self, source: int, shape: Shape) -> int:
        if self.nodes[source].shape == shape:
            return source
        return self.per_sample(lambda x: _expand(x, shape), source, shape, moves=False)

    def constant(self, value: Any, shape: Shape) -> Tensor:
        """A constant as it meets one sample of `shape`."""
        value = _values(value)
        tensor = value.to(torch.float64) if isinstance(value, Tensor) else torch.tensor(float(value)).double()
        if tensor.ndim > len(shape):
            if tensor.ndim != len(shape) + 1 or not bool((tensor == tensor[:1]).all()):
                raise self.unknown("arithmetic with a constant that differs between the samples of a batch")
            tensor = tensor[0]
        return tensor

    # one method per operator, named after aten

    def _expand(self, node: torch.fx.Node) -> int:
        return self.expanded(self.of(node.args[0]), self.own(node))

    def _item(self, node: torch.fx.Node) -> int:
        parts, index = node.args
        rest, target = _values(parts.args[1:]), parts.target  # type: ignore[union-attr]
        source = self.of(parts.args[0])  # type: ignore[union-attr]
        return self.per_sample(lambda x: target(x, *rest)[index], source, self.own(node), moves=True)  # type: ignore

    def _cat(self, node: torch.fx.Node) -> int:
        parts = [self.of(p) for p in node.args[0]]  # type: ignore[union-attr]
        given: Any = node.args[1] if len(node.args) > 1 else 0
        axis = int(given) % len(node.meta["shape"]) - 1
        if axis < 0:
            raise self.unknown("cat", "it mixes the samples of a batch")
        return self.add(Concatenate(axis, [self.nodes[p].shape[axis] for p in parts]), parts, self.own(node))

    def _binary(self, node: torch.fx.Node, sign: float) -> int:
        left, right = node.args[0], node.args[1]
        factor = sign * float(node.kwargs.get("alpha", node.args[2] if len(node.args) > 2 else 1))  # type: ignore
        shape = self.own(node)
        if left in self.place and right in self.place:
            both = [self.expanded(self.place[a], shape) for a in (left, right)]
            return self.add(Sum((1.0, factor)), both, shape)
        if left in self.place:
            source = self.expanded(self.place[left], shape)
            return self.add(Scale(None, factor * self.constant(right, shape)), (source,), shape)
        source = self.expanded(self.of(right), shape)
        times = None if factor == 1 else torch.tensor(factor, dtype=torch.float64)
        return self.add(Scale(times, self.constant(left, shape)), (source,), shape)

    def _add(self, node: torch.fx.Node) -> int:
        return self._binary(node, 1.0)

    def _sub(self, node: torch.fx.Node) -> int:
        return self._binary(node, -1.0)

    def _rsub(self, node: torch.fx.Node) -> int:
        shape = self.own(node)
        source = self.expanded(self.of(node.args[0]), shape)
        return self.add(Scale(torch.tensor(-1.0).double(), self.constant(node.args[1], shape)), (source,), shape)

    def _mul(self, node: torch.fx.Node) -> int:
        left, right = node.args
        if left in self.place and right in self.place:
            raise self.unknown("a product of two things that depend on the input")
        source, other = (left, right) if left in self.place else (right, left)
        shape = self.own(node)
        return self.add(Scale(self.constant(other, shape), None), (self.expanded(self.of(source), shape),), shape)

    def _div(self, node: torch.fx.Node) -> int:
        if node.args[1] in self.place or node.kwargs.get("rounding_mode") is not None:
            raise self.unknown("a division by something that depends on the input, or one with rounding")
        shape = self.own(node)
        source = self.expanded(self.of(node.args[0]), shape)
        return self.add(Scale(1 / self.constant(node.args[1], shape), None), (source,), shape)

    def _neg(self, node: torch.fx.Node) -> int:
        return self.add(Scale(torch.tensor(-1.0).double(), None), (self.of(node.args[0]),), self.own(node))

    def _convolution(self, node: torch.fx.Node) -> int:
        x, weight, bias, stride, padding, dilation, transposed, output_padding, groups = _values(node.args)
        if not isinstance(weight, Tensor) or not (bias is None or isinstance(bias, Tensor)):
            raise self.unknown("a convolution whose weights depend on the input")
        source = self.of(x)
        op = Convolution(
            weight,
            bias,
            self.nodes[source].shape,
            stride=stride,
            padding=padding,
            dilation=dilation,
            transposed=transposed,
            output_padding=output_padding,
            groups=groups,
        )
        return self.add(op, (source,), self.own(node))

    def _dense(self, source: Any, weight: Any, bias: Any, node: torch.fx.Node) -> int:
        weight, bias = _values(weight), _values(bias)
        if not isinstance(weight, Tensor) or not (bias is None or isinstance(bias, Tensor)):
            raise self.unknown("a product of two things that depend on the input")
        source = self.of(source)
        shape = (*self.nodes[source].shape[:-1], weight.shape[1])
        if shape != self.own(node):
            raise self.unknown("a matrix product along the batch axis")
        return self.add(Dense(weight.T.contiguous(), bias), (source,), shape)

    def _mm(self, node: torch.fx.Node) -> int:
        return self._dense(node.args[0], node.args[1], None, node)

    def _addmm(self, node: torch.fx.Node) -> int:
        if node.kwargs.get("beta", 1) != 1 or node.kwargs.get("alpha", 1) != 1:
            raise self.unknown("addmm with factors")
        return self._dense(node.args[1], node.args[2], node.args[0], node)

    def _native_batch_norm(self, node: torch.fx.Node) -> int:
        x, weight, bias, mean, variance, training, _, eps = _values(node.args)
        return self._norm(x, weight, bias, mean, variance, eps, training, node)

    def _cudnn_batch_norm(self, node: torch.fx.Node) -> int:
        return self._native_batch_norm(node)

    def _native_batch_norm_legit(self, node: torch.fx.Node) -> int:
        return self._native_batch_norm(node)

    def _native_batch_norm_legit_no_training(self, node: torch.fx.Node) -> int:
        x, weight, bias, mean, variance, _, eps = _values(node.args)
        return self._norm(x, weight, bias, mean, variance, eps, False, node)

    def _norm(
        self, x: Any, weight: Any, bias: Any, mean: Any, variance: Any, eps: float, training: bool, node: torch.fx.Node
    ) -> int:
        if training or mean is None or variance is None:
            raise self.unknown("batch norm with the statistics of the batch", "it keeps no running statistics")
        factor = 1 / torch.sqrt(variance.double() + eps)
        factor = factor if weight is None else factor * weight
        shift = -mean * factor if bias is None else bias - mean * factor
        shape = self.own(node)
        side = (-1, *(1,) * (len(shape) - 1))
        return self.add(Scale(factor.reshape(side), shift.reshape(side)), (self.of(x),), shape)

    def _relu(self, node: torch.fx.Node) -> int:
        return self.add(Relu(), (self.of(node.args[0]),), self.own(node))

    def _leaky_relu(self, node: torch.fx.Node) -> int:
        slope = float(node.args[1]) if len(node.args) > 1 else 0.01  # type: ignore[arg-type]
        if not 0 <= slope <= 1:
            raise self.unknown(f"leaky_relu with slope {slope}", "slopes are between 0 and 1")
        return self.add(Relu(slope), (self.of(node.args[0]),), self.own(node))

    def _clamp(self, node: torch.fx.Node) -> int:
        named = dict(zip(("min", "max"), node.args[1:]), **node.kwargs)
        low, high = (_values(named.get(k)) for k in ("min", "max"))
        if isinstance(low, Tensor) or isinstance(high, Tensor):
            raise self.unknown("clamp between tensors")
        x, shape = self.of(node.args[0]), self.own(node)
        parts, factors, offset = [], [], 0.0
        if low is not None:  # max(x, low) = low + relu(x - low)
            parts.append(self.add(Relu(), (self.shifted(x, -float(low)),), shape))
            factors.append(1.0)
            offset += float(low)
        else:
            parts.append(x)
            factors.append(1.0)
        if high is not None:
            parts.append(self.add(Relu(), (self.shifted(x, -float(high)),), shape))
            factors.append(-1.0)
        whole = self.add(Sum(factors), parts, shape)
        return self.shifted(whole, offset)

    def shifted(self, source: int, by: float) -> int:
        if by == 0:
            return source
        return self.add(Scale(None, torch.tensor(by, dtype=torch.float64)), (source,), self.nodes[source].shape)

    def _clamp_min(self, node: torch.fx.Node) -> int:
        return self._clamp(node)

    def _hardtanh(self, node: torch.fx.Node) -> int:
        return self._clamp(node) if len(node.args) == 3 else self._bounded(node, -1.0, 1.0)

    def _relu6(self, node: torch.fx.Node) -> int:
        return self._bounded(node, 0.0, 6.0)

    def _bounded(self, node: torch.fx.Node, low: float, high: float) -> int:
        x, shape = self.of(node.args[0]), self.own(node)
        parts = [self.add(Relu(), (self.shifted(x, -v),), shape) for v in (low, high)]
        return self.shifted(self.add(Sum((1.0, -1.0)), parts, shape), low)

    def _abs(self, node: torch.fx.Node) -> int:
        x, shape = self.of(node.args[0]), self.own(node)
        minus = self.add(Scale(torch.tensor(-1.0).double(), None), (x,), shape)
        parts = [self.add(Relu(), (i,), shape) for i in (x, minus)]
        return self.add(Sum((1.0, 1.0)), parts, shape)

    def larger(self, a: int, b: int) -> int:
        """max(a, b) = b + relu(a - b)."""
        shape = self.nodes[a].shape
        difference = self.add(Sum((1.0, -1.0)), (a, b), shape)
        return self.add(Winner(), (b, self.add(Relu(), (difference,), shape), a), shape)

    def _maximum(self, node: torch.fx.Node) -> int:
        shape = self.own(node)
        return self.larger(*(self.expanded(self.of(a), shape) for a in node.args[:2]))

    def _max_pool2d_with_indices(self, node: torch.fx.Node) -> int:
        source, shape = self.of(node.args[0]), self.own(node)
        given = [_values(a) for a in node.args[1:5]]
        kernel = _pair(given[0])
        stride = _pair(given[1]) if len(given) > 1 and given[1] else kernel
        padding = _pair(given[2]) if len(given) > 2 else (0, 0)
        dilation = _pair(given[3]) if len(given) > 3 else (1, 1)
        sides = self.nodes[source].shape[-2:]
        rows, columns = (
            _taps(sides[a], shape[-2:][a], kernel[a], stride[a], padding[a], dilation[a]) for a in range(2)
        )
        index = torch.stack(
            [row[:, None] * sides[1] + column[None, :] for row, column in itertools.product(rows, columns)]
        )
        lead, count, out = shape[:-2], len(index), tuple(shape[-2:])
        reach = [(n - 1) * s + d * (k - 1) + 1 for n, s, d, k in zip(out, stride, dilation, kernel)]
        inside = padding == (0, 0) and all(r <= side for r, side in zip(reach, sides))
        pick = Pick(index, self.nodes[source].shape, window=(kernel, stride, dilation) if inside else None)
        taps = self.add(pick, (source,), (count, *lead, *out))
        while count > 1:
            pairs = count // 2
            duels = self.add(Duels(pairs, count), (taps,), (pairs, *lead, *out))
            wins = self.add(Relu(), (duels,), (pairs, *lead, *out))
            count -= pairs
            taps = self.add(Winners(pairs), (taps, wins), (count, *lead, *out))
        return self.add(View(self.nodes[taps].shape, shape), (taps,), shape)


def _values(value: Any) -> Any:
    return _each(value)


def _each(value: Any) -> Any:
    if isinstance(value, Constant):
        return value.value
    if isinstance(value, (tuple, list)):
        return [_each(v) for v in value]
    if isinstance(value, dict):
        return {k: _each(v) for k, v in value.items()}
    return value


def _expand(x: Tensor, shape: Shape) -> Tensor:
    lead = (1,) * (len(shape) + 1 - x.ndim)
    return x.reshape(len(x), *lead, *x.shape[1:]).expand(len(x), *shape).contiguous()


def _pair(value: Any) -> tuple[int, int]:
    values = list(value) if isinstance(value, (list, tuple)) else [value]
    return (int(values[0]), int(values[-1]))


def _taps(side: int, out: int, kernel: int, stride: int, padding: int, dilation: int) -> list[Tensor]:
    """For each tap of a pooling window, the place that it reads for every output; a tap beyond the border reads what
    another tap of the window reads, which leaves the maximum as it is."""
    start = torch.arange(out) * stride - padding
    places = start[None] + dilation * torch.arange(kernel)[:, None]
    inside = (places >= 0) & (places < side)
    first = places.gather(0, inside.int().argmax(0, keepdim=True))
    return list(torch.where(inside, places, first))


def _compare(network: Network, call: nn.Module, name: str) -> None:
    """Raises when the lowered network is not the model."""
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(4, *network.input_shape, dtype=torch.float64, generator=generator).to(network.device)
    x[2:] = x[2:] * 4 - 2
    with torch.no_grad():
        want, got = call(x), network(x)
    if not torch.isfinite(want).all():
        with torch.no_grad():
            values = network.values(x)
        odd = next((n.layer for n, v in zip(network.nodes, values) if not torch.isfinite(v).all()), "?")
        raise AdviceError(
            f"{name} answers ordinary input with numbers that are not finite; they begin in the layer {odd!r}. Nothing "
            "can be proven about it: look at its weights."
        )
    scale = 1 + float(want.abs().max())
    if want.shape != got.shape or float((want - got).abs().max()) > 1e-8 * scale:
        raise AdviceError(
            f"{name} does more than bounds can see (its recorded steps give other outputs, gap "
            f"{float((want - got).abs().max()):.3g}): values written in place, or branches on the batch size."
        )
