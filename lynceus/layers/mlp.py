"""The two-layer perceptron of transformer blocks."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from lynceus.layers.fused import fusable, hooked, linear, plain_linear

LARGEST, PIECE = (
    2**25,
    2**22,
)  # bytes of the hidden layer: above the first, inference on a CPU goes in pieces of the second


class QuickGELU(nn.Module):
    """x sigmoid(1.702 x), an approximation of GELU, as silu(1.702 x) / 1.702."""

    slope = 1.702

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(x * self.slope) * (1 / self.slope)


class Mlp(nn.Module):
    """fc1 -> activation -> dropout -> fc2 -> dropout on the last axis, whatever stands before it.

    hidden: width in between. act: None for the exact GELU. norm_eps: given, a LayerNorm `norm` of that eps stands
    before fc2.
    """

    def __init__(
        self,
        dim: int,
        hidden: int,
        *,
        out: int | None = None,
        bias: bool = True,
        drop: float = 0.0,
        act: nn.Module | None = None,
        norm_eps: float | None = None,
    ):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden, bias=bias)
        self.act = nn.GELU() if act is None else act
        self.drop = nn.Dropout(drop)
        self.norm = nn.Identity() if norm_eps is None else nn.LayerNorm(hidden, eps=norm_eps)
        self.fc2 = nn.Linear(hidden, out or dim, bias=bias)

    def forward(self, x: Float[Tensor, "*batch c"], residual: Tensor | None = None) -> Float[Tensor, "*batch d"]:
        """residual: added to the result, inside the last kernel where that is possible."""
        rows = x.numel() // x.shape[-1] if fusable(x) else 0
        if rows * self.fc1.out_features * x.element_size() > LARGEST and self._plain(x):
            return self._in_pieces(x, residual, rows)
        return self._whole(x, residual)

    def _plain(self, x: Tensor) -> bool:
        parts = (self.act, self.drop, self.norm)
        return not self.training and plain_linear(self.fc1, x) and plain_linear(self.fc2, x) and not hooked(*parts)

    def _in_pieces(self, x: Tensor, residual: Tensor | None, rows: int) -> Tensor:
        """The same, some thousand rows at a time: the hidden layer stays in the cache instead of costing new pages."""
        out = x.new_empty(rows, self.fc2.out_features)
        count = max(PIECE // (self.fc1.out_features * x.element_size()), 1)
        added = [None] * -(-rows // count) if residual is None else torch.split(residual.reshape(out.shape), count)
        for piece, add, place in zip(torch.split(x.reshape(rows, -1), count), added, torch.split(out, count)):
            place.copy_(self._whole(piece, add))
        return out.view(*x.shape[:-1], -1)

    def _quick(self, x: Tensor, residual: Tensor | None) -> Tensor:
        """QuickGELU inside the first kernel; its two factors go to the narrow ends instead of the hidden layer."""
        k, ends = QuickGELU.slope, (self.fc1.bias, self.fc2.bias)
        first, second = (None if bias is None else bias * k for bias in ends)
        hidden = torch.ops.mkldnn._linear_pointwise(x * k, self.fc1.weight, first, "swish", [], "none")
        y = torch.ops.mkldnn._linear_pointwise(hidden, self.fc2.weight, second, "none", [], "none")
        return y.mul_(1 / k) if residual is None else torch.add(residual, y, alpha=1 / k)

    def _whole(self, x: Tensor, residual: Tensor | None) -> Tensor:
        if type(self.act) is QuickGELU and type(self.norm) is nn.Identity and fusable(x) and self._plain(x):
            return self._quick(x, residual)
        if type(self.act) is nn.GELU and not hooked(self.act):
            x = linear(self.fc1, x, activation="gelu" if self.act.approximate == "none" else "gelu_tanh")
        else:
            x = self.act(self.fc1(x))
        if self.training and self.drop.p > 0:
            x = self.drop(self.fc2(self.norm(self.drop(x))))
            return x if residual is None else residual + x
        return linear(self.fc2, self.norm(x), residual=residual)
