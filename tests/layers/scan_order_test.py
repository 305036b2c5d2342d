"""Sweeps over a map: permutations of neighbours, there and back."""

import pytest
import torch

from lynceus.layers.scan_order import DOWN, LEFT, RIGHT, START, UP, sweeps

MOVES = {RIGHT: (0, 1), LEFT: (0, -1), UP: (-1, 0), DOWN: (1, 0)}
SIZES = [(h, w) for h in range(1, 10) for w in range(1, 10)]


@pytest.mark.parametrize("kind", ["snake", "raster"])
def test_permutations_and_their_inverses(kind):
    for h, w in SIZES:
        found = sweeps(h, w, kind)
        every = torch.arange(h * w).expand(4, -1)
        assert torch.equal(found.order.sort(1).values, every)
        assert torch.equal(found.order.gather(1, found.inverse), every)
        assert torch.equal(found.order[1], found.order[0].flip(0))
        assert torch.equal(found.order[3], found.order[2].flip(0))


def test_a_snake_goes_from_neighbour_to_neighbour_by_its_codes():
    for h, w in SIZES:
        found = sweeps(h, w)
        for order, codes in zip(found.order.tolist(), found.codes.tolist()):
            assert codes[0] == START
            for before, now, code in zip(order, order[1:], codes[1:]):
                row, column = MOVES[code]
                assert (before // w + row, before % w + column) == (now // w, now % w)
                assert 0 <= before % w + column < w


def test_where_the_sweeps_start():
    assert sweeps(3, 4).order.tolist() == [
        [0, 1, 2, 3, 7, 6, 5, 4, 8, 9, 10, 11],
        [11, 10, 9, 8, 4, 5, 6, 7, 3, 2, 1, 0],
        [0, 4, 8, 9, 5, 1, 2, 6, 10, 11, 7, 3],
        [3, 7, 11, 10, 6, 2, 1, 5, 9, 8, 4, 0],
    ]


def test_orders_are_kept_and_may_be_trained_with():
    with torch.inference_mode():
        first = sweeps(6, 5)
    assert sweeps(6, 5).order is first.order
    x = torch.randn(30, 2, requires_grad=True)
    x[first.order[0]].sum().backward()
    assert x.grad is not None
