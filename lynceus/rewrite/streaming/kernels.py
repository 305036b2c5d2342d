"""The convolutions of one step on a CPU, without gradients: folded with their batch norm, in few calls.

Only the way of computing differs from `ConvNode.plain`; tests hold the two together. Frames keep their channels last
here, so that a kernel over time is one product with k c columns, and a depthwise one k calls of a packed kernel that
add up in place.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lynceus.layers.fused import AVAILABLE, fusable, hooked
from lynceus.rewrite.streaming.node import Held

if TYPE_CHECKING:
    from lynceus.rewrite.streaming.conv import ConvNode

EPILOGUES: dict[type, str] = {nn.ReLU: "relu", nn.SiLU: "swish"}


class Watch:
    """Whether the tensors of some modules are still the same and unwritten, and whether anybody listens to them.

    Writes through `tensor.data` in place escape it."""

    def __init__(self, modules: Sequence[nn.Module] = (), listened: Sequence[nn.Module] = ()):
        owners = [d for m in modules for d in (m._parameters, m._buffers)]
        self.kept = [
            (d, k, t, t.data_ptr(), t._version)
            for d in owners
            for k, t in d.items()
            if t is not None and t.is_floating_point() and not t.is_inference()
        ]
        self.whole = all(
            t is None or not t.is_floating_point() or not t.is_inference() for d in owners for t in d.values()
        )
        self.listened = tuple(listened)

    def holds(self) -> bool:
        if not self.kept:
            return False
        for owner, name, tensor, place, version in self.kept:
            if owner.get(name) is not tensor or tensor.data_ptr() != place or tensor._version != version:
                return False
        return True

    def of(self, dtype: torch.dtype) -> bool:
        """Whether all can be watched and have the dtype."""
        return self.whole and all(t.dtype == dtype for _, _, t, _, _ in self.kept)

    def hooked(self) -> bool:
        return hooked(*self.listened)


class Kernels:
    """The folded weights of one convolution: made at the first step, and anew when a tensor they come from changed."""

    def __init__(self, node: ConvNode):
        self.node = node
        self.shape: tuple[int, ...] = ()
        self.watch = Watch()
        self.way: Any = None
        self.weights: list[Tensor] = []
        self.bias: Tensor | None = None
        self.where: tuple[list[int], list[int], list[int], int] = ([], [], [], 1)
        self.after = "none"

    def __deepcopy__(self, memo: Any) -> Kernels:
        return Kernels(memo.get(id(self.node), self.node))

    def __reduce__(self) -> Any:
        return Kernels, (self.node,)

    def run(self, frames: Held) -> Tensor | None:
        """The output, or None where the plain modules have to run."""
        x = frames[-1]
        if not fusable(x) or x.dtype != torch.float32:
            return None
        if x.shape != self.shape or not self.watch.holds():
            node = self.node
            modules = [node.module, *([] if node.norm is None else [node.norm.module])]
            self.watch = Watch(modules, [*modules, *([] if node.act is None else [node.act])])
            self.shape, self.way = tuple(x.shape), None
            if self.watch.of(x.dtype):
                with torch.inference_mode(False), torch.no_grad():
                    self._fold(x)
        if self.way is None or self.watch.hooked():
            return None
        y: Tensor = self.way(frames)
        return y

    # folding --------------------------------------------------------------------------------------
    def _fold(self, x: Tensor) -> None:
        node, m = self.node, self.node.module
        weight = m.weight.detach()
        bias = weight.new_zeros(m.out_channels) if m.bias is None else m.bias.detach()
        if node.norm is not None:
            b = node.norm.module
            assert b.running_mean is not None
            assert b.running_var is not None
            scale = (b.running_var.double() + b.eps).rsqrt()
            scale = scale if b.weight is None else scale * b.weight.double()
            shift = (bias.double() - b.running_mean.double()) * scale
            bias = (shift if b.bias is None else shift + b.bias.double()).to(weight.dtype)
            weight = (weight.double() * scale.view(-1, *[1] * (weight.ndim - 1))).to(weight.dtype)
        self.bias = bias.detach().clone()
        pointwise = all(k == 1 for k in m.kernel_size[1:]) and all(s == 1 for s in m.stride[1:])
        pointwise = pointwise and not any(node.space_padding)
        depthwise = m.groups == m.in_channels == m.out_channels > 1
        self.where = (list(node.space_padding), list(m.stride[1:]), list(m.dilation[1:]), m.groups)
        self.after = EPILOGUES.get(type(node.act), "none")
        if pointwise and m.groups == 1:
            # o, c, k -> k c, o
            self.weights = [weight.flatten(2).permute(2, 1, 0).reshape(-1, m.out_channels).contiguous()]
            self.way = self._product
        elif pointwise and depthwise and node.dims > 1:
            self.weights = [w.contiguous() for w in weight.flatten(1).unbind(1)]
            self.way = self._scaled
        elif node.dims == 3 and AVAILABLE and (depthwise or node.kernel == 1):
            self.weights = [self._packed(w, x) for w in weight.unbind(2)]
            self.way = self._slices
        elif node.dims == 3 and AVAILABLE and m.groups == 1:
            # o, c, k, h, w -> o, k c, h, w
            joined = weight.transpose(1, 2).flatten(1, 2)
            self.weights = [self._packed(joined, x, node.kernel)]
            self.way = self._joined

    def _packed(self, weight: Tensor, x: Tensor, times: int = 1) -> Tensor:
        b, c, *space = x.shape
        reorder: Any = torch._C._nn.mkldnn_reorder_conv2d_weight
        made: Tensor = reorder(weight.contiguous().to_mkldnn(), *self.where, [b, times * c, *space])
        return made

    # running --------------------------------------------------------------------------------------
    def _product(self, frames: Held) -> Tensor:
        """Kernels of 1 in space: one product over all frames and channels."""
        rows = [f if f.ndim == 2 else f.movedim(1, -1) for f in frames]
        joined = rows[0] if len(rows) == 1 else torch.cat(rows, -1)
        flat = joined.reshape(-1, joined.shape[-1])
        assert self.bias is not None
        y = torch.addmm(self.bias, flat, self.weights[0])
        y = self._activated(y, own=True)
        y = y.view(*joined.shape[:-1], -1)
        return y if y.ndim == 2 else y.movedim(-1, 1)

    def _scaled(self, frames: Held) -> Tensor:
        """Depthwise kernels over time alone: a weighted sum of frames."""
        assert self.bias is not None
        rows = [f.movedim(1, -1) for f in frames]
        y = torch.addcmul(self.bias, rows[0], self.weights[0])
        for row, weight in zip(rows[1:], self.weights[1:]):
            y.addcmul_(row, weight)
        return self._activated(y, own=True).movedim(-1, 1)

    def _slices(self, frames: Held) -> Tensor:
        """One convolution in space per frame, each added to the last inside its kernel."""
        ops, where = torch.ops.mkldnn, self.where
        after = self.after
        rows = [f.contiguous(memory_format=torch.channels_last) for f in frames]
        if len(rows) == 1:
            y = ops._convolution_pointwise(rows[0], self.weights[0], self.bias, *where, after, [], "")
            return y if after != "none" else self._activated(y, own=True)
        y = ops._convolution_pointwise(rows[0], self.weights[0], self.bias, *where, "none", [], "")
        for i in range(1, len(rows)):
            end = "relu" if after == "relu" and i == len(rows) - 1 else None
            ops._convolution_pointwise_.binary(y, rows[i], self.weights[i], None, *where, "add", 1.0, end, [], "")
        return y if after == "relu" else self._activated(y, own=True)

    def _joined(self, frames: Held) -> Tensor:
        """Frames as channels of one convolution in space."""
        rows = torch.cat([f.contiguous(memory_format=torch.channels_last) for f in frames], 1)
        rows = rows.contiguous(memory_format=torch.channels_last)
        after = self.after
        y: Tensor = torch.ops.mkldnn._convolution_pointwise(
            rows, self.weights[0], self.bias, *self.where, after, [], ""
        )
        return y if after != "none" else self._activated(y, own=True)

    def _activated(self, y: Tensor, *, own: bool) -> Tensor:
        act = self.node.act
        if act is None:
            return y
        if own and type(act) is nn.ReLU:
            return y.relu_()
        made: Tensor = act(y)
        return made
