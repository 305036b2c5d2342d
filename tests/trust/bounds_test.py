"""Certified bounds: the reference's numbers, containment of samples, every operator, errors that name layers."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import lynceus
from lynceus import Subject
from lynceus.core.errors import AdviceError
from lynceus.reengineer import parity
from lynceus.reengineer.keys.bounds import network as from_text
from lynceus.trust.attacks import fmn
from lynceus.trust.bounds import METHODS, Ball, Box, Propagation, bounds
from lynceus.trust.bounds_graph import fused, trace
from lynceus.trust.verified import certified_radius

RECORDS = sorted((Path(__file__).parents[1] / "parity" / "trust").glob("bounds_*.json"))


class Residual(nn.Module):
    """Everything that the bounds know, in one network."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.deeper, self.pool = nn.Conv2d(4, 4, 3, padding=1, groups=2), nn.MaxPool2d(3, 2, 1)
        self.drop, self.head = nn.Dropout(), nn.Linear(4, 5)
        self.norm.running_mean.normal_()
        self.norm.running_var.uniform_(0.5, 2)

    def forward(self, x):
        x = self.pool(torch.relu_(self.norm(self.conv(x))))
        y = F.leaky_relu(self.deeper(x), 0.1)
        z = torch.cat([x + y, F.relu6(x - y).abs(), torch.maximum(x, y).clamp(-1, 2)], 1)[:, ::3]
        z = F.avg_pool2d(F.pad(2 * z, (1, 0, 0, 1), value=0.5), 2)
        return self.head(self.drop(z.mean((2, 3)).flatten(1)))


@pytest.fixture
def residual():
    torch.manual_seed(0)
    return Residual().eval()


def sampled(region, count, generator=None):
    """Points of a region, half of them at its rim: (count, b, *shape)."""
    shape = (count, *(region.lower if isinstance(region, Box) else region.centre).shape)
    noise = torch.randn(shape, dtype=torch.float64, generator=generator)
    noise[: count // 2] = noise[: count // 2].sign()
    if isinstance(region, Ball) and region.norm == 2:
        length = noise.flatten(2).norm(dim=2).reshape(count, -1, *(1,) * (noise.ndim - 2))
        x = region.centre + noise / length * region._side(region.centre) * (1 - 1e-12)
        return x if region.clip is None else x.clamp(*region.clip)
    box = region if isinstance(region, Box) else region.box()
    x = box.centre + noise.clamp(-1, 1) * (box.upper - box.lower) / 2
    return x.maximum(box.lower).minimum(box.upper)


@pytest.mark.parametrize("path", RECORDS, ids=lambda p: p.stem)
def test_every_figure_of_the_reference_to_its_last_digit(path):
    record = json.loads(path.read_text())
    for row in parity.check_record(path):
        scale = record["outputs"].get(row.output, {}).get("std", 1.0)
        assert row.gap * scale <= 1e-8, row


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("norm", "clip"), [(math.inf, (0.0, 1.0)), (2, None), (2, (0.0, 1.0))])
def test_ten_thousand_points_of_a_residual_net_lie_within(residual, method, norm, clip):
    subject = Subject(residual, size=10, mean=(0.4, 0.5, 0.6), std=(0.3, 0.25, 0.2))
    x = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    region = Ball(x, 0.05 * (1 if norm == math.inf else 8), norm=norm, clip=clip)
    network = trace(subject, (3, 8, 8))
    small = fused(network)
    points = sampled(region, 10_000)[:, 0]
    assert bool(region.pick(torch.zeros(100, dtype=torch.long)).contains(points[::100]).all())
    out = torch.cat([small(p) for p in points.split(500)])
    for way in (network, small):
        for intersect in (True, False):
            found = bounds(way, region, method=method, label=1, intersect=intersect)
            assert bool((out >= found.lower - 1e-12).all() and (out <= found.upper + 1e-12).all())
            assert bool((out[:, 1:2] - out[:, [0, 2, 3, 4]] >= found.margin - 1e-12).all())


def test_each_method_is_at_least_as_tight_as_the_cheaper_one(residual):
    x = torch.rand(3, 3, 8, 8)
    widths = [(b.upper - b.lower) for b in (bounds(residual, Ball(x, 0.05, clip=(0, 1)), method=m) for m in METHODS)]
    assert bool((widths[1] <= widths[0] + 1e-12).all())
    assert float(widths[2].mean()) < float(widths[1].mean())
    assert bool((widths[2] <= widths[0] + 1e-12).all())


class Strides(nn.Module):
    """Convolutions in a row, with stride, dilation, groups, padding; pools that overlap; two paths."""

    def __init__(self):
        super().__init__()
        self.a = nn.Sequential(nn.Conv2d(2, 4, 3, padding=2), nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2))
        self.b, self.norm = nn.Conv2d(6, 6, 3, padding=2, dilation=2), nn.BatchNorm2d(6)
        self.c, self.short = nn.Conv2d(6, 4, 3, stride=2, padding=1), nn.Conv2d(6, 4, 1, stride=2)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        x = torch.relu(self.a(x))
        x = F.max_pool2d(F.leaky_relu(self.norm(self.b(x)) + x, 0.2), 3, 1)
        x = torch.maximum(torch.relu(self.c(x)), self.short(x))
        return self.head(torch.relu(x - 0.1).mean((2, 3)))


@pytest.mark.parametrize(("norm", "fuse"), [(math.inf, False), (2, True)])
def test_patches_give_what_whole_maps_give(norm, fuse, monkeypatch):
    torch.manual_seed(3)
    net = Strides().eval()
    nn.init.uniform_(net.norm.running_mean, -0.3, 0.3)
    network = trace(net, (2, 13, 13), fuse=fuse)
    region = Ball(torch.rand(2, 2, 13, 13), 0.03, norm=norm, clip=(0.0, 1.0))
    options = {"label": torch.tensor([0, 2]), "intersect": False}
    small = bounds(network, region, **options)
    monkeypatch.setattr("lynceus.trust.bounds.FEW", 10**9)
    whole = bounds(network, region, **options)
    assert small.hidden.keys() == whole.hidden.keys()
    assert len(whole.hidden) == 9  # five written ones and four rounds of the pool
    for key, ends in whole.hidden.items():
        for mine, theirs in zip(small.hidden[key], ends):
            torch.testing.assert_close(mine, theirs, atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(small.margin, whole.margin, atol=1e-10, rtol=1e-10)


def test_a_point_is_bounded_by_its_own_logits(residual):
    x = torch.rand(2, 3, 8, 8)
    found = bounds(residual, Box(x, x))
    want = trace(residual, (3, 8, 8))(x.double())
    torch.testing.assert_close(found.lower, want, atol=1e-9, rtol=0)
    torch.testing.assert_close(found.upper, want, atol=1e-9, rtol=0)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    text=st.sampled_from(
        [
            "Linear(6,9) relu Linear(9,7) leaky(0.2) Linear(7,3)",
            "Linear(6,5) Linear(5,4) relu Linear(4,3) relu",
            "Linear(6,12) relu Linear(12,12) relu Linear(12,12) relu Linear(12,3)",
        ]
    ),
    eps=st.floats(0, 2),
    norm=st.sampled_from([2, math.inf]),
)
def test_random_networks_stay_within_their_bounds(seed, text, eps, norm):
    torch.manual_seed(seed)
    net = from_text(text).eval()
    region = Ball(torch.randn(3, 6), eps, norm=norm)
    out = trace(net, (6,))(sampled(region, 400).flatten(0, 1)).reshape(400, 3, -1)
    for method in METHODS:
        found = bounds(net, region, method=method)
        assert bool((out >= found.lower - 1e-12).all() and (out <= found.upper + 1e-12).all())


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6), kernel=st.integers(1, 4), stride=st.integers(1, 3), dilation=st.integers(1, 2))
def test_max_pooling_of_any_window_is_the_model_itself(seed, kernel, stride, dilation):
    torch.manual_seed(seed)
    pool = nn.MaxPool2d(kernel, stride, padding=kernel // 2, dilation=dilation, ceil_mode=bool(seed % 2))
    net = nn.Sequential(pool, nn.Flatten(), nn.LazyLinear(3)).eval()
    x = torch.rand(2, 2, 9, 8)
    net(x)
    network = trace(net, (2, 9, 8))
    torch.testing.assert_close(network(x.double()), net.double()(x.double()))
    found = bounds(network, Ball(x, 0.1))
    out = network(sampled(Ball(x, 0.1), 300).flatten(0, 1)).reshape(300, 2, -1)
    assert bool((out >= found.lower - 1e-9).all() and (out <= found.upper + 1e-9).all())


def test_an_affine_network_is_bounded_exactly():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(32, 3)).eval()
    x = torch.rand(1, 1, 4, 4)
    weight = torch.autograd.functional.jacobian(net, x)[0].reshape(3, 16).double()
    for norm, reach in ((math.inf, weight.abs().sum(1)), (2, weight.norm(dim=1))):
        found = bounds(net, Ball(x, 0.3, norm=norm), intersect=False)
        half = (found.upper - found.lower)[0] / 2
        torch.testing.assert_close(half, 0.3 * reach, atol=1e-6, rtol=1e-6)


def test_an_l2_ball_through_a_padded_convolution_is_exact_at_the_border():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(50, 2)).eval()
    region = Ball(torch.rand(1, 1, 5, 5), 0.5, norm=2)
    network = trace(net, (1, 5, 5))
    exact, theirs = (Propagation(network, region, method="ibp", kernel_rows=k).hidden[1] for k in (False, True))
    width, loose = (exact[1] - exact[0])[0, 0], (theirs[1] - theirs[0])[0, 0]
    torch.testing.assert_close(width[1:-1, 1:-1], loose[1:-1, 1:-1])
    assert bool((width[0] < loose[0]).all())


def test_certified_is_never_above_attacked():
    from bench._trust import digits8, digits_mlp

    _, _, x, y = digits8()
    net = digits_mlp(0)
    right = net(x[:24]).argmax(1) == y[:24]
    x, y = x[:24][right], y[:24][right]
    network = trace(net, (1, 8, 8), fuse=True)
    for norm in (math.inf, 2):
        found = fmn(Subject(net, mean=(0.0,), std=(1.0,)), x, y, norm="linf" if norm == math.inf else "l2", steps=60)
        proven = certified_radius(network, x, y, most=1.0, norm=norm)
        assert bool((proven <= found.distance).all())
        assert float(proven.mean()) > 0.2 * float(found.distance[found.success].mean())


def test_the_librarys_own_resnet_with_its_normalisation_and_resizing():
    torch.manual_seed(0)
    subject = Subject(lynceus.create_model("resnet_nano", num_classes=4), size=16)
    x = torch.rand(2, 3, 8, 8)
    network = trace(subject, (3, 8, 8))
    torch.testing.assert_close(network(x.double()).float(), subject(x), atol=1e-4, rtol=1e-4)
    found = bounds(network, Ball(x, 1e-4, clip=(0, 1)), method="crown-ibp")
    out = network(sampled(Ball(x, 1e-4, clip=(0, 1)), 20).flatten(0, 1)).reshape(20, 2, -1)
    assert bool((out >= found.lower).all() and (out <= found.upper).all())


@pytest.mark.parametrize(
    ("layer", "word"),
    [
        (nn.GELU(), "gelu"),
        (nn.Sigmoid(), "sigmoid"),
        (nn.Softmax(1), "softmax"),
        (nn.LeakyReLU(1.5), "slope"),
        (nn.BatchNorm1d(4, track_running_stats=False), "statistics"),
        (nn.LayerNorm(4), "norm"),
    ],
)
def test_an_unknown_operator_is_an_error_that_names_the_layer(layer, word):
    net = nn.Sequential()
    net.add_module("first", nn.Linear(3, 4))
    net.add_module("strange", layer)
    net.add_module("last", nn.Linear(4, 2))
    with pytest.raises(AdviceError, match="strange") as caught:
        bounds(net.eval(), Ball(torch.rand(1, 3), 0.1))
    assert word in str(caught.value).lower()


def test_mistakes_are_errors_that_advise():
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).eval()
    ball = Ball(torch.rand(1, 3), 0.1)
    with pytest.raises(AdviceError, match="Label 7 is outside"):
        bounds(net, ball, label=7)
    with pytest.raises(AdviceError, match="no method"):
        bounds(net, ball, method="crowne")
    with pytest.raises(AdviceError, match="samples of shape"):
        bounds(net, Ball(torch.rand(1, 5), 0.1))
    with pytest.raises(AdviceError, match="norm 2 or inf"):
        Ball(torch.rand(1, 3), 0.1, norm=1)
    with pytest.raises(AdviceError, match="must not be above"):
        Box(torch.ones(1, 3), torch.zeros(1, 3))
    with pytest.raises(AdviceError, match="answers"):
        bounds(Subject(lambda x: x.mean((2, 3))), Ball(torch.rand(1, 3, 4, 4), 0.1))
    broken = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).eval()
    with torch.no_grad():
        broken[2].bias.fill_(float("nan"))
    with pytest.raises(AdviceError, match=r"2 \(Linear\)"):
        bounds(broken, ball)

    class Branch(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    with pytest.raises(AdviceError, match="branch"):
        bounds(Branch(), ball)


def test_the_model_is_left_as_it_was(residual):
    before = {k: v.clone() for k, v in residual.state_dict().items()}
    residual.train()
    bounds(residual, Ball(torch.rand(1, 3, 8, 8), 0.1), method="ibp")
    assert residual.training
    assert next(residual.parameters()).dtype == torch.float32
    for key, value in residual.state_dict().items():
        np.testing.assert_array_equal(value, before[key])
