"""The dynamic aggregation against its index formula, its gradients and memory; the mixer's shapes and errors."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lynceus.core.counter import Counting
from lynceus.core.errors import AdviceError
from lynceus.layers.large_small import LargeSmall, LargeSmallMixer, _padded, aggregate
from lynceus.layers.mixers import Place, mixer_config
from lynceus.layers.offset_attention import OffsetAttention


def formula(x, w):
    """out[n, y, x, c] = sum over a, b of X[n, y-1+a, x-1+b, c] w[n, y, x, 3a+b, c mod k], number by number."""
    n, h, width, c = x.shape
    side, k = round(w.shape[3] ** 0.5), w.shape[4]
    out = torch.zeros_like(x)
    for i, y, z, ch in itertools.product(range(n), range(h), range(width), range(c)):
        for a, b in itertools.product(range(side), range(side)):
            row, column = y - side // 2 + a, z - side // 2 + b
            if 0 <= row < h and 0 <= column < width:
                out[i, y, z, ch] += x[i, row, column, ch] * w[i, y, z, side * a + b, ch % k]
    return out


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("kernels", [1, 3, 8])
@pytest.mark.parametrize("size", [(3, 5), (1, 1), (1, 4), (2, 7)], ids=str)
def test_equals_the_index_formula(kernels, size):
    x, w = random(2, *size, 8 * kernels), random(2, *size, 9, kernels, seed=1)
    want = formula(x, w)
    assert (aggregate(x, w) - want).abs().max() < 1e-12
    assert (_padded(x, w, 3) - want).abs().max() < 1e-12


@pytest.mark.parametrize("kernels", [1, 3, 8])
def test_gradients(kernels):
    x, w = random(2, 3, 2, 2 * kernels), random(2, 3, 2, 9, kernels, seed=1)
    assert torch.autograd.gradcheck(aggregate, (x.requires_grad_(), w.requires_grad_()))


def test_gradients_of_gradients():
    x, w = random(1, 2, 3, 4).requires_grad_(), random(1, 2, 3, 9, 2, seed=1).requires_grad_()
    assert torch.autograd.gradgradcheck(aggregate, (x, w))


@settings(max_examples=25, deadline=None)
@given(
    b=st.integers(1, 3),
    h=st.integers(1, 6),
    w=st.integers(1, 6),
    k=st.integers(1, 3),
    groups=st.integers(1, 3),
    r=st.integers(0, 2),
)
def test_both_routes_agree_in_value_and_gradient(b, h, w, k, groups, r):
    side = 2 * r + 1
    x, kernels, out = (
        random(b, h, w, groups * k),
        random(b, h, w, side**2, k, seed=1),
        random(b, h, w, groups * k, seed=2),
    )
    found = []
    for run in (aggregate, lambda x, w: _padded(x, w, side)):
        leaves = x.clone().requires_grad_(), kernels.clone().requires_grad_()
        y = run(*leaves)
        found.append([y.detach(), *torch.autograd.grad(y, leaves, out)])
    for a, c in zip(*found):
        assert (a - c).abs().max() < 1e-12


def test_function_transforms_and_forward_mode():
    x, w = random(2, 3, 4, 6), random(2, 3, 4, 9, 3, seed=1)
    t = random(2, 3, 4, 6, seed=2)
    _, slope = torch.func.jvp(lambda v: aggregate(v, w), (x,), (t,))
    assert (slope - aggregate(t, w)).abs().max() < 1e-12
    mapped = torch.func.vmap(lambda a, b: aggregate(a[None], b[None])[0])(x, w)
    assert (mapped - aggregate(x, w)).abs().max() < 1e-12


def test_channels_share_kernels_modulo_not_in_runs():
    """The trap of the card: c mod k. Kernels given to runs of channels are another function altogether."""
    x, w = random(2, 6, 5, 64), random(2, 6, 5, 9, 8, seed=1)
    runs = (
        aggregate(x.unflatten(3, (8, 8)).transpose(3, 4).flatten(3), w).unflatten(3, (8, 8)).transpose(3, 4).flatten(3)
    )
    y = aggregate(x, w)
    assert (runs - y).std() > 0.5 * y.std()


@pytest.mark.parametrize("alone", [True, False], ids=["operator", "mixer"])
def test_memory_stays_below_three_copies_of_the_map(alone):
    """N=8, C=128, 56x56 without gradients: nothing of the size taps x map. The whole mixer, kernels and all: four."""
    x = torch.empty(8, 56, 56, 128, device="meta")
    size = x.numel() * x.element_size()
    layer = LargeSmall(128).to("meta").eval()
    with torch.no_grad():
        w = layer.lkp(x)
        counting = Counting()
        counting.ignore(layer, x, w)
        with counting:
            aggregate(x, w) if alone else layer(x, residual=x)
    assert counting.peak < (3 if alone else 4) * size, counting.peak / size


def test_training_keeps_the_map_and_the_kernels_only():
    x, w = torch.randn(2, 14, 14, 64, requires_grad=True), torch.randn(2, 14, 14, 9, 8, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        aggregate(x, w)
    assert sum(t.numel() for t in kept) == x.numel() + w.numel()


def test_the_norm_spans_taps_and_map():
    """Each kernel's nine taps over the whole map have mean 0 and variance 1, before the norm's own weights."""
    layer = LargeSmall(16).double().eval()
    w = layer.lkp(random(2, 9, 7, 16))
    assert w.mean((1, 2, 3)).abs().max() < 1e-6
    assert (w.var((1, 2, 3), correction=0) - 1).abs().max() < 1e-3


def test_errors_advise():
    with pytest.raises(AdviceError, match="take e"):
        LargeSmall(20)
    with pytest.raises(AdviceError, match="no centre"):
        LargeSmall(16, small_kernel=2)
    with pytest.raises(AdviceError, match="do not fit 8 channels"):
        aggregate(torch.zeros(1, 2, 2, 8), torch.zeros(1, 2, 2, 8, 2))


@pytest.mark.parametrize("name", ["large_small", "offset_attention"])
def test_it_is_a_mixer(name):
    mixer = mixer_config(name).build(Place(dim=32, heads=2, grid=(5, 4)))
    assert isinstance(mixer, nn.Module)
    for size in [(5, 4), (1, 1), (3, 9)]:
        x = torch.randn(2, *size, 32)
        assert mixer(x).shape == x.shape
    mixer(torch.randn(2, 5, 4, 32)).square().mean().backward()
    assert all(p.grad is not None for p in mixer.parameters())
    assert isinstance(mixer_config("large_small"), LargeSmallMixer)


def attention(grid, **options):
    layer = OffsetAttention(12, 3, grid=grid, norm_weight=1.0, **options).double().eval()
    with torch.no_grad():
        layer.attention_biases.copy_(random(3, grid[0] * grid[1], seed=3))
    return layer


@pytest.mark.parametrize("grid", [(3, 3), (2, 4), (1, 1)], ids=str)
def test_offsets_number_pairs_as_they_appear(grid):
    """The authors number (|dy|, |dx|) by first appearance over raster pairs; that is |dy| * columns + |dx|."""
    layer, places = attention(grid), list(itertools.product(range(grid[0]), range(grid[1])))
    seen = {}
    want = torch.empty(3, len(places), len(places), dtype=torch.float64)
    for i, p in enumerate(places):
        for j, q in enumerate(places):
            number = seen.setdefault((abs(p[0] - q[0]), abs(p[1] - q[1])), len(seen))
            want[:, i, j] = layer.attention_biases[:, number].detach()
    assert torch.equal(layer.bias(*grid), want)


def test_other_maps_resize_the_table_or_the_matrix():
    table, matrix = attention((4, 4)), attention((4, 4), resize="matrix")
    resized = nn.functional.interpolate(table.attention_biases.view(1, 3, 4, 4), (3, 5), mode="bicubic").flatten(2)
    other = attention((3, 5))
    other.attention_biases.data.copy_(resized[0])
    assert torch.equal(table.bias(3, 5), other.bias(3, 5))
    whole = matrix.bias(4, 4)[None]
    assert torch.equal(matrix.bias(3, 5), nn.functional.interpolate(whole, (15, 15), mode="bicubic")[0])


def test_a_kept_bias_follows_the_table():
    """The trap of the card: the authors' copy of the bias goes stale when weights are loaded in eval mode."""
    layer, x = attention((3, 3)).float(), torch.randn(2, 3, 3, 12)
    with torch.no_grad():
        before = layer(x)
        state = layer.state_dict()
        state["attention_biases"] = state["attention_biases"] + torch.arange(9.0)
        layer.load_state_dict(state)
        after = layer(x)
    assert (after - before).abs().max() > 1e-3
    assert torch.allclose(after, layer.double()(x.double()).float(), atol=1e-5)
