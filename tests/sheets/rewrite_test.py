"""What every rewrite owes: it is a frozen dataclass of options, gives a module that owns its pixels, and leaves the old
model untouched."""

import copy
import dataclasses

import pytest
import torch
from torch import nn

import lynceus
from lynceus.core.nouns import Rewrite, chain
from lynceus.core.subject import owns_pixels
from lynceus.rewrite.adapters import Adapt, PruneChannels
from lynceus.rewrite.block_prune import BlockPrune
from lynceus.rewrite.crop_selection import CropSelection
from lynceus.rewrite.expedite import Expedite
from lynceus.rewrite.haloify import Haloify
from lynceus.rewrite.prune_tokens import PruneTokens
from lynceus.rewrite.split import Split
from lynceus.tasks.classify import Classify


def cnn():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 5)
    )


def ours(name: str, **changes):
    """A classifier of five classes on a backbone of this library, pixels of 32x32 in [0, 1]."""

    def build():
        torch.manual_seed(0)
        return Classify(num_classes=5).build(lynceus.create_model(name, **changes))

    return build


# a rewrite, and the network it is tried on
REWRITES = [
    (Adapt(rank=2), ours("resnet_nano")),
    (Adapt(kind="splopa", block=(16, 16), prototypes=3), ours("vit_nano")),
    (BlockPrune(block=(16, 32), flops=0.5), ours("vit_nano")),
    (BlockPrune(block=8, flops=0.6, cost="tokens"), ours("swin_nano")),
    (CropSelection(input_size=24, view=32), cnn),
    (CropSelection(input_size=24, view=32, cyclic=True), cnn),
    (CropSelection(input_size=24, view=32, top=3, score="log"), cnn),
    (Haloify(block_size=4, halo_size=1), ours("resnet_nano")),
    (Split(parts=2, steps=2, fusion_steps=2), ours("vit_nano", depth=2)),
    (Expedite(alpha=2, clusters=(5, 6)), ours("vit_nano")),
    (Expedite(alpha=1, clusters=(3, 3), temperature="auto"), ours("swin_nano")),
    (PruneChannels(ratio=0.4), ours("vit_nano")),
    (PruneChannels(ratio=0.4, importance="taylor", scope="layer"), ours("resnet_nano")),
    (PruneTokens(blocks=(1, 2), keep=0.6), ours("vim_nano", class_token="middle")),
    (PruneTokens(blocks=(2,), keep=0.5, carry="decay_prev"), ours("plain_mamba_nano")),
]


@pytest.fixture(params=REWRITES, ids=lambda r: f"{type(r[0]).__name__}-{REWRITES.index(r)}")
def case(request):
    return request.param


@pytest.fixture
def rewrite(case):
    return case[0]


@pytest.fixture
def net(case):
    return case[1]


def test_a_frozen_dataclass_of_options(rewrite):
    assert isinstance(rewrite, Rewrite)
    assert dataclasses.is_dataclass(rewrite)
    assert type(rewrite)(**{f.name: getattr(rewrite, f.name) for f in dataclasses.fields(rewrite)}) == rewrite
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(rewrite, dataclasses.fields(rewrite)[0].name, None)


def test_the_old_model_is_untouched(rewrite, net):
    model, x = net(), torch.rand(3, 3, 32, 32)
    model.train()
    before = copy.deepcopy(model.state_dict())
    new = rewrite(model, x)
    new(x)
    for p in new.parameters():
        p.data.add_(1)
    assert model.training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not {id(p) for p in model.parameters()} & {id(p) for p in new.parameters()}


def test_the_new_model_owns_its_pixels_and_is_in_eval_mode(rewrite, net):
    new, x = rewrite(net(), torch.rand(3, 3, 32, 32)), torch.rand(4, 3, 32, 32)
    assert isinstance(new, nn.Module)
    assert owns_pixels(new)
    assert not any(m.training for m in new.modules())
    assert new(x).shape == (4, 5)
    assert torch.equal(new(x), new(x))


def test_batch_order_does_not_matter(rewrite, net):
    new, x = rewrite(net(), torch.rand(3, 3, 32, 32)), torch.rand(5, 3, 32, 32)
    order = torch.tensor([3, 0, 4, 1, 2])
    assert torch.allclose(new(x)[order], new(x[order]), atol=1e-6)


def test_gradients_reach_the_weights(rewrite, net):
    new = rewrite(net(), torch.rand(3, 3, 32, 32))
    new(torch.rand(2, 3, 32, 32)).square().sum().backward()
    learns = [p for p in new.parameters() if p.ndim > 1 and p.requires_grad]
    assert learns
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in learns)


def test_it_moves_and_changes_precision_like_any_module(rewrite, net):
    x = torch.rand(3, 3, 32, 32)
    new = rewrite(net(), x)
    want = new(x)
    assert torch.allclose(new.cpu().double()(x.double()).float(), want, atol=1e-5)


def test_it_chains(rewrite, net):
    x = torch.rand(3, 3, 32, 32)
    assert torch.equal(chain(rewrite)(net(), x)(x), rewrite(net(), x)(x))
