"""Cosine attention in windows: the written formula, its coordinates, other windows, padding, precision; its mixers."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from lynceus.core.errors import AdviceError
from lynceus.layers.mixers import Place, mixer_config
from lynceus.layers.window import from_windows, relative_index, shift_mask, to_windows
from lynceus.layers.window_cosine import WindowCosineAttention, log_coordinates


def lively(layer):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in layer.named_parameters():
            z = torch.randn(p.shape, generator=generator)
            p.copy_(2 + z if "logit_scale" in name else z * (p.shape[-1] ** -0.5 if p.ndim == 2 else 0.3))
    return layer.double().eval()


def written(layer, x):
    """The card, line by line, on a map whose sides are multiples of the window."""
    b, h, w, c = x.shape
    m, g, d = layer.window, layer.heads, c // layer.heads
    parts = to_windows(x, m, layer.shift)
    q, k, v = (parts @ layer.qkv.weight.T).view(-1, m * m, 3, c).unbind(2)
    if layer.q_bias is not None:
        q, v = q + layer.q_bias, v + layer.v_bias
    q, k, v = (t.reshape(-1, m * m, g, d).transpose(1, 2) for t in (q, k, v))
    cosine = F.cosine_similarity(q[:, :, :, None], k[:, :, None], dim=-1)
    scale = torch.exp(torch.minimum(layer.logit_scale, torch.tensor(100.0).log()))
    position = torch.zeros(g, m * m, m * m, dtype=x.dtype)
    unit = (layer.pretrained or m) - 1
    for i in range(m * m):
        for j in range(m * m):
            offset = torch.tensor([i // m - j // m, i % m - j % m], dtype=x.dtype) / unit * 8
            place = offset.sign() * (offset.abs() + 1).log2() / 3
            position[:, i, j] = 16 * torch.sigmoid(layer.cpb_mlp(place))
    logits = cosine * scale + position
    if layer.shift:
        logits = logits + shift_mask(h // m, w // m, m, layer.shift).to(x.dtype).repeat(b, 1, 1)[:, None]
    out = (logits.softmax(-1) @ v).transpose(1, 2).reshape(-1, m * m, c)
    return from_windows(layer.proj(out), (b, h, w), m, layer.shift)


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("pretrained", [0, 2])
@pytest.mark.parametrize("bias", [True, False])
def test_attention_is_the_written_formula(shift, pretrained, bias):
    layer = lively(WindowCosineAttention(12, 3, 3, shift=shift, pretrained=pretrained, qkv_bias=bias))
    assert (layer.q_bias is not None) == bias
    with torch.no_grad():
        layer.logit_scale[0] = 7.0  # above the clamp
        x = torch.randn(2, 6, 9, 12, dtype=torch.float64)
        assert torch.allclose(layer(x), written(layer, x), atol=1e-6)  # coordinates are float32
        single = WindowCosineAttention(12, 3, 3, shift=shift, pretrained=pretrained, qkv_bias=bias).eval()
        single.load_state_dict(layer.state_dict())
        assert torch.allclose(single(x.float()).double(), layer(x), atol=1e-4)


def test_coordinates_are_logarithmic_and_odd():
    table = log_coordinates(5)
    assert table.shape == (9, 9, 2)
    assert torch.equal(table[4, 4], torch.zeros(2))
    assert torch.allclose(table, -table.flip(0, 1))
    assert table[8, 0].tolist() == pytest.approx([math.log2(9) / 3, -math.log2(9) / 3])
    assert torch.equal(log_coordinates(1), torch.zeros(1, 1, 2))  # a window of one cell: no division by zero
    assert torch.isfinite(log_coordinates(4, 1)).all()


@settings(deadline=None, max_examples=20)
@given(st.integers(2, 6), st.integers(1, 4))
def test_a_larger_window_keeps_the_bias_of_shared_offsets(side, times):
    torch.manual_seed(0)
    small = lively(WindowCosineAttention(8, 2, side))
    large = WindowCosineAttention(8, 2, side * times, pretrained=side).double()
    large.load_state_dict(small.state_dict(), strict=True)
    a, b = (layer.table().view(2 * m - 1, 2 * m - 1, 2) for layer, m in ((small, side), (large, side * times)))
    middle, reach = side * times - 1, side - 1
    shared = slice(middle - reach, middle + reach + 1)
    assert (a - b[shared, shared]).abs().max() < 1e-6


def test_padding_comes_before_the_roll():
    layer = lively(WindowCosineAttention(8, 2, 4, shift=2))
    x = torch.randn(2, 5, 7, 8, dtype=torch.float64)
    wanted = layer(F.pad(x, (0, 0, 0, 1, 0, 3)))[:, :5, :7]
    assert torch.allclose(layer(x), wanted, atol=1e-12)


def test_zero_queries_and_one_cell_are_finite():
    layer = lively(WindowCosineAttention(8, 2, 1, qkv_bias=False)).float()
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            assert torch.isfinite(layer(torch.zeros(1, 3, 2, 8))).all()


def test_cosines_stay_in_float32_under_autocast():
    layer = lively(WindowCosineAttention(8, 2, 4)).float()
    x = torch.randn(1, 4, 4, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        q, k, v = layer.heads_of(to_windows(x, 4))
        assert (q.dtype, k.dtype, v.dtype) == (torch.float32, torch.float32, torch.bfloat16)
        assert torch.allclose(k.norm(dim=-1), torch.ones(1), atol=1e-5)
        assert torch.allclose(layer(x).float(), layer.double()(x.double()).float(), atol=0.1)


def test_few_windows_at_a_time_change_nothing(monkeypatch):
    layer = lively(WindowCosineAttention(8, 2, 4, shift=2)).float()
    x = torch.randn(3, 12, 20, 8)
    with torch.no_grad():
        whole = layer(x)
        monkeypatch.setattr("lynceus.layers.window.PIECE", 4 * 16 * 24 * 4 // torch.get_num_threads())
        assert torch.allclose(layer(x), whole, atol=1e-6)


def test_a_listener_on_the_projection_is_called():
    layer = lively(WindowCosineAttention(8, 2, 4)).float()
    x, heard = torch.randn(1, 4, 4, 8), []
    with torch.no_grad():
        quiet = layer(x)
        layer.qkv.register_forward_hook(lambda *_: heard.append(1))
        layer.cpb_mlp[0].register_forward_hook(lambda *_: heard.append(2))
        assert torch.allclose(layer(x), quiet, atol=1e-6)
    assert sorted(heard) == [1, 2]


def test_relative_index_is_shared_with_swin():
    assert torch.equal(WindowCosineAttention(8, 2, 3).relative_index, relative_index(3).flatten())


# mixers ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["window", "window_mlp", "window_cosine", "conv_projection"])
@pytest.mark.parametrize("size", [(8, 8), (5, 11), (1, 1)])
def test_mixers_keep_any_map(name, size):
    mixer = mixer_config(name).build(Place(dim=24, heads=3, grid=(14, 14), index=1, depth=4)).eval()
    x = torch.randn(2, *size, 24)
    y = mixer(x)
    assert y.shape == x.shape
    assert torch.isfinite(y).all()


def test_windows_fit_their_place():
    even = mixer_config("window").build(Place(dim=8, heads=2, grid=(14, 14), index=0))
    odd = mixer_config("window_cosine", {"window": 4}).build(Place(dim=8, heads=2, grid=(14, 14), index=3))
    small = mixer_config("window_mlp").build(Place(dim=8, heads=2, grid=(3, 9), index=1))
    assert (even.window, even.shift) == (7, 0)
    assert (odd.window, odd.shift) == (4, 2)
    assert (small.window, small.shift) == (3, 0)
    with pytest.raises(AdviceError, match="multiple"):
        mixer_config("window_cosine", {"heads": 3}).build(Place(dim=8))
