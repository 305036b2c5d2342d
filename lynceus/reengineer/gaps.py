"""How far two tensors are apart, after the layout that brings them closest."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Gap:
    """How far two tensors are apart, after the layout that brings them closest."""

    largest: float  # absolute
    relative: float  # in units of the first one's standard deviation
    cosine: float
    first: tuple[int, ...] | None  # index of the first element that differs
    layout: str = ""


def compare(a: Tensor, b: Tensor) -> Gap:
    """The gap under the layout that fits best: as they are, NCHW / NHWC, map / tokens, extra token first / last."""
    best: Gap | None = None
    for layout, turned in _layouts(a, b):
        found = gap_of(a, turned, layout)
        if best is None or found.largest < best.largest:
            best = found
        if best.largest == 0 or (not layout and best.relative < 1e-9):
            break
    return best or Gap(math.inf, math.inf, 0.0, None, f"shapes {list(a.shape)} and {list(b.shape)}")


def _layouts(a: Tensor, b: Tensor) -> Iterator[tuple[str, Tensor]]:
    if a.shape == b.shape:
        yield "", b
    if a.ndim == b.ndim == 4:
        for layout, order in (("NHWC -> NCHW", (0, 3, 1, 2)), ("NCHW -> NHWC", (0, 2, 3, 1))):
            if b.permute(order).shape == a.shape:
                yield layout, b.permute(order)
    if a.ndim == 3 and b.ndim == 4:
        for layout, tokens in (
            ("map NCHW -> tokens", b.flatten(2).transpose(1, 2)),
            ("map NHWC -> tokens", b.flatten(1, 2)),
        ):
            if tokens.shape == a.shape:
                yield layout, tokens
    if a.ndim == 4 and b.ndim == 3 and b.shape[1] * b.shape[2] == a[0].numel():
        if b.shape[2] == a.shape[1]:
            yield "tokens -> map NCHW", b.transpose(1, 2).reshape(a.shape)
        if b.shape[2] == a.shape[3]:
            yield "tokens -> map NHWC", b.reshape(a.shape)
    if a.ndim == b.ndim == 3 and a.shape == b.shape and a.shape[1] > 1:
        yield "extra token last -> first", b.roll(1, 1)
        yield "extra token first -> last", b.roll(-1, 1)


def gap_of(a: Tensor, b: Tensor, layout: str = "") -> Gap:
    x, y = a.double().flatten(), b.double().flatten()
    if x.numel() == 0:
        return Gap(0.0, 0.0, 1.0, None, layout)
    far = (x - y).abs()
    if not bool(torch.isfinite(far).all()):
        far = torch.where((x == y) | (x.isnan() & y.isnan()), torch.zeros_like(far), torch.full_like(far, math.inf))
    largest = float(far.max())
    spread = float(x.std(correction=0)) if x.numel() > 1 else 0.0
    unit = spread or float(x.abs().max()) or 1.0
    norm = float(x.norm() * y.norm())
    first = int((far > 1e-9 * unit).to(torch.uint8).argmax()) if largest > 1e-9 * unit else None
    index = tuple(int(i) for i in torch.unravel_index(torch.tensor(first), a.shape)) if first is not None else None
    return Gap(largest, largest / unit, float(x @ y) / norm if norm else 1.0, index, layout)
