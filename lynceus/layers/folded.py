"""Convolution + batch norm (+ residual) (+ ReLU) as one convolution, at inference.

`conv_bn` computes the ordinary modules wherever gradients, training, tracing, hooks or other devices ask for them, and
one fused kernel elsewhere (see `lynceus.layers.fused`). The folded weights are kept in a `Folds` and made anew as soon
as one of the tensors they come from was replaced or written to. Only writes through `tensor.data` escape torch's
counters; `train()` and `eval()` forget the folds, so those are seen from there on.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lynceus.core.errors import AdviceError
from lynceus.layers.fused import fusable, hooked


def fold(conv: nn.Conv2d, bn: nn.BatchNorm2d) -> tuple[Float[Tensor, "o i kh kw"], Float[Tensor, " o"]]:
    """Kernel and bias of the convolution that equals `conv` then `bn` in eval mode; computed in float64."""
    if bn.running_mean is None or bn.running_var is None:
        raise AdviceError("A batch norm without running statistics has no fixed scale to fold.")
    scale = (bn.running_var.double() + bn.eps).rsqrt()
    if bn.weight is not None:
        scale = scale * bn.weight.double()
    shift = -bn.running_mean.double() * scale
    if bn.bias is not None:
        shift = shift + bn.bias.double()
    if conv.bias is not None:
        shift = shift + conv.bias.double() * scale
    kernel = conv.weight.double() * scale.view(-1, 1, 1, 1)
    return kernel.to(conv.weight.dtype), shift.to(conv.weight.dtype)


@dataclass(slots=True)
class _Entry:
    stamp: tuple[Any, ...]
    sources: tuple[Tensor, ...]  # keeps their memory from being reused, so that an equal address means the same tensor
    kernel: Tensor
    bias: Tensor


class Folds:
    """The folded kernels of one block. Never copied, pickled or saved with it."""

    def __init__(self) -> None:
        self.entries: dict[str, _Entry] = {}

    def __deepcopy__(self, memo: Any) -> Folds:
        return Folds()

    def __reduce__(self) -> Any:
        return Folds, ()

    def forget(self) -> None:
        self.entries.clear()

    def get(self, name: str, conv: nn.Conv2d, bn: nn.BatchNorm2d, x: Tensor) -> _Entry | None:
        """Kernel and bias, from the cache if they still hold; None when the tensors cannot be watched."""
        statistics = (bn.running_mean, bn.running_var, bn.num_batches_tracked)
        sources = tuple(t for t in (conv.weight, conv.bias, bn.weight, bn.bias, *statistics) if t is not None)
        if any(t.is_inference() for t in sources):
            return None
        stamp = (bn.eps, *[(t.data_ptr(), t._version) for t in sources])
        entry = self.entries.get(name)
        if entry is None or entry.stamp != stamp:
            with torch.inference_mode(False), torch.no_grad():
                kernel, bias = fold(conv, bn)
                reorder: Any = torch._C._nn.mkldnn_reorder_conv2d_weight  # its stub lacks the input's size
                kernel = reorder(
                    kernel.contiguous().to_mkldnn(),
                    list(conv.padding),
                    list(conv.stride),
                    list(conv.dilation),
                    conv.groups,
                    list(x.shape),
                )
                entry = _Entry(stamp, tuple(t.detach() for t in sources), kernel, bias)
            self.entries[name] = entry
        return entry


def _plain(conv: nn.Module, bn: nn.Module, relu: nn.Module | None, x: Tensor) -> bool:
    return (
        type(conv) is nn.Conv2d
        and type(bn) is nn.BatchNorm2d
        and (relu is None or type(relu) is nn.ReLU)
        and not bn.training
        and bn.track_running_stats
        and conv.padding_mode == "zeros"
        and not isinstance(conv.padding, str)
        and conv.weight.dtype == x.dtype
        and conv.weight.is_cpu
        and not (hooked(conv, bn) or (relu is not None and hooked(relu)))
    )


def conv_bn(
    x: Float[Tensor, "b i h w"],
    conv: nn.Module,
    bn: nn.Module,
    *,
    folds: Folds,
    name: str,
    relu: nn.Module | None = None,
    residual: Float[Tensor, "b o H W"] | None = None,
    own: bool = False,
) -> Float[Tensor, "b o H W"]:
    """relu(bn(conv(x)) + residual), each of the two optional. own: `residual` is nobody else's and may be overwritten.

    name: the key of this pair in `folds`.
    """
    if fusable(x) and _plain(conv, bn, relu, x):
        entry = folds.get(name, conv, bn, x)  # type: ignore[arg-type]
        if entry is not None:
            where = (list(conv.padding), list(conv.stride), list(conv.dilation), conv.groups)  # type: ignore[arg-type]
            after = "none" if relu is None else "relu"
            x = x.contiguous(memory_format=torch.channels_last)
            ops = torch.ops.mkldnn
            if residual is None:
                return ops._convolution_pointwise(x, entry.kernel, entry.bias, *where, after, [], "")
            if own:
                return ops._convolution_pointwise_.binary(
                    residual, x, entry.kernel, entry.bias, *where, "add", 1.0, None if relu is None else after, [], ""
                )
            return ops._convolution_pointwise.binary(
                x, residual, entry.kernel, entry.bias, *where, "add", 1.0, None if relu is None else after, [], ""
            )
    y = bn(conv(x))
    if residual is not None:
        y = y + residual if type(bn) is nn.Identity else y.add_(residual)
    return y if relu is None else relu(y)
