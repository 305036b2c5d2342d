"""A guarantee from finitely many answers: a grid that is fine enough for how steep the network can be.

Feature-Guided Black-Box Safety Testing of Deep Neural Networks, TACAS 2018, arXiv 1710.07859, in a form that needs
nothing else. Products of layer norms: Intriguing Properties of Neural Networks, ICLR 2014, arXiv 1312.6199.

Let f_c - f_j be H_cj-Lipschitz in the L_q norm. A grid of step tau on n dimensions is within
beta = (tau / 2) n^(1/q) of every point of the region. If every grid point keeps the class c with
f_c - f_j > beta H_cj for every other j, the whole region does.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lynceus.core.errors import AdviceError, unknown
from lynceus.trust.bounds import Box, bounds

Constants = Literal["layers", "local"]
POINTS = 4_000_000  # of a grid
ENTRIES = 1 << 24  # numbers that a layer's matrix may have
SLACK = 1e-6  # of the logits' scale: the network runs in float32, the argument in real numbers
AFFINE = (nn.Linear, nn.Conv2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.BatchNorm1d, nn.BatchNorm2d, nn.Flatten)
IDENTITY = (nn.Identity, nn.Dropout, nn.Dropout2d)
STEEP = {nn.ReLU: 1.0, nn.Tanh: 1.0, nn.Sigmoid: 0.25, nn.Softplus: 1.0}  # how much each can stretch


@dataclass(frozen=True, kw_only=True)
class Guarantee:
    """What a grid says of a region.

    kind: "guaranteed": no point of the region has another class; "counterexample": a grid point has; "unknown" else.
    label: the class. points: of the grid. beta: how far from a grid point one can be. smallest: least of
    (margin - beta H) over grid points and classes, above 0 where guaranteed. witness: the nearest grid point of another
    class. nearest: (low, high): the distance from the sample to the nearest point of another class lies between them;
    high is inf where no grid point has one, and low is then never beyond the region.
    """

    kind: Literal["guaranteed", "counterexample", "unknown"]
    label: int
    points: int
    beta: float
    smallest: float
    nearest: tuple[float, float]
    witness: Tensor | None = None


def guarantee(
    model: nn.Module,
    x: Tensor,
    *,
    half_width: float,
    step: float,
    dims: Sequence[int] | None = None,
    norm: float = 2.0,
    clip: tuple[float, float] | None = (0.0, 1.0),
    constants: Constants = "layers",
    label: int | None = None,
    batch: int = 8192,
) -> Guarantee:
    """Is every point within `half_width` of one sample, along `dims`, of its class? Asked on a grid of `step`.

    model: a chain of layers (nn.Sequential, nested or not) in eval mode. x: one sample (*shape), no batch axis.
    dims: indices into the flattened sample, None: all. norm: the q of L_q: 1, 2 or inf. clip: the region is cut there.
    constants: "layers": H from products of the layers' norms, one for the whole space; "local": from the gradients that
      are possible within each cell of the grid, by `trust.bounds`, which is tighter by far.
    Raises AdviceError for layers without a known constant, naming them, and for grids of more than 4 million points.
    """
    if constants not in ("layers", "local"):
        raise unknown("kind of constants", str(constants), ("layers", "local"))
    if norm not in (1.0, 2.0, math.inf):
        raise AdviceError(f"norm is 1, 2 or math.inf, not {norm}.")
    if not (half_width > 0 and step > 0):
        raise AdviceError(f"half_width and step are lengths above 0, not {half_width} and {step}.")
    layers = chain(model)
    net = nn.Sequential(*(copy.deepcopy(layer) for layer in layers)).double().eval()
    x = x.detach().double()
    if clip is not None and (float(x.min()) < clip[0] or float(x.max()) > clip[1]):
        raise AdviceError(f"The sample leaves the clip {clip}; clip=None takes any values.")
    flat = x.reshape(-1)
    where = torch.arange(flat.numel()) if dims is None else torch.as_tensor(list(dims), dtype=torch.long)
    low, high = flat[where] - half_width, flat[where] + half_width
    if clip is not None:
        low, high = low.clamp(*clip), high.clamp(*clip)
    counts = ((high - low) / step - 1e-9).ceil().clamp(min=1).long()
    total = math.prod(counts.tolist())
    if total > POINTS:
        raise AdviceError(
            f"A grid of step {step:g} has {total:,} points on {len(where)} dimensions; this takes at most {POINTS:,}. "
            "Take fewer dims, a larger step, or trust.verify."
        )
    width = (high - low) / counts  # of a cell, at most the step
    # an L_q ball around a cell's middle holds the cell
    half = width / 2
    beta = float(half.abs().max() if norm == math.inf else (half**norm).sum() ** (1 / norm))
    with torch.no_grad():
        first = net(x[None])[0]
    if first.ndim != 1 or len(first) < 2 or not bool(first.isfinite().all()):
        raise AdviceError("The model must answer one sample with at least two finite logits; look at its weights.")
    own = int(first.argmax()) if label is None else label
    if not 0 <= own < len(first):
        raise AdviceError(f"label {own} is outside the model's {len(first)} classes.")
    others = [j for j in range(len(first)) if j != own]
    rows = torch.zeros(len(others), len(first), dtype=torch.float64)
    rows[:, own] = 1
    rows[torch.arange(len(others)), others] = -1
    whole = lipschitz(nn.Sequential(*net), x.shape, norm=norm, dims=where, rows=None) if constants == "layers" else None
    fixed = None if whole is None else whole[own] + whole[others]
    smallest, beyond, nearest = math.inf, math.inf, math.inf
    witness = None
    for start in range(0, total, batch):
        index = torch.arange(start, min(start + batch, total))
        steps = torch.stack(torch.unravel_index(index, tuple(counts.tolist())), 1)
        at = low + (steps + 0.5) * width
        points = flat.expand(len(at), -1).clone()
        points[:, where] = at
        shaped = points.view(-1, *x.shape)
        with torch.no_grad():
            logits = net(shaped)
        margin = logits @ rows.T
        if fixed is None:
            lower, upper = points.clone(), points.clone()
            lower[:, where], upper[:, where] = at - width / 2, at + width / 2
            need = local(net, Box(lower.view_as(shaped), upper.view_as(shaped)), rows, norm=norm, dims=where)
        else:
            need = fixed.expand_as(margin)
        spare = (margin - beta * need).amin(1) - SLACK * logits.abs().amax(1)
        away = (at - flat[where]).abs()
        far = away.amax(1) if norm == math.inf else (away**norm).sum(1) ** (1 / norm)
        smallest = min(smallest, float(spare.min()))
        if bool((spare <= 0).any()):
            beyond = min(beyond, float(far[spare <= 0].min()))
        other = (margin <= 0).any(1)  # equal logits count as another class
        if bool(other.any()):
            i = int(torch.where(other, far, math.inf).argmin())
            if float(far[i]) < nearest:
                nearest, witness = float(far[i]), shaped[i].clone()
    kind: Literal["guaranteed", "counterexample", "unknown"] = "unknown"
    if witness is not None:
        kind = "counterexample"
    elif smallest > 0:
        kind = "guaranteed"
    edge = float(torch.minimum(flat[where] - low, high - flat[where]).min()) if clip is None else half_width
    return Guarantee(
        kind=kind,
        label=own,
        points=total,
        beta=beta,
        smallest=smallest,
        nearest=(max(0.0, min(beyond - beta, edge)), nearest),
        witness=witness,
    )


def lipschitz(
    model: nn.Module,
    shape: Sequence[int],
    *,
    norm: float = 2.0,
    dims: Tensor | None = None,
    rows: Tensor | None = None,
) -> Float[Tensor, " k"]:
    """A Lipschitz constant of every logit in the L_norm of the input: products of the layers' operator norms.

    shape: of one sample. dims: inputs that may change. rows: (k, classes) combinations of logits instead of the logits.
    """
    size: tuple[int, ...] = tuple(shape)
    scale = 1.0
    pending: Tensor | None = None  # the matrix of the affine layers since the last bend
    for name, layer in named_chain(model):
        if isinstance(layer, AFFINE):
            matrix, size = _matrix(layer, size, name)
            if pending is None and dims is not None and scale == 1.0:
                matrix = matrix[:, dims]
                dims = None
            pending = matrix if pending is None else matrix @ pending
        elif isinstance(layer, IDENTITY):
            continue
        else:
            stretch, size = _stretch(layer, size, name)
            scale *= stretch * (1.0 if pending is None else _operator(pending, norm))
            pending = None
    if pending is None:
        raise AdviceError("The chain must end with a linear layer, so that every logit has a constant of its own.")
    last = pending if rows is None else rows @ pending
    return scale * _dual(last, norm)


def local(
    model: nn.Module, region: Box, rows: Float[Tensor, "s k"], *, norm: float = 2.0, dims: Tensor | None = None
) -> Float[Tensor, "b s"]:
    """Lipschitz constants of the combinations `rows` of logits within each box: from all gradients possible there.

    Which ReLUs are on, off or undecided comes from `trust.bounds`; the gradients are then bounded by intervals, from
    the logits back to the input."""
    layers = list(named_chain(model))
    hidden = list(bounds(nn.Sequential(*(layer for _, layer in layers)), region, method="crown").hidden.values())
    size: tuple[int, ...] = tuple(region.lower.shape[1:])
    plan: list[tuple[str, Tensor | tuple[Tensor, Tensor]]] = []
    for name, layer in layers:
        if isinstance(layer, AFFINE):
            matrix, size = _matrix(layer, size, name)
            plan.append(("affine", matrix))
        elif isinstance(layer, nn.ReLU):
            if not hidden:
                raise AdviceError(f"The bounds say nothing of the ReLU {name!r}; use constants='layers'.")
            lower, upper = hidden.pop(0)
            plan.append(("relu", ((lower.flatten(1) >= 0).double(), (upper.flatten(1) > 0).double())))
        elif not isinstance(layer, IDENTITY):
            raise AdviceError(
                f"Local constants know linear layers and ReLU; the layer {name!r} is {type(layer).__name__}. "
                "Use constants='layers'."
            )
    boxes = len(region)
    low = high = rows.double().expand(boxes, -1, -1)
    for kind, part in reversed(plan):
        if kind == "affine":
            assert isinstance(part, Tensor)
            middle, radius = (low + high) / 2, (high - low) / 2
            centre, spread = middle @ part, radius @ part.abs()
            low, high = centre - spread, centre + spread
        else:
            on, may = part  # 1 where the slope is surely one; 1 where it may be
            low = torch.minimum(low * on[:, None], low * may[:, None])
            high = torch.maximum(high * on[:, None], high * may[:, None])
    most = torch.maximum(low.abs(), high.abs())
    if dims is not None:
        most = most[..., dims]
    return _dual(most, norm)


def chain(model: nn.Module) -> list[nn.Module]:
    """The layers of a model that runs them one after the other."""
    return [layer for _, layer in named_chain(model)]


def named_chain(model: nn.Module, prefix: str = "") -> list[tuple[str, nn.Module]]:
    """Layers with their names. Raises AdviceError naming what is no chain of known layers."""
    if isinstance(model, nn.Sequential):
        found = []
        for name, child in model.named_children():
            found += named_chain(child, f"{prefix}{name}.")
        return found
    known = (*AFFINE, *IDENTITY, *STEEP, nn.LeakyReLU, nn.MaxPool2d)
    if not isinstance(model, known):
        raise AdviceError(
            f"No Lipschitz constant is known for {prefix.rstrip('.') or 'the model'} ({type(model).__name__}). A "
            "guarantee takes a chain (nn.Sequential) of linear, convolution, pooling, norm and activation layers."
        )
    return [(prefix.rstrip(".") or type(model).__name__, model)]


def _matrix(layer: nn.Module, size: tuple[int, ...], name: str) -> tuple[Tensor, tuple[int, ...]]:
    """The linear part of an affine layer as a matrix (out, in), and the shape of its outputs."""
    count = math.prod(size)
    with torch.no_grad():
        zero = layer(torch.zeros(1, *size, dtype=torch.float64))
        out = tuple(zero.shape[1:])
        if count * math.prod(out) > ENTRIES:
            raise AdviceError(
                f"The layer {name!r} maps {count:,} numbers to {math.prod(out):,}: too many for a matrix."
            )
        basis = torch.eye(count, dtype=torch.float64).view(count, *size)
        return (layer(basis) - zero).reshape(count, -1).T.contiguous(), out


def _stretch(layer: nn.Module, size: tuple[int, ...], name: str) -> tuple[float, tuple[int, ...]]:
    """How much a layer that is not affine can lengthen a difference, in every norm."""
    if isinstance(layer, nn.LeakyReLU):
        return max(1.0, abs(layer.negative_slope)), size
    if isinstance(layer, nn.MaxPool2d):
        kernel, stride = (v if isinstance(v, tuple) else (v, v) for v in (layer.kernel_size, layer.stride))
        if any(k > s for k, s in zip(kernel, stride, strict=True)):
            raise AdviceError(f"Windows of the pooling {name!r} overlap; it has no constant here.")
        with torch.no_grad():
            return 1.0, tuple(layer(torch.zeros(1, *size, dtype=torch.float64)).shape[1:])
    return STEEP[type(layer)], size


def _operator(matrix: Tensor, norm: float) -> float:
    if norm == 2.0:
        return float(torch.linalg.matrix_norm(matrix, 2))
    return float(matrix.abs().sum(1 if norm == math.inf else 0).max())


def _dual(rows: Tensor, norm: float) -> Tensor:
    """How fast rows . x can change with x, along the last axis."""
    if norm == 2.0:
        return rows.norm(dim=-1)
    return rows.abs().sum(-1) if norm == math.inf else rows.abs().amax(-1)
