"""Convolutional projections: the written formula with and without tokens, all kinds, cost, and folded batch norms."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from lynceus.core.errors import AdviceError
from lynceus.layers.conv_projection import ConvProjection, ConvProjectionMixer
from lynceus.layers.mixers import Place


def lively(layer):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in [*layer.named_parameters(), *layer.named_buffers()]:
            if p.is_floating_point():
                z = torch.randn(p.shape, generator=generator)
                p.copy_(1 + 0.2 * z.abs() if "var" in name else z / max(p[0].numel(), 1) ** 0.5 if p.ndim > 1 else z)
    return layer.double().eval()


def written(layer, x, token=None):
    b, c = x.shape[0], x.shape[3]
    image = x.permute(0, 3, 1, 2)
    parts = []
    for projection, linear in (
        (layer.conv_proj_q, layer.proj_q),
        (layer.conv_proj_k, layer.proj_k),
        (layer.conv_proj_v, layer.proj_v),
    ):
        y = image
        if hasattr(projection, "conv"):
            k, bn = projection.conv, projection.bn
            y = F.conv2d(y, k.weight, None, k.stride, k.padding, groups=c)
            y = F.batch_norm(y, bn.running_mean, bn.running_var, bn.weight, bn.bias)
        elif hasattr(projection, "avg"):
            a = projection.avg
            y = F.avg_pool2d(y, a.kernel_size, a.stride, a.padding, ceil_mode=True)
        y = y.flatten(2).transpose(1, 2)
        y = y if token is None else torch.cat([token, y], 1)
        parts.append(linear(y).view(b, -1, layer.heads, c // layer.heads).transpose(1, 2))
    q, k, v = parts
    y = ((q @ k.transpose(-1, -2)) * c**-0.5).softmax(-1) @ v  # the full width, not the head's
    return layer.proj(y.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("projection", ["dw_bn", "avg", "linear"])
@pytest.mark.parametrize("stride", [1, 2, 3])
@settings(deadline=None, max_examples=8)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 2))
def test_attention_is_the_written_formula(projection, stride, h, w, extra):
    layer = lively(ConvProjection(12, 3, projection=projection, stride_kv=stride))
    x = torch.randn(2, h, w, 12, dtype=torch.float64)
    assert torch.allclose(layer(x), written(layer, x).view(x.shape), atol=1e-10)
    tokens = torch.cat([torch.randn(2, extra, 12, dtype=torch.float64), x.flatten(1, 2)], 1)
    assert torch.allclose(layer(tokens, (h, w)), written(layer, x, tokens[:, :extra]), atol=1e-10)
    shortcut = torch.randn_like(tokens)
    assert torch.allclose(layer(tokens, (h, w), residual=shortcut), layer(tokens, (h, w)) + shortcut, atol=1e-12)


def test_folded_batch_norms_agree():
    layer = lively(ConvProjection(16, 2)).float()
    x = torch.randn(2, 9, 7, 16)
    unfolded = layer(x)  # with gradients nothing is folded
    with torch.no_grad():
        assert (layer(x) - unfolded).abs().max() < 1e-5
        layer.conv_proj_k.bn.running_mean.add_(1.0)
        exact = ConvProjection(16, 2).eval()
        exact.load_state_dict(layer.state_dict())
        assert (layer(x) - exact.double()(x.double())).abs().max() < 1e-4  # and what was folded is not stale


@pytest.mark.parametrize("token", [0, 1])
def test_keys_of_stride_two_cost_a_quarter(token):
    """Counted products of attention itself, within 3%; the token's own row and column come on top."""
    found = []
    for stride in (1, 2):
        layer = ConvProjection(64, 2, stride_kv=stride).eval()
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            layer(torch.randn(1, 28 * 28 + token, 64), (28, 28))
        found.append(counter.get_flop_counts()["Global"][torch.ops.aten.bmm])
    assert found[1] / found[0] == pytest.approx(0.25, rel=0.03)
    n = 28 * 28
    assert found[1] == 2 * 2 * (n + token) * (n // 4 + token) * 64


def test_mistakes_advise():
    with pytest.raises(AdviceError, match="multiple"):
        ConvProjection(10, 3)
    with pytest.raises(AdviceError, match="dw_bn"):
        ConvProjection(12, 3, projection="conv")
    with pytest.raises(AdviceError, match="map's size"):
        ConvProjection(12, 3, stride_q=2)


def test_mixer_takes_its_options():
    made = ConvProjectionMixer(kernel=5, stride_kv=1, projection="avg", qkv_bias=False).build(Place(dim=12, heads=2))
    assert made.proj_q.bias is None
    assert made.conv_proj_k.avg.kernel_size == 5
    assert made(torch.randn(1, 5, 7, 12)).shape == (1, 5, 7, 12)
