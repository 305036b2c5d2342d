"""The two-layer perceptron of transformer blocks."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn

from lynceus.layers.fused import linear


class Mlp(nn.Module):
    """fc1 -> exact GELU -> dropout -> fc2 -> dropout on the last axis, whatever stands before it.

    hidden: width in between. norm_eps: given, a LayerNorm `norm` of that eps stands before fc2.
    """

    def __init__(
        self,
        dim: int,
        hidden: int,
        *,
        out: int | None = None,
        bias: bool = True,
        drop: float = 0.0,
        norm_eps: float | None = None,
    ):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden, bias=bias)
        self.act = nn.GELU()
        self.drop = nn.Dropout(drop)
        self.norm = nn.Identity() if norm_eps is None else nn.LayerNorm(hidden, eps=norm_eps)
        self.fc2 = nn.Linear(hidden, out or dim, bias=bias)

    def forward(self, x: Float[Tensor, "*batch c"], residual: Tensor | None = None) -> Float[Tensor, "*batch d"]:
        """residual: added to the result, inside the last kernel where that is possible."""
        if type(self.act) is nn.GELU and self.act.approximate == "none" and not self.act._forward_hooks:
            x = linear(self.fc1, x, activation="gelu")
        else:
            x = self.act(self.fc1(x))
        if self.training and self.drop.p > 0:
            x = self.drop(self.fc2(self.norm(self.drop(x))))
            return x if residual is None else residual + x
        return linear(self.fc2, self.norm(x), residual=residual)
