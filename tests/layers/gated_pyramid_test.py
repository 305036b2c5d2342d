"""Pyramids fused by gated convolutions: shapes, extra levels, training, and mistakes."""

import pytest
import torch
from torch.nn import functional as F

import lynceus
from lynceus.core.errors import AdviceError
from lynceus.layers.gated_conv import GatedConv2d
from lynceus.layers.gated_pyramid import GatedFPN, GatedUPer
from lynceus.reengineer.keys import hornet as keys

DIMS = (8, 16, 24)


def maps(batch=2, side=21):
    return [torch.randn(batch, c, -(-side >> i), side + 3 >> i) for i, c in enumerate(DIMS)]


def test_levels_keep_their_sizes_and_later_ones_are_sampled():
    pyramid = GatedFPN(DIMS, 16, count=5, norm=True, act=True).eval()
    x = maps()
    with torch.no_grad():
        out = pyramid(x)
    assert [o.shape[2:] for o in out[:3]] == [m.shape[2:] for m in x]
    assert torch.equal(out[3], F.max_pool2d(out[2], 1, stride=2))
    assert torch.equal(out[4], F.max_pool2d(out[3], 1, stride=2))
    part = GatedFPN(DIMS, 16, start=1, end=2)
    assert [o.shape for o in part(x)] == [(2, 16, *m.shape[2:]) for m in x[1:]]


def test_top_down_sums_are_nearest():
    pyramid = GatedFPN(DIMS[:2], 8, order=2)
    pyramid.outputs[0] = pyramid.outputs[1] = torch.nn.Identity()
    x = maps()[:2]
    with torch.no_grad():
        fine, coarse = pyramid(x)
        wanted = pyramid.laterals[0](x[0]) + F.interpolate(coarse, x[0].shape[2:], mode="nearest")
    assert torch.allclose(fine, wanted)


def test_every_decoder_trains_with_either_filter():
    torch.manual_seed(0)
    backbone = lynceus.create_model("hornet_nano", num_classes=0)
    dims = [s.channels for s in backbone.stages]
    x = torch.randn(2, 3, 40, 56)
    for table in (None, (8, 5)):
        pyramid = GatedFPN(dims, 16, table=table)
        decoder = GatedUPer(dims, 16, num_classes=5, table=table, project=True)
        features = backbone.forward_stages(x)
        scores = decoder(features)
        assert scores.shape == (2, 5, *features[0].shape[2:])
        loss = sum(m.square().mean() for m in pyramid(features)) + scores.square().mean()
        loss.backward()
        for module in (pyramid, decoder):
            silent = [n for n, p in module.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
            assert silent == []


def test_without_projection_the_operators_width_leaves():
    module = GatedConv2d(12, 8, project=False, kernel=3, norm=True, act=True).eval()
    with torch.no_grad():
        y = module(torch.randn(2, 12, 5, 7))
    assert y.shape == (2, 8, 5, 7)
    assert y.min() >= 0
    assert isinstance(module.proj_out, torch.nn.Identity)


def test_the_authors_arguments_are_read():
    config = {"in_channels": [8, 16], "out_channels": 8, "num_outs": 2, "gn_conv_cfg": {"type": "gngf", "h": 12}}
    fpn = keys.build(config)
    assert fpn.outputs[0].dwconv.complex_weight.shape[1:3] == (12, 7)
    module = keys.build({"in_channels": 12, "out_channels": 8, "dim_ratio": 2, "proj_out": True, "order": 3})
    assert module.widths == [4, 8, 16]
    assert module.proj_out.weight.shape == (8, 16)
    uper = keys.build({"in_channels": [8, 16], "channels": 8, "pool_scales": [1, 2], "num_classes": 3})
    assert isinstance(uper, GatedUPer)
    assert uper.fusion.dwconv.kernel_size == (3, 3)


def test_mistakes_advise():
    with pytest.raises(AdviceError, match="takes 3 maps"):
        GatedFPN(DIMS, 16)(maps()[:2])
    with pytest.raises(AdviceError, match="take 2\\."):
        GatedFPN(DIMS, 16, start=0, end=1, count=3)
    with pytest.raises(AdviceError, match="from 0 to 2"):
        GatedFPN(DIMS, 16, end=5)
    with pytest.raises(AdviceError, match="takes 3 maps"):
        GatedUPer(DIMS, 16)(maps()[:2])
    with pytest.raises(AdviceError, match="only sampled"):
        keys.build({"in_channels": [8], "add_extra_convs": "on_output"})
