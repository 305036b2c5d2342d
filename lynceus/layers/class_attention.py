"""Class attention (CaiT, ICCV 2021, arXiv 2103.17239): the class token alone asks, all tokens answer."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from lynceus.core.errors import AdviceError
from lynceus.layers.drop import DropPath
from lynceus.layers.fused import fusable, linear, plain_linear
from lynceus.layers.mlp import Mlp


class ClassAttention(nn.Module):
    """Attention of the first token to all; `kv` packs [2, heads, c / heads]. scale: None for head width ** -0.5."""

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        qkv_bias: bool = False,
        scale: float | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
    ):
        super().__init__()
        if dim % heads:
            good = heads * max(dim // heads, 1)
            raise AdviceError(f"dim {dim} cannot be shared by {heads} heads; take a multiple, e.g. dim={good}.")
        self.heads = heads
        self.scale = scale if scale is not None else (dim // heads) ** -0.5
        self.kv = nn.Linear(dim, 2 * dim, bias=qkv_bias)
        self.q = nn.Linear(dim, dim, bias=qkv_bias)
        self.attn_drop = attn_drop
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Float[Tensor, "b n c"]) -> Float[Tensor, "b 1 c"]:
        b, n, c = x.shape
        q = self.q(x[:, :1]).reshape(b, 1, self.heads, c // self.heads).transpose(1, 2)
        if not self.training and fusable(x) and plain_linear(self.kv, x):
            x = self._of_one_query(q, x)
        else:
            k, v = linear(self.kv, x).reshape(b, n, 2, self.heads, c // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
            drop = self.attn_drop if self.training else 0.0
            x = F.scaled_dot_product_attention(q, k, v, dropout_p=drop, scale=self.scale)
        x = self.proj(x.transpose(1, 2).reshape(b, 1, c))
        return self.proj_drop(x)

    def _of_one_query(self, q: Tensor, x: Tensor) -> Tensor:
        """The same with the products in another order: with one query per head, it is cheaper to take the query to the
        tokens' space, and the tokens' mean to the values', than to make keys and values of every token."""
        b, _, c = x.shape
        g, d = self.heads, c // self.heads
        to_key, to_value = self.kv.weight.view(2, g, d, c).unbind(0)
        asked = torch.matmul(q.transpose(0, 1).reshape(g, b, d), to_key)  # g b c
        logits = torch.bmm(asked.transpose(0, 1), x.transpose(1, 2)) * self.scale  # b g n; a key bias adds a constant
        mean = torch.bmm(logits.softmax(-1), x)  # b g c
        value = torch.bmm(mean.transpose(0, 1), to_value.transpose(1, 2)).transpose(0, 1)  # b g d
        if self.kv.bias is not None:
            value = value + self.kv.bias.view(2, g, d)[1]
        return value.unsqueeze(2)


class ClassBlock(nn.Module):
    """Class attention and a perceptron on the class token; the other tokens pass unchanged."""

    def __init__(
        self,
        dim: int,
        heads: int,
        hidden: int,
        *,
        eps: float = 1e-5,
        qkv_bias: bool = False,
        scale: float | None = None,
        attn_drop: float = 0.0,
        drop_path: float = 0.0,
    ):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=eps)
        self.attn = ClassAttention(dim, heads, qkv_bias=qkv_bias, scale=scale, attn_drop=attn_drop)
        self.drop_path = DropPath(drop_path)
        self.norm2 = nn.LayerNorm(dim, eps=eps)
        self.mlp = Mlp(dim, hidden)

    def forward(self, x: Float[Tensor, "b n c"]) -> Float[Tensor, "b n c"]:
        first = x[:, :1]
        first = first + self.drop_path(self.attn(self.norm1(x)))
        first = first + self.drop_path(self.mlp(self.norm2(first)))
        return torch.cat([first, x[:, 1:]], 1)
