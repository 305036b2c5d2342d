"""Orders in which a scan visits a map: four sweeps along rows and columns, as a snake or line by line.

A snake turns at the end of each line, so every step goes to a neighbour (PlainMamba, BMVC 2024, arXiv 2403.17695).
Codes name the move that led to a place: 0 start, 1 right, 2 left, 3 up, 4 down.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Literal, NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

Order = Literal["snake", "raster"]
START, RIGHT, LEFT, UP, DOWN = range(5)
_OPPOSITE = (START, LEFT, RIGHT, DOWN, UP)


class Sweeps(NamedTuple):
    """Four sweeps over a map of h * w = n places: along rows, the same path back, along columns, that path back.

    order: the place (row * w + column) visited at each step. inverse: the step at which each place is visited.
    codes: the move that led to the place visited at each step.
    """

    order: Int[Tensor, "4 n"]
    inverse: Int[Tensor, "4 n"]
    codes: Int[Tensor, "4 n"]


def sweeps(height: int, width: int, kind: Order = "snake", *, device: torch.device | None = None) -> Sweeps:
    """The four sweeps of a map; kept from call to call, except while torch traces.

    "raster" starts every line anew at its left or upper end; its codes say along which line the step belongs.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or torch._C._len_torch_dispatch_stack() > 0:
        return _made(height, width, kind, device)
    return _kept(height, width, kind, device)


@lru_cache(maxsize=64)
def _kept(height: int, width: int, kind: Order, device: torch.device | None) -> Sweeps:
    with torch.inference_mode(False):
        return _made(height, width, kind, device)


def _made(height: int, width: int, kind: Order, device: torch.device | None) -> Sweeps:
    # arithmetic on tensors only: the sizes may be free
    number = torch.arange(height * width, device=device)
    h, w = (torch.full((), n, dtype=torch.int64, device=device) for n in (height, width))
    row, place_in_row = number // w, number % w
    column, place_in_column = number // h, number % h
    if kind == "snake":
        across = torch.where(row % 2 == 0, place_in_row, w - 1 - place_in_row)
        down = torch.where(column % 2 == 0, place_in_column, h - 1 - place_in_column)
        codes_rows = torch.where(place_in_row == 0, DOWN, torch.where(row % 2 == 0, RIGHT, LEFT))
        codes_columns = torch.where(place_in_column == 0, RIGHT, torch.where(column % 2 == 0, DOWN, UP))
    else:
        across, down = place_in_row, place_in_column
        codes_rows = torch.full_like(number, RIGHT)
        codes_columns = torch.full_like(number, DOWN)
    by_rows, by_columns = row * w + across, down * w + column
    order = torch.stack((by_rows, by_rows.flip(0), by_columns, by_columns.flip(0)))
    codes = torch.stack((*_there_and_back(codes_rows, number), *_there_and_back(codes_columns, number)))
    inverse = torch.empty_like(order).scatter_(1, order, number.expand(4, -1))
    return Sweeps(order, inverse, codes)


def _there_and_back(codes: Tensor, number: Tensor) -> tuple[Tensor, Tensor]:
    """The codes of a path, and of the same path the other way round."""
    opposite = torch.tensor(_OPPOSITE, device=codes.device)[codes]
    first = number == 0
    return torch.where(first, START, codes), torch.where(first, START, opposite.flip(0).roll(1))
