"""What a convolutional network is made of: its layers in the order in which they run, which of them must keep the same
number of channels because their outputs are added, and which stand in a residual branch or on a shortcut.

The network is run once on shapes alone. Modules without children are its layers; what happens between them (sums,
concatenations, flattening) is seen as torch functions, each tensor carrying the group of channels it belongs to and the
layers it went through.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lynceus.core.errors import AdviceError

KINDS = (
    "Unknown",
    "Conv2d",
    "MaxPool2d",
    "ReLU",
    "BatchNorm2d",
    "Linear",
    "Dropout",
    "LogSoftmax",
    "AvgPool2d",
    "L2Norm",
    "Softmax",
)
TYPES: dict[type, str] = {
    nn.Conv2d: "Conv2d",
    nn.MaxPool2d: "MaxPool2d",
    nn.ReLU: "ReLU",
    nn.ReLU6: "ReLU",
    nn.BatchNorm2d: "BatchNorm2d",
    nn.Linear: "Linear",
    nn.Dropout: "Dropout",
    nn.Dropout2d: "Dropout",
    nn.LogSoftmax: "LogSoftmax",
    nn.AvgPool2d: "AvgPool2d",
    nn.AdaptiveAvgPool2d: "AvgPool2d",
    nn.Softmax: "Softmax",
}
SUMS = {"add", "add_", "__add__", "__iadd__", "__radd__", "sub", "__sub__", "mul", "mul_", "__mul__", "__imul__"}
SUMS |= {"maximum", "minimum", "__rmul__", "__rsub__"}


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One layer as a policy sees it. kernel, stride, padding: of one side; width: channels or features given. Numbers
    that a layer does not have are 0. group: layers of one group give equally many channels, -1 for those that give what
    they get. fixed: its group's width may not change. shortcut: on a shortcut. start, end: first and last layer (from
    1) of the residual branch it is in, 0 for none. joins: its output enters a sum. resizes: its map is of another size
    than the one it reads. size: numbers in its parameters."""

    name: str
    kind: str
    kernel: int = 0
    stride: int = 0
    width: int = 0
    padding: int = 0
    inside: int = 0
    groups: int = 1
    group: int = -1
    fixed: bool = False
    shortcut: bool = False
    start: int = 0
    end: int = 0
    joins: bool = False
    resizes: bool = False
    size: int = 0

    @property
    def depthwise(self) -> bool:
        return self.kind == "Conv2d" and self.groups > 1 and self.groups == self.inside == self.width


@dataclass
class _Tag:
    """group: of the channels; past: layers that this tensor went through."""

    group: int
    past: frozenset[int]


@dataclass
class _Watch(TorchFunctionMode):
    """Follows groups of channels through everything that is called between layers."""

    tags: dict[int, _Tag] = field(default_factory=dict)
    alive: list[Tensor] = field(default_factory=list)
    parent: list[int] = field(default_factory=list)
    frozen: set[int] = field(default_factory=set)
    joined: set[int] = field(default_factory=set)
    branches: list[tuple[frozenset[int], frozenset[int]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    def new(self) -> int:
        self.parent.append(len(self.parent))
        return len(self.parent) - 1

    def root(self, group: int) -> int:
        while self.parent[group] != group:
            group = self.parent[group]
        return group

    def mark(self, tensor: Tensor, group: int, past: frozenset[int]) -> None:
        self.alive.append(tensor)  # so that its id stays its own
        self.tags[id(tensor)] = _Tag(group, past)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        found = [t for t in _tensors((args, kwargs or {})) if id(t) in self.tags]
        out = func(*args, **(kwargs or {}))
        if not found:
            return out
        tags = [self.tags[id(t)] for t in found]
        past = frozenset().union(*(t.past for t in tags))
        group = self.root(tags[0].group)
        if len(tags) > 1:
            name = getattr(func, "__name__", "")
            if name in SUMS:
                self.branches.append((tags[0].past, tags[1].past))
                for tag in tags[1:]:
                    self.parent[self.root(tag.group)] = group
                self.joined.add(group)
            else:
                # channels side by side, or multiplied as matrices: their numbers stay as they are
                self.frozen |= {t.group for t in tags}
                group = self.new()
                self.frozen.add(group)
        for tensor in _tensors(out):
            self.mark(tensor, group, past)
        return out


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, tuple | list):
        return [t for v in value for t in _tensors(v)]
    if isinstance(value, Mapping):
        return [t for v in value.values() for t in _tensors(v)]
    return []


def skeleton(model: nn.Module) -> nn.Module:
    """A copy that holds shapes and no numbers, in eval mode."""
    memo: dict[int, Any] = {}
    for p in model.parameters():
        memo[id(p)] = nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=p.requires_grad)
    for b in model.buffers():
        memo[id(b)] = torch.empty_like(b, device="meta")
    return copy.deepcopy(model, memo).eval()


def layers_of(model: nn.Module, image: tuple[int, int, int]) -> tuple[Layer, ...]:
    """The layers of `model` in the order in which they first run on images (channels, h, w).

    AdviceError when the network cannot run on that size."""
    made = skeleton(model)
    names = {m: n for n, m in made.named_modules() if not list(m.children()) and not isinstance(m, nn.Identity)}
    order: dict[str, int] = {}
    seen: dict[str, tuple[torch.Size, torch.Size]] = {}
    own: dict[str, int] = {}
    watch = _Watch()
    past: dict[nn.Module, _Tag] = {}

    def before(module: nn.Module, args: tuple[Any, ...]) -> None:
        found = [t for t in _tensors(args) if id(t) in watch.tags]
        if found:
            past[module] = watch.tags[id(found[0])]

    def after(module: nn.Module, args: tuple[Any, ...], out: Any) -> None:
        name = names[module]
        index = order.setdefault(name, len(order))
        tag = past[module]
        group = tag.group
        if isinstance(module, nn.Conv2d | nn.Linear):
            grouped = isinstance(module, nn.Conv2d) and module.groups > 1
            if not grouped:
                group = watch.new()
            elif module.groups != module.in_channels or module.groups != module.out_channels:
                watch.frozen.add(group)
                group = watch.new()
                watch.frozen.add(group)
        own[name] = group
        seen.setdefault(name, (_tensors(args)[0].shape, _tensors(out)[0].shape))
        for tensor in _tensors(out):
            watch.mark(tensor, group, tag.past | {index})

    hooks = [m.register_forward_pre_hook(before) for m in names] + [m.register_forward_hook(after) for m in names]
    probe = torch.empty(2, *image, device="meta")
    watch.mark(probe, watch.new(), frozenset())
    try:
        with torch.no_grad(), watch:
            out = made(probe)
    except Exception as error:
        raise AdviceError(
            f"{type(model).__name__} does not run on images of {image[1]}x{image[2]} with {image[0]} channels: {error}"
        ) from None
    finally:
        for h in hooks:
            h.remove()
    for tensor in _tensors(out):
        if id(tensor) in watch.tags:
            watch.frozen.add(watch.tags[id(tensor)].group)
    return _assembled(made, order, seen, own, watch)


def _assembled(
    made: nn.Module,
    order: dict[str, int],
    seen: dict[str, tuple[torch.Size, torch.Size]],
    own: dict[str, int],
    watch: _Watch,
) -> tuple[Layer, ...]:
    modules = {n: made.get_submodule(n) for n in order}
    shortcut: set[int] = set()
    place: dict[int, tuple[int, int]] = {}
    for a, b in watch.branches:
        left, right = a - b, b - a
        main, other = (left, right) if len(left) >= len(right) else (right, left)
        shortcut |= other
        for i in main:
            place[i] = (min(main) + 1, max(main) + 1)
    frozen = {watch.root(g) for g in watch.frozen}
    joined = {watch.root(g) for g in watch.joined}
    for name, module in modules.items():
        strided = isinstance(module, nn.Conv2d) and module.stride != (1, 1)
        if strided and order[name] not in shortcut:
            frozen.add(watch.root(own[name]))
    out = []
    for name, module in modules.items():
        index, group = order[name], watch.root(own[name])
        start, end = place.get(index, (0, 0))
        produces = isinstance(module, nn.Conv2d | nn.Linear)
        into, gives = seen[name]
        out.append(
            Layer(
                name=name,
                kind=TYPES.get(type(module), "Unknown"),
                kernel=_side(getattr(module, "kernel_size", 0)),
                stride=_side(getattr(module, "stride", 0)),
                width=gives[1] if isinstance(module, nn.Conv2d) else gives[-1] if produces else 0,
                padding=_side(getattr(module, "padding", 0)),
                inside=into[1] if isinstance(module, nn.Conv2d) else into[-1] if produces else 0,
                groups=getattr(module, "groups", 1),
                group=group if produces else -1,
                fixed=group in frozen,
                shortcut=index in shortcut,
                start=start,
                end=end,
                joins=produces and group in joined,
                resizes=len(into) == len(gives) == 4 and into[2:] != gives[2:],
                size=sum(p.numel() for p in module.parameters()),
            )
        )
    return tuple(out)


def _side(value: Any) -> int:
    if isinstance(value, tuple):
        value = value[0] if value else 0
    return value if isinstance(value, int) and not isinstance(value, bool) else 0
