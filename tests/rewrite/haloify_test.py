"""Haloify: shapes stay, only 3x3 convolutions change, the old model is untouched, the result learns."""

import copy

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

import lynceus
from lynceus.core.errors import AdviceError
from lynceus.core.nouns import Rewrite
from lynceus.rewrite.haloify import HaloConv, Haloify


@pytest.mark.parametrize("size", [(64, 64), (70, 45)], ids=str)
@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_maps_keep_their_shapes(name, size):
    model, x = lynceus.create_model(name, num_classes=5), torch.randn(1, 3, *size)
    made = Haloify(block_size=4, halo_size=1)(model, x)
    with torch.no_grad():
        assert [m.shape for m in made.forward_stages(x)] == [m.shape for m in model.forward_stages(x)]
        assert made(x).shape == (1, 5)
    replaced = [n for n, m in made.named_modules() if isinstance(m, HaloConv)]
    assert len(replaced) == 16
    assert isinstance(made.conv1, nn.Conv2d)


def test_names_choose_and_the_rest_keeps_its_weights():
    model = timm.create_model("resnet50", num_classes=5).eval()
    before = copy.deepcopy(model.state_dict())
    made = Haloify(names=r"^layer4\.")(model, torch.rand(1, 3, 64, 64))
    replaced = [n for n, m in made.named_modules() if isinstance(m, HaloConv)]
    assert replaced == [f"layer4.{i}.conv2" for i in range(3)]
    for name, value in made.state_dict().items():
        if not any(name.startswith(r) for r in replaced):
            assert torch.equal(value, before[name])
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_it_is_a_rewrite_and_the_same_seed_gives_the_same_weights():
    model, rewrite = lynceus.create_model("resnet_nano", num_classes=5), Haloify(block_size=4, seed=3)
    assert isinstance(rewrite, Rewrite)
    a, b = rewrite(model, None), rewrite(model, None)
    assert a.rewrite == rewrite
    assert all(torch.equal(v, w) for v, w in zip(a.state_dict().values(), b.state_dict().values()))


def test_it_learns():
    torch.manual_seed(0)
    model = Haloify(block_size=4, halo_size=1)(lynceus.create_model("resnet_nano", num_classes=2), None).train()
    x, y = torch.randn(16, 3, 8, 8), torch.arange(16) % 2
    x += y[:, None, None, None]
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    losses = []
    for _ in range(25):
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None for p in model.parameters())
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.2 < losses[0]


def test_nothing_to_replace_advises():
    with pytest.raises(AdviceError, match=r"layer1\.0\.conv1"):
        Haloify(names="stage9")(lynceus.create_model("resnet18"), None)
    with pytest.raises(AdviceError, match="none of 3x3"):
        Haloify()(nn.Sequential(nn.Linear(2, 2)), None)
    with pytest.raises(AdviceError, match="regular expression"):
        Haloify(names="(")
