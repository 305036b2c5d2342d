"""One forward pass on a torch.fx graph: what torch executes (aten), with the layer that each step belongs to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.fx
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lynceus.core.errors import AdviceError
from lynceus.trust.bounds_ops import Shape

BATCH = 3  # of the recording
aten = torch.ops.aten

# what these give does not depend on the numbers they are given
_EMPTY = {f"{a}_like" for a in ("zeros", "ones", "full", "empty")} | {
    f"new_{a}" for a in ("zeros", "ones", "full", "empty")
}


class _Recorder(TorchDispatchMode):
    """Writes every operator that depends on the input onto a torch.fx graph; what does not is simply computed."""

    def __init__(self, x: Tensor):
        super().__init__()
        self.graph = torch.fx.Graph()
        self.known: dict[int, torch.fx.Node] = {}
        self.alive: list[Tensor] = []  # so that no id is used twice
        self.layers: list[str] = []
        self._note(x, self.graph.placeholder("x"))

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # True imports the compiler, which takes seconds

    def _note(self, value: Tensor, node: torch.fx.Node) -> None:
        node.meta.update(shape=tuple(value.shape), layer=self.layers[-1] if self.layers else "")
        self.known[id(value)] = node
        self.alive.append(value)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        reads = [a for a in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(a, Tensor)]
        if not any(id(a) in self.known for a in reads):
            return func(*args, **kwargs)
        name = func.overloadpacket.__name__
        if name in _EMPTY:
            return func(*args, **kwargs)
        if name == "_local_scalar_dense":
            raise AdviceError(
                f"{self._where()} reads a number from its input while it runs (a branch on values); "
                "bounds hold for networks whose steps are fixed."
            )
        swap = lambda a: self.known.get(id(a), a) if isinstance(a, Tensor) else a  # noqa: E731
        node = self.graph.create_node(
            "call_function",
            func,
            over_tree(swap, args),
            over_tree(swap, kwargs),
        )
        out = func(*args, **kwargs)
        first = out[0] if isinstance(out, (tuple, list)) else out
        node.meta["name"] = name
        if isinstance(first, Tensor):
            self._note(first, node)
        if isinstance(out, (tuple, list)) and name in ("split", "split_with_sizes", "chunk", "unbind"):
            for i, part in enumerate(out):
                item = self.graph.create_node("call_function", unpack, (node, i))
                item.meta["name"] = "item"
                self._note(part, item)
        return out

    def _where(self) -> str:
        return f"Layer {self.layers[-1]!r}" if self.layers else "The network"


def unpack(parts: Sequence[Tensor], index: int) -> Tensor:
    return parts[index]


def over_tree(function: Callable[[Any], Any], value: Any) -> Any:
    """`function` on every leaf; constants stay tensors, so the graph is for reading and not for code generation."""
    if isinstance(value, (tuple, list)):
        return tuple(over_tree(function, v) for v in value)
    if isinstance(value, dict):
        return {k: over_tree(function, v) for k, v in value.items()}
    got = function(value)
    return Constant(got) if isinstance(got, Tensor) else got


class Constant:
    """A tensor that does not depend on the input, as an argument of the graph."""

    def __init__(self, value: Tensor):
        self.value = value

    def __repr__(self) -> str:
        return f"constant{tuple(self.value.shape)}"


def record(call: nn.Module, shape: Shape, name: str) -> torch.fx.Graph:
    """The steps of one forward pass on `BATCH` samples that depend on the input."""
    device = next((p.device for p in call.parameters()), torch.device("cpu"))
    x = torch.rand(BATCH, *shape, dtype=torch.float64, device=device)
    recorder = _Recorder(x)
    hooks = []
    for path, module in call.get_submodule("model").named_modules():
        label = f"{path or 'model'} ({type(module).__name__})"
        hooks.append(module.register_forward_pre_hook(lambda *_, label=label: recorder.layers.append(label)))
        hooks.append(module.register_forward_hook(lambda *_: recorder.layers.pop() and None))
    try:
        with recorder:
            out = call(x)
    except RuntimeError as error:
        if isinstance(error, AdviceError):
            raise
        raise AdviceError(
            f"{name} does not take samples of shape {shape} ({str(error).splitlines()[0]}); give the shape of one "
            "sample without the batch axis, as the model wants it."
        ) from None
    finally:
        for hook in hooks:
            hook.remove()
    if not isinstance(out, Tensor) or out.ndim != 2 or len(out) != BATCH:
        found = f"shape {tuple(out.shape)}" if isinstance(out, Tensor) else type(out).__name__
        raise AdviceError(f"Bounds are for classifiers that give logits (b, k); {name} gave {found}.")
    if id(out) not in recorder.known:
        raise AdviceError(f"The output of {name} does not depend on its input, so there is nothing to bound.")
    recorder.graph.output(recorder.known[id(out)])
    return recorder.graph
