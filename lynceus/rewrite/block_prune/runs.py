"""How a block-sparse matrix is multiplied quickly on a CPU: a few dense products over neighbouring kept blocks.

Rows are tokens, columns features. Every step adds (columns c0 .. c0 + k of the input) x (packed weights) to columns
r0 .. r0 + m of the output, as one strided matrix product: nothing is gathered or transposed. Steps go input block by
input block and merge the kept output blocks that are neighbours, so the slice of the input stays in the cache; where
the order of the outputs is free, it is chosen so that kept blocks become neighbours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor
from torch.autograd import forward_ad

CALL = 5.0  # microseconds that one step costs beside its arithmetic
SPEED = 5e4  # multiply-adds per microsecond and thread of a good dense product
SHORT = 0.8  # share of that speed which the short products of the steps reach
WIDE, PANEL = 2048, 512  # outputs: above the first, so many at a time
ROWS = 1024  # tokens that are taken at a time
FEW = 512  # tokens up to which bringing permuted outputs back costs less than the steps it saves
MOVE = 2.5e-4  # microseconds that bringing one output back costs
Step = tuple[int, int, int, int]  # c0, k, r0, m


def lean(x: Tensor, *weights: Tensor | None) -> bool:
    """True where nobody asks for gradients, traces or transforms, so that the steps may write in place."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    if torch.is_grad_enabled() and (x.requires_grad or any(w is not None and w.requires_grad for w in weights)):
        return False
    return (
        type(x) is Tensor
        and x.device.type in ("cpu", "meta")
        and x.is_floating_point()
        and all(w is None or w.dtype == x.dtype for w in weights)
        and x.numel() > 0
        and not torch.is_autocast_enabled("cpu")
        and torch._C._functorch.maybe_current_level() is None
        and forward_ad._current_level < 0
    )


def stamp(*tensors: Tensor | None) -> tuple[Any, ...]:
    """Changes whenever one of the tensors is replaced or written to."""
    return tuple(
        None if t is None else (t.data_ptr(), 0 if t.is_inference() else t._version, t.dtype, t.device) for t in tensors
    )


def tour(patterns: Bool[np.ndarray, "n d"]) -> list[int]:
    """An order of rows in which neighbours differ in few places: nearest neighbour first, the best of eight starts."""
    count = len(patterns)
    if count < 3:
        return list(range(count))
    apart = (patterns[:, None] != patterns[None]).sum(-1).astype(np.int64)
    best, least = list(range(count)), int(apart[np.arange(count - 1), np.arange(1, count)].sum())
    for start in sorted({round(i * (count - 1) / 7) for i in range(8)}):
        left = np.ones(count, dtype=bool)
        left[start] = False
        order, length = [start], 0
        while left.any():
            far = np.where(left, apart[order[-1]], count * patterns.shape[1] + 1)
            nearest = int(far.argmin())
            length += int(far[nearest])
            order.append(nearest)
            left[nearest] = False
        if length < least:
            best, least = order, length
    return best


def runs(row: Sequence[bool] | np.ndarray) -> list[tuple[int, int]]:
    """First and last + 1 of every stretch of True."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], np.asarray(row, dtype=bool), [False]])))
    return [(int(a), int(b)) for a, b in zip(edges[::2], edges[1::2])]


def panels(edges: np.ndarray) -> list[tuple[int, int]]:
    """The output blocks between which each input block goes its way: all, or, where the outputs are too many for the
    cache, some at a time. edges: where each block begins, and the end."""
    if edges[-1] <= WIDE:
        return [(0, len(edges) - 1)]
    cuts = np.unique(np.searchsorted(edges, np.arange(0, edges[-1], PANEL)))
    return list(zip(cuts.tolist(), [*cuts[1:].tolist(), len(edges) - 1]))


def steps_of(kept: Bool[np.ndarray, "r c"], rows: np.ndarray, columns: np.ndarray) -> list[Step]:
    """The steps of a matrix whose block rows and columns have these sizes.

    Input block by input block; only where merging the other way takes less than half as many steps, output block by
    output block."""
    r, c = np.concatenate([[0], rows.cumsum()]), np.concatenate([[0], columns.cumsum()])
    tall = [
        (j, j + 1, first + a, first + b)
        for first, last in panels(r)
        for j in range(kept.shape[1])
        for a, b in runs(kept[first:last, j])
    ]
    wide = [(a, b, i, i + 1) for i in range(kept.shape[0]) for a, b in runs(kept[i])]
    chosen = wide if 2 * len(wide) < len(tall) else tall
    return [(int(c[a]), int(c[b] - c[a]), int(r[i]), int(r[j] - r[i])) for a, b, i, j in chosen]


def sizes(total: int, block: int) -> np.ndarray:
    """How long the blocks of an axis are: all `block`, the last one perhaps less."""
    count = -(-total // block)
    return np.array([block] * (count - 1) + [total - block * (count - 1)])


def elements(order: Sequence[int], length: np.ndarray) -> Tensor:
    """The places of the single features when blocks of these lengths are put into `order`."""
    starts = np.concatenate([[0], length.cumsum()])
    return torch.from_numpy(np.concatenate([np.arange(starts[i], starts[i] + length[i]) for i in order]))


@dataclass(frozen=True)
class Program:
    """The steps of one matrix with their packed weights (k, m).

    back: None, or where each piece of the result lies among the permuted outputs; a piece is `unit` features long.
    """

    out: int
    steps: list[Step]
    packs: list[Tensor]
    bias: Tensor | None
    back: Tensor | None
    unit: int
    kept: int  # weights

    def worth(self, tokens: int, dense: int) -> bool:
        """Whether the steps are quicker than one dense product of `dense` weights, by estimate."""
        speed = SPEED * torch.get_num_threads()
        return CALL * len(self.steps) + tokens * self.kept / (SHORT * speed) < tokens * dense / speed

    def into(self, x: Tensor, y: Tensor) -> None:
        """Writes the product of x (n, in), and the bias, into y (n, out), in the program's own order."""
        if self.bias is None:
            y.zero_()
        else:
            y.copy_(self.bias)
        last, some = (-1, -1), x
        for (c0, k, r0, m), weight in zip(self.steps, self.packs):
            if last != (c0, k):
                last, some = (c0, k), x.narrow(1, c0, k)
            part = y.narrow(1, r0, m)
            torch.addmm(part, some, weight, out=part)  # as quick as addmm_, which torch's counter of FLOPs misses

    def __call__(self, x: Tensor) -> Tensor:
        """x: (n, in). Gives (n, out)."""
        y = x.new_empty(len(x), self.out)
        if len(x) <= ROWS:
            self.into(x, y)
        else:
            count = -(-len(x) // -(-len(x) // ROWS))
            for some, place in zip(x.split(count), y.split(count)):
                self.into(some, place)
        if self.back is None:
            return y
        return y.unflatten(1, (-1, self.unit)).index_select(1, self.back.to(y.device)).flatten(1)


def program(
    weight: Tensor,
    bias: Tensor | None,
    kept: Bool[np.ndarray, "r c"],
    block: tuple[int, int],
    *,
    row_order: Sequence[int] | None = None,
    column_order: Sequence[int] | None = None,
    restore: bool = True,
) -> Program:
    """Packs a dense `weight` (out, in) whose blocks outside `kept` are zero.

    row_order, column_order: of the output blocks, and of the input blocks as they come. restore: bring outputs back
    into their own order at the end.
    """
    out, inn = weight.shape
    rows, columns = sizes(out, block[0]), sizes(inn, block[1])
    r = list(row_order) if row_order is not None else list(range(len(rows)))
    c = list(column_order) if column_order is not None else list(range(len(columns)))
    found = steps_of(kept[r][:, c], rows[r], columns[c])
    where = elements(r, rows)
    plain = r == list(range(len(rows)))
    w = weight.detach()
    if not plain:
        w = w.index_select(0, where.to(w.device))
    if c != list(range(len(columns))):
        w = w.index_select(1, elements(c, columns).to(w.device))
    packs = [w[r0 : r0 + m, c0 : c0 + k].t().contiguous() for c0, k, r0, m in found]
    shift = None if bias is None else bias.detach()
    if shift is not None and not plain:
        shift = shift.index_select(0, where.to(shift.device))
    unit = block[0] if out % block[0] == 0 else 1  # whole blocks move four times as quickly as single features
    back = torch.argsort(where[::unit] // unit) if restore and not plain else None
    return Program(out, found, packs, shift, back, unit, sum(k * m for _, k, _, m in found))


def worth_reordering(kept: Bool[np.ndarray, "r c"], block: tuple[int, int], out: int) -> list[int] | None:
    """For some 200 tokens: an order of the output blocks that saves more than bringing the outputs back costs; None to
    leave it."""
    order = tour(kept)
    plain = sum(len(runs(kept[:, j])) for j in range(kept.shape[1]))
    better = sum(len(runs(kept[order][:, j])) for j in range(kept.shape[1]))
    move = MOVE if out % block[0] == 0 else 4 * MOVE
    return order if CALL * (plain - better) > 200 * out * move else None
