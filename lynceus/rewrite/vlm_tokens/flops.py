"""What pruned prefill should cost: the papers' model, per layer 4 n d^2 + 2 n^2 d + 2 n d m multiply-adds (3 n d m for
gated perceptrons), with n tokens, width d and perceptron width m; fewer key and value heads make 4 d^2 smaller."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Of one decoder layer. width: d. hidden: m of its perceptron. gated: three matrices of it, else two.
    heads, kv_heads, head_dim: of attention; None: d of queries, keys and values alike."""

    width: int
    hidden: int
    gated: bool = True
    heads: int | None = None
    kv_heads: int | None = None
    head_dim: int | None = None

    def macs(self, tokens: float) -> float:
        """Multiply-adds of one layer on `tokens` tokens."""
        head = self.head_dim or (self.width // self.heads if self.heads else self.width)
        inner = head * (self.heads or 1)
        keys = head * (self.kv_heads or self.heads or 1)
        projections = 2 * self.width * (inner + keys)
        perceptron = (3 if self.gated else 2) * self.width * self.hidden
        return tokens * (projections + perceptron) + 2 * tokens**2 * inner


def prefill(shape: Shape, tokens: Sequence[float]) -> float:
    """Multiply-adds of a prefill whose layer l sees tokens[l] tokens."""
    return sum(shape.macs(n) for n in tokens)


def reduction(shape: Shape, tokens: Sequence[float], full: float) -> float:
    """1 - cost at each layer's own number of tokens / cost with `full` tokens in all of them."""
    return 1 - prefill(shape, tokens) / prefill(shape, [full] * len(tokens))
