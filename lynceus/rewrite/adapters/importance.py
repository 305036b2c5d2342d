"""How much a layer's outputs matter: by weight, by gradient, by squared Taylor term, by relevance.

Weight: Li et al., Pruning Filters for Efficient ConvNets, ICLR 2017, arXiv 1608.08710. Gradient: Sun et al., meProp,
ICML 2017, arXiv 1706.06197. Taylor: Molchanov et al., Importance Estimation for Neural Network Pruning, CVPR 2019,
arXiv 1906.10771. Relevance: Yeom et al., Pruning by Explaining, Pattern Recognition 2021, arXiv 1912.08881
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lynceus.core.cost import evaluating
from lynceus.core.errors import AdviceError, unknown
from lynceus.rewrite.adapters.layers import CONVS
from lynceus.rewrite.dependency import Axis, Bundle, DependencyGraph

Criterion = Literal["l1", "l2", "gradient", "taylor", "lrp"]
CRITERIA = ("l1", "l2", "gradient", "taylor", "lrp")
Loss = Callable[[nn.Module], Tensor]  # a scalar, from a model


def row_scores(
    model: nn.Module, layers: Sequence[Axis], criterion: Criterion, inputs: Sequence[Tensor], loss: Loss | None = None
) -> dict[str, np.ndarray]:
    """A number per output of every layer, by the name of its weight. model: with plain weights (fused).

    loss: what gradients are taken of; by default the cross-entropy of the model's answers to `inputs` with its own
    first answers, and for lrp the relevance of those."""
    if criterion not in CRITERIA:
        raise unknown("importance", str(criterion), CRITERIA)
    weights = {axis.name: model.get_parameter(axis.name) for axis in layers}
    if criterion in ("l1", "l2"):
        values = {n: w.detach().abs() if criterion == "l1" else w.detach().square() for n, w in weights.items()}
        return {a.name: _rows(values[a.name], a.dim, root=criterion == "l2") for a in layers}
    if criterion == "lrp":
        return _relevances(model, layers, inputs, loss)
    grads = _gradients(model, weights, inputs, loss)
    values = {n: (w.detach() * grads[n]).abs() for n, w in weights.items()}
    return {
        a.name: _rows(v if criterion == "gradient" else v.square(), a.dim) for a in layers for v in [values[a.name]]
    }


def _rows(value: Tensor, dim: int, *, root: bool = False) -> np.ndarray:
    rows = value.double().movedim(dim, 0).flatten(1).sum(1)
    return (rows.sqrt() if root else rows).cpu().numpy()


def own_answers(inputs: Sequence[Tensor]) -> Loss:
    """Cross-entropy of a classifier's answers with its own first answers."""

    def loss(model: nn.Module) -> Tensor:
        logits = model(*inputs)
        if not isinstance(logits, Tensor) or logits.ndim != 2:
            raise AdviceError(
                "Importance by gradient of a model that gives no logits (b, k) needs a loss: "
                "prune(model, ratio, importance='taylor', example=x, loss=lambda m: my_loss(m(x)))."
            )
        return F.cross_entropy(logits, logits.detach().argmax(1))

    return loss


def _gradients(
    model: nn.Module, weights: Mapping[str, Tensor], inputs: Sequence[Tensor], loss: Loss | None
) -> dict[str, Tensor]:
    with evaluating(model), torch.enable_grad():
        for w in weights.values():
            w.requires_grad_(True)
        found = torch.autograd.grad((loss or own_answers(inputs))(model), list(weights.values()), allow_unused=True)
    return {n: torch.zeros_like(w) if g is None else g for (n, w), g in zip(weights.items(), found)}


class _Positive(torch.autograd.Function):
    """A layer whose gradient is relevance over activation under the z+ rule: only what adds to an output has a share
    in it. Other operators keep their gradient, which is the plain rule; sums then share in proportion."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, layer: Any, run: Any, found: dict[str, Tensor], name: str) -> Tensor:
        ctx.save_for_backward(x, y)
        ctx.layer, ctx.run, ctx.found, ctx.name = layer, run, found, name
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, y = ctx.saved_tensors
        relevance = y * grads[0]
        channel = relevance.movedim(-1 if isinstance(ctx.layer, nn.Linear) else 1, 0).flatten(1).abs().sum(1)
        ctx.found[ctx.name] = ctx.found.get(ctx.name, 0) + channel
        weight = ctx.layer.weight.detach()
        with torch.enable_grad():
            x = x.detach().requires_grad_(True)
            total = ctx.run(x.clamp(min=0), weight.clamp(min=0)) + ctx.run(x.clamp(max=0), weight.clamp(max=0))
            share = torch.where(total > 1e-9, relevance / total.clamp(min=1e-9), torch.zeros_like(total)).detach()
            (back,) = torch.autograd.grad(total, x, share)
        return back, None, None, None, None, None


def _relevances(
    model: nn.Module, layers: Sequence[Axis], inputs: Sequence[Tensor], loss: Loss | None
) -> dict[str, np.ndarray]:
    found: dict[str, Tensor] = {}
    handles = []
    for axis in layers:
        layer: Any = model.get_submodule(axis.name.rpartition(".")[0])
        if getattr(layer, "transposed", False):
            raise AdviceError(
                f"lrp has no rule for the transposed convolution {axis.name!r}; take importance='taylor'."
            )

        if type(layer) is not nn.Linear and type(layer) not in CONVS:
            continue  # a layer with a forward of its own, whose arguments are not known; it counts 0

        def hook(module: Any, args: Any, out: Tensor, name: str = axis.name) -> Tensor:
            def run(x: Tensor, weight: Tensor) -> Tensor:
                made: Tensor = (
                    F.linear(x, weight) if isinstance(module, nn.Linear) else module._conv_forward(x, weight, None)
                )
                return made

            made: Tensor = _Positive.apply(args[0], out.detach(), module, run, found, name)
            return made

        handles.append(layer.register_forward_hook(hook))
    try:
        inputs = [x.detach().requires_grad_(x.is_floating_point()) for x in inputs]
        with evaluating(model), torch.enable_grad():
            if loss is None:
                out = model(*inputs)
                if not isinstance(out, Tensor) or out.ndim != 2:
                    own_answers(inputs)(model)
                total = out.max(1).values.sum()
            else:
                total = loss(model)
            total.backward()
    finally:
        for handle in handles:
            handle.remove()
    zeros = {a.name: np.zeros(a.size) for a in layers}
    return zeros | {n: v.detach().double().cpu().numpy() for n, v in found.items()}


def choose(
    graph: DependencyGraph,
    rows: Mapping[str, np.ndarray],
    ratio: float,
    *,
    scope: Literal["global", "layer"] = "global",
    least: int = 1,
    multiple: int = 1,
) -> list[int]:
    """Numbers of the units to remove, so that the share `ratio` of the prunable channels goes, least important first.

    A unit's score is the sum over coupled layers; the scores of a bundle are divided by their L2 norm, so that bundles
    compare. scope: "global" ranks all units together, "layer" takes the same share of every bundle. least: units
    that stay in each bundle. multiple: what is left of every layer is rounded up to a multiple of so many outputs, or
    to all that it has; the most important of what would have gone stay."""
    scores = []
    for bundle in graph.bundles:
        place = {u: k for k, u in enumerate(bundle.units.tolist())}
        total = np.zeros(len(bundle.units))
        for axis in graph.roots:
            if axis.name.removesuffix("weight").rstrip(".") in bundle.layers and axis.name in rows:
                for u, value in zip(graph.unit[axis.slots].tolist(), rows[axis.name]):
                    if u in place:
                        total[place[u]] += value
        norm = np.linalg.norm(total)
        scores.append(total / norm if norm > 0 else total)
    goal, drop = ratio * graph.channels, []
    if scope == "layer":
        for bundle, score in zip(graph.bundles, scores):
            count = min(round(ratio * len(score)), max(len(score) - least, 0))
            drop += _rounded(graph, bundle, np.argsort(score, kind="stable")[:count], multiple)
        return drop
    left = [len(b.units) for b in graph.bundles]
    ranked = sorted((s, k, i) for k, score in enumerate(scores) for i, s in enumerate(score))
    going: list[list[int]] = [[] for _ in graph.bundles]
    removed = 0.0
    for _, k, i in ranked:
        bundle = graph.bundles[k]
        # the nearest number of channels: half of a unit more is removed, less is not
        if removed + bundle.channels / 2 > goal:
            if removed + 0.5 > goal:
                break
            continue
        if left[k] > least:
            left[k] -= 1
            removed += bundle.channels
            going[k].append(i)
    return [u for b, gone in zip(graph.bundles, going) for u in _rounded(graph, b, gone, multiple)]


def _rounded(graph: DependencyGraph, bundle: Bundle, going: Sequence[int] | np.ndarray, multiple: int) -> list[int]:
    """Units that go, least important first as given, less the few that make what is left of every layer a multiple."""
    if multiple > 1 and len(going):
        # outputs of a layer that go with one unit: a head, a group, or one channel
        each = [int((graph.rows(layer) == bundle.units[0]).sum()) for layer in bundle.layers]
        whole = math.lcm(*(multiple // math.gcd(multiple, n) for n in each))
        left = len(bundle.units) - len(going)
        going = going[: max(0, len(bundle.units) - math.ceil(left / whole) * whole)]
    return [int(u) for u in bundle.units[np.asarray(going, dtype=int)]]
