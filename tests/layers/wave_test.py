"""Wave and two-field mixers: rotation, the strongest channel, gradients, and any size."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from lynceus.core.errors import AdviceError
from lynceus.layers.wave import TwoFieldMixer, WaveMixer, rotated, rotated_by_reals


def lively(module, seed=1):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) / (p[0].numel() ** 0.5 if p.ndim > 1 else 2.0))
    return module.eval()


@pytest.mark.parametrize("depthwise", [False, True])
def test_two_fields_written_out(depthwise):
    """1x1, decomposition, 3x3 and dilated 3x3 twice, squeeze-and-excitation, 1x1: channels first, norms by hand."""
    mixer = lively(TwoFieldMixer(16, depthwise=depthwise)).double()
    x = torch.randn(2, 7, 9, 16, dtype=torch.float64)
    groups = 8 if depthwise else 1

    def norm(y, bn):
        y = (y - bn.running_mean.view(-1, 1, 1)) / (bn.running_var.view(-1, 1, 1) + 1e-6).sqrt()
        return y * bn.weight.view(-1, 1, 1) + bn.bias.view(-1, 1, 1)

    def squeeze(y, se):
        s = F.relu(y.mean((2, 3)) @ se.fc1.weight.T + se.fc1.bias) @ se.fc2.weight.T + se.fc2.bias
        return y * s.sigmoid()[:, :, None, None]

    with torch.no_grad():
        u = F.conv2d(x.permute(0, 3, 1, 2), mixer.proj_in.weight[:, :, None, None], mixer.proj_in.bias)
        u = u + mixer.gamma * (u - u.mean((2, 3), keepdim=True))
        high = F.gelu(norm(F.conv2d(u, mixer.h_conv.conv.weight, padding=1, groups=groups), mixer.h_conv.norm))
        low = F.conv2d(u, mixer.l_conv[0].conv.weight, padding=2, dilation=2, groups=groups)
        low = F.conv2d(low, mixer.l_conv[1].conv.weight, padding=2, dilation=2, groups=groups)
        low = F.gelu(norm(low, mixer.l_conv[1].norm))
        y = torch.cat([squeeze(high, mixer.h_attn), squeeze(low, mixer.l_attn)], 1).permute(0, 2, 3, 1)
        wanted = y @ mixer.proj_out.weight.T + mixer.proj_out.bias
        assert (mixer(x) - wanted).abs().max() < 1e-12


def test_rotation_is_the_complex_product_and_keeps_the_norm_of_pairs():
    x = torch.randn(2, 5, 7, 12, dtype=torch.float64)
    z = torch.randn(6, 2, dtype=torch.float64)
    product = torch.view_as_complex(x.unflatten(-1, (-1, 2))) * torch.view_as_complex(z)
    assert (rotated(x, z) - torch.view_as_real(product).flatten(-2)).abs().max() < 1e-12
    assert (rotated_by_reals(x.unflatten(-1, (-1, 2)), z) - torch.view_as_real(product)).abs().max() < 1e-12
    angle = torch.linspace(0, 2 * math.pi, 6, dtype=torch.float64)
    turned = rotated(x, torch.stack([angle.cos(), angle.sin()], -1))
    norms = [v.unflatten(-1, (-1, 2)).norm(dim=-1) for v in (x, turned)]
    assert (norms[0] - norms[1]).abs().max() < 1e-12
    assert (turned - x).abs().max() > 0.1
    still = torch.tensor([[1.0, 0.0]], dtype=torch.float64).expand(6, 2)
    assert (rotated(x, still) - x).abs().max() < 1e-12


def test_rotation_stays_in_float32():
    x, z = torch.randn(4, 8), torch.randn(4, 2)
    half = rotated(x.bfloat16(), z)
    assert half.dtype == torch.bfloat16
    assert torch.equal(half, rotated(x.bfloat16().float(), z).bfloat16())


def test_the_strongest_channel_of_each_cell_is_added():
    mixer = lively(WaveMixer(8, ratio=2)).double()
    x = torch.randn(1, 3, 4, 8, dtype=torch.float64)
    with torch.no_grad():
        t, a = F.gelu(mixer.theta(x)), mixer.proj(x)
        f = mixer.aggregate(x)
        for r in range(3):
            for s in range(4):
                i = int(x[0, r, s].argmax())
                assert torch.allclose(f[0, r, s], a[0, r, s] * t[0, r, s] + a[0, r, s, i] * t[0, r, s, i], atol=1e-12)
        flat = torch.zeros(1, 2, 2, 8, dtype=torch.float64)  # a tie: the lowest index
        t, a = F.gelu(mixer.theta(flat)), mixer.proj(flat)
        assert torch.allclose(mixer.aggregate(flat), a * t + a[..., :1] * t[..., :1], atol=1e-12)


def test_gradients_pass_through_the_peak_and_not_through_its_place():
    torch.manual_seed(0)
    mixer = lively(WaveMixer(6, ratio=2)).double()
    order = torch.stack([torch.randperm(6) for _ in range(12)]).view(1, 3, 4, 6)  # far from ties
    x = (order.double() + 0.1 * torch.rand(1, 3, 4, 6, dtype=torch.float64)).requires_grad_()
    assert torch.autograd.gradcheck(mixer, (x,))
    mixer.zero_grad()
    with (
        torch.no_grad()
    ):  # channel 2 is the strongest everywhere; output 11 of f depends on theta's row 2 by the peak alone
        x[..., 2] = 9.0
    mixer.aggregate(x)[..., 11].sum().backward()
    assert mixer.theta.weight.grad[2].abs().sum() > 0
    assert mixer.theta.weight.grad[3].abs().sum() == 0


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 3), st.integers(1, 9), st.integers(1, 9), st.booleans(), st.sampled_from([2, 3, 4]))
def test_any_size_and_inference_agrees(b, h, w, depthwise, ratio):
    x = torch.randn(b, h, w, 16, generator=torch.Generator().manual_seed(0))
    for mixer in (TwoFieldMixer(16, depthwise=depthwise), WaveMixer(16, ratio=ratio, depthwise=depthwise)):
        lively(mixer)
        y = mixer(x).detach()
        with torch.no_grad():
            lean = mixer(x)
        assert y.shape == x.shape
        assert (lean - y).abs().max() <= 1e-5 * max(float(y.abs().max()), 1e-3)


def test_batch_norms_have_the_authors_eps():
    modules = [*TwoFieldMixer(16).modules(), *WaveMixer(16).modules()]
    assert {m.eps for m in modules if isinstance(m, nn.BatchNorm2d)} == {1e-6}


def test_mistakes_advise():
    with pytest.raises(AdviceError, match="try 16"):
        TwoFieldMixer(12)
    with pytest.raises(AdviceError, match="at least 2"):
        WaveMixer(16, ratio=1)
