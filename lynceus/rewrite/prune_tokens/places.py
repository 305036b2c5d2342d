"""Which tokens of a sequence are still there, and what the gaps between them do to a recurrence.

Paper: Zhan et al., Exploring Token Pruning in Vision State Space Models, NeurIPS 2024, arXiv 2409.18962
Code: ZLKong/ToP-ViM (partial)

A removed place changes the state that passes it by one of three rules, none of which adds an input:
hold: not at all; decay: as a token of zeros would, whose step is softplus(bias); decay_prev: with the step of the last
kept token. In all three the compact recurrence over the kept tokens is an ordinary selective scan:
h_j = exp((delta_j + extra_j) A) h_(j-1) + delta_j B_j u_j, where extra_j is the time that passed in the gap.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lynceus.core.rng import generator

Carry = Literal["hold", "decay", "decay_prev", "none"]
Score = Literal["clip", "sum", "l1", "l2", "random"]


@dataclass(frozen=True)
class Places:
    """at: the places (b, k) of the kept tokens in a sequence of `count`, increasing."""

    at: Int[Tensor, "b k"]
    count: int

    def mask(self) -> Bool[Tensor, "b n"]:
        """True at the kept places."""
        none = torch.zeros(self.at.shape[0], self.count, dtype=torch.bool, device=self.at.device)
        return none.scatter(1, self.at, True)

    def spread(self, x: Float[Tensor, "b k c"], onto: Tensor | None = None) -> Float[Tensor, "b n c"]:
        """Tokens at their places, over `onto` (b, n, c), else zeros."""
        onto = x.new_zeros(x.shape[0], self.count, x.shape[2]) if onto is None else onto
        return onto.scatter(1, self.at[..., None].expand(-1, -1, x.shape[2]), x)

    def gather(self, x: Float[Tensor, "b n c"]) -> Float[Tensor, "b k c"]:
        """What stands at the kept places of a whole sequence."""
        return take(x, self.at)

    def gaps(self, reverse: bool = False) -> Int[Tensor, "k b"]:
        """How many places before each token are removed, tokens first; reverse: of the sequence read backwards."""
        return gaps_of(self.count - 1 - self.at.flip(1) if reverse else self.at).t()

    def cut(self, keep: Int[Tensor, "b j"]) -> Places:
        """The places left when the tokens of these numbers (among the kept ones) are."""
        return Places(self.at.gather(1, keep), self.count)


def everything(batch: int, count: int, device: torch.device) -> Places:
    """All places of a sequence."""
    return Places(torch.arange(count, device=device).expand(batch, -1), count)


def take(x: Float[Tensor, "b n c"], numbers: Int[Tensor, "b k"]) -> Float[Tensor, "b k c"]:
    return x.gather(1, numbers[..., None].expand(-1, -1, x.shape[2]))


def gaps_of(at: Int[Tensor, "*b k"]) -> Int[Tensor, "*b k"]:
    """at_j - at_(j-1) - 1; for the first, what stands before it."""
    return torch.diff(at, prepend=at.new_full((*at.shape[:-1], 1), -1)) - 1


def through_gaps(
    u: Float[Tensor, "t s b d"],
    delta: Float[Tensor, "t e b d"],
    gaps: Int[Tensor, "t s b"],
    carry: Carry,
    idle: Float[Tensor, "#e 1 d"],
) -> tuple[Float[Tensor, "t s b d"], Float[Tensor, "t f b d"]]:
    """Inputs and steps of the ordinary scan that does what the gaps ask for. idle: the step of a token of zeros."""
    if carry in ("hold", "none"):
        return u, delta
    if carry == "decay":
        step = idle.expand_as(delta)
    else:
        step = torch.cat([torch.zeros_like(delta[:1]), delta[:-1]])
    whole = delta + gaps[..., None].to(delta.dtype) * step
    # the scan multiplies its input by the whole step, of which only delta brings in something
    return u * (delta / whole.clamp(min=torch.finfo(delta.dtype).tiny)), whole


def importance(gated: Float[Tensor, "b k d"], score: Score, *, seed: int = 0, places: Places) -> Float[Tensor, "b k"]:
    """How much each token matters: the sum over channels of max(0, y) ("clip"), y, |y| or y^2, or noise drawn for its
    place. No gradient flows through it."""
    y = gated.detach()
    y = y.float() if y.dtype in (torch.bfloat16, torch.float16) else y
    if score == "clip":
        return y.clamp(min=0).sum(-1)
    if score == "sum":
        return y.sum(-1)
    if score == "l1":
        return y.abs().sum(-1)
    if score == "l2":
        return y.square().sum(-1)
    noise = torch.rand(places.count, generator=generator(seed, "token scores")).to(y)
    return noise.expand(len(y), -1).gather(1, places.at)


def keep_count(others: int, ratio: float, *, odd: bool) -> int:
    """How many of the tokens without class token stay: ratio of them, rounded up; odd: one fewer than that made odd,
    so that with the class token they are an odd number."""
    if ratio >= 1:
        return others
    count = math.ceil(round(ratio * others, 9))
    if odd:
        count = count + 1 - count % 2 - 1
    return max(min(count, others), 1)


def chosen(score: Float[Tensor, "b k"], always: Bool[Tensor, "b k"], total: int) -> Int[Tensor, "b j"]:
    """The numbers of the `total` tokens that stay, increasing: those of `always`, and the others of the largest
    scores; among equals the first."""
    order = score.masked_fill(always, math.inf).sort(dim=1, descending=True, stable=True).indices
    return order[:, :total].sort(1).values
