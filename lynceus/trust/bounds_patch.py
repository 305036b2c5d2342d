"""Backward passes on patches: what one neuron of a convolutional network reads is a small window of each earlier map.

Coefficients are kept for that window alone, another one for every row, instead of for whole maps that are mostly zeros:
the same sums with a fraction of the numbers, and all neurons of a layer in one batch. An operator that has no windows
gets whole maps again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from lynceus.trust.bounds_ops import (
    Convolution,
    Dense,
    Duels,
    Node,
    Operator,
    Pick,
    Scale,
    Shape,
    Sum,
    View,
    Winner,
    Winners,
)

MATRIX = 1 << 20  # entries of a convolution on one window that is written as a matrix


@dataclass(frozen=True, kw_only=True)
class Patch:
    """Coefficients c (n, s, *lead, h, w) on the window of a map whose first corner is (top, left), (n,) each; a window
    may reach beyond the map, and coefficients there mean nothing."""

    c: Tensor
    top: Tensor
    left: Tensor

    def _beyond(self, shape: Shape) -> tuple[int, ...]:
        """How far windows reach over the border of maps of `shape`: above, below, to the left, to the right."""
        out: list[int] = []
        for start, count, side in zip((self.top, self.left), self.c.shape[-2:], shape[-2:]):
            out += [max(0, -int(start.min())), max(0, int(start.max()) + count - side)]
        return tuple(out)

    def read(self, value: Tensor, at: Tensor | None) -> Tensor:
        """The windows of maps (b, *lead, H, W), 0 beyond the border: (n, *lead, h, w). `at` (n,): the map of each row;
        None where there is one for all."""
        h, w = self.c.shape[-2:]
        before = [max(0, -int(v.min())) for v in (self.left, self.top)]
        after = [
            max(0, int(v.max()) + k - side) for v, k, side in zip((self.left, self.top), (w, h), value.shape[:-3:-1])
        ]
        value = F.pad(value, (before[0], after[0], before[1], after[1]))
        windows = value.unfold(-2, h, 1).unfold(-2, w, 1).movedim((-4, -3), (1, 2))
        top, left = self.top + before[1], self.left + before[0]
        image = torch.zeros_like(top) if at is None else at
        rows, columns = windows.shape[1:3]
        place, back = ((image * rows + top) * columns + left).unique(return_inverse=True)
        few = windows[place // (rows * columns), place // columns % rows, place % columns]
        return few if len(few) == len(back) and bool((back[1:] > back[:-1]).all()) else few[back]

    def masked(self, shape: Shape) -> Patch:
        """Zeros beyond the border of maps of `shape`."""
        if not any(self._beyond(shape)):
            return self
        h, w = self.c.shape[-2:]
        inside = []
        for start, count, side in zip((self.top, self.left), (h, w), shape[-2:]):
            place = start[:, None] + torch.arange(count, device=start.device)
            inside.append((place >= 0) & (place < side))
        mask = inside[0][:, :, None] & inside[1][:, None, :]
        lead = (1,) * (self.c.ndim - 3)
        return replace(self, c=self.c * mask.reshape(len(mask), *lead, h, w))

    def whole(self, shape: Shape) -> Tensor:
        """The same coefficients on whole maps, (n, s, *shape)."""
        h, w = self.c.shape[-2:]
        side = shape[-2] + 2 * h, shape[-1] + 2 * w  # room for what reaches beyond
        row = (self.top + h)[:, None] + torch.arange(h, device=self.top.device)
        column = (self.left + w)[:, None] + torch.arange(w, device=self.top.device)
        place = (row[:, :, None] * side[1] + column[:, None, :]).reshape(len(row), *(1,) * (self.c.ndim - 3), h * w)
        out = self.c.new_zeros(*self.c.shape[:-2], side[0] * side[1])
        out.scatter_(-1, place.expand(*self.c.shape[:-2], h * w), self.c.flatten(-2))
        return out.unflatten(-1, side)[..., h : h + shape[-2], w : w + shape[-1]].contiguous()

    def plus(self, other: Patch) -> Patch | None:
        """The sum, on a window that holds both; None where the two lie differently in different rows."""
        down, right = other.top - self.top, other.left - self.left
        if bool((down != down[0]).any()) or bool((right != right[0]).any()):
            return None
        shift = int(down[0]), int(right[0])
        sides = []
        for move, mine, theirs in zip(shift, self.c.shape[-2:], other.c.shape[-2:]):
            start, end = min(0, move), max(mine, move + theirs)
            sides.append((-start, end - mine, move - start, end - move - theirs))
        (a, b, c, d), (e, f, g, h) = sides
        both = F.pad(self.c, (e, f, a, b)) + F.pad(other.c, (g, h, c, d))
        return Patch(c=both, top=self.top - a, left=self.left - e)


Held = Tensor | Patch


def joined(a: Held, b: Held, shape: Shape) -> Held:
    """The sum of coefficients of one node."""
    if isinstance(a, Patch) and isinstance(b, Patch):
        both = a.plus(b)
        if both is not None:
            return both
    whole = [v.whole(shape) if isinstance(v, Patch) else v for v in (a, b)]
    return whole[0] + whole[1]


def has_windows(op: Operator) -> bool:
    """Can `step` go through this operator?"""
    if isinstance(op, Convolution):
        return len(op.rest[0]) == 2 and not op.rest[3]
    if isinstance(op, Pick):
        return op.window is not None
    if isinstance(op, Dense):
        return bool(op.steps)
    if isinstance(op, View):
        return min(len(op.before), len(op.after)) > 2 and op.before[-2:] == op.after[-2:]
    return isinstance(op, (Scale, Sum, Winner, Duels, Winners))


def step(node: Node, patch: Patch) -> tuple[Patch | None, ...]:
    """Patches of a node's output -> patches of its inputs, for an operator that `has_windows`."""
    op = node.op
    if isinstance(op, Dense):
        for inner in reversed(op.steps):
            (before,) = step(inner, patch)
            assert before is not None
            patch = before
        return (patch,)
    if isinstance(op, View):
        return (replace(patch, c=patch.c.reshape(*patch.c.shape[:2], *op.before[:-2], *patch.c.shape[-2:])),)
    if isinstance(op, (Convolution, Pick)):
        patch = patch.masked(node.shape)
    c = patch.c
    flat = c.flatten(0, 1)
    if isinstance(op, Scale):
        if op.factor is None:
            return (patch,)
        if op.factor.numel() == 1:
            return (replace(patch, c=c * op.factor.reshape(())),)
        factor = op.factor.expand(node.shape)[None]
        return (replace(patch, c=c * patch.read(factor, None).unsqueeze(1)),)
    if isinstance(op, Convolution):
        stride, padding, dilation = op.rest[:3]
        out = _convolved(op, flat, _reach(c.shape[-2:], op.weight.shape[-2:], stride, dilation))
        top, left = (v * s - p for v, s, p in zip((patch.top, patch.left), stride, padding))
        return (Patch(c=out.unflatten(0, c.shape[:2]), top=top, left=left),)
    if isinstance(op, Pick):
        assert op.window is not None
        kernel, apart, gap = op.window
        out = flat.new_zeros(len(flat), *flat.shape[2:-2], *_reach(c.shape[-2:], kernel, apart, gap))
        for tap in range(kernel[0] * kernel[1]):
            begin = [g * i for g, i in zip(gap, divmod(tap, kernel[1]))]
            rows, columns = (slice(b, b + (n - 1) * s + 1, s) for b, n, s in zip(begin, c.shape[-2:], apart))
            out[..., rows, columns] += flat[:, tap]
        top, left = (v * s for v, s in zip((patch.top, patch.left), apart))
        return (Patch(c=out.unflatten(0, c.shape[:2]), top=top, left=left),)
    parts = op.back(flat)
    return tuple(None if p is None else replace(patch, c=p.unflatten(0, c.shape[:2])) for p in parts)


def _reach(sides: Sequence[int], kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int]) -> list[int]:
    """How many rows and columns a window of so many outputs reads."""
    return [(n - 1) * s + d * (k - 1) + 1 for n, k, s, d in zip(sides, kernel, stride, dilation)]


def _convolved(op: Convolution, c: Tensor, sides: Sequence[int]) -> Tensor:
    """Coefficients of a window of a convolution's output as those of the window that it reads, without padding."""
    inner = (op.shape[0], *sides)
    rest = (op.rest[0], [0, 0], op.rest[2], False, [0, 0], op.rest[5])

    def back(c: Tensor) -> Tensor:
        x = c.new_zeros(()).expand(len(c), *inner)
        return torch.ops.aten.convolution_backward(c, x, op.weight, None, *rest, [True, False, False])[0]

    size = c[0].numel()
    if size * inner[0] * inner[1] * inner[2] > MATRIX:
        return back(c)
    key = tuple(c.shape[1:])
    if key not in op.windows:
        op.windows[key] = back(torch.eye(size, dtype=c.dtype, device=c.device).reshape(size, *key)).flatten(1)
    return (c.flatten(1) @ op.windows[key]).reshape(len(c), *inner)
