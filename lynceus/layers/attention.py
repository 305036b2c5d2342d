"""Multi-head self-attention over a sequence of tokens, or over all cells of a map."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from lynceus.core.errors import AdviceError
from lynceus.layers.fused import linear
from lynceus.layers.mixers import Place


class Attention(nn.Module):
    """Softmax attention of all tokens with all, scale head_dim ** -0.5; `qkv` packs [3, heads, head_dim].

    head_dim: width of a head, by default dim / heads; with another, heads * head_dim need not be dim. scale: another
    factor on the logits. qk_norm: LayerNorm of queries and keys per head. scale_norm: LayerNorm before
    `proj`. Both with `norm_eps`.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        head_dim: int | None = None,
        qkv_bias: bool = True,
        proj_bias: bool = True,
        scale: float | None = None,
        qk_norm: bool = False,
        scale_norm: bool = False,
        norm_eps: float = 1e-6,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
    ):
        super().__init__()
        if head_dim is None and dim % heads:
            good = heads * max(dim // heads, 1)
            raise AdviceError(f"dim {dim} cannot be shared by {heads} heads; take a multiple, e.g. dim={good}.")
        self.heads, self.scale = heads, scale
        self.head_dim = dim // heads if head_dim is None else head_dim
        width = heads * self.head_dim
        self.qkv = nn.Linear(dim, 3 * width, bias=qkv_bias)
        self.q_norm = nn.LayerNorm(self.head_dim, eps=norm_eps) if qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(self.head_dim, eps=norm_eps) if qk_norm else nn.Identity()
        self.attn_drop = attn_drop
        self.norm = nn.LayerNorm(width, eps=norm_eps) if scale_norm else nn.Identity()
        self.proj = nn.Linear(width, dim, bias=proj_bias)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(
        self, x: Float[Tensor, "b *n c"], size: tuple[int, int] | None = None, residual: Tensor | None = None
    ) -> Float[Tensor, "b *n c"]:
        """x: tokens b n c or a map b h w c. size: rows and columns of a map inside tokens, of no effect here.

        residual: added to the result, inside the last kernel where that is possible.
        """
        b, shape = x.shape[0], x.shape[:-1]
        n = x.shape[1] if x.ndim == 3 else x.shape[1] * x.shape[2]
        qkv = linear(self.qkv, x).reshape(b, n, 3, self.heads, self.head_dim).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        drop = self.attn_drop if self.training else 0.0
        x = F.scaled_dot_product_attention(self.q_norm(q), self.k_norm(k), v, dropout_p=drop, scale=self.scale)
        x = self.norm(x.transpose(1, 2).reshape(*shape, self.heads * self.head_dim))
        if self.training and self.proj_drop.p > 0:
            x = self.proj_drop(self.proj(x))
            return x if residual is None else residual + x
        return linear(self.proj, x, residual=residual)

    def attention(self, x: Float[Tensor, "b *n c"]) -> Float[Tensor, "b g m m"]:
        """The attention of every token to every token, as a table: for inspection."""
        q, k, _ = self.qkv(x).reshape(x.shape[0], -1, 3, self.heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        scale = self.head_dim**-0.5 if self.scale is None else self.scale
        return ((self.q_norm(q) * scale) @ self.k_norm(k).transpose(-2, -1)).softmax(-1)


class MapAttention(Attention):
    """The same among all cells of a map b h w c."""

    orderless = True

    def forward(  # type: ignore[override]
        self, x: Float[Tensor, "b h w c"], residual: Tensor | None = None
    ) -> Float[Tensor, "b h w c"]:
        return super().forward(x, residual=residual)

    def mix_tokens(self, x: Float[Tensor, "b n c"]) -> Float[Tensor, "b n c"]:
        """Attention among all tokens, whether they lie on a map or not."""
        return super().forward(x)


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionMixer:
    """All cells attend to all. heads: None takes the place's, or as many as give each 32 channels where it had none."""

    heads: int | None = None
    qkv_bias: bool = True
    proj_bias: bool = True
    qk_norm: bool = False
    attn_drop: float = 0.0
    proj_drop: float = 0.0

    def build(self, place: Place) -> nn.Module:
        heads = self.heads or (place.heads if place.heads > 1 else max(place.dim // 32, 1))
        while self.heads is None and place.dim % heads:
            heads -= 1
        layer = MapAttention(
            place.dim,
            heads,
            qkv_bias=self.qkv_bias,
            proj_bias=self.proj_bias,
            qk_norm=self.qk_norm,
            attn_drop=self.attn_drop,
            proj_drop=self.proj_drop,
        )
        for m in (layer.qkv, layer.proj):
            nn.init.trunc_normal_(m.weight, std=0.02)
            if m.bias is not None:
                nn.init.zeros_(m.bias)
        return layer
