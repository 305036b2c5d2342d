"""Schedules are pure functions of the step; groups know what is not decayed; optimisers come by name."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lynceus.core.errors import AdviceError, OptionError
from lynceus.train.optim import SCHEDULES, lr_factor, make_optimizer, param_groups, set_lr


@given(
    total=st.integers(1, 5000), at=st.floats(0, 1), schedule=st.sampled_from(SCHEDULES),
    warmup=st.sampled_from([0.0, 0.05, 0.3, 0.9]), final=st.sampled_from([0.0, 0.01]),
)  # fmt: skip
@settings(max_examples=200, deadline=None)
def test_the_factor_stays_between_zero_and_one(total, at, schedule, warmup, final):
    step = min(total - 1, int(at * total))
    assert 0 <= lr_factor(step, total, schedule, warmup, final) <= 1 + 1e-12


def test_cosine_equals_torch():
    weight = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    theirs = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 100, eta_min=0.1)
    for step in range(100):
        assert lr_factor(step, 100, "cosine", 0.0, 0.1) == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-9)
        optimizer.step()
        theirs.step()


@pytest.mark.parametrize("total", [10, 57, 400])
def test_one_cycle_equals_torch(total):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0, momentum=0.9)
    theirs = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1.0, total_steps=total, cycle_momentum=False)
    for step in range(total):
        assert lr_factor(step, total, "one-cycle") == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-9)
        optimizer.step()
        if step < total - 1:
            theirs.step()


def test_warm_up_rises_in_a_line_to_the_peak():
    values = [lr_factor(s, 100, "cosine", 0.1) for s in range(100)]
    assert values[:10] == pytest.approx([(s + 1) / 11 for s in range(10)])
    assert values[10] == max(values) == 1
    assert values[99] < 1e-3


def test_step_schedule_falls_at_30_60_80_of_90():
    values = [lr_factor(s, 90, "step") for s in range(90)]
    assert [s for s in range(1, 90) if values[s] < values[s - 1]] == [30, 60, 80]
    assert values[-1] == pytest.approx(1e-3)


def test_constant_and_linear():
    assert {lr_factor(s, 50, "constant") for s in range(50)} == {1.0}
    assert lr_factor(25, 50, "linear") == pytest.approx(0.5)
    with pytest.raises(OptionError, match="cosine"):
        lr_factor(0, 10, "cosin")


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Linear(4, 4)
        self.blocks = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
        self.position = nn.Parameter(torch.zeros(1, 4))
        self.head = nn.Linear(4, 2)

    def no_weight_decay(self):
        return {"position"}

    def group_matcher(self, coarse=False):
        return {"stem": r"^(?:stem|position)", "blocks": [(r"^blocks\.(\d+)", None)]}


def names(model, group):
    ids = {id(p): n for n, p in model.named_parameters()}
    return {ids[id(p)] for p in group["params"]}


def test_one_dimensional_and_listed_parameters_are_not_decayed():
    model = Net()
    decayed, plain = param_groups(model)
    assert names(model, decayed) == {"stem.weight", "blocks.0.weight", "blocks.1.weight", "head.weight"}
    assert plain["weight_decay"] == 0
    assert "position" in names(model, plain)
    assert "weight_decay" not in decayed


def test_frozen_parameters_are_left_out():
    model = Net()
    model.stem.requires_grad_(False)
    assert not any("stem" in n for g in param_groups(model) for n in names(model, g))
    with pytest.raises(AdviceError, match="Nothing is left"):
        param_groups(model.requires_grad_(False))


def test_layer_decay_equals_timms():
    from timm.optim import param_groups_layer_decay

    model = Net()
    theirs = {}
    for group in param_groups_layer_decay(model, 0.05, no_weight_decay_list=("position",), layer_decay=0.5):
        for p in group["params"]:
            theirs[id(p)] = (group["lr_scale"], group["weight_decay"])
    ours = {
        id(p): (g["lr_scale"], g.get("weight_decay", 0.05))
        for g in param_groups(model, layer_decay=0.5)
        for p in g["params"]
    }
    assert ours == theirs
    assert len({scale for scale, _ in ours.values()}) == 4


@pytest.mark.parametrize("name", ["adamw", "adam", "sgd", "nesterov", "lars", "lamb", "adopt", "muon"])
def test_optimisers_by_name_lower_a_loss(name):
    torch.manual_seed(0)
    model = Net()
    optimizer = make_optimizer(param_groups(model, layer_decay=0.9), name, lr=0.05, weight_decay=0.01)
    x, y = torch.randn(32, 4), torch.randint(0, 2, (32,))
    losses = []
    for step in range(40):
        set_lr(optimizer, 0.05 * lr_factor(step, 40))
        loss = nn.functional.cross_entropy(model.head(model.blocks[1](model.blocks[0](model.stem(x)))), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    assert math.isfinite(losses[-1])


def test_an_unknown_optimiser_says_the_nearest():
    with pytest.raises(OptionError, match="'adamw'"):
        make_optimizer(param_groups(Net()), "adamww", lr=1e-3)


def test_a_parameter_belongs_to_one_group():
    p = nn.Parameter(torch.zeros(2))
    with pytest.raises(AdviceError, match="two groups"):
        make_optimizer([{"params": [p]}, {"params": [p]}], "sgd", lr=0.1)
