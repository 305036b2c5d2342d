"""What the policies may do to a network, and the plan that their actions mean.

N2N Learning, ICLR 2018, arXiv 1709.06030, section 3.2 and appendix: layers that must stay, fields that must not change,
one action for layers whose outputs are added.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from lynceus.rewrite.restructure import Change, Restructure
from lynceus.rewrite.structure import Layer
from lynceus.search.policy.sequences import FACTORS, FIELDS

LEAST = 10  # channels that shrinking leaves
STAYS = ("Unknown", "Linear", "AvgPool2d")


def removable(layers: Sequence[Layer]) -> Bool[Tensor, " t"]:
    """Layers that may go. The first and the last stay, strided convolutions, linear layers, average pools, all that is
    on a shortcut, and in a residual branch what changes the map's size or gives the sum another number of channels."""
    out = []
    last = len(layers) - 1
    first = next((i for i, l in enumerate(layers) if l.kind == "Conv2d"), 0)
    for i, l in enumerate(layers):
        strided = l.kind == "Conv2d" and l.stride != 1
        breaks = (l.start > 0 and l.resizes) or (l.joins and l.inside != l.width)
        out.append(not (i in (first, last) or l.kind in STAYS or strided or l.shortcut or breaks))
    return torch.tensor(out)


def shrinkable(layers: Sequence[Layer]) -> Bool[Tensor, "t 5"]:
    """Fields that may change. Of convolutions without stride: kernel, width, padding, inside residual branches only the
    width; of max pools outside of branches: kernel, stride, padding. Layers whose outputs are added share one width,
    which the first of them decides; groups that hold a strided convolution or the answer keep theirs."""
    made = torch.zeros(len(layers), len(FIELDS), dtype=torch.bool)
    decided: set[int] = set()
    for i, l in enumerate(layers):
        straight = l.start == 0 and not l.shortcut
        if l.kind == "Conv2d" and l.stride == 1 and not l.shortcut:
            if straight:
                made[i, 1] = l.kernel > 1
                made[i, 4] = l.padding > 0
            if not (l.fixed or l.depthwise or l.groups > 1) and l.group not in decided:
                made[i, 3] = True
                decided.add(l.group)
        elif l.kind == "MaxPool2d" and straight:
            made[i, 1], made[i, 2], made[i, 4] = l.kernel > 1, l.stride > 1, l.padding > 0
    return made


def after_removal(layers: Sequence[Layer], keep: Int[Tensor, " t"]) -> tuple[str, ...]:
    """Names of the layers that actions 0 (remove) mean."""
    return tuple(l.name for l, k in zip(layers, keep.tolist()) if not k)


def after_shrinking(layers: Sequence[Layer], actions: Int[Tensor, "t 5"]) -> tuple[Change, ...]:
    """What indices into FACTORS change: kernel and stride stay at least 1, widths at least 10 (or what they were)."""
    rows = [[FACTORS[a] for a in row] for row in actions.tolist()]
    return _changes(layers, rows)


def narrowed(layers: Sequence[Layer], factor: float) -> tuple[Change, ...]:
    """Every width that may change times `factor`."""
    return _changes(layers, [[1.0, 1.0, 1.0, factor, 1.0]] * len(layers))


def _changes(layers: Sequence[Layer], factors: Sequence[Sequence[float]]) -> tuple[Change, ...]:
    free = shrinkable(layers)
    widths: dict[int, int] = {}
    for l, row, able in zip(layers, factors, free.tolist()):
        if able[3]:
            widths[l.group] = min(l.width, max(int(l.width * row[3]), LEAST))
    changes: list[Change] = []
    for l, row, able in zip(layers, factors, free.tolist()):  # a shortcut may run before what decides its width
        k, s, p = (row[i] if able[i] else 1.0 for i in (1, 2, 4))
        width = widths.get(l.group, l.width) if l.group >= 0 else l.width
        kernel = max(int(l.kernel * k), 1)
        padding = int(l.padding * p)
        if l.kind == "MaxPool2d":
            padding = min(padding, kernel // 2)
        new = (l.name, kernel, max(int(l.stride * s), 1), width, padding)
        if l.kind in ("Conv2d", "MaxPool2d") and new[1:] != (l.kernel, l.stride, l.width, l.padding):
            changes.append(new)
    return tuple(changes)


def merged(first: Restructure, then: Restructure) -> Restructure:
    """One plan for what two do to a network one after the other."""
    gone = {*first.removed, *then.removed}
    changed = {c[0]: c for c in (*first.changed, *then.changed) if c[0] not in gone}
    removed = tuple(sorted(gone))
    return Restructure(removed=removed, changed=tuple(changed.values()), image=then.image, seed=then.seed)
