"""Long causal convolutions: all three ways are the direct sum, in one, two and three axes, of any sides."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lynceus.core.errors import AdviceError, OptionError
from lynceus.layers.long_conv import WAYS, causal_conv, choose, prepare


def by_hand(x, kernel, flipped=()):
    """The sum of the definition, cell by cell."""
    turn = [axis + 1 for axis in flipped]
    x = x.flip(turn) if turn else x
    y = torch.zeros_like(x)
    grid = kernel.shape[:-1]
    for p in itertools.product(*map(range, grid)):
        for a in itertools.product(*[range(i + 1) for i in p]):
            y[(slice(None), *p)] += kernel[a] * x[(slice(None), *[i - j for i, j in zip(p, a)])]
    return y.flip(turn) if turn else y


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 5), min_size=1, max_size=3), st.data())
def test_every_way_is_the_direct_sum(grid, data):
    x, kernel = draw(2, *grid, 3), draw(*grid, 3, seed=1)
    flipped = sorted(data.draw(st.sets(st.integers(0, len(grid) - 1))))
    want = by_hand(x, kernel, flipped)
    for way in WAYS:
        if way == "direct" and len(grid) == 3:
            continue
        assert (causal_conv(x, kernel, flipped=flipped, way=way) - want).abs().max() < 1e-12


@pytest.mark.parametrize("grid", [(33,), (14, 14), (9, 20), (5, 6, 7)], ids=str)
def test_ways_agree_forward_and_backward(grid):
    kernel, g = draw(*grid, 4, seed=1), draw(2, *grid, 4, seed=2)
    found = {}
    for way in WAYS[1 if len(grid) < 3 else 2 :]:
        x, k = draw(2, *grid, 4).requires_grad_(), kernel.clone().requires_grad_()
        y = causal_conv(x, k, way=way)
        y.backward(g)
        found[way] = (y.detach(), x.grad, k.grad)
    for values in found.values():
        for a, b in zip(values, found["fft"]):
            assert (a - b).abs().max() < 1e-11 * b.abs().max()


def test_direct_is_exactly_causal():
    x = draw(1, 6, 7, 2).requires_grad_()
    causal_conv(x, draw(6, 7, 2, seed=1), way="direct")[0, 3, 2].sum().backward()
    reached = x.grad[0].abs().sum(-1) > 0
    assert reached[:4, :3].all()
    assert not reached[4:].any()
    assert not reached[:, 3:].any()


def test_nothing_grows_with_the_square_of_the_tokens():
    """No way makes a tensor of more than 16 d L^2 numbers: there is no token-by-token map."""

    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        numbers = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for t in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(t, torch.Tensor):
                    self.numbers = max(self.numbers, t.numel() * (2 if t.is_complex() else 1))
            return out

    for way in WAYS[1:]:
        side, dim = 40, 8
        with Largest() as mode:
            causal_conv(torch.randn(1, side, side, dim), torch.randn(side, side, dim), way=way)
        assert 0 < mode.numbers <= 16 * dim * side**2


def test_the_way_follows_the_size():
    small, large = torch.empty(1, 14, 14, 2), torch.empty(1, 70, 70, 2)
    assert choose(small, grad=False) == "direct"
    assert choose(small, grad=True) == "products"
    assert choose(large, grad=False) == choose(large, grad=True) == "fft"
    assert choose(torch.empty(1, 6, 6, 6, 2), grad=False) == "fft"


def test_mistakes_are_told():
    with pytest.raises(OptionError, match="products"):
        prepare(torch.randn(3, 3, 1), "product")
    with pytest.raises(AdviceError, match="one or two axes"):
        prepare(torch.randn(3, 3, 3, 1), "direct")
    with pytest.raises(AdviceError, match="0 to 1"):
        prepare(torch.randn(3, 3, 1), "fft", [2])
    with pytest.raises(AdviceError, match="shape"):
        causal_conv(torch.randn(1, 4, 4, 2), torch.randn(4, 3, 2))
