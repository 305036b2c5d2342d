"""Multi-head attention whose queries, keys, values and output are four projections, so that heads and the width of the
tokens can be pruned apart; and the way from and to torch's packed layout.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from lynceus.core.errors import AdviceError
from lynceus.rewrite.adapters.layers import Adapted


class HeadAttention(nn.Module):
    """What nn.MultiheadAttention computes, with `num_heads` heads of `head_dim` that need not fill the tokens' width.

    q_proj, k_proj, v_proj: linear layers without bias onto num_heads * head_dim; in_proj_bias: their joint bias
    (3 * num_heads * head_dim) or None; out_proj: back to the width of the tokens. Made by `unpacked`.
    """

    q_proj: nn.Linear
    k_proj: nn.Linear
    v_proj: nn.Linear
    out_proj: nn.Linear
    in_proj_bias: Tensor | None
    bias_k: Any
    bias_v: Any
    # torch's encoder layers would read packed weights here and pass by the projections
    _qkv_same_embed_dim = False
    in_proj_weight = None

    def __init__(self, num_heads: int, head_dim: int, *, dropout: float = 0.0, batch_first: bool = False):
        super().__init__()
        self.num_heads, self.head_dim = num_heads, head_dim
        self.dropout, self.batch_first, self.add_zero_attn = dropout, batch_first, False

    def forward(
        self,
        query: Float[Tensor, "*n d"],
        key: Float[Tensor, "*m k"],
        value: Float[Tensor, "*m v"],
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As nn.MultiheadAttention: (n, b, d) unless batch_first, (n, d) without batch. Boolean masks are True where
        not to look, float ones are added. Gives the output and, with need_weights, the attention (b, n, m)."""
        single = query.ndim == 2
        if single:
            query, key, value = (t[None] for t in (query, key, value))
            key_padding_mask = None if key_padding_mask is None else key_padding_mask[None]
        elif not self.batch_first:
            query, key, value = (t.transpose(0, 1) for t in (query, key, value))
        out, table = self._attend(query, key, value, key_padding_mask, attn_mask, need_weights, is_causal)
        if table is not None and average_attn_weights:
            table = table.mean(1)
        if single:
            return out[0], None if table is None else table[0]
        return out if self.batch_first else out.transpose(0, 1), table

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, padding: Any, extra: Any, weights: bool, causal: bool
    ) -> tuple[Tensor, Tensor | None]:
        biases = (None, None, None) if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        layers = (self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (layer(x) if b is None else layer(x) + b for layer, x, b in zip(layers, (query, key, value), biases))
        count = q.shape[0]
        # torch's own order: learned keys and values, then zeros, are appended to the sequence
        if self.bias_k is not None:
            k = torch.cat([k, self.bias_k.expand(count, -1, -1)], 1)
            v = torch.cat([v, self.bias_v.expand(count, -1, -1)], 1)
        q, k, v = (t.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2) for t in (q, k, v))
        if self.add_zero_attn:
            k, v = (F.pad(t, (0, 0, 0, 1)) for t in (k, v))
        mask = _mask(padding, extra, q, k.shape[2], self.num_heads, causal)
        drop = self.dropout if self.training else 0.0
        table = None
        if weights:
            logits = (q * self.head_dim**-0.5) @ k.transpose(-2, -1)
            table = (logits if mask is None else logits + mask).softmax(-1)
            table = F.dropout(table, drop, True) if drop else table
            x = table @ v
        else:
            x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=drop)
        return self.out_proj(x.transpose(1, 2).flatten(2)), table


def _mask(padding: Any, extra: Any, q: Tensor, keys: int, heads: int, causal: bool) -> Tensor | None:
    """The sum of both masks as numbers to add, (b, heads or 1, n, m); 0 for appended keys."""
    if causal and extra is None:
        raise AdviceError("is_causal is a hint about attn_mask, as in torch; give the attn_mask too.")
    parts = []
    if padding is not None:
        parts.append(_added(padding, q)[:, None, None, :])
    if extra is not None:
        added = _added(extra, q)
        parts.append(added if added.ndim == 2 else added.unflatten(0, (-1, heads)))
    if not parts:
        return None
    parts = [F.pad(p, (0, keys - p.shape[-1])) for p in parts]
    return parts[0] if len(parts) == 1 else parts[0] + parts[1]


def _added(mask: Tensor, like: Tensor) -> Tensor:
    """A mask as numbers to add to logits."""
    if mask.dtype == torch.bool:
        return torch.zeros_like(mask, dtype=like.dtype).masked_fill_(mask, -torch.inf)
    return mask.to(like.dtype)


def unpacked(module: nn.MultiheadAttention) -> HeadAttention:
    """The same attention with four projections; `module` is left as it is, tensors are copied."""
    if module.embed_dim % module.num_heads:
        raise AdviceError(f"{module.embed_dim} channels cannot be shared by {module.num_heads} heads.")
    made = HeadAttention(module.num_heads, module.head_dim, dropout=module.dropout, batch_first=module.batch_first)
    made.add_zero_attn = module.add_zero_attn
    if module.in_proj_weight is not None:
        weights = list(module.in_proj_weight.detach().chunk(3))
    else:
        weights = [w.detach() for w in (module.q_proj_weight, module.k_proj_weight, module.v_proj_weight)]
    for name, weight in zip(("q_proj", "k_proj", "v_proj"), weights):
        setattr(made, name, _linear(weight, None))
    made.in_proj_bias = _copy(module.in_proj_bias)
    made.out_proj = _linear(module.out_proj.weight.detach(), module.out_proj.bias)
    made.bias_k, made.bias_v = _copy(module.bias_k), _copy(module.bias_v)
    return made.train(module.training)


def packed(module: HeadAttention) -> nn.Module:
    """torch's nn.MultiheadAttention where the heads fill the tokens' width; elsewhere `module` itself."""
    embed, width = module.q_proj.in_features, module.num_heads * module.head_dim
    if width != embed or module.out_proj.out_features != embed or any(isinstance(m, Adapted) for m in module.modules()):
        return module
    like = module.q_proj.weight
    made = nn.MultiheadAttention(
        embed, module.num_heads, dropout=module.dropout, bias=module.in_proj_bias is not None,
        add_bias_kv=module.bias_k is not None, add_zero_attn=module.add_zero_attn,
        kdim=module.k_proj.in_features, vdim=module.v_proj.in_features, batch_first=module.batch_first,
        device=like.device, dtype=like.dtype,
    )  # fmt: skip
    weights = [m.weight.detach() for m in (module.q_proj, module.k_proj, module.v_proj)]
    if made.in_proj_weight is not None:
        made.in_proj_weight = nn.Parameter(torch.cat(weights))
    else:
        made.q_proj_weight, made.k_proj_weight, made.v_proj_weight = (nn.Parameter(w.clone()) for w in weights)
    made.out_proj.weight = nn.Parameter(module.out_proj.weight.detach().clone())
    made.out_proj.bias = _copy(module.out_proj.bias)
    made.in_proj_bias = _copy(module.in_proj_bias)
    made.bias_k, made.bias_v = _copy(module.bias_k), _copy(module.bias_v)
    return made.train(module.training)


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    made.weight = nn.Parameter(weight.clone())
    made.bias = _copy(bias)
    return made


def _copy(value: Tensor | None) -> Any:
    return None if value is None else nn.Parameter(copy.copy(value.detach()).clone(), requires_grad=True)
