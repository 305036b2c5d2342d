"""Which channels of a network go together: a dependency graph for structured pruning of any model that runs.

Idea: Fang et al., DepGraph: Towards Any Structural Pruning, CVPR 2023, arXiv 2301.12900; another method: the model is
run once, and every axis of every tensor carries the numbers of the parameter slots that it comes from
(`rewrite.label_rules`). Slots that meet in a sum, a product or a norm must be removed together: residual sums,
concatenations, norms, flattened maps, grouped and depthwise convolutions, heads. What meets the input, the output, or
an operator without a rule stays, and the reason is kept. At last one unit of every bundle is removed from a copy on
trial; a bundle whose removal the code of the model does not survive (a width written down as a number) stays too.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lynceus.core.cost import evaluating
from lynceus.core.counter import named
from lynceus.core.errors import AdviceError
from lynceus.rewrite.label_rules import Axes, Label, rule_of

Example = Tensor | Sequence[Tensor]


@dataclass(frozen=True, kw_only=True, slots=True)
class Axis:
    """Axis `dim` of the parameter or buffer `name`; its slots are numbered start .. start + size."""

    name: str
    dim: int
    start: int
    size: int

    @property
    def slots(self) -> slice:
        return slice(self.start, self.start + self.size)


@dataclass(frozen=True, kw_only=True, slots=True)
class Bundle:
    """Units that lie on the same axes: the channels of a layer and of all that is coupled with it, or its heads.

    units: numbers of the units, in the order of the first layer's outputs. layers: names of the layers whose outputs
    they are. channels: outputs that go with one unit, over all those layers.
    """

    units: np.ndarray
    layers: tuple[str, ...]
    channels: int


@dataclass(frozen=True, kw_only=True)
class Selection:
    """What is kept, as plain values: masks by (parameter name, axis), and whole numbers that modules hold."""

    masks: Mapping[tuple[str, int], np.ndarray]
    counts: Mapping[str, int] = field(default_factory=dict)

    def apply_(self, model: nn.Module) -> None:
        """Removes, in place, what is not kept; parameters keep their identity, gradients are dropped."""
        tensors = dict([*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)])
        wrong = [n for n, d in self.masks if n not in tensors or d >= tensors[n].ndim]
        wrong += [n for (n, d), m in self.masks.items() if n not in wrong and tensors[n].shape[d] != len(m)]
        if wrong:
            raise AdviceError(
                f"The masks are of another model: {type(model).__name__} has no {wrong[0]!r} of the same shape."
            )
        done: set[tuple[int, int]] = set()
        touched = set()
        with torch.no_grad():
            for (name, dim), mask in self.masks.items():
                tensor = tensors[name]
                touched.add(name.rpartition(".")[0])
                if (id(tensor), dim) in done:
                    continue
                done.add((id(tensor), dim))
                where = torch.from_numpy(np.flatnonzero(mask)).to(tensor.device)
                tensor.grad = None
                tensor.data = tensor.data.index_select(dim, where)
        for path in touched:
            resize_(model.get_submodule(path))
        for place, number in self.counts.items():
            path, _, name = place.rpartition(".")
            set_count_(model.get_submodule(path), name, number)


@dataclass(kw_only=True)
class DependencyGraph:
    """Slots of a model's parameters, and which belong together.

    axes: all of them. unit: of every slot, the number of the unit it belongs to. free: of every unit, whether it can be
    removed. reasons: of units that cannot, why. counts: (module path, attribute, slots) of whole numbers that follow.
    bundles: what can be pruned.
    """

    axes: list[Axis]
    unit: np.ndarray
    free: np.ndarray
    reasons: dict[int, str]
    counts: list[tuple[str, str, np.ndarray]]
    roots: list[Axis]
    bundles: list[Bundle] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.bundles = self._bundles()

    def _bundles(self) -> list[Bundle]:
        members: dict[int, dict[int, int]] = {}
        first: dict[int, int] = {}
        for number, axis in enumerate(self.roots):
            units, where, counts = np.unique(self.unit[axis.slots], return_index=True, return_counts=True)
            for u, at, count in zip(units.tolist(), where.tolist(), counts.tolist()):
                if self.free[u]:
                    members.setdefault(u, {})[number] = count
                    first.setdefault(u, axis.start + at)
        groups: dict[tuple[tuple[int, int], ...], list[int]] = {}
        for u, held in members.items():
            groups.setdefault(tuple(sorted(held.items())), []).append(u)
        made = []
        for key, together in groups.items():
            names = tuple(self.roots[number].name.removesuffix("weight").rstrip(".") for number, _ in key)
            ordered = np.array(sorted(together, key=lambda u: first[u]))
            made.append(Bundle(units=ordered, layers=names, channels=sum(n for _, n in key)))
        return made

    @property
    def channels(self) -> int:
        """Layer outputs that can be removed."""
        return sum(len(b.units) * b.channels for b in self.bundles)

    def bundle_of(self, layer: str) -> Bundle:
        """The bundle of a layer's outputs; AdviceError with the reason where they cannot be pruned."""
        for bundle in self.bundles:
            if layer in bundle.layers:
                return bundle
        axis = next((a for a in self.roots if a.name in (f"{layer}.weight", layer)), None)
        if axis is None:
            able = ", ".join(b.layers[0] for b in self.bundles[:6])
            raise AdviceError(f"There is no layer {layer!r} whose outputs could be pruned; such are {able} ...")
        raise AdviceError(f"The outputs of {layer!r} cannot be pruned: what they are {self.reason(axis)}.")

    def reason(self, axis: Axis) -> str:
        """Why the slots of an axis stay."""
        return next((self.reasons[u] for u in self.unit[axis.slots].tolist() if u in self.reasons), "used by the code")

    def rows(self, layer: str) -> np.ndarray:
        """Units of a layer's outputs, output by output."""
        axis = next(a for a in self.roots if a.name in (f"{layer}.weight", layer))
        return self.unit[axis.slots]

    def selection(self, drop: Iterable[int]) -> Selection:
        """What is left without these units."""
        gone = np.zeros(len(self.free), dtype=bool)
        gone[np.fromiter(drop, dtype=np.int64)] = True
        if (gone & ~self.free).any():
            unit = int(np.flatnonzero(gone & ~self.free)[0])
            raise AdviceError(f"Unit {unit} cannot be removed: it {self.reasons.get(unit, 'is used by the code')}.")
        dropped = gone[self.unit]
        masks = {(a.name, a.dim): ~dropped[a.slots] for a in self.axes if a.name and dropped[a.slots].any()}
        empty = [name for (name, _), mask in masks.items() if not mask.any()]
        if empty:
            raise AdviceError(f"Nothing would be left of {empty[0]}; keep at least one channel of every layer.")
        counts = {f"{p}.{n}": int((~dropped[ids]).sum()) for p, n, ids in self.counts if dropped[ids].any()}
        return Selection(masks=masks, counts=counts)

    def forbid(self, bundle: Bundle, why: str) -> None:
        """Takes a bundle out of what can be pruned."""
        self.free[bundle.units] = False
        self.reasons |= dict.fromkeys(bundle.units.tolist(), why)
        self.bundles = [b for b in self.bundles if b is not bundle]


def dependencies(model: nn.Module, example: Example, *, trial: bool = True) -> DependencyGraph:
    """The dependency graph of `model`, which is run on `example` (an input, or several as a tuple).

    trial: one unit of every bundle is removed from a copy, which must still run; bundles that break it stay.
    Channels that the model gives out (logits, returned maps) stay."""
    inputs = (example,) if isinstance(example, Tensor) else tuple(example)
    graph = _traced(model, inputs)
    if trial and graph.bundles:
        _try(model, inputs, graph)
    return graph


# following the channels ---------------------------------------------------------------------------
class _Tracer(TorchDispatchMode):
    """Gives every tensor that arises the labels of its axes."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        self.inside: list[str] = [""]
        self.names = {id(t): n for n, t in reversed([*model.named_parameters(), *model.named_buffers()])}
        self.labels: dict[int, Axes] = {}
        self.alive: list[Any] = []  # ids of tensors are only told apart while they live
        self.axes: list[Axis] = []
        self.total = 0
        self.ties: list[tuple[np.ndarray, np.ndarray]] = []
        self.fixed: list[tuple[np.ndarray, str]] = []
        self.counts: list[tuple[str, str, np.ndarray]] = []

    # what the rules ask -----------------------------------------------------------------------
    def of(self, value: Any) -> Axes:
        if not isinstance(value, Tensor):
            return ()
        found = self.labels.get(id(value))
        if found is None:
            name = self.names.get(id(value))
            found = tuple(None if name is None or s < 2 else self._slots(name, d, s) for d, s in enumerate(value.shape))
            self._set(value, found)
        return found

    def tie(self, a: Label, b: Label, why: str) -> Label:
        if a is not None and b is not None and a is not b:
            self.ties.append((a, b))
        return a if b is None or a is not None else b

    def fix(self, ids: Label, why: str) -> None:
        if ids is not None:
            self.fixed.append((np.unique(ids), why + (f" in {self.inside[-1]}" if self.inside[-1] else "")))

    def constant(self, size: int) -> np.ndarray:
        ids = self._slots("", 0, size)
        self.fixed.append((ids, "is no parameter's"))
        return ids

    def attribute(self, name: str) -> Any:
        return getattr(self.model.get_submodule(self.inside[-1]), name, None)

    def count(self, ids: np.ndarray, names: Sequence[str], size: int, *, needs: str = "") -> bool:
        held = next((n for n in names if type(self.attribute(n)) is int and self.attribute(n) == size), None)
        if held is None or (needs and self.attribute(needs) is None):
            return False
        self.counts.append((self.inside[-1], held, ids))
        return True

    # running ----------------------------------------------------------------------------------
    def _slots(self, name: str, dim: int, size: int) -> np.ndarray:
        self.axes.append(Axis(name=name, dim=dim, start=self.total, size=size))
        self.total += size
        return np.arange(self.total - size, self.total)

    def _set(self, value: Tensor, labels: Axes) -> None:
        self.labels[id(value)] = labels
        self.alive.append(value)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        given = [a for a in tree_leaves((args, kwargs)) if isinstance(a, Tensor)]
        shown = any(ids is not None for a in given for ids in self.of(a))
        out = func(*args, **kwargs)
        made: Any = None
        if shown:
            made = rule_of(func)(self, func.overloadpacket.__name__, args, kwargs, out)
        outputs = [out] if isinstance(out, Tensor) else list(out) if isinstance(out, (tuple, list)) else []
        found = [made] if isinstance(made, tuple) else list(made or ())
        for k, value in enumerate(outputs):
            if isinstance(value, Tensor):
                self._set(value, found[k] if k < len(found) and found[k] is not None else (None,) * value.ndim)
        return out


def _run(model: nn.Module, inputs: Sequence[Tensor]) -> Any:
    """In eval mode and without torch's fused encoder layers, which hide what they read."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with evaluating(model), torch.no_grad():
            return model(*inputs)
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def _traced(model: nn.Module, inputs: Sequence[Tensor]) -> DependencyGraph:
    tracer = _Tracer(model)
    for x in inputs:
        tracer._set(x, (None,) * x.ndim)
    with named(model, tracer), tracer:  # type: ignore[arg-type]
        out = _run(model, inputs)
    for value in tree_leaves(out):
        for ids in tracer.of(value):
            tracer.inside = [""]
            tracer.fix(ids, "is given out by the model")
    size = tracer.total
    pairs = [(a.ravel(), b.ravel()) for a, b in tracer.ties]
    left, right = (np.concatenate([p[k] for p in pairs] or [np.zeros(0, int)]) for k in (0, 1))
    links = coo_matrix((np.ones(len(left), dtype=bool), (left, right)), shape=(size, size))
    count, unit = connected_components(links, directed=False) if size else (0, np.zeros(0, int))
    free, reasons = np.ones(count, dtype=bool), {}
    for ids, why in tracer.fixed:
        for u in np.unique(unit[ids]).tolist():
            if free[u]:
                free[u], reasons[u] = False, why
    modules = dict(model.named_modules())
    roots = [a for a in tracer.axes if a.name and a.dim == _outputs(a.name, modules)]
    return DependencyGraph(axes=tracer.axes, unit=unit, free=free, reasons=reasons, counts=tracer.counts, roots=roots)


def _outputs(name: str, modules: Mapping[str, nn.Module]) -> int:
    """The axis of a weight that is its layer's outputs; -1 where it is no such weight."""
    path, _, leaf = name.rpartition(".")
    module = modules.get(path)
    if leaf != "weight" or not isinstance(module, (nn.Linear, nn.modules.conv._ConvNd)):
        return -1
    return 1 if getattr(module, "transposed", False) else 0


def _try(model: nn.Module, inputs: Sequence[Tensor], graph: DependencyGraph) -> None:
    """Removes one unit of all bundles at once from a copy; where that fails, of each alone, and takes out those that
    the model does not survive, until the rest goes together."""

    def survives(bundles: Sequence[Bundle]) -> str | None:
        made = copy.deepcopy(model)
        try:
            graph.selection(int(b.units[-1]) for b in bundles).apply_(made)
            _run(made, inputs)
        except Exception as error:
            return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:120]}"
        return None

    for bundle in [b for b in graph.bundles if len(b.units) < 2]:
        graph.forbid(bundle, "a single unit, which must stay")
    if not graph.bundles or survives(graph.bundles) is None:
        return
    for bundle in list(graph.bundles):
        problem = survives([bundle])
        if problem is not None:
            graph.forbid(bundle, f"written down as a number in the model's code ({problem})")
    kept: list[Bundle] = []
    if survives(graph.bundles) is not None:
        for bundle in list(graph.bundles):
            problem = survives([*kept, bundle])
            if problem is None:
                kept.append(bundle)
            else:
                graph.forbid(bundle, f"tied to another width in the model's code ({problem})")


# what modules say of their sizes ------------------------------------------------------------------
def resize_(module: Any) -> None:
    """Sets the whole numbers that a torch layer holds to what its parameters are."""
    weight: Any = getattr(module, "weight", None)
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = weight.shape
    elif isinstance(module, nn.modules.conv._ConvNd):
        a, b = weight.shape[:2]
        if module.transposed:
            module.in_channels, module.out_channels = a, b * module.groups
        else:
            module.out_channels, module.in_channels = a, b * module.groups
    elif isinstance(module, (nn.modules.batchnorm._NormBase, nn.GroupNorm)):
        held = next(t for t in (weight, getattr(module, "running_mean", None)) if t is not None)
        setattr(module, "num_channels" if isinstance(module, nn.GroupNorm) else "num_features", len(held))
    elif hasattr(module, "normalized_shape") and weight is not None:
        module.normalized_shape = tuple(weight.shape)
    elif isinstance(module, nn.PReLU):
        module.num_parameters = weight.numel()


def set_count_(module: Any, name: str, number: int) -> None:
    """Sets a number of heads or groups, and the widths that follow from it."""
    before = getattr(module, name)
    setattr(module, name, number)
    if name == "groups" and isinstance(module, nn.modules.conv._ConvNd):
        resize_(module)
    width = getattr(module, "head_dim", None)
    for other in ("attn_dim", "all_head_dim", "inner_dim"):
        if name != "groups" and isinstance(width, int) and getattr(module, other, None) == before * width:
            setattr(module, other, number * width)
