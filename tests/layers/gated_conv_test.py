"""Gated convolution: its order, reach and cost, at any size, and in the place of attention and of a 3x3."""

import itertools

import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import lynceus
from lynceus.core.cost import cost
from lynceus.core.errors import AdviceError
from lynceus.layers.gated_conv import GatedConv, GatedConv2d, GatedConvMixer, widths
from lynceus.layers.mixers import Place, mixer_config


def lively(module, seed=1):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) / max(p[0].numel(), 4) ** 0.5)
    return module


@pytest.mark.parametrize("order", [1, 2, 3, 4, 5])
def test_order_n_is_a_polynomial_of_degree_n_plus_one(order):
    mixer = lively(GatedConv(32, order=order)).double()
    for name, p in mixer.named_parameters():
        if name.endswith("bias"):
            nn.init.zeros_(p)
    x, t = torch.randn(2, 9, 11, 32, dtype=torch.float64), 1.7
    with torch.no_grad():
        once, scaled = mixer(x), mixer(t * x)
    assert (scaled - t ** (order + 1) * once).abs().max() <= 1e-10 * scaled.abs().max()
    assert (scaled - t**order * once).abs().max() > 0.1 * scaled.std()


def test_written_out_channels_first():
    """The paper's formula with plain 1x1 and depthwise convolutions, order 4."""
    mixer = lively(GatedConv(48, order=4, scale=1 / 3)).double()
    x = torch.randn(2, 10, 7, 48, dtype=torch.float64)

    def conv(layer, x):
        return F.conv2d(x, layer.weight[:, :, None, None], layer.bias)

    dims = [6, 12, 24, 48]
    p, q = conv(mixer.proj_in, x.permute(0, 3, 1, 2)).split([6, sum(dims)], dim=1)
    gates = (F.conv2d(q, mixer.dwconv.weight, mixer.dwconv.bias, padding=3, groups=sum(dims)) / 3).split(dims, dim=1)
    y = p * gates[0]
    for layer, gate in zip(mixer.pws, gates[1:]):
        y = conv(layer, y) * gate
    y = conv(mixer.proj_out, y).permute(0, 2, 3, 1)
    assert (mixer(x) - y).abs().max() < 1e-12 * max(1, y.abs().max())


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 3), st.integers(1, 12), st.integers(1, 12), st.integers(1, 4), st.booleans())
def test_any_size_and_inference_agrees(b, h, w, order, is_global):
    torch.manual_seed(0)
    mixer = lively(GatedConv(16, order=order, table=(4, 3) if is_global else None, scale=0.5))
    x = torch.randn(b, h, w, 16)
    y = mixer(x)
    with torch.no_grad():
        lean = mixer(x)
    assert y.shape == x.shape
    assert (lean - y).abs().max() <= 1e-5 * max(float(y.detach().abs().max()), 1e-3)


def test_seven_by_seven_sees_its_neighbourhood_and_the_global_filter_everything():
    x = torch.randn(1, 15, 17, 16, dtype=torch.float64)
    moved = x.clone()
    moved[:, 0, 0] += 1.0
    near = lively(GatedConv(16, order=3)).double()
    far = lively(GatedConv(16, order=3, table=(15, 9))).double()
    with torch.no_grad():
        changed = (near(moved) - near(x)).abs().amax(-1)[0] > 0
        everywhere = (far(moved) - far(x)).abs().amax(-1)[0]
    assert changed[:4, :4].all()
    assert not changed[4:].any()
    assert not changed[:, 4:].any()
    assert everywhere.min() > 0


@pytest.mark.parametrize("dim", [64, 256])
def test_order_costs_little(dim):
    h, w, counts = 6, 5, {}
    for order in (2, 3, 4, 5):
        dims = widths(dim, order)
        formula = h * w * (3 * dim**2 + sum(a * b for a, b in itertools.pairwise(dims)) + 49 * sum(dims))
        counts[order] = cost(GatedConv(dim, order=order), torch.empty(1, h, w, dim)).macs
        assert counts[order] == formula
    growth = counts[5] / counts[2] - 1
    assert growth == pytest.approx({64: 0.107, 256: 0.065}[dim], abs=0.001)
    assert growth < 0.12


def test_takes_the_place_of_attention_in_a_vit():
    torch.manual_seed(0)

    class Tokens(nn.Module):
        """The mixer on the tokens of a map, with class tokens passed by."""

        def __init__(self, mixer):
            super().__init__()
            self.mixer = mixer

        def forward(self, x, grid=None, **_):
            b, n, c = x.shape
            side = int(n**0.5)
            extra = n - side * side
            mixed = self.mixer(x[:, extra:].view(b, side, side, c)).flatten(1, 2)
            return torch.cat([x[:, :extra], mixed], 1)

    vit = lynceus.create_model("vit_nano", num_classes=4).train()
    place = Place(dim=vit.blocks[0].norm1.weight.shape[0], grid=(8, 8))
    for block in vit.blocks:
        block.attn = Tokens(mixer_config("gated_conv", {"order": 3, "filter": "global"}).build(place))
    x, y = torch.randn(8, 3, 32, 32), torch.arange(8) % 4
    assert falls(vit, x, y)


def test_takes_the_place_of_the_3x3_in_a_pyramid():
    torch.manual_seed(0)
    pyramid = torchvision.ops.FeaturePyramidNetwork([8, 16], 16)
    pyramid.layer_blocks = nn.ModuleList(GatedConv2d(16, 16, order=3) for _ in range(2))

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.pyramid, self.head = pyramid, nn.Linear(16, 4)

        def forward(self, x):
            maps = self.pyramid({"0": x[:, :8], "1": x[:, 8:24, ::2, ::2]})
            return self.head(sum(m.mean((2, 3)) for m in maps.values()))

    assert falls(Net(), torch.randn(8, 24, 15, 13), torch.arange(8) % 4, lr=2e-2, steps=40)


def falls(model, x, y, *, lr=3e-3, steps=15):
    optimizer = torch.optim.AdamW(model.parameters(), lr)
    losses = []
    for _ in range(steps):
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return losses[-1] < losses[0] - 0.2


def test_mistakes_advise():
    with pytest.raises(AdviceError, match="orders that fit 12: 1, 2, 3"):
        GatedConv(12, order=4)
    with pytest.raises(AdviceError, match="cannot give 8"):
        GatedConv(16, order=2, out=8, project=False)
    with pytest.raises(AdviceError, match="odd"):
        GatedConv(3, order=1, table=(4, 3))
    assert GatedConvMixer().build(Place(dim=16)).scale == 1 / 3
