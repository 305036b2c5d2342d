"""Convolution + batch norm (+ residual) (+ ReLU, SiLU or GELU) as one convolution, at inference.

`conv_bn` computes the ordinary modules wherever gradients, training, tracing, hooks or other devices ask for them, and
one fused kernel elsewhere (see `lynceus.layers.fused`). The folded weights are kept in a `Folds` and made anew as soon
as one of the tensors they come from was replaced or written to. Only writes through `tensor.data` escape torch's
counters; `train()` and `eval()` forget the folds, so those are seen from there on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from lynceus.core.errors import AdviceError
from lynceus.layers.fused import fusable, hooked

Pair = tuple[nn.Conv2d, nn.Module]  # a convolution and its batch norm, or nn.Identity where it has none


def fold(conv: nn.Conv2d, bn: nn.Module) -> tuple[Float[Tensor, "o i kh kw"], Float[Tensor, " o"]]:
    """Kernel and bias of the convolution that equals `conv` then `bn` in eval mode; computed in float64.

    bn: a batch norm, or nn.Identity for none.
    """
    if not isinstance(bn, nn.BatchNorm2d):
        zero = conv.weight.new_zeros(conv.out_channels)
        return conv.weight.clone(), zero if conv.bias is None else conv.bias.clone()
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


def fold_sum(
    pairs: Sequence[Pair], *, identity: bool = False
) -> tuple[Float[Tensor, "o i kh kw"], Float[Tensor, " o"]]:
    """Kernel and bias of the one convolution that equals the sum of parallel ones, and of the input if `identity`.

    Odd "same" kernels of one stride; the smaller are centred in the first. identity: as many channels out as in.
    """
    kernel, bias = fold(*pairs[0])
    size = kernel.shape[-2:]
    for pair in pairs[1:]:
        other, shift = fold(*pair)
        rows, columns = ((a - b) // 2 for a, b in zip(size, other.shape[-2:]))
        kernel = kernel + F.pad(other, (columns, columns, rows, rows))
        bias = bias + shift
    if identity:
        channel = torch.arange(kernel.shape[0], device=kernel.device)
        kernel[channel, channel % kernel.shape[1], size[0] // 2, size[1] // 2] += 1
    return kernel, bias


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

    def get(
        self, name: str, pairs: Sequence[Pair], x: Tensor, *, identity: bool = False, rows: int = 0
    ) -> _Entry | None:
        """Kernel and bias of the sum, from the cache if they still hold; None when the tensors cannot be watched.

        rows: given, the kernel is that of a linear layer on so many rows.
        """
        sources = [t for pair in pairs for m in pair for t in (*m._parameters.values(), *m._buffers.values())]
        watched = tuple(t for t in sources if t is not None)
        if any(t.is_inference() for t in watched):
            return None
        stamp = (
            identity,
            rows > 0,
            *[getattr(bn, "eps", 0.0) for _, bn in pairs],
            *[(t.data_ptr(), t._version) for t in watched],
        )
        entry = self.entries.get(name)
        if entry is None or entry.stamp != stamp:
            with torch.inference_mode(False), torch.no_grad():
                kernel, bias = fold_sum(pairs, identity=identity)
                kernel = _reordered(kernel, pairs[0][0], x, rows)
                entry = _Entry(stamp, tuple(t.detach() for t in watched), kernel, bias)
            self.entries[name] = entry
        return entry


def _reordered(kernel: Tensor, conv: nn.Conv2d, x: Tensor, rows: int) -> Tensor:
    if rows:
        made: Tensor = torch.ops.mkldnn._reorder_linear_weight(kernel.flatten(1), rows)
        return made
    reorder: Any = torch._C._nn.mkldnn_reorder_conv2d_weight  # its stub lacks the input's size
    where = (list(conv.padding), list(conv.stride), list(conv.dilation), conv.groups)
    made = reorder(kernel.contiguous().to_mkldnn(), *where, list(x.shape))
    return made


FEW = 4096  # places up to which a 1x1 convolution is called as a linear layer: a third of the cost of the call
EPILOGUES: dict[type, str] = {nn.ReLU: "relu", nn.SiLU: "swish", nn.GELU: "gelu"}  # activations that the kernel knows


def _plain(conv: nn.Module, bn: nn.Module, relu: nn.Module | None, x: Tensor) -> bool:
    return (
        type(conv) is nn.Conv2d
        and (type(bn) is nn.Identity or (type(bn) is nn.BatchNorm2d and not bn.training and bn.track_running_stats))
        and (relu is None or (type(relu) in EPILOGUES and getattr(relu, "approximate", "none") == "none"))
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

    relu: nn.ReLU, nn.SiLU or exact nn.GELU, inside the kernel; any other activation takes the plain path.
    name: the key of this pair in `folds`.
    """
    if fusable(x) and _plain(conv, bn, relu, x):
        rows = 0 if own else _rows(conv, x)  # type: ignore[arg-type]
        entry = folds.get(name, [(conv, bn)], x, rows=rows)  # type: ignore[list-item]
        if entry is not None and rows:
            return _run_linear(x, entry, relu=relu, residual=residual)
        if entry is not None:
            return _run(x, entry, conv, relu=relu, residual=residual, own=own)  # type: ignore[arg-type]
    y = bn(conv(x))
    if residual is not None:
        y = y + residual if type(bn) is nn.Identity else y.add_(residual)
    return y if relu is None else relu(y)


def conv_bn_sum(
    x: Float[Tensor, "b i h w"], pairs: Sequence[Pair], *, folds: Folds, name: str, identity: bool = False
) -> Float[Tensor, "b o H W"]:
    """The sum of bn(conv(x)) over parallel pairs, and of x if `identity`; see `fold_sum` for what may be summed."""
    if fusable(x) and all(_plain(conv, bn, None, x) for conv, bn in pairs):
        entry = folds.get(name, pairs, x, identity=identity)
        if entry is not None:
            return _run(x, entry, pairs[0][0])
    y = sum(bn(conv(x)) for conv, bn in pairs)
    return y + x if identity else y


def _rows(conv: nn.Conv2d, x: Tensor) -> int:
    """Places of a map on which a 1x1 convolution is cheaper called as a linear layer; 0 where it is not."""
    count = x.shape[0] * x.shape[2] * x.shape[3]
    pointwise = conv.kernel_size == conv.stride == (1, 1) and conv.groups == 1 and conv.padding == (0, 0)
    return count if pointwise and count <= FEW else 0


def _run_linear(x: Tensor, entry: _Entry, *, relu: nn.Module | None, residual: Tensor | None) -> Tensor:
    x = x.permute(0, 2, 3, 1)
    after = "none" if relu is None else EPILOGUES[type(relu)]
    run = torch.ops.mkldnn._linear_pointwise
    if residual is None:
        y = run(x, entry.kernel, entry.bias, after, [], "none" if after == "gelu" else "")
    else:
        y = run.binary(x, residual.permute(0, 2, 3, 1), entry.kernel, entry.bias, "add")
        y = y if relu is None else relu(y)
    return y.permute(0, 3, 1, 2)


def _run(
    x: Tensor,
    entry: _Entry,
    conv: nn.Conv2d,
    *,
    relu: nn.Module | None = None,
    residual: Tensor | None = None,
    own: bool = False,
) -> Tensor:
    where = (list(conv.padding), list(conv.stride), list(conv.dilation), conv.groups)
    after = "none" if relu is None else EPILOGUES[type(relu)]
    x = x.contiguous(memory_format=torch.channels_last)
    ops = torch.ops.mkldnn
    if residual is None:
        algorithm = "none" if after == "gelu" else ""  # the exact one, not tanh
        return ops._convolution_pointwise(x, entry.kernel, entry.bias, *where, after, [], algorithm)
    options: tuple[Any, ...] = (
        *where,
        "add",
        1.0,
        after if after == "relu" else None,
        [],
        "",
    )  # no other may follow the sum
    if own:
        y = ops._convolution_pointwise_.binary(residual, x, entry.kernel, entry.bias, *options)
    else:
        y = ops._convolution_pointwise.binary(x, residual, entry.kernel, entry.bias, *options)
    return y if after in ("none", "relu") or relu is None else relu(y)
