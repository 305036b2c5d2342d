"""Gated positional attention: the formula, the convolution it starts as, rectangles, gradients, what it costs."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel

from lynceus.core.cost import cost
from lynceus.core.errors import AdviceError
from lynceus.layers.gated_position import GatedPositionAttention, distances, non_locality
from lynceus.layers.mixers import Place, mixer_config


def lively(dim=24, heads=4, seed=0, **options):
    """Float64 with weights of every kind away from their start."""
    torch.manual_seed(seed)
    layer = GatedPositionAttention(dim, heads, **options).double()
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(0.3 * torch.randn(p.shape, dtype=p.dtype))
    return layer.eval()


def written_out(layer, x):
    """The card's formula, query by query, with the table of all pairs."""
    b, h, w, c = x.shape
    g, d = layer.heads, c // layer.heads
    cells = [(r, s) for r in range(h) for s in range(w)]
    q, k = layer.qk(x.reshape(b, -1, c)).reshape(b, h * w, 2, g, d).unbind(2)
    v = layer.v(x.reshape(b, -1, c)).reshape(b, h * w, g, d)
    gate = torch.sigmoid(layer.gating_param)
    out = torch.zeros(b, h * w, g, d, dtype=x.dtype)
    for i, (row, column) in enumerate(cells):
        steps = torch.tensor(
            [[s - column, r - row, (s - column) ** 2 + (r - row) ** 2] for r, s in cells], dtype=x.dtype
        )
        position = layer.pos_proj(steps).softmax(0)  # j g
        for n in range(b):
            content = torch.einsum("gd,jgd->jg", q[n, i], k[n]).mul(layer.scale).softmax(0)
            mixed = (1 - gate) * content + gate * position
            out[n, i] = torch.einsum("jg,jgd->gd", mixed / mixed.sum(0), v[n])
    return layer.proj(out.reshape(b, h, w, c))


@settings(deadline=None, max_examples=12)
@given(st.integers(1, 2), st.integers(1, 6), st.integers(1, 6), st.integers(1, 5), st.booleans())
def test_is_the_formula_on_any_rectangle(b, h, w, heads, bias):
    layer = lively(6 * heads, heads, qkv_bias=bias)
    x = torch.randn(b, h, w, 6 * heads, dtype=torch.float64)
    torch.testing.assert_close(layer(x), written_out(layer, x), atol=1e-10, rtol=1e-9)


@pytest.mark.parametrize("size", [(5, 7), (1, 9), (8, 8)])
def test_table_of_attention_is_what_forward_applies(size):
    layer, x = lively(), torch.randn(2, *size, 24, dtype=torch.float64)
    table = layer.attention(x)
    assert table.shape == (2, 4, size[0] * size[1], size[0] * size[1])
    torch.testing.assert_close(table.sum(-1), torch.ones_like(table[..., 0]))
    v = layer.v(x).reshape(2, -1, 4, 6).transpose(1, 2)
    out = layer.proj((table @ v).transpose(1, 2).reshape(x.shape))
    torch.testing.assert_close(layer(x), out, atol=1e-10, rtol=1e-9)


def test_dropout_of_attention_acts_in_training_alone():
    layer, x = lively(attn_drop=0.5), torch.randn(2, 4, 4, 24, dtype=torch.float64)
    quiet = layer(x)
    torch.manual_seed(0)
    assert not torch.allclose(layer.train()(x), quiet)
    layer.attn_drop = 1e-12
    torch.testing.assert_close(layer(x), quiet)


# the start --------------------------------------------------------------------------------------------
def test_fresh_values_are_the_identity_and_gates_one():
    layer = GatedPositionAttention(36, 9)
    assert torch.equal(layer.v.weight, torch.eye(36))
    assert torch.equal(layer.gating_param, torch.ones(9))
    assert float(layer.gate[0].detach()) == pytest.approx(0.731, abs=1e-3)


@pytest.mark.parametrize(("heads", "side"), [(1, 1), (4, 2), (9, 3), (11, 3), (16, 4)])
def test_heads_look_at_a_square_of_offsets(heads, side):
    layer = GatedPositionAttention(4 * heads, heads, locality=2.0)
    centre = (side - 1) / 2
    for h1 in range(side):
        for h2 in range(side):
            w = layer.pos_proj.weight[h1 + side * h2]
            assert w.tolist() == [4 * (h2 - centre), 4 * (h1 - centre), -2]
            found = layer.centres()[h1 + side * h2].tolist()
            assert found == pytest.approx([h2 - centre, h1 - centre])
    assert torch.allclose(layer.spans()[: side * side], torch.tensor(0.5))
    rest = layer.pos_proj.weight[side * side :]
    assert (rest[:, 2] > -1).all()  # random, not localised


def shifted(x, dx, dy):
    """y[r, s] = x[r + dy, s + dx]; what comes from outside is nan."""
    out = torch.full_like(x, math.nan)
    h, w = x.shape[1:3]
    out[:, max(0, -dy) : h - max(0, dy), max(0, -dx) : w - max(0, dx)] = x[
        :, max(0, dy) : h - max(0, -dy), max(0, dx) : w - max(0, -dx)
    ]
    return out


@pytest.mark.parametrize(("strength", "tolerance"), [(50.0, 1e-5), (10.0, 1e-4)])
@pytest.mark.parametrize("size", [(8, 8), (6, 9)])
def test_is_a_convolution_at_high_strength(strength, tolerance, size):
    torch.manual_seed(0)
    layer = GatedPositionAttention(36, 9, locality=strength).eval()
    torch.nn.init.constant_(layer.gating_param, 30.0)
    x = torch.randn(2, *size, 36)
    parts = []
    for p in range(9):
        dx, dy = (round(v) for v in layer.centres()[p].tolist())
        assert (dx, dy) == (p // 3 - 1, p % 3 - 1)
        parts.append(shifted(x[..., 4 * p : 4 * p + 4], dx, dy))
    want = layer.proj(torch.cat(parts, -1))[:, 1:-1, 1:-1]
    assert (layer(x)[:, 1:-1, 1:-1] - want).abs().max() < tolerance


def test_distances_at_the_default_strength():
    layer = GatedPositionAttention(36, 9).eval()
    torch.nn.init.constant_(layer.gating_param, 30.0)
    far = non_locality(layer.attention(torch.randn(2, 8, 8, 36)), 8, 8).detach()
    for p in range(9):
        steps = abs(p // 3 - 1) + abs(p % 3 - 1)
        assert float(far[p]) == pytest.approx({2: 1.39, 1: 1.10, 0: 0.73}[steps], abs=0.02)


def test_four_heads_look_between_cells():
    layer = GatedPositionAttention(16, 4, locality=50.0)
    torch.nn.init.constant_(layer.gating_param, 30.0)
    table = layer.attention(torch.randn(1, 6, 6, 16))[0]
    for p in range(4):
        dx, dy = layer.centres()[p].tolist()
        assert abs(dx) == abs(dy) == 0.5
        row = table[p, 2 * 6 + 2].view(6, 6)
        top, left = 2 + math.floor(dy), 2 + math.floor(dx)
        assert torch.allclose(row[top : top + 2, left : left + 2], torch.full((2, 2), 0.25), atol=1e-5)


# other properties -------------------------------------------------------------------------------------
def test_distances():
    d = distances(3, 4)
    assert d[0, 1 * 4 + 1] == pytest.approx(math.sqrt(2))
    assert d[2, 2 * 4] == pytest.approx(math.hypot(2, 2))
    assert torch.equal(d, d.T)


def test_gradients_and_their_gradients():
    layer = lively(8, 2)
    x = torch.randn(1, 3, 2, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, (x,))
    with sdpa_kernel(SDPBackend.MATH):  # torch's fused kernels have no second derivative
        out = layer(x).square().sum()
        grads = torch.autograd.grad(out, [x, layer.pos_proj.weight, layer.gating_param], create_graph=True)
        assert all(g.abs().sum() > 0 for g in grads)
        torch.autograd.grad(sum(g.square().sum() for g in grads), layer.pos_proj.weight)


def test_position_needs_no_table_of_all_pairs():
    """Multiply-adds of position per cell grow with the side, not with the area."""
    layer = GatedPositionAttention(24, 4)

    def position(side):
        x = torch.empty(1, side, side, 24, device="meta")
        whole = cost(layer, x).macs
        content = 2 * side**4 * 24 + 4 * side**2 * 24 * 24
        return whole - content

    assert position(32) / position(16) == pytest.approx(8.0, rel=0.02)
    assert layer.state_dict().keys() == {
        "qk.weight", "v.weight", "proj.weight", "proj.bias", "pos_proj.weight", "pos_proj.bias", "gating_param"
    }  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtypes_and_far_distances(dtype):
    """Squared distances beyond what half precision counts do not spoil position."""
    layer = GatedPositionAttention(16, 4).eval()
    x = torch.randn(1, 2, 40, 16)
    want = layer(x)
    got = layer.to(dtype)(x.to(dtype))
    assert got.dtype == dtype
    assert (got.float() - want).abs().max() < (0.05 if dtype == torch.bfloat16 else 1e-5) * want.std() * 4


def test_as_a_mixer():
    layer = mixer_config("gated_position", {"locality": 3.0}).build(Place(dim=16, heads=4))
    x = torch.randn(2, 5, 3, 16)
    assert layer(x).shape == x.shape
    assert layer.locality == 3.0
    with pytest.raises(AdviceError, match="dim=15"):
        GatedPositionAttention(16, 5)
