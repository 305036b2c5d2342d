"""Attention over the last n tokens of a stream, one token at a time.

Hedegaard, Bakhtiarnia, Iosifidis, Continual Transformers: Redundancy-Free Attention for Online Inference, ICLR 2023,
arXiv 2201.06268. Reference code: LukasHedegaard/continual-inference (Apache-2.0).

Single-output attention answers for one query of the window, retroactive attention for all n of them, both in O(n e) a
token. The latter keeps, for each query, the sum of its unnormalised weights and of the weighted values, takes the
oldest key out of them and puts the new one in. Each query has its own running maximum, so nothing overflows; and
since a query whose weights have mostly left the window would keep little but rounding, all are summed anew then.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from lynceus.core.errors import AdviceError
from lynceus.rewrite.streaming.clock import Clock, Rate, TracedClock, written
from lynceus.rewrite.streaming.node import Held, Node

KEPT = 1 / 16  # share of the largest sum so far below which a query is summed anew


class WindowAttention(nn.Module):
    """Multi-head self-attention whose stream looks at the last `window` tokens; sequences are (b, t, e).

    query: the place in the window of the query that a stream answers for, -1 for the newest token; None: all of them,
    (b, window, e) at every step. On a clip it is plain attention over all t tokens.
    """

    time_axis = 1

    def __init__(self, dim: int, heads: int, *, window: int, query: int | None = -1, bias: bool = True):
        super().__init__()
        if window < 1 or (query is not None and not -window <= query < window):
            raise AdviceError(f"query is a place in the window, -{window} to {window - 1}, or None; not {query}.")
        if dim % heads:
            raise AdviceError(f"{dim} channels do not share out over {heads} heads.")
        self.window = window
        self.query = query if query is None else query % window
        self.mha = nn.MultiheadAttention(dim, heads, bias=bias, batch_first=True)

    def forward(self, x: Float[Tensor, "b t e"]) -> Float[Tensor, "b t e"]:
        y: Tensor = self.mha(x, x, x, need_weights=False)[0]
        return y

    def extra_repr(self) -> str:
        return f"window={self.window}, query={self.query}"


class Heads:
    """The projections of an nn.MultiheadAttention, taken one token (b, e) or several (b, n, e) at a time."""

    def __init__(self, name: str, mha: nn.MultiheadAttention):
        if not mha._qkv_same_embed_dim or mha.bias_k is not None or mha.add_zero_attn:
            raise AdviceError(
                f"{name} has keys of another width (kdim, vdim), or adds tokens (add_bias_kv, add_zero_attn); a stream "
                "takes self-attention without them."
            )
        self.mha = mha
        self.count = mha.num_heads
        self.dim = mha.embed_dim // mha.num_heads
        self.scale = 1 / math.sqrt(self.dim)

    def project(self, x: Tensor, first: int = 0, last: int = 3) -> tuple[Tensor, ...]:
        """Queries, keys, values `first` to `last`, each (b, h, d) or (b, h, n, d)."""
        e = self.mha.embed_dim
        weight: Tensor | None = self.mha.in_proj_weight
        bias: Tensor | None = self.mha.in_proj_bias
        assert weight is not None
        if (first, last) != (0, 3):
            weight = weight[first * e : last * e]
            bias = None if bias is None else bias[first * e : last * e]
        y = F.linear(x, weight, bias).unflatten(-1, (last - first, self.count, self.dim))
        parts = y.unbind(-3)
        return parts if x.ndim == 2 else tuple(p.transpose(1, 2) for p in parts)

    def out(self, x: Tensor) -> Tensor:
        """Heads (b, h, d) or (b, h, n, d) put together and projected."""
        x = x.flatten(-2) if x.ndim == 3 else x.transpose(1, 2).flatten(-2)
        y: Tensor = self.mha.out_proj(x)
        return y


class SingleOutputNode(Node):
    """Holds rings of keys and values, and the queries that wait for the tokens behind them."""

    def __init__(self, name: str, mha: nn.MultiheadAttention, window: int, query: int = -1):
        super().__init__(name)
        self.heads, self.window = Heads(name, mha), window
        self.behind = window - 1 - query % window  # tokens that a query waits for
        self.reach = window
        self.width = 2 + self.behind

    def begin(self, x: Tensor) -> tuple[Held, Tensor]:
        ring = x.new_zeros(x.shape[0], self.heads.count, self.window, self.heads.dim)
        return (ring, ring.clone(), *[ring[:, :, 0]] * self.behind), torch.zeros_like(x)

    def attend(self, x: Tensor, held: Held, clock: Clock, enters: Rate, runs: bool) -> tuple[Tensor | None, Held]:
        """Attention before the output projection's residual, for one query; the state after the token."""
        keys, values, *queries = held
        if runs or self.behind:
            q, k, v = self.heads.project(x)
            queries.append(q)
        else:
            k, v = self.heads.project(x, 1, 3)
        slot = clock.slot(enters, self.window)
        keys, values = written(keys, slot, k, 2), written(values, slot, v, 2)
        y = None
        if runs:
            y = self.heads.out(F.scaled_dot_product_attention(queries[0].unsqueeze(2), keys, values).squeeze(2))
        return y, (keys, values, *queries[len(queries) - self.behind :])

    def step(self, x: Tensor, held: Held, clock: Clock) -> tuple[Tensor | None, Held]:
        return self.attend(x, held, clock, self.enters, clock.runs(self.leaves))

    def describe(self) -> str:
        return f"Single({self.heads.mha.embed_dim},{self.heads.count},{self.window},{self.behind})"


class RetroactiveNode(Node):
    """Holds rings of queries, keys, values; and per query its running maximum, the largest sum since it was summed, the
    sum and the weighted values. Gives the attention of all tokens in the window, oldest first."""

    width = 7

    def __init__(self, name: str, mha: nn.MultiheadAttention, window: int):
        super().__init__(name)
        self.heads, self.window = Heads(name, mha), window
        self.reach = window

    def begin(self, x: Tensor) -> tuple[Held, Tensor]:
        ring = x.new_zeros(x.shape[0], self.heads.count, self.window, self.heads.dim)
        rows = ring[..., 0].clone()
        held = (ring, ring.clone(), ring.clone(), rows, rows.clone(), rows.clone(), ring.clone())
        return held, x.new_zeros(x.shape[0], self.window, x.shape[1])

    def attend(self, x: Tensor, held: Held, clock: Clock, enters: Rate, runs: bool) -> tuple[Tensor | None, Held]:
        queries, keys, values, top, peak, total, mixed = held
        q, k, v = self.heads.project(x)
        q = q * self.heads.scale
        slot = clock.slot(enters, self.window)
        traced = isinstance(clock, TracedClock)
        last = None if traced else clock.frames - enters.delay - (self.window - 1) * enters.stride
        old_k, old_v = (None, None) if traced else (keys[:, :, slot], values[:, :, slot])
        queries, keys, values = (
            written(queries, slot, q, 2), written(keys, slot, k, 2), written(values, slot, v, 2)
        )  # fmt: skip
        if not runs:
            return None, (queries, keys, values, top, peak, total, mixed)
        if traced or last == 0 or old_k is None or old_v is None:  # a graph cannot decide which rows to sum anew
            top, peak, total, mixed = summed(queries, keys, values)
        else:
            # rows of the queries that stay; that of the new one is overwritten below
            leaving = torch.einsum("bhnd,bhd->bhn", queries, old_k)
            coming = torch.einsum("bhnd,bhd->bhn", queries, k)
            new_top = torch.maximum(top, coming)
            shrunk = (top - new_top).exp()
            leaving, coming = (leaving - new_top).exp(), (coming - new_top).exp()
            total = total * shrunk - leaving + coming
            mixed = (
                mixed * shrunk[..., None] - leaving[..., None] * old_v[:, :, None] + coming[..., None] * v[:, :, None]
            )
            top, peak = new_top, torch.maximum(peak * shrunk, total)
            one = summed(q.unsqueeze(2), keys, values)
            top, peak, total, mixed = (
                written(a, slot, b.select(2, 0), 2) for a, b in zip((top, peak, total, mixed), one)
            )
            if bool((total < KEPT * peak).any()):
                top, peak, total, mixed = summed(queries, keys, values)
        y = mixed / total[..., None]
        if isinstance(slot, Tensor):
            order = (slot.to(y.device) + 1 + torch.arange(self.window, device=y.device)) % self.window
            y = y.index_select(2, order)
        else:
            y = y.roll(-slot - 1, 2)
        return self.heads.out(y), (queries, keys, values, top, peak, total, mixed)

    def step(self, x: Tensor, held: Held, clock: Clock) -> tuple[Tensor | None, Held]:
        return self.attend(x, held, clock, self.enters, clock.runs(self.leaves))

    def describe(self) -> str:
        return f"Retroactive({self.heads.mha.embed_dim},{self.heads.count},{self.window})"


def summed(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """For queries q (b, h, m, d), scaled, over keys and values (b, h, n, d): the largest logit, the sum of exponentials
    under it (twice), and the values weighted with them."""
    logits = q @ k.transpose(-1, -2)
    top = logits.amax(-1)
    weights = (logits - top[..., None]).exp()
    total = weights.sum(-1)
    return top, total, total, weights @ v
