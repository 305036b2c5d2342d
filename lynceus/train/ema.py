"""The exponential moving average of what is trained (Polyak and Juditsky, Acceleration of Stochastic Approximation by
Averaging, 1992). The decay grows from about 0.1, so that short runs are averaged too."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from lynceus.core.nouns import Recipe


class Ema:
    """The average of everything that a recipe holds, parameters and buffers, as a recipe of its own.

    The decay at step s (from 1) is min(decay, (1 + s) / (10 + s)). Buffers of integers are copied.
    """

    def __init__(self, recipe: Recipe, decay: float):
        self.decay = decay
        self.recipe = copy.deepcopy(recipe).requires_grad_(False)
        # the tensors are looked up at each step, since wrappers (DDP) and modules may put others in their place
        self.mine, self.theirs = _slots(self.recipe), _slots(recipe)

    @torch.no_grad()
    def update(self, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        soft: tuple[list[Tensor], list[Tensor]] = ([], [])
        for (a, name), (b, _) in zip(self.mine, self.theirs):
            old, new = a[name], b[name]
            if old is None or new is None:
                continue
            if old.is_floating_point():
                soft[0].append(old)
                soft[1].append(new)
            else:
                old.copy_(new)
        torch._foreach_lerp_(soft[0], soft[1], 1 - decay)


def _slots(module: nn.Module) -> list[tuple[dict[str, Tensor | None], str]]:
    """(dictionary, name) of every parameter and buffer, shared ones once."""
    seen: set[int] = set()
    out: list[tuple[dict[str, Tensor | None], str]] = []
    for part in module.modules():
        for slots in (part._parameters, part._buffers):
            for name, value in slots.items():
                if value is not None and id(value) not in seen:
                    seen.add(id(value))
                    out.append((slots, name))  # type: ignore[arg-type]
    return out
