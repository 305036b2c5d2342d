"""The ways to run a model that `rewrite.deploy` measures: a builder each, from a model and an example to a function.

A builder gets a copy of the model that is its own, in eval mode with frozen parameters, and may change it. What it
gives back takes the same images as the model and gives outputs of the model's dtype.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from lynceus.core.errors import AdviceError
from lynceus.layers import fused
from lynceus.layers.folded import fold
from lynceus.layers.packed import PackedConv, PackedLinear

Run = Callable[[Tensor], Any]


def _always(model: nn.Module, example: Tensor) -> str:
    return ""


@dataclass(frozen=True, kw_only=True)
class Way:
    """One way to run a model.

    text: what it is. build: (own copy of the model, example) -> function of images. refuse: why it makes no sense for
    this model on this machine ("" when it does); such a way is only tried when it is named. fixed: it holds for the
    example's shape only. slow: building takes a minute. default: tried unless ways are named.
    """

    text: str
    build: Callable[[nn.Module, Tensor], Run]
    refuse: Callable[[nn.Module, Tensor], str] = _always
    fixed: bool = False
    slow: bool = False
    default: bool = True


# eager ----------------------------------------------------------------------------------------------
def _plain(model: nn.Module, example: Tensor) -> Run:
    """Ordinary modules alone: the shortcuts of `layers.fused` stay away where gradients are on."""

    def run(image: Tensor) -> Any:
        with torch.enable_grad():
            return model(image)

    return run


def _eager(model: nn.Module, example: Tensor) -> Run:
    return model


def _channels_last(model: nn.Module, example: Tensor) -> Run:
    model = model.to(memory_format=torch.channels_last)
    return lambda image: model(image.contiguous(memory_format=torch.channels_last))


def _has_maps(model: nn.Module, example: Tensor) -> str:
    return "" if any(isinstance(m, nn.Conv2d) for m in model.modules()) else "there is no convolution"


# folding --------------------------------------------------------------------------------------------
def _folded(model: nn.Module, example: Tensor) -> Run:
    return _fold(model, example)


def _fold(model: nn.Module, example: Tensor, *, foreign_only: bool = False) -> nn.Module:
    """The deployment form of the model's family, where it has one; then every batch norm that follows a convolution
    alone is taken into it. foreign_only: not in our own modules, which fold as they run."""
    model = deployment_form(model)
    for conv_name, norm_name in _followed(model, example, nn.Conv2d, nn.BatchNorm2d):
        if foreign_only and _ours(model, norm_name):
            continue
        conv, norm = model.get_submodule(conv_name), model.get_submodule(norm_name)
        assert isinstance(conv, nn.Conv2d)
        assert isinstance(norm, nn.BatchNorm2d)
        if norm.running_mean is None:
            continue
        kernel, bias = fold(conv, norm)
        with torch.no_grad():
            conv.weight.copy_(kernel)
            conv.bias = nn.Parameter(bias, requires_grad=False)
        # timm's norms carry their activation
        rest = [m for n, m in norm.named_children() if n in ("drop", "act")]
        model.set_submodule(norm_name, nn.Sequential(*rest) if rest else nn.Identity())
    return model


def deployment_form(model: nn.Module) -> nn.Module:
    """What the `fuse` of the model's own family makes of it (the backbone inside a task's module too); else itself."""
    inner = getattr(model, "backbone", None)
    if isinstance(inner, nn.Module):
        model.backbone = deployment_form(inner)
        return model
    module = type(model).__module__
    fuse = getattr(import_module(module), "fuse", None) if module.startswith("lynceus.backbones.") else None
    return fuse(model).requires_grad_(False) if fuse is not None else model


def _has_norms(model: nn.Module, example: Tensor) -> str:
    if any(isinstance(m, nn.BatchNorm2d) for m in model.modules()):
        return ""
    return "there is no batch norm to fold"


def _followed(model: nn.Module, example: Tensor, first: Any, second: Any) -> list[tuple[str, str]]:
    """Pairs of modules that run once each, the second on the very tensor that the first gave, as one run shows.

    That nothing else reads this tensor is not seen here: the outputs are compared afterwards."""
    made: dict[int, tuple[str, Tensor, int]] = {}
    pairs: dict[str, str] = {}
    calls: dict[str, int] = {}

    def watch(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], out: Any) -> None:
            calls[name] = calls.get(name, 0) + 1
            if isinstance(module, second) and args and id(args[0]) in made:
                before, _, version = made[id(args[0])]
                if args[0]._version == version:  # nothing was added in place meanwhile
                    pairs[before] = name
            if isinstance(module, first) and isinstance(out, Tensor):
                made[id(out)] = (name, out, out._version)  # it is kept, so that its id stays its own

        return hook

    modules = [(n, m) for n, m in model.named_modules() if isinstance(m, (first, second))]
    hooks = [m.register_forward_hook(watch(n)) for n, m in modules]
    try:
        with torch.no_grad():
            model(example[:1])
    finally:
        for h in hooks:
            h.remove()
    return [(a, b) for a, b in pairs.items() if calls[a] == calls[b] == 1]


# prepacked weights ----------------------------------------------------------------------------------
def _packed(model: nn.Module, example: Tensor) -> Run:
    return _pack(model, example, next(model.parameters()).dtype)


def _mixed(model: nn.Module, example: Tensor) -> Run:
    return _pack(model, example, torch.bfloat16)


def _bf16_packed(model: nn.Module, example: Tensor) -> Run:
    return _in_bf16(_pack(model.bfloat16(), example.bfloat16(), torch.bfloat16), example.dtype)


def _pack(model: nn.Module, example: Tensor, dtype: torch.dtype) -> nn.Module:
    """Linear layers and convolutions prepacked. In foreign modules batch norms are folded first, and a GELU or ReLU
    that follows is taken in; ours have kernels for that already, which take packed layers too."""
    model = _fold(model, example, foreign_only=dtype == next(model.parameters()).dtype)
    normed = {conv for conv, _ in _followed(model, example, nn.Conv2d, nn.BatchNorm2d)}
    after: dict[str, tuple[str, str]] = {}
    for kind, name in ((nn.GELU, "gelu"), (nn.ReLU, "relu")):
        for layer, act in _followed(model, example, (nn.Linear, nn.Conv2d), kind):
            exact = getattr(model.get_submodule(act), "approximate", "none") == "none"
            taken = name == "relu" or type(model.get_submodule(layer)) is nn.Linear
            if exact and taken and not _ours(model, layer):
                after[layer] = (act, name)
    shapes = _shapes(model, example)
    for name, m in list(model.named_modules()):
        act, kind_of = after.get(name, ("", "none"))
        if name not in shapes or name in normed or fused.hooked(m):
            continue
        if type(m) is nn.Linear:
            rows = shapes[name].numel() // m.in_features
            made: nn.Module = PackedLinear(m, rows=rows, activation=kind_of, dtype=dtype)  # type: ignore[arg-type]
        elif type(m) is nn.Conv2d and m.padding_mode == "zeros" and not isinstance(m.padding, str):
            made = PackedConv(m, shape=shapes[name], relu=kind_of == "relu", dtype=dtype)
        else:
            continue
        model.set_submodule(name, made)
        if act:
            model.set_submodule(act, nn.Identity())
    return model


def _ours(model: nn.Module, name: str) -> bool:
    """Whether the module that holds this one is this library's."""
    return type(model.get_submodule(name.rpartition(".")[0])).__module__.startswith("lynceus.")


def _shapes(model: nn.Module, example: Tensor) -> dict[str, torch.Size]:
    """Of the input of every linear layer and convolution that is really called, as one run shows."""
    found: dict[str, torch.Size] = {}

    def watch(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            found.setdefault(name, args[0].shape)

        return hook

    hooks = [
        m.register_forward_pre_hook(watch(n)) for n, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))
    ]
    try:
        with torch.no_grad():
            model(example)
    finally:
        for h in hooks:
            h.remove()
    return found


def _no_onednn(model: nn.Module, example: Tensor) -> str:
    if example.device.type != "cpu":
        return "it is for CPUs"
    return "" if fused.AVAILABLE else "this build of torch has no oneDNN"


def _no_mixed(model: nn.Module, example: Tensor) -> str:
    return _no_onednn(model, example) or _no_bf16(model, example)


# bfloat16 -------------------------------------------------------------------------------------------
def _bf16(model: nn.Module, example: Tensor) -> Run:
    return _in_bf16(model.bfloat16(), example.dtype)


def _in_bf16(model: Run, dtype: torch.dtype) -> Run:
    """Images to bfloat16, whatever floats come out back."""
    return lambda image: tree_map(_float_to(dtype), model(image.bfloat16()))


def _float_to(dtype: torch.dtype) -> Callable[[Any], Any]:
    return lambda y: y.to(dtype) if isinstance(y, Tensor) and y.is_floating_point() else y


def bf16_unit(device: torch.device) -> bool:
    """True where bfloat16 products have instructions of their own: AVX512-BF16 or AMX, or the GPU's."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu":
        return False
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, c, lambda: False)() for c in checks)


def _no_bf16(model: nn.Module, example: Tensor) -> str:
    return "" if bf16_unit(example.device) else "this machine has no unit for bfloat16"


# compilers ------------------------------------------------------------------------------------------
def _compile(model: nn.Module, example: Tensor) -> Run:
    return _compiled(model, example, {"freezing": True})


def _compile_bf16(model: nn.Module, example: Tensor) -> Run:
    return _in_bf16(_compiled(model.bfloat16(), example.bfloat16(), {"freezing": True}), example.dtype)


def _compile_max(model: nn.Module, example: Tensor) -> Run:
    return _compiled(model, example, {"freezing": True, "max_autotune": True})


def _compile_max_bf16(model: nn.Module, example: Tensor) -> Run:
    run = _compiled(model.bfloat16(), example.bfloat16(), {"freezing": True, "max_autotune": True})
    return _in_bf16(run, example.dtype)


def _compiled(model: nn.Module, example: Tensor, options: dict[str, Any]) -> Run:
    """Through torch's compiler with the weights as constants, for this one shape. It is compiled here, not later."""
    if example.device.type == "cuda":
        options = {k: v for k, v in options.items() if k != "freezing"}
    made: Run = torch.compile(model, dynamic=False, fullgraph=True, options=options)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made(example)
    return made


def _no_compiler(model: nn.Module, example: Tensor) -> str:
    if example.device.type == "cpu":
        import shutil

        if not any(shutil.which(c) for c in ("g++", "clang++", "c++")):
            return "torch's compiler needs a C++ compiler"
    return ""


def _no_compiler_bf16(model: nn.Module, example: Tensor) -> str:
    return _no_compiler(model, example) or _no_bf16(model, example)


def _onnx(model: nn.Module, example: Tensor) -> Run:
    """The file that `rewrite.export` writes, in onnxruntime."""
    from lynceus.rewrite.export import open_onnx, traced, write_onnx

    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _, structure = tree_flatten(model(example))
        plan = traced(model, example, ("batch", "height", "width"))
        folder = tempfile.TemporaryDirectory(prefix="lynceus-")
        write_onnx(plan, model, example, Path(folder.name) / "model.onnx")
        session = open_onnx(Path(folder.name) / "model.onnx")

    def run(image: Tensor) -> Any:
        _ = folder  # lives as long as the session that may read it
        return tree_unflatten(session(image), structure)

    return run


def _no_onnx(model: nn.Module, example: Tensor) -> str:
    missing = [p for p in ("onnx", "onnxscript", "onnxruntime") if find_spec(p) is None]
    if missing:
        return f'{missing[0]} is not installed: pip install "lynceus[export]"'
    return "" if example.device.type == "cpu" else "it runs on the CPU, the model does not"


# eight bits -----------------------------------------------------------------------------------------
def _int8(model: nn.Module, example: Tensor) -> Run:
    from torch.ao.quantization import quantize_dynamic

    if not any(isinstance(m, nn.Linear) for m in model.modules()):
        raise AdviceError("there is no linear layer to quantise")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)


def _no_int8(model: nn.Module, example: Tensor) -> str:
    return "" if example.device.type == "cpu" else "it is for CPUs"


WAYS: dict[str, Way] = {
    "plain": Way(text="ordinary modules, no shortcuts", build=_plain),
    "eager": Way(text="the model as it is, without gradients: fused kernels, kept tables", build=_eager),
    "channels_last": Way(text="channels last in memory", build=_channels_last, refuse=_has_maps),
    "folded": Way(text="batch norms inside convolutions", build=_folded, refuse=_has_norms),
    "packed": Way(text="folded, weights in the kernels' own order", build=_packed, refuse=_no_onednn),
    "bf16": Way(text="bfloat16", build=_bf16, refuse=_no_bf16),
    "bf16_packed": Way(text="bfloat16, folded and packed", build=_bf16_packed, refuse=_no_mixed),
    "mixed": Way(text="products in bfloat16, the rest in the model's own dtype", build=_mixed, refuse=_no_mixed),
    "compile": Way(text="torch.compile, weights frozen", build=_compile, refuse=_no_compiler, fixed=True, slow=True),
    "compile_bf16": Way(
        text="torch.compile in bfloat16", build=_compile_bf16, refuse=_no_compiler_bf16, fixed=True, slow=True
    ),
    "compile_max": Way(
        text="torch.compile, kernels chosen by trial",
        build=_compile_max,
        refuse=_no_compiler,
        fixed=True,
        slow=True,
        default=False,
    ),
    "compile_max_bf16": Way(
        text="torch.compile in bfloat16, kernels chosen by trial",
        build=_compile_max_bf16,
        refuse=_no_compiler_bf16,
        fixed=True,
        slow=True,
        default=False,
    ),
    "onnx": Way(text="onnxruntime", build=_onnx, refuse=_no_onnx, slow=True),
    "int8": Way(text="linear layers in 8 bits, scales found per batch", build=_int8, refuse=_no_int8, default=False),
}


@contextmanager
def with_threads(count: int) -> Iterator[None]:
    """torch's thread count inside; afterwards it is what it was."""
    before = torch.get_num_threads()
    if count == before:
        yield
        return
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
