"""The two-layer perceptron with block-sparse layers: the hidden features stand in the order that suits the blocks."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor, nn

from lynceus.layers.fused import hooked
from lynceus.layers.mlp import Mlp
from lynceus.rewrite.block_prune.runs import Program, lean, program, sizes, stamp, tour
from lynceus.rewrite.block_prune.sparse import BlockSparseLinear, Kept

HIDDEN = 2**24  # bytes of the hidden layer that are worked on at a time


class BlockSparseMlp(Mlp):
    """fc1 -> activation -> fc2 as `layers.mlp.Mlp`, both block-sparse. Takes the place of that and of timm's Mlp.

    Without gradients on a CPU, fc1 writes its outputs in an order in which its kept blocks are neighbours, the
    activation works in place, and fc2 reads that order.
    """

    fc1: BlockSparseLinear  # type: ignore[assignment]
    fc2: BlockSparseLinear  # type: ignore[assignment]

    def __init__(self, fc1: BlockSparseLinear, act: nn.Module, drop: nn.Dropout, fc2: BlockSparseLinear):
        nn.Module.__init__(self)
        self.fc1, self.act, self.drop, self.norm, self.fc2 = fc1, act, drop, nn.Identity(), fc2
        self._packed = Kept()

    def train(self, mode: bool = True) -> BlockSparseMlp:
        """As nn.Module's; also forgets what was packed."""
        self._packed = Kept()
        super().train(mode)
        return self

    def programs(self) -> tuple[Program, Program]:
        """fc1 and fc2 with one order of the hidden features."""
        one, two = self.fc1, self.fc2
        now = stamp(one.blocks, one.bias, two.blocks, two.bias)
        if self._packed.stamp != now:
            rows, columns = hidden_order(one.kept, two.kept, one.block[0], two.block[1], one.out_features)
            first = program(one.weight, one.bias, one.kept, one.block, row_order=rows, restore=False)
            second = program(two.weight, two.bias, two.kept, two.block, column_order=columns)
            self._packed.stamp, self._packed.value = now, (first, second)
        out: tuple[Program, Program] = self._packed.value
        return out

    def _whole(self, x: Tensor, residual: Tensor | None) -> Tensor:
        one, two = self.fc1, self.fc2
        quick = not self.training and type(self.act) in (nn.GELU, nn.ReLU) and not hooked(one, self.act, two)
        if not quick or not lean(x, one.blocks, one.bias, two.blocks, two.bias):
            return super()._whole(x, residual)
        first, second = self.programs()
        rows = x.numel() // one.in_features
        dense = (one.in_features * one.out_features, two.in_features * two.out_features)
        if not (first.worth(rows, dense[0]) and second.worth(rows, dense[1])):
            return super()._whole(x, residual)
        flat, out = x.reshape(rows, one.in_features), x.new_empty(rows, two.out_features)
        most = max(HIDDEN // (one.out_features * x.element_size()), 64)
        count = -(-rows // -(-rows // most))
        hidden = x.new_empty(count, one.out_features)
        for some, place in zip(flat.split(count), out.split(count)):
            middle = hidden[: len(some)]
            first.into(some, middle)
            if isinstance(self.act, nn.GELU):
                torch.ops.aten.gelu_(middle, approximate=self.act.approximate)
            else:
                middle.relu_()
            second.into(middle, place)
        y = out.view(*x.shape[:-1], two.out_features)
        return y if residual is None else y.add_(residual)


def hidden_order(
    first: np.ndarray, second: np.ndarray, rows: int, columns: int, hidden: int
) -> tuple[list[int], list[int]]:
    """One order of the hidden features, as block rows of fc1 and as block columns of fc2.

    first, second: kept blocks of both. rows, columns: lengths of the hidden blocks in fc1 and in fc2; units of their
    least common multiple are moved."""
    unit = math.lcm(rows, columns)
    count = -(-hidden // unit)
    a, b = unit // rows, unit // columns
    padded = np.zeros((count * a, first.shape[1]), dtype=bool)
    padded[: len(first)] = first
    order = tour(padded.reshape(count, -1))
    total = (len(sizes(hidden, rows)), len(sizes(hidden, columns)))
    return (
        [i for u in order for i in range(u * a, min((u + 1) * a, total[0]))],
        [i for u in order for i in range(u * b, min((u + 1) * b, total[1]))],
    )


def pair_up(model: nn.Module) -> None:
    """Gives every perceptron of `model` whose two layers are block-sparse the class above."""
    for name, module in list(model.named_modules()):
        if isinstance(module, BlockSparseMlp):
            continue
        drop = _dropout(module)
        parts = [getattr(module, n, None) for n in ("fc1", "fc2")]
        if drop is None or not all(type(p) is BlockSparseLinear for p in parts):
            continue
        made = BlockSparseMlp(parts[0], module.act, drop, parts[1])  # type: ignore[arg-type]
        made.train(module.training)
        model.set_submodule(name, made)


def _dropout(module: nn.Module) -> nn.Dropout | None:
    """The dropout of a perceptron that works as ours does; None for every other module."""
    if type(module) is not Mlp and f"{type(module).__module__}.{type(module).__name__}" != "timm.layers.mlp.Mlp":
        return None
    if type(getattr(module, "norm", None)) is not nn.Identity or hooked(module):
        return None
    drops = [m for m in (getattr(module, n, None) for n in ("drop", "drop1", "drop2")) if isinstance(m, nn.Dropout)]
    return drops[0] if drops and len({d.p for d in drops}) == 1 else None
