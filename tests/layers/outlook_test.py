"""Outlook attention: a loop over pixels, box filters, cost, gradients, gathers for export."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from lynceus.core.cost import cost
from lynceus.core.errors import AdviceError
from lynceus.layers.attention import Attention
from lynceus.layers.mixers import Place, mixer_config
from lynceus.layers.outlook import OutlookAttention, overlap_add, windows


def lively(dim=12, heads=3, **options):
    torch.manual_seed(0)
    layer = OutlookAttention(dim, heads, **options).double()
    with torch.no_grad():
        layer.attn.weight.mul_(5)
    return layer.eval()


def pixel_by_pixel(layer, x):
    """For each output pixel, the sum over the windows that cover it of what they say of it."""
    b, h, w, c = x.shape
    k, s, p, g = layer.kernel, layer.stride, layer.padding, layer.heads
    d = c // g
    v = layer.v(x).reshape(b, h, w, g, d)
    rows, columns = -(-h // s), -(-w // s)
    out = torch.zeros(b, h, w, g, d, dtype=x.dtype)
    for i in range(rows):
        for j in range(columns):
            mean = x[:, i * s : (i + 1) * s, j * s : (j + 1) * s].mean((1, 2))
            matrix = (layer.attn(mean).reshape(b, g, k * k, k * k) * layer.scale).softmax(-1)
            cells = [(i * s - p + t // k, j * s - p + t % k) for t in range(k * k)]
            for to, (r, q) in enumerate(cells):
                if 0 <= r < h and 0 <= q < w:
                    for source, (y, z) in enumerate(cells):
                        if 0 <= y < h and 0 <= z < w:
                            out[:, r, q] += matrix[:, :, to, source, None] * v[:, y, z]
    return layer.proj(out.reshape(b, h, w, c))


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [(7, 5), (8, 8), (9, 6), (1, 1), (1, 4)])
def test_is_the_sum_over_covering_windows(size, stride):
    layer, x = lively(stride=stride), torch.randn(2, *size, 12, dtype=torch.float64)
    assert (layer(x) - pixel_by_pixel(layer, x)).abs().max() < 1e-10
    assert (layer._mix_free_sizes(x) - layer.mix(x)).abs().max() < 1e-12


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 5), st.data(), st.integers(1, 9), st.integers(1, 9))
def test_windows_and_adding_up_are_adjoint(kernel, data, h, w):
    stride = data.draw(st.integers(1, kernel))
    padding = kernel // 2
    layout = (-(-h // stride), -(-w // stride), kernel, stride, padding)
    x = torch.randn(2, h, w, 2, 3, dtype=torch.float64)
    y = torch.randn(2, layout[0], layout[1], 2, kernel, kernel, 3, dtype=torch.float64)
    out = windows(x, layout)
    assert out.shape == y.shape
    assert float((out * y).sum()) == pytest.approx(float((x * overlap_add(y, (h, w), layout)).sum()), abs=1e-9)


@pytest.mark.parametrize("size", [(8, 8), (9, 6)])
def test_uniform_weights_are_two_box_filters(size):
    layer = OutlookAttention(6, 2, stride=1).double()
    torch.nn.init.zeros_(layer.attn.weight)
    torch.nn.init.zeros_(layer.attn.bias)
    for part in (layer.v, layer.proj):
        torch.nn.init.eye_(part.weight)
    torch.nn.init.zeros_(layer.proj.bias)
    x = torch.randn(2, *size, 6, dtype=torch.float64)

    def box(z):
        return F.avg_pool2d(z, 3, 1, 1, count_include_pad=True)

    want = 9 * box(box(x.permute(0, 3, 1, 2))).permute(0, 2, 3, 1)
    assert (layer(x) - want).abs().max() < 1e-13


def test_cost_grows_with_the_area_and_attention_faster():
    def ratio(layer):
        small, large = (cost(layer, torch.empty(1, s, s, 48, device="meta")).macs for s in (28, 56))
        return large / small

    assert ratio(OutlookAttention(48, 2, stride=2)) == pytest.approx(4.0, abs=0.05)
    assert ratio(OutlookAttention(48, 2, stride=1)) == pytest.approx(4.0, abs=0.05)
    assert ratio(Attention(48, 2)) > 6


@pytest.mark.parametrize("stride", [1, 2])
def test_gradients_and_their_gradients(stride):
    layer = lively(4, 2, stride=stride)
    x = torch.randn(1, 3, 2, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, (x,))
    assert torch.autograd.gradgradcheck(layer.mix, (x,), atol=1e-4)
    with torch.no_grad():
        quiet = layer(x)
    torch.testing.assert_close(layer(x), quiet)


def test_as_a_mixer_and_mistakes():
    layer = mixer_config("outlook", {"stride": 2}).build(Place(dim=16, heads=4))
    x = torch.randn(2, 5, 3, 16)
    assert layer(x).shape == x.shape
    with pytest.raises(AdviceError, match="dim=15"):
        OutlookAttention(16, 5)
    with pytest.raises(AdviceError, match="gaps"):
        OutlookAttention(16, 4, kernel=3, stride=4)
