"""Halo attention: a loop over query pixels, its special cases, ragged maps, linear cost, and timm's layer."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.layers.halo_attn import HaloAttn
from torch import nn

from lynceus.core.cost import cost
from lynceus.core.errors import AdviceError
from lynceus.layers.halo import HaloAttention, HaloMixer
from lynceus.layers.mixers import Place, mixer_config


def lively(layer):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in layer.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * p.shape[-1] ** -0.5 if p.ndim == 2 else p)
            if p.ndim != 2:
                p.copy_(torch.randn(p.shape, generator=generator) * (p[0].numel() ** -0.5 if p.ndim > 1 else 0.3))
    return layer.double().eval()


def by_pixels(layer, x):
    """One query after the other: its block's window, the position rows by index difference, a softmax."""
    b = x.shape[0]
    g, dk, dv, m, halo, step = layer.heads, layer.key_dim, layer.value_dim, layer.block, layer.halo, layer.step
    q = F.conv2d(x.permute(0, 3, 1, 2), layer.q.weight, layer.q.bias, step)
    kv = F.conv2d(x.permute(0, 3, 1, 2), layer.kv.weight, layer.kv.bias).unflatten(1, (g, dk + dv))
    far = halo + m
    kv = F.pad(kv.flatten(0, 1), (far, far, far, far)).unflatten(0, (b, g))  # room for every window
    side, window = m // step, layer.window
    tables = layer.pos_embed.height_rel, layer.pos_embed.width_rel
    out = torch.zeros(b, q.shape[2], q.shape[3], g * dv, dtype=x.dtype)
    for r in range(q.shape[2]):
        for c in range(q.shape[3]):
            top, left = r // side * m - halo + far, c // side * m - halo + far
            seen = kv[:, :, :, top : top + window, left : left + window]
            query = q[:, :, r, c].unflatten(1, (g, dk))
            place = torch.arange(window)
            rows = query @ tables[0][place - r % side + window - 1].T
            columns = query @ tables[1][place - c % side + window - 1].T
            position = rows[..., :, None] + columns[..., None, :]
            logits = torch.einsum("bgd,bgdij->bgij", query, seen[:, :, :dk]) * dk**-0.5
            position = position * dk**-0.5 if layer.scale_position else position
            weights = (logits + position).flatten(2).softmax(-1).unflatten(2, (window, window))
            out[:, r, c] = torch.einsum("bgij,bgdij->bgd", weights, seen[:, :, dk:]).flatten(1)
    if layer.pooled:
        out = F.avg_pool2d(out.permute(0, 3, 1, 2), 2, ceil_mode=True, count_include_pad=False).permute(0, 2, 3, 1)
    return out


CASES = [
    {"block_size": 4, "halo_size": 1},
    {"block_size": 4, "halo_size": 3, "stride": 2},
    {"block_size": 2, "halo_size": 2, "qkv_bias": True},
    {"block_size": 3, "halo_size": 1, "stride": 2},
    {"block_size": 4, "halo_size": 2, "stride": 2, "avg_down": True, "qkv_bias": True},
    {"block_size": 5, "halo_size": 0, "scale_position": True},
    {"block_size": 4, "halo_size": 1, "out": 20, "head_dim": 3, "qkv_bias": True},
]


@pytest.mark.parametrize("options", CASES, ids=str)
@pytest.mark.parametrize("size", [(8, 12), (7, 5), (1, 3)], ids=str)
def test_equals_the_loop_over_query_pixels(options, size):
    layer = lively(HaloAttention(8, heads=2, **options))
    x = torch.randn(2, *size, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    want = by_pixels(layer, x)
    for grad in (False, True):  # windows are taken in two ways
        with torch.set_grad_enabled(grad):
            got = layer(x)
            assert got.shape[1:3] == tuple(math.ceil(side / layer.stride) for side in size)
            assert got.shape == want.shape
            assert (got - want).abs().max() < 1e-10


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 11), st.integers(1, 11), st.integers(1, 5), st.integers(0, 3), st.sampled_from([1, 2]))
def test_inference_kernels_agree(h, w, block, halo, stride):
    layer = lively(HaloAttention(8, heads=2, block_size=block, halo_size=halo, stride=stride))
    x = torch.randn(2, h, w, 8, dtype=torch.float64)
    with torch.no_grad():
        want = layer(x)
        assert (layer.float()(x.float()) - want).abs().max() < 1e-4 * max(float(want.abs().max()), 1.0)


def test_in_pieces_is_the_same(monkeypatch):
    layer = lively(HaloAttention(8, heads=2, block_size=2, halo_size=1)).float()
    x = torch.randn(3, 10, 6, 8)
    with torch.no_grad():
        whole = layer(x)
        monkeypatch.setattr("lynceus.layers.halo.PIECE", 1)
        assert torch.allclose(layer(x), whole, atol=1e-6)


def windows_attention(layer, x, m):
    """Softmax attention inside windows that do not overlap, with the layer's position terms."""
    b, h, w, _ = x.shape
    g, dk, dv = layer.heads, layer.key_dim, layer.value_dim
    parts = x.reshape(b, h // m, m, w // m, m, -1).transpose(2, 3).reshape(-1, m * m, x.shape[-1])
    q = parts @ layer.q.weight[:, :, 0, 0].T
    kv = (parts @ layer.kv.weight[:, :, 0, 0].T).unflatten(-1, (g, dk + dv))
    q, k, v = q.unflatten(-1, (g, dk)).transpose(1, 2), kv[..., :dk].transpose(1, 2), kv[..., dk:].transpose(1, 2)
    r, c = torch.arange(m).repeat_interleave(m), torch.arange(m).repeat(m)
    table = layer.pos_embed.height_rel[r - r[:, None] + m - 1] + layer.pos_embed.width_rel[c - c[:, None] + m - 1]
    logits = q @ k.transpose(-1, -2) * dk**-0.5 + torch.einsum("ngqd,qkd->ngqk", q, table)
    y = (logits.softmax(-1) @ v).transpose(1, 2).reshape(b, h // m, w // m, m, m, g * dv)
    return y.transpose(2, 3).reshape(b, h, w, g * dv)


def test_without_halo_it_is_window_attention_and_with_one_block_global_attention():
    x = torch.randn(2, 8, 8, 8, dtype=torch.float64)
    for block in (4, 8):  # 8: the map is one block
        layer = lively(HaloAttention(8, heads=2, block_size=block, halo_size=0))
        with torch.no_grad():
            assert (layer(x) - windows_attention(layer, x, block)).abs().max() < 1e-10


def test_a_full_halo_sees_everything():
    """With h at least the map, every query sees all cells: changing any cell changes all outputs."""
    layer = lively(HaloAttention(8, heads=2, block_size=2, halo_size=6))
    x = torch.randn(1, 6, 6, 8, dtype=torch.float64)
    y = x.clone()
    y[0, 5, 0] += 1
    near = lively(HaloAttention(8, heads=2, block_size=2, halo_size=1))
    with torch.no_grad():
        assert ((layer(x) - layer(y)).abs().amax(-1) > 1e-6).all()
        seen = (near(x) - near(y)).abs().amax(-1) > 0
        assert seen[0, 4:, :2].all()
        assert not seen[0, :2].any()


@pytest.mark.parametrize(
    ("options", "size"),
    [
        ({"dim": 24, "dim_out": 48, "stride": 2, "num_heads": 4, "avg_down": True, "qkv_bias": True}, (16, 24)),
        ({"dim": 32, "stride": 2, "block_size": 7, "halo_size": 2, "num_heads": 4, "scale_pos_embed": True}, (14, 28)),
        ({"dim": 24, "dim_out": 48, "num_heads": 4, "qk_ratio": 0.5, "block_size": 4, "halo_size": 1}, (8, 12)),
    ],
    ids=str,
)
def test_timms_layer(options, size):
    from lynceus.reengineer.keys.halonet import build

    theirs = lively(HaloAttn(**options))
    ours = build(options).double()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, options["dim"], *size, dtype=torch.float64)
    with torch.no_grad():
        assert (ours(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2) - theirs(x)).abs().max() < 1e-10


def test_cost_and_memory_are_linear_in_the_map():
    layer = HaloAttention(32, heads=2, block_size=8, halo_size=3)
    small, large = (cost(layer, torch.empty(1, side, side, 32, device="meta")) for side in (64, 128))
    assert large.macs / small.macs == pytest.approx(4.0, abs=0.02)
    assert large.peak_bytes / small.peak_bytes == pytest.approx(4.0, abs=0.05)


@pytest.mark.parametrize(("block", "halo", "times"), [(14, 2, 1.65), (8, 4, 4.0), (8, 3, 3.06), (10, 3, 2.56)])
def test_a_block_shares_its_window(block, halo, times):
    """Keys and values gathered per query: (window / block) squared, not window squared."""
    layer = HaloAttention(8, heads=2, block_size=block, halo_size=halo)
    with torch.no_grad():
        k, v = layer.to_windows(torch.randn(1, 2 * block, 2 * block, 16), 2, 2)
    assert k.shape[0] * k.shape[2] / (2 * block) ** 2 == pytest.approx(times, abs=0.01)
    assert v.shape == k.shape


def test_gradients_are_those_of_the_loop():
    layer = lively(HaloAttention(8, heads=2, block_size=4, halo_size=1, stride=2, qkv_bias=True))
    x = torch.randn(1, 6, 7, 8, dtype=torch.float64)
    g = torch.randn(1, 3, 4, 8, dtype=torch.float64)
    wanted = torch.autograd.grad((by_pixels(layer, x) * g).sum(), list(layer.parameters()))
    for a, b in zip(torch.autograd.grad((layer(x) * g).sum(), list(layer.parameters())), wanted):
        assert (a - b).abs().max() < 1e-10


def test_the_mixer_takes_its_place():
    config = mixer_config("halo", {"block_size": 4, "halo_size": 1})
    assert config == HaloMixer(block_size=4, halo_size=1)
    mixer = config.build(Place(dim=24, heads=3))
    assert isinstance(mixer.proj, nn.Linear)
    assert mixer(torch.randn(2, 5, 9, 24)).shape == (2, 5, 9, 24)


def test_bad_options_advise():
    with pytest.raises(AdviceError, match=r"e\.g\. 8"):
        HaloAttention(10, heads=4)
    with pytest.raises(AdviceError, match="stride 1 or 2"):
        HaloAttention(8, heads=4, stride=3)
    with pytest.raises(AdviceError, match="at least 1"):
        HaloAttention(8, heads=4, block_size=0)
