"""Inference on a CPU with fewer passes over memory: bias, activation and residual sum inside the matrix product.

oneDNN runs these as epilogues of its kernels (the operators torch's own compiler emits). They are taken only where
nobody can notice: no gradients, no tracing or export, no autocast, no hooks on the layers in question, float32 or
bfloat16 on a CPU. Everywhere else the same mathematics runs as ordinary modules.
`torch.backends.mkldnn.flags(enabled=False)` turns them off.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as _module

from lynceus.layers.packed import PackedLinear

Activation = Literal["none", "relu", "gelu", "gelu_tanh"]
_PLAIN: dict[str, object] = {
    "none": lambda x: x,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


def _available() -> bool:
    names = ("_linear_pointwise", "_convolution_pointwise", "_convolution_pointwise_")
    return torch.backends.mkldnn.is_available() and all(hasattr(torch.ops.mkldnn, n) for n in names)


AVAILABLE = _available()
SMALL = 5_000_000  # multiply-adds below which oneDNN's start (20 to 40 us here) costs more than its epilogues save
BFLOAT16 = AVAILABLE and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def fusable(x: Tensor) -> bool:
    """True when `x` may go through fused kernels: see the top of this file."""
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or not AVAILABLE:
        return False
    return (
        type(x) is Tensor
        and x.device.type == "cpu"
        and (x.dtype == torch.float32 or (BFLOAT16 and x.dtype == torch.bfloat16))
        and x.layout == torch.strided
        and x.numel() > 0
        and torch._C._get_mkldnn_enabled()
        and not torch.jit.is_tracing()
        and not torch.is_autocast_enabled("cpu")
        and torch._C._len_torch_dispatch_stack() == 0  # e.g. a FLOP counter, which does not know these operators
        and torch._C._functorch.maybe_current_level() is None
        and forward_ad._current_level < 0
    )


def hooked(*modules: nn.Module) -> bool:
    """True when somebody listens to one of these modules, so that it must really be called."""
    if _module._global_forward_hooks or _module._global_forward_pre_hooks:
        return True
    return any(m._forward_hooks or m._forward_pre_hooks for m in modules)


def plain_linear(layer: nn.Module, x: Tensor) -> bool:
    """True for an ordinary nn.Linear of the dtype of `x`: no adapter, no parametrisation, no quantisation, no hook; and
    for a packed one that leaves the activation to others."""
    if type(layer) is PackedLinear:
        return layer.dtype == x.dtype and layer.activation == "none" and not hooked(layer)
    return type(layer) is nn.Linear and layer.weight.dtype == x.dtype and layer.weight.is_cpu and not hooked(layer)


def linear(layer: nn.Module, x: Tensor, *, activation: Activation = "none", residual: Tensor | None = None) -> Tensor:
    """activation(layer(x)), or layer(x) + residual (one or the other), in one kernel where that is allowed."""
    if not (fusable(x) and plain_linear(layer, x)) or x.numel() * layer.out_features < SMALL:  # type: ignore[operator]
        x = _PLAIN[activation](layer(x))  # type: ignore[operator]
        return x if residual is None else residual + x
    weight, bias = (layer.packed, layer.shift) if type(layer) is PackedLinear else (layer.weight, layer.bias)
    if residual is not None:
        return torch.ops.mkldnn._linear_pointwise.binary(x, residual, weight, bias, "add")
    kind, algorithm = ("gelu", "tanh") if activation == "gelu_tanh" else (activation, "none")
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, kind, [], algorithm)


def affine(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x weight^T + bias, for weights that are no module's own."""
    if fusable(x) and weight.is_cpu and weight.dtype == x.dtype and x.numel() * weight.shape[0] >= SMALL:
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "none")
    return F.linear(x, weight, bias)


def autocasting(x: Tensor) -> bool:
    """True when operations on the device of `x` choose their own precision; False where there is no such thing."""
    kind = x.device.type
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)


def without_autocast(x: Tensor) -> AbstractContextManager[None]:
    """A context in which operations on the device of `x` keep the precision of what they are given."""
    return torch.autocast(x.device.type, enabled=False) if autocasting(x) else nullcontext()
