"""nn.TransformerEncoder in a stream: the last position's output for the window of the last n tokens.

One layer is single-output attention and the perceptron on one token. Two are retroactive attention, whose outputs for
all n tokens go on to a second layer of which only the last query is asked. Layers between the first and the last have
to be computed in full: every token of the window changes with each new one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lynceus.core.errors import AdviceError
from lynceus.rewrite.streaming.attention import Heads, RetroactiveNode, SingleOutputNode
from lynceus.rewrite.streaming.clock import Clock, written
from lynceus.rewrite.streaming.node import Held, Node


class Layer:
    """The token-wise parts of an nn.TransformerEncoderLayer."""

    def __init__(self, name: str, layer: nn.TransformerEncoderLayer):
        if not isinstance(layer.self_attn, nn.MultiheadAttention):
            raise AdviceError(f"{name}.self_attn is a {type(layer.self_attn).__name__}, not nn.MultiheadAttention.")
        self.name, self.layer = name, layer
        self.heads = Heads(f"{name}.self_attn", layer.self_attn)

    def before(self, x: Tensor) -> Tensor:
        """What attention sees."""
        y: Tensor = self.layer.norm1(x) if self.layer.norm_first else x
        return y

    def after(self, x: Tensor, attended: Tensor) -> Tensor:
        """Residual, norms and perceptron."""
        m: Any = self.layer
        if m.norm_first:
            x = x + attended
            y: Tensor = x + self.perceptron(m.norm2(x))
            return y
        x = m.norm1(x + attended)
        made: Tensor = m.norm2(x + self.perceptron(x))
        return made

    def perceptron(self, x: Tensor) -> Tensor:
        m: Any = self.layer
        y: Tensor = m.linear2(m.activation(m.linear1(x)))
        return y

    def whole(self, x: Tensor) -> Tensor:
        """All tokens (b, n, e)."""
        q, k, v = self.heads.project(self.before(x))
        return self.after(x, self.heads.out(F.scaled_dot_product_attention(q, k, v)))

    def newest(self, x: Tensor) -> Tensor:
        """The last of the tokens (b, n, e) alone: (b, e)."""
        seen = self.before(x)
        k, v = self.heads.project(seen, 1, 3)
        (q,) = self.heads.project(seen[:, -1], 0, 1)
        y = F.scaled_dot_product_attention(q.unsqueeze(2), k, v).squeeze(2)
        return self.after(x[:, -1], self.heads.out(y))

    def describe(self) -> str:
        m: Any = self.layer
        activation = getattr(m.activation, "__name__", type(m.activation).__name__)
        return (
            f"Layer({self.heads.mha.embed_dim},{self.heads.count},{m.linear1.out_features},{activation},{m.norm_first})"
        )


class EncoderNode(Node):
    """Tokens (b, e) in; the encoder's output at the newest one, over the last `window`, out."""

    def __init__(self, name: str, layers: Sequence[Layer], norm: nn.Module | None, window: int):
        super().__init__(name)
        self.layers, self.norm, self.window = list(layers), norm, window
        self.reach = window
        mha = self.layers[0].heads.mha
        self.attention: Any
        if len(self.layers) == 1:
            self.attention = SingleOutputNode(name, mha, window)
            self.width = self.attention.width
        else:
            self.attention = RetroactiveNode(name, mha, window)
            self.width = self.attention.width + 1

    def begin(self, x: Tensor) -> tuple[Held, Tensor]:
        held, _ = self.attention.begin(x)
        if len(self.layers) > 1:
            held = (*held, x.new_zeros(x.shape[0], self.window, x.shape[1]))
        return held, torch.zeros_like(x)

    def step(self, x: Tensor, held: Held, clock: Clock) -> tuple[Tensor | None, Held]:
        first, runs = self.layers[0], clock.runs(self.leaves)
        seen = first.before(x)
        if len(self.layers) == 1:
            attended, held = self.attention.attend(seen, held, clock, self.enters, runs)
            y = None if attended is None else first.after(x, attended)
        else:
            slot = clock.slot(self.enters, self.window)
            tokens = written(held[-1], slot, x, 1)
            attended, new = self.attention.attend(seen, held[:-1], clock, self.enters, runs)
            held = (*new, tokens)
            y = None
            if attended is not None:
                z = first.after(in_order(tokens, slot), attended)
                for layer in self.layers[1:-1]:
                    z = layer.whole(z)
                y = self.layers[-1].newest(z)
        if y is not None and self.norm is not None:
            y = self.norm(y)
        return y, held

    def describe(self) -> str:
        return f"Encoder({self.window};{';'.join(m.describe() for m in self.layers)};{self.norm is not None})"


def in_order(ring: Tensor, slot: int | Tensor) -> Tensor:
    """A ring of tokens (b, n, e), oldest first."""
    if not isinstance(slot, Tensor):
        return ring.roll(-slot - 1, 1)
    n = ring.shape[1]
    order = (slot.to(ring.device) + 1 + torch.arange(n, device=ring.device)) % n
    return ring.index_select(1, order)


class RecyclingPositions(nn.Module):
    """Learned positions that repeat: token number t of a stream gets entry t mod `size` of a table (size, e).

    A window of n tokens then sees one of `size` rotations. size: 2 n - 1 keeps every difference of positions apart.
    On a clip (b, t, e) the first token is number `start`.
    """

    time_axis = 1

    def __init__(self, dim: int, size: int):
        super().__init__()
        self.table = nn.Parameter(torch.randn(size, dim) * 0.02)

    def forward(self, x: Tensor, start: int = 0) -> Tensor:
        at = (start + torch.arange(x.shape[1], device=x.device)) % self.table.shape[0]
        return x + self.table[at]


class PositionsNode(Node):
    """Adds the position of the token's number."""

    def __init__(self, name: str, module: RecyclingPositions):
        super().__init__(name)
        self.module = module

    def begin(self, x: Tensor) -> tuple[Held, Tensor]:
        return (), x + self.module.table[0]

    def step(self, x: Tensor, held: Held, clock: Clock) -> tuple[Tensor | None, Held]:
        table = self.module.table
        at = clock.slot(self.enters, len(table))
        row = table.index_select(0, at.reshape(1).to(table.device))[0] if isinstance(at, Tensor) else table[at]
        return x + row, ()

    def describe(self) -> str:
        return f"Positions{tuple(self.module.table.shape)}"
