"""The formulas of LPViT: curves by the explicit Hessian, slopes equal, multiply-adds met, costly layers pruned more."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import lynceus
from lynceus.core.errors import AdviceError
from lynceus.rewrite.block_prune import BlockPrune, allocate
from lynceus.rewrite.block_prune.allocate import balance, hull, slopes, smoothed
from lynceus.rewrite.block_prune.costs import AT, costs, milliseconds, units
from lynceus.rewrite.block_prune.scores import LAMBDA, block_scores, candidates, curve, gradients, positions


@pytest.fixture(scope="module")
def small():
    """A ViT in float64, its images, and the gradients of every layer."""
    torch.manual_seed(0)
    net = lynceus.create_model("vit_nano", num_classes=3, dim=8, heads=2, depth=2, image_size=(16, 16), patch_size=8)
    net, images = net.double(), torch.rand(6, 3, 16, 16, dtype=torch.float64)
    names = candidates(net, (3, 4), "", "")
    return net, images, gradients(net, images, names, batch=2)


def test_gradients_are_means_over_batches_of_the_mean_square(small):
    net, images, found = small
    for name in ("blocks.0.attn.qkv", "patch_embed.proj", "blocks.1.mlp.fc2"):
        weight = net.get_submodule(name).weight
        parts = [torch.autograd.grad(net(part).square().mean(), weight)[0] for part in images.split(2)]
        assert torch.allclose(found[name], torch.stack(parts).mean(0).flatten(1), atol=1e-12)


@pytest.mark.parametrize("name", ["blocks.0.attn.qkv", "blocks.0.mlp.fc1", "blocks.1.attn.proj", "patch_embed.proj"])
def test_the_curve_is_the_formula_with_an_explicit_hessian(small, name):
    net, _, found = small
    weight, g = net.get_submodule(name).weight.detach().flatten(1), found[name]
    made = curve(name, weight, g, block=(3, 4), positions=5)
    hessian = torch.outer(g.flatten(), g.flatten()) + LAMBDA * torch.eye(g.numel(), dtype=torch.float64)
    scores = block_scores(weight, g, (3, 4))
    for i in range(0, 101):
        kept = torch.from_numpy(made.mask(i))
        assert int(kept.sum()) == max(int((1 - i / 100) * made.blocks + 1e-9), 1)
        if not kept.all():
            assert scores[kept].min() >= scores[~kept].max()
        whole = kept.repeat_interleave(3, 0).repeat_interleave(4, 1)[: weight.shape[0], : weight.shape[1]]
        change = (weight * whole - weight).flatten()
        direct = (change * g.flatten()).square().mean() + 0.5 * change @ hessian @ change
        assert abs(float(direct) - made.distortion[i]) <= 1e-9 * max(1.0, float(direct))
        assert made.macs[i] == 5 * int(whole.sum())
    assert made.distortion[0] == 0


def test_scores_average_over_the_part_inside():
    weight, g = torch.arange(1.0, 16).view(3, 5), torch.full((3, 5), 2.0)
    found = block_scores(weight, g, (2, 2))
    assert torch.allclose(found[0, 0], torch.tensor((1 + 2 + 6 + 7) * 2 / 4))
    assert torch.allclose(found[1, 2], torch.tensor(15 * 2.0))
    assert torch.allclose(block_scores(weight, None, (2, 2), "magnitude")[0, 2], torch.tensor((5 + 10) / 2))


def test_smoothing_is_without_bias_and_begins_at_zero():
    values = np.cumsum(np.random.default_rng(0).random((2, 101)), 1)
    values -= values[:, :1]
    made = smoothed(values, 0.5)
    assert (made[:, 0] == 0).all()
    weights = 0.5 ** np.arange(10, -1, -1)
    assert np.allclose(made[:, 10], (values[:, :11] * weights).sum(1) / weights.sum())
    assert np.array_equal(smoothed(values, 0), values)


def test_the_stencil_is_exact_on_polynomials_and_one_sided_at_the_ends():
    s = np.linspace(0, 1, 101)
    made = slopes(np.stack([s**4, 3 * s]))
    assert np.allclose(made[0, 4:97], 4 * s[4:97] ** 3)
    assert np.allclose(made[1], 3)
    assert np.isclose(made[0, 0], (s[4] ** 4) / 0.04)


@given(st.lists(st.floats(-5, 5), min_size=2, max_size=40))
@settings(deadline=None)
def test_the_hull_is_convex_below_and_touches(values):
    curve_ = np.array(values)
    made = hull(curve_)
    assert (made <= curve_ + 1e-9).all()
    assert (np.diff(made, 2) >= -1e-9).all()
    assert made[0] == curve_[0]
    assert made[-1] == curve_[-1]


def convex(count, seed):
    draw = np.random.default_rng(seed)
    s = np.linspace(0, 1, 101)
    return draw.uniform(0.1, 10, (count, 1)) * s[None] ** draw.uniform(1.5, 5, (count, 1))


@settings(max_examples=40, deadline=None)
@given(count=st.integers(3, 12), seed=st.integers(0, 999), flops=st.floats(0.15, 0.95), power=st.booleans())
def test_slopes_are_equal_and_the_budget_is_met(count, seed, flops, power):
    distortion = convex(count, seed)
    draw = np.random.default_rng(seed + 1)
    left = 1 - np.linspace(0, 1, 101)
    macs, cost = left * draw.uniform(1, 5, (count, 1)), left * draw.uniform(1, 5, (count, 1))
    made = allocate(distortion, cost, macs, flops=flops, power=power)
    assert abs(made.share - flops) <= 0.02
    assert np.isclose(made.share, macs[np.arange(count), made.index].sum() / macs[:, 0].sum())
    objective = distortion + made.beta * cost
    last = int(np.floor((1 - min(0.05, (1 - flops) / 2)) * 100 + 1e-9))
    assert (made.index <= last).all()
    rise = np.diff(objective, axis=1) * 100
    for i, at in enumerate(made.index):
        if 1 < at < last:  # one grid step to either side the slope passes mu
            assert rise[i, at - 2] <= made.mu + 1e-9
            assert rise[i, min(at + 1, 99)] >= made.mu - 1e-9
    assert made.beta == (balance(distortion, cost) if power else 0)


def test_the_costlier_of_two_equal_layers_is_pruned_more():
    distortion = np.repeat(convex(1, 3), 2, 0)
    left = 1 - np.linspace(0, 1, 101)
    macs, cost = np.stack([left, left]), np.stack([left, 4 * left])
    charged = allocate(distortion, cost, macs, flops=0.5)
    free = allocate(distortion, cost, macs, flops=0.5, power=False)
    assert charged.index[1] > charged.index[0] + 5
    assert abs(int(free.index[0]) - int(free.index[1])) <= 1
    assert abs(charged.share - 0.5) < 0.02
    assert abs(free.share - 0.5) < 0.02


def test_curves_that_are_not_convex_still_meet_the_budget():
    s = np.linspace(0, 1, 101)
    waves = np.stack([s + 0.3 * np.sin(9 * s), np.sqrt(s), s**3])
    macs = np.stack([1 - s] * 3)
    for flops in (0.2, 0.4, 0.6, 0.8):
        assert abs(allocate(waves, macs, macs, flops=flops).share - flops) <= 0.02


def test_a_budget_out_of_reach_says_what_is_in_reach():
    s = np.linspace(0, 1, 101)
    macs = np.stack([1 - s, 1 - s])
    with pytest.raises(AdviceError, match=r"out of reach.*Ask for flops=0\.5"):
        allocate(macs, macs, macs, flops=0.2, fixed=2.0)


def test_nothing_goes_at_a_budget_of_all():
    macs = np.stack([1 - np.linspace(0, 1, 101)] * 2)
    assert (allocate(convex(2, 0), macs, macs, flops=1.0).index == 0).all()


def test_power_is_counted_in_block_multiplications(small):
    net, images, found = small
    used = positions(net, images)
    made = curve("blocks.0.mlp.fc1", net.blocks[0].mlp.fc1.weight, found["blocks.0.mlp.fc1"], block=(4, 4),
                 positions=used["blocks.0.mlp.fc1"])  # fmt: skip
    assert used["blocks.0.mlp.fc1"] == 4  # patches; this net has no class token
    assert used["patch_embed.proj"] == 4
    assert made.blocks == 32 // 4 * 2
    assert units(made, "weights")[0] == 16 * (8 // 16)
    assert units(made, "tokens")[0] == 16
    assert np.isclose(units(made, "tokens")[25], 0.75 * 16)


def test_milliseconds_are_measured_once_and_read_between():
    made = curve("f", torch.randn(96, 64), torch.randn(96, 64), block=(16, 16), positions=64)
    table = milliseconds((96, 64), 64, (16, 16))
    assert table == milliseconds((96, 64), 64, (16, 16))
    assert len(table) == len(AT)
    assert all(t > 0 for t in table)
    found_costs = costs([made], "measured", (16, 16))
    assert np.isclose(found_costs[0, 50], table[2])
    assert np.isclose(found_costs[0, 60], table[2] + (table[3] - table[2]) * 0.4)


def test_a_layer_without_gradient_is_named():
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 32), torch.nn.Linear(32, 32))
    net[2].weight.data.zero_()
    x = torch.rand(4, 3, 4, 4)
    with pytest.raises(AdviceError, match="No gradient reaches the layer '1'"):
        BlockPrune(block=8, flops=0.7, exclude="")(net, x)
    with torch.inference_mode(), pytest.raises(AdviceError, match="inference_mode"):
        BlockPrune(block=8, exclude="")(net, x)
