"""REINFORCE for the policies: a running baseline, and an advantage of its own for every rollout.

N2N Learning, ICLR 2018, arXiv 1709.06030, section 3.5. The paper gives all rollouts of an iteration the same advantage;
that is an option here, since it throws away which of them was better.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from lynceus.core.errors import AdviceError
from lynceus.search.policy.sequences import Policy

Advantage = Literal["own", "shared"]


@dataclass(frozen=True, kw_only=True)
class ReinforceConfig:
    """How a policy learns. policy_lr: of its Adam. advantage: "own" reward of each rollout minus the baseline, or the
    "shared" mean of the iteration minus it, as in the paper. window: the baseline is the mean of so many last
    iterations' mean rewards; 0 takes all. steps: one optimiser step per iteration, or one per rollout, as in the
    paper's code (with own advantages that is too much: most policies end at removing everything). A policy with a
    critic takes its value as baseline."""

    policy_lr: float = 0.003
    advantage: Advantage = "own"
    window: int = 10
    steps: Literal["iteration", "rollout"] = "iteration"

    def __post_init__(self) -> None:
        if not self.policy_lr > 0 or self.window < 0 or self.advantage not in ("own", "shared"):
            raise AdviceError(
                f"policy_lr={self.policy_lr}, window={self.window}, advantage={self.advantage!r}: the rate is above 0, "
                "window at least 0 (0: all iterations), advantage 'own' or 'shared'."
            )


@dataclass
class Reinforce:
    """One policy, its optimiser and its baseline."""

    policy: Policy
    config: ReinforceConfig = field(default_factory=ReinforceConfig)

    def __post_init__(self) -> None:
        self.optimizer = torch.optim.Adam(self.policy.parameters(), self.config.policy_lr)
        self.means: list[float] = []

    def step(
        self,
        rows: Float[Tensor, "t f"],
        free: Bool[Tensor, "t ..."],
        actions: Int[Tensor, "n t ..."],
        rewards: Sequence[float],
    ) -> float:
        """Learns from one iteration's rollouts; returns their mean reward."""
        mean = sum(rewards) / len(rewards)
        last = self.means[-self.config.window :] if self.config.window else self.means
        baseline = sum(last) / len(last) if last else mean
        self.means.append(mean)
        own = self.config.advantage == "own"
        gained = torch.tensor([r if own else mean for r in rewards], dtype=torch.float32)
        parts = [slice(0, len(rewards))]
        if self.config.steps == "rollout":
            parts = [slice(i, i + 1) for i in range(len(rewards))]
        for part in parts:
            chosen, value = self.policy.log_prob(rows, free, actions[part])
            if not chosen.requires_grad:
                return mean  # no layer had a choice
            if value is None:
                loss = -((gained[part] - baseline) * chosen).mean()
            else:
                loss = -((gained[part] - value.detach()) * chosen).mean()
                loss = loss + F.smooth_l1_loss(value, torch.full_like(value, mean))
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
        return mean
