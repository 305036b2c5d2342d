"""The two policies over the layers of a network: which to remove (bidirectional), how far to shrink (autoregressive).

N2N Learning, ICLR 2018, arXiv 1709.06030, section 3.2. A layer is a vector of fixed width, so a policy learned on one
network may go on with another of any depth.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from lynceus.rewrite.structure import KINDS, Layer

FACTORS = (0.25, 0.5, 0.5, 0.5, 0.5, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
FIELDS = ("kind", "kernel", "stride", "width", "padding")
HIDDEN = 30


def raw(layers: Sequence[Layer], *, skips: bool = True) -> Float[Tensor, "t f"]:
    """One row per layer: kind (index in KINDS), kernel, stride, width, padding, and with `skips` the first and last
    layer of the residual branch it is in."""
    rows = [[KINDS.index(l.kind), l.kernel, l.stride, l.width, l.padding] for l in layers]
    made = torch.tensor(rows, dtype=torch.float32).reshape(len(rows), len(FIELDS))
    if not skips:
        return made
    return torch.cat([made, torch.tensor([[l.start, l.end] for l in layers], dtype=torch.float32).reshape(-1, 2)], 1)


def features(rows: Float[Tensor, "*t f"], *, scaled: bool = True) -> Float[Tensor, "*t g"]:
    """What a policy reads of `raw` rows. scaled: kinds one-hot, sizes as logarithms (512 channels beside a kernel of 3
    saturate the cells); else the numbers as they are, as in the paper's code."""
    if not scaled:
        return rows
    kinds = nn.functional.one_hot(rows[..., 0].long(), len(KINDS)).to(rows.dtype)
    sizes = torch.log2(1 + rows[..., 1:])
    # of about one unit: kernels, strides and paddings are small, widths go to thousands, places to hundreds
    units = torch.tensor([2.0, 1.0, 8.0, 2.0, 6.0, 6.0], dtype=rows.dtype)[: sizes.shape[-1]]
    return torch.cat([kinds, sizes / units], dim=-1)


def width_of(*, scaled: bool, skips: bool) -> int:
    """Numbers per layer that `features` gives."""
    plain = len(FIELDS) + 2 * skips
    return len(KINDS) + plain - 1 if scaled else plain


class RemovalPolicy(nn.Module):
    """Keep (1) or remove (0), per layer: a bidirectional LSTM of two layers over all of them.

    scaled, skips: how layers are described, see `features` and `raw`. critic: also gives a value per layer."""

    def __init__(self, *, scaled: bool = True, skips: bool = True, critic: bool = False):
        super().__init__()
        self.scaled, self.skips = scaled, skips
        self.cells = nn.LSTM(width_of(scaled=scaled, skips=skips), HIDDEN, num_layers=2, bidirectional=True)
        self.actions = nn.Linear(2 * HIDDEN, 2)
        self.critic = nn.Linear(2 * HIDDEN, 1) if critic else None

    def forward(self, rows: Float[Tensor, "t f"]) -> tuple[Float[Tensor, "t 2"], Float[Tensor, " t"] | None]:
        """Logits of remove and keep, and values where there is a critic."""
        hidden, _ = self.cells(features(rows, scaled=self.scaled))
        return self.actions(hidden), None if self.critic is None else self.critic(hidden)[:, 0]

    @torch.no_grad()
    def sample(
        self, rows: Float[Tensor, "t f"], free: Bool[Tensor, " t"], count: int, generator: torch.Generator
    ) -> Int[Tensor, "n t"]:
        """`count` draws; layers that are not `free` are kept."""
        chances = self(rows)[0].softmax(-1)[:, 1]
        drawn = torch.rand(count, len(rows), generator=generator) < chances
        return (drawn | ~free).long()

    def log_prob(
        self, rows: Float[Tensor, "t f"], free: Bool[Tensor, " t"], actions: Int[Tensor, "n t"]
    ) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"] | None]:
        """Of each draw, over the layers that had a choice; with a critic also the mean value of those layers."""
        logits, values = self(rows)
        chosen = logits.log_softmax(-1).expand(len(actions), -1, -1).gather(-1, actions[..., None])[..., 0]
        mean = None if values is None else values[free].mean().expand(len(actions))
        return (chosen * free).sum(-1), mean


class ShrinkPolicy(nn.Module):
    """A factor of FACTORS for every field of every layer, one after the other: what was decided is read back.

    Two LSTM cells step through the layers and, inside a layer, through its five fields; the kind never changes."""

    def __init__(self, *, scaled: bool = True, skips: bool = True, critic: bool = False):
        super().__init__()
        self.scaled, self.skips = scaled, skips
        inside = width_of(scaled=scaled, skips=skips)
        self.cells = nn.ModuleList([nn.LSTMCell(inside, HIDDEN), nn.LSTMCell(HIDDEN, HIDDEN)])
        self.actions = nn.Linear(HIDDEN, len(FACTORS))
        self.critic = nn.Linear(HIDDEN, 1) if critic else None

    @torch.no_grad()
    def sample(
        self, rows: Float[Tensor, "t f"], free: Bool[Tensor, "t 5"], count: int, generator: torch.Generator
    ) -> Int[Tensor, "n t 5"]:
        """`count` draws of indices into FACTORS; fields that are not `free` get the last, 1."""
        return self._walk(rows, free, torch.zeros(count, len(rows), len(FIELDS), dtype=torch.long), generator)[0]

    def log_prob(
        self, rows: Float[Tensor, "t f"], free: Bool[Tensor, "t 5"], actions: Int[Tensor, "n t 5"]
    ) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"] | None]:
        """As in `RemovalPolicy`, over the fields that had a choice."""
        _, chosen, values = self._walk(rows, free, actions, None)
        return chosen, values

    def _walk(
        self, rows: Tensor, free: Tensor, actions: Tensor, generator: torch.Generator | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """With a generator it draws, without one it scores `actions`."""
        count = len(actions)
        factors = torch.tensor(FACTORS)
        none = len(FACTORS) - 1
        state = [(torch.zeros(count, HIDDEN), torch.zeros(count, HIDDEN)) for _ in self.cells]
        drawn, total, values = [], torch.zeros(count), []
        for t in range(len(rows)):
            now = rows[t].expand(count, -1)
            for f in range(len(FIELDS)):
                x = features(now, scaled=self.scaled)
                for i, cell in enumerate(self.cells):
                    state[i] = cell(x, state[i])
                    x = state[i][0]
                if free[t, f]:
                    scores = self.actions(x).log_softmax(-1)
                    if generator is not None:
                        action = torch.multinomial(scores.exp(), 1, generator=generator)[:, 0]
                    else:
                        action = actions[:, t, f]
                    total = total + scores.gather(-1, action[:, None])[:, 0]
                    if self.critic is not None:
                        values.append(self.critic(x)[:, 0])
                else:
                    action = torch.full((count,), none)
                drawn.append(action)
                if f:
                    now = torch.cat([now[:, :f], (now[:, f] * factors[action])[:, None], now[:, f + 1 :]], 1)
        mean = torch.stack(values).mean(0) if values else None
        return torch.stack(drawn, 1).reshape(count, len(rows), len(FIELDS)), total, mean


Policy = RemovalPolicy | ShrinkPolicy
