"""Guarantees from grids: never contradicted by verification, samples or gradients, and lost when the grid is coarse."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from bench._trust import curve_net, curve_points
from lynceus.core.errors import AdviceError
from lynceus.trust.bounds import Box
from lynceus.trust.guarantee import guarantee, lipschitz, local
from lynceus.trust.verify import verify

NORMS = (1.0, 2.0, math.inf)


def random_net(seed, conv=False):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if conv:
            layers = [nn.Conv2d(1, 3, 3, padding=1), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(12, 3)]
        else:
            layers = [nn.Linear(3, 8), nn.ReLU(), nn.Identity(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)]
        return nn.Sequential(*layers).double().eval()


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from(NORMS), st.booleans())
def test_constants_are_above_every_sampled_slope(seed, norm, conv):
    net, shape = random_net(seed, conv), (1, 4, 4) if conv else (3,)
    draw = torch.Generator().manual_seed(seed)
    low = torch.rand(1, *shape, generator=draw, dtype=torch.float64)
    box = Box(low, low + 0.3)
    a, b = (low + 0.3 * torch.rand(500, *shape, generator=draw, dtype=torch.float64) for _ in range(2))
    rows = torch.tensor([[1.0, -1, 0], [1, 0, -1], [0, 1, -1]], dtype=torch.float64)
    with torch.no_grad():
        rise = (net(a) - net(b)).abs()
        turn = ((net(a) - net(b)) @ rows.T).abs()
    run = torch.linalg.vector_norm((a - b).flatten(1), norm, dim=1)[:, None]
    logits = lipschitz(net, shape, norm=norm)
    assert (rise <= logits * run * (1 + 1e-9)).all()
    near = local(net, box, rows, norm=norm)
    assert (turn <= near * run * (1 + 1e-9) + 1e-12).all()
    whole = lipschitz(net, shape, norm=norm, rows=rows)
    assert (near[0] <= whole * (1 + 1e-9)).all()


@pytest.mark.parametrize(
    ("constants", "norm"), [("layers", 2.0), ("layers", math.inf), ("local", 2.0), ("local", math.inf)]
)
def test_item_5_what_is_guaranteed_is_verified(constants, norm):
    net, clip = curve_net(0), (0.0, 2 * math.pi)
    points, _ = curve_points(40, 1)
    step = {"layers": 0.02, "local": 0.3}[constants]
    kinds = []
    for x in points:
        found = guarantee(net, x, half_width=0.3, step=step, norm=norm, clip=clip, constants=constants)
        kinds.append(found.kind)
        if found.kind == "guaranteed":
            verdict = verify(net, x, step=0.3, count=1, clip=clip, goal="region")
            assert verdict.kind == "safe"
            assert verdict.strength == "region"
    assert kinds.count("guaranteed") >= 15


@pytest.mark.parametrize("constants", ["layers", "local"])
def test_item_5_a_step_twice_too_large_loses_the_guarantee(constants):
    """The largest step that still gives the guarantee, by halving; twice that step gives it no more, on some points."""
    net, clip = curve_net(0), (0.0, 2 * math.pi)
    points, _ = curve_points(30, 2)
    lost = held = 0
    for x in points:
        step = 0.6  # one cell
        while step > 0.005:
            if guarantee(net, x, half_width=0.3, step=step, clip=clip, constants=constants).kind == "guaranteed":
                held += 1
                twice = guarantee(net, x, half_width=0.3, step=2 * step, clip=clip, constants=constants)
                lost += twice.kind != "guaranteed"
                break
            step /= 2
    assert held >= 20
    assert lost >= {"layers": 5, "local": 1}[constants]


def test_witnesses_replay_and_the_nearest_other_class_lies_in_the_interval():
    net, clip = curve_net(0), (0.0, 2 * math.pi)
    points, _ = curve_points(30, 3)
    seen = 0
    for x in points:
        found = guarantee(net, x, half_width=0.4, step=0.01, clip=clip)
        low, high = found.nearest
        draw = torch.Generator().manual_seed(0)
        around = (x + 0.4 * (2 * torch.rand(20_000, 2, generator=draw) - 1)).clamp(*clip)
        with torch.no_grad():
            other = net(around).argmax(1) != found.label
        if other.any():
            assert float((around[other] - x).norm(dim=1).min()) >= low
            assert found.kind != "guaranteed"
        if found.kind == "counterexample":
            seen += 1
            assert int(net(found.witness.float()[None]).argmax()) != found.label
            assert float((found.witness - x).norm()) == pytest.approx(high)
            assert high - low < 0.3
        else:
            assert high == math.inf
    assert seen


def test_a_wedge_between_grid_points_is_not_guaranteed():
    """Class 1 only within 0.01 of x = 0.37: a grid of step 0.1 sees nothing of it."""
    first = nn.Linear(1, 3)
    first.weight.data = torch.tensor([[1.0], [1.0], [1.0]])
    first.bias.data = -torch.tensor([0.36, 0.37, 0.38])
    last = nn.Linear(3, 2)
    last.weight.data = torch.tensor([[0.0, 0, 0], [100, -200, 100]])
    last.bias.data = torch.tensor([0.5, 0.0])
    net = nn.Sequential(first, nn.ReLU(), last)
    x = torch.tensor([0.5])
    assert int(net(torch.tensor([[0.37]])).argmax()) == 1
    for constants in ("layers", "local"):
        coarse = guarantee(net, x, half_width=0.2, step=0.1, constants=constants)
        assert coarse.kind == "unknown"
        assert coarse.nearest[0] < 0.13
        assert guarantee(net, x, half_width=0.2, step=0.001, constants=constants).kind == "counterexample"


def test_dims_clip_and_convolutions():
    net = random_net(4, conv=True)
    x = torch.rand(1, 4, 4, generator=torch.Generator().manual_seed(1))
    found = guarantee(net, x, half_width=0.2, step=0.05, dims=[0, 5, 10], constants="local")
    assert found.points <= 8**3
    draw = torch.Generator().manual_seed(2)
    around = x.double().expand(5_000, -1, -1, -1).flatten(1).clone()
    for d in (0, 5, 10):
        around[:, d] = (around[:, d] + 0.2 * (2 * torch.rand(5_000, generator=draw) - 1)).clamp(0, 1)
    with torch.no_grad():
        same = (net(around.view(-1, 1, 4, 4)).argmax(1) == found.label).all()
    assert same or found.kind != "guaranteed"


@pytest.mark.parametrize(
    ("model", "kwargs", "words"),
    [
        (nn.Sequential(nn.Linear(2, 4), nn.GELU(), nn.Linear(4, 2)), {}, "1 .GELU"),
        (nn.Sequential(nn.Linear(2, 4), nn.ReLU()), {}, "linear layer"),
        (nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 2)), {"constants": "local"}, "Tanh"),
        (nn.Linear(2, 2), {"step": 1e-6}, "points"),
        (nn.Linear(2, 2), {"norm": 3.0}, "norm"),
        (nn.Linear(2, 2), {"constants": "both"}, "constants"),
        (nn.Linear(2, 2), {"label": 5}, "label 5"),
        (nn.Linear(2, 2), {"half_width": 0.0}, "half_width"),
        (nn.Linear(2, 2), {"clip": (0.6, 1.0)}, "clip"),
    ],
)
def test_wrong_use_is_an_error_that_names_the_layer_or_the_value(model, kwargs, words):
    options = {"half_width": 0.1, "step": 0.05} | kwargs
    with pytest.raises(AdviceError, match=words):
        guarantee(model.eval(), torch.full((2,), 0.5), **options)
    broken = nn.Linear(2, 2)
    broken.weight.data.fill_(math.nan)
    with pytest.raises(AdviceError, match="finite"):
        guarantee(broken, torch.full((2,), 0.5), half_width=0.1, step=0.1)
