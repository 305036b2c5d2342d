"""The pre-norm block of transformers: a token mixer and a perceptron, each behind a LayerNorm and beside a shortcut."""

from __future__ import annotations

from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from lynceus.layers.attention import Attention
from lynceus.layers.conv_projection import ConvProjection
from lynceus.layers.drop import DropPath
from lynceus.layers.fused import fusable, hooked
from lynceus.layers.gated_position import GatedPositionAttention
from lynceus.layers.mlp import Mlp
from lynceus.layers.outlook import OutlookAttention
from lynceus.layers.pieces import in_pieces

# branches that add the shortcut themselves, inside their last kernel
ADDING = (Attention, ConvProjection, GatedPositionAttention, OutlookAttention, Mlp)


class MixerBlock(nn.Module):
    """x + attn(norm1 x), then x + mlp(norm2 x), with stochastic depth on both; `attn` is whatever mixes tokens.

    mixer: a map mixer for x b h w c, or, where `forward` is given a size, a token mixer called as attn(x, size).
    hidden: width of the perceptron. drop, act: dropout and activation inside it (None: exact GELU). drop_path: rate of
    stochastic depth.
    """

    def __init__(
        self,
        dim: int,
        mixer: nn.Module,
        hidden: int,
        *,
        eps: float = 1e-6,
        drop: float = 0.0,
        drop_path: float = 0.0,
        act: nn.Module | None = None,
    ):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=eps)
        self.attn = mixer
        self.drop_path = DropPath(drop_path)
        self.norm2 = nn.LayerNorm(dim, eps=eps)
        self.mlp = Mlp(dim, hidden, drop=drop, act=act)

    def forward(self, x: Float[Tensor, "b *n c"], size: tuple[int, int] | None = None) -> Float[Tensor, "b *n c"]:
        """x: a map b h w c; or tokens b n c that hold a map of `size` (rows, columns) and more."""
        place = () if size is None else (size,)
        return in_pieces(self, lambda some: self._all(some, *place), x, width=self.mlp.fc1.out_features)

    def _all(self, x: Tensor, *size: Any) -> Tensor:
        x = self._add(x, self.attn, self.norm1(x), *size)
        return self._add(x, self.mlp, self.norm2(x))

    def _add(self, x: Tensor, branch: nn.Module, normed: Tensor, *size: Any) -> Tensor:
        lean = not self.training and fusable(x) and not hooked(branch, self.drop_path)
        if lean and isinstance(branch, ADDING):
            out: Tensor = branch(normed, *size, residual=x)
            return out
        return x + self.drop_path(branch(normed, *size))
