"""Which sub-model owns which classes: balanced groups, drawn, given, or of classes that are often confused."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from lynceus.core.errors import AdviceError, unknown
from lynceus.core.rng import generator

Grouping = Literal["random", "confusion"]


def groups(
    classes: int,
    count: int,
    how: Grouping | Sequence[Sequence[int]] = "random",
    *,
    confusion: Float[Tensor, "k k"] | None = None,
    seed: int = 0,
) -> tuple[tuple[int, ...], ...]:
    """`count` groups of the classes 0 to `classes` - 1, whose sizes differ by at most one.

    how: "random"; "confusion", so that classes which `confusion` (true, said) mixes up come together, where one
    sub-model learns to tell them apart; or the groups themselves, of any sizes.
    """
    if count < 1:
        raise AdviceError(f"A model is split into at least one sub-model, not {count}.")
    if count > classes:
        raise AdviceError(
            f"{count} sub-models cannot own {classes} classes: each needs at least one. Ask for at most {classes} "
            f"sub-models: parts={classes}; further devices then stay idle."
        )
    if not isinstance(how, str):
        made = tuple(tuple(sorted(int(c) for c in group)) for group in how)
        told = sorted(c for group in made for c in group)
        if told != list(range(classes)) or len(made) != count or not all(made):
            twice = next((c for c in told if told.count(c) > 1), None)
            missing = [c for c in range(classes) if c not in told]
            raise AdviceError(
                f"The groups must hold every class 0 to {classes - 1} once, in {count} groups that are not empty; "
                + (f"class {twice} stands in two." if twice is not None else f"missing: {missing[:8]}." if missing
                   else f"there are {len(made)} groups with {len(told)} classes.")
            )  # fmt: skip
        return made
    if how not in ("random", "confusion"):
        raise unknown("grouping of classes", how, ("random", "confusion"), how="Or give the groups themselves.")
    order = torch.randperm(classes, generator=generator(seed, "groups"))
    chosen = [sorted(p.tolist()) for p in order.tensor_split(count)]
    if how == "confusion":
        if confusion is None or confusion.shape != (classes, classes):
            raise AdviceError("Grouping by confusion needs the confusion matrix (true, said): confusion=matrix.")
        chosen = _swapped(chosen, confusion.double() + confusion.double().T)
    return tuple(sorted(tuple(sorted(g)) for g in chosen))


def inside(made: Sequence[Sequence[int]], confusion: Float[Tensor, "k k"]) -> float:
    """Share of all mistakes that are made between classes of one group."""
    off = confusion.double() - confusion.double().diag().diag()
    kept = sum(float(off[list(g)][:, list(g)].sum()) for g in made)
    return kept / max(float(off.sum()), 1e-12)


def _swapped(made: list[list[int]], weight: Tensor) -> list[list[int]]:
    """Exchanges pairs of classes between groups while that raises the weight inside groups."""
    weight = weight - weight.diag().diag()
    better = True
    while better:
        better = False
        for a in range(len(made)):
            for b in range(a + 1, len(made)):
                for i in range(len(made[a])):
                    for j in range(len(made[b])):
                        x, y = made[a][i], made[b][j]
                        now = weight[x, made[a]].sum() + weight[y, made[b]].sum()
                        then = weight[y, made[a]].sum() + weight[x, made[b]].sum() - 2 * weight[x, y]
                        if then > now + 1e-9:
                            made[a][i], made[b][j], better = y, x, True
    return made
