"""Linear layers and convolutions whose weights lie in the order of oneDNN's kernels; for inference on a CPU.

oneDNN otherwise brings a weight into that order at every call. The price is twice the memory, and that the layer
cannot be trained, saved or moved: `rewrite.deploy` makes these from a model's layers, and the model keeps its own.
`weight` and `bias` are still there for modules that read them without calling the layer.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn


class PackedLinear(nn.Module):
    """What `layer` computes, then `activation`, in one kernel. dtype: of the product; inputs of another are brought to
    it and back. rows: of the input that it is tuned for; any other number goes too."""

    def __init__(
        self,
        layer: nn.Linear,
        *,
        rows: int,
        activation: Literal["none", "relu", "gelu"] = "none",
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.activation, self.dtype = activation, dtype or layer.weight.dtype
        self.weight, self.bias = layer.weight, layer.bias
        self.packed = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach().to(self.dtype), rows)
        self.shift = None if layer.bias is None else layer.bias.detach().to(self.dtype)

    def forward(self, x: Float[Tensor, "*batch i"]) -> Float[Tensor, "*batch o"]:
        out = torch.ops.mkldnn._linear_pointwise(x.to(self.dtype), self.packed, self.shift, self.activation, [], "none")
        return out.to(x.dtype)


class PackedConv(nn.Module):
    """What `layer` computes, then a ReLU if asked for, in one kernel on maps with channels last. shape: of the input
    that it is tuned for; any other goes too."""

    def __init__(self, layer: nn.Conv2d, *, shape: torch.Size, relu: bool = False, dtype: torch.dtype | None = None):
        super().__init__()
        self.dtype, self.after = dtype or layer.weight.dtype, "relu" if relu else "none"
        self.where = (list(layer.padding), list(layer.stride), list(layer.dilation), layer.groups)
        self.weight, self.bias = layer.weight, layer.bias
        reorder: Any = torch._C._nn.mkldnn_reorder_conv2d_weight
        self.packed = reorder(layer.weight.detach().to(self.dtype).contiguous().to_mkldnn(), *self.where, list(shape))
        self.shift = None if layer.bias is None else layer.bias.detach().to(self.dtype)

    def forward(self, x: Float[Tensor, "b i h w"]) -> Float[Tensor, "b o H W"]:
        y = x.to(self.dtype).contiguous(memory_format=torch.channels_last)
        out = torch.ops.mkldnn._convolution_pointwise(y, self.packed, self.shift, *self.where, self.after, [], "")
        return out.to(x.dtype)
