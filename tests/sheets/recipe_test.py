"""What every recipe owes: a finite loss with a gradient for all it trains, seeded augmentation, a usable export, and
a resumed run equal to the straight one."""

import pytest
import torch

from lynceus import FitConfig, create_model, fit
from lynceus.core import rng
from lynceus.core.nouns import Recipe
from lynceus.core.types import Batch
from lynceus.data import open_dataset
from lynceus.recipes.augmix import AugMix
from lynceus.recipes.robustify import Robustify, RobustifyConfig
from lynceus.recipes.supervised import Supervised, SupervisedConfig
from lynceus.recipes.token_label import TokenLabel
from lynceus.tasks.classify import Classify
from lynceus.train.fit import Interrupted

STRONG = SupervisedConfig(crop=2, flip=0.5, mixup=0.8, cutmix=1.0, erase=0.25, layer_decay=0.75)


def supervised(config=None, name="vit_nano"):
    torch.manual_seed(0)
    options = {"depth": 2} if name == "vit_nano" else {}
    return Supervised(Classify(num_classes=10), create_model(name, drop_path_rate=0.1, **options), config)


def token_labels(annotator=False):
    torch.manual_seed(0)
    net = create_model("volo_nano", layers=(1, 1, 1, 1), dense=True, num_classes=10)
    teacher = create_model("resnet_nano", num_classes=10) if annotator else None
    return TokenLabel(Classify(num_classes=10), net, annotator=teacher)


def augmix():
    torch.manual_seed(0)
    return AugMix(Classify(num_classes=10), create_model("resnet_nano"), views=SupervisedConfig(crop=2, flip=0.5))


def robustify(name="resnet_nano", **options):
    torch.manual_seed(0)
    task = Classify(num_classes=10)
    teacher = task.build(create_model("convnext_nano", num_classes=10))
    big = task.build(create_model(name, num_classes=10))
    return Robustify(big, teacher, RobustifyConfig(**options), views=SupervisedConfig(crop=2))


MEMBERS = {
    "supervised": lambda: supervised(),
    "supervised, everything on": lambda: supervised(STRONG),
    "supervised, views": lambda: supervised(SupervisedConfig(view=16, flip=0.5)),
    "token labels": lambda: token_labels(),
    "token labels, annotator": lambda: token_labels(annotator=True),
    "augmix": lambda: augmix(),
    "robustify": lambda: robustify(),
    "robustify, frozen norms": lambda: robustify("vit_nano", norms=False, uncertain=False),
}


@pytest.fixture(scope="module")
def data():
    return open_dataset("digits", size=16).subset(range(96))


def batch(data):
    part = data.batch(list(range(16)))
    return Batch(image=part.image, sizes=part.sizes, label=part.label)


@pytest.mark.parametrize("name", MEMBERS)
def test_the_loss_is_finite_and_reaches_every_parameter(name, data):
    recipe = MEMBERS[name]().train()
    assert isinstance(recipe, Recipe)
    out = recipe(recipe.augment(batch(data), rng.generator(0)))
    assert torch.isfinite(out["loss"])
    assert out["loss"].ndim == 0
    out["loss"].backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in recipe.parameters() if p.requires_grad)


@pytest.mark.parametrize("name", MEMBERS)
def test_every_trained_parameter_is_in_one_group(name):
    recipe = MEMBERS[name]()
    ids = [id(p) for g in recipe.param_groups() for p in g["params"]]
    assert sorted(ids) == sorted(id(p) for p in recipe.parameters() if p.requires_grad)


@pytest.mark.parametrize("name", MEMBERS)
def test_augmentation_is_a_function_of_its_generator(name, data):
    recipe = MEMBERS[name]()
    a, b, c = (recipe.augment(batch(data), rng.generator(s)) for s in (1, 1, 2))
    assert torch.equal(a.image, b.image)
    assert torch.equal(a.label, b.label)
    if recipe.config == STRONG:
        assert not torch.equal(a.image, c.image)
        assert torch.allclose(a.label.sum(-1), torch.ones(16))
    sample = data[3]
    views = [recipe.transform(sample, rng.generator(s)).image for s in (1, 1, 2)]
    assert torch.equal(views[0], views[1])
    assert torch.equal(views[0], views[2]) != recipe.views
    assert torch.equal(recipe.transform(sample).image, sample.image)


@pytest.mark.parametrize("name", MEMBERS)
def test_resumed_equals_straight_and_the_export_is_usable(name, data, tmp_path):
    import os
    import signal

    config = FitConfig(epochs=2, batch_size=24, ema=0.9, evaluate_every=1, quiet=True, device="cpu")
    straight = MEMBERS[name]()
    fit(straight, data, config=config)
    calls = []

    def stop(subject, seen):
        calls.append(1)
        if len(calls) == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return {}

    with pytest.raises(Interrupted):
        fit(MEMBERS[name](), data, config=config, evaluate=stop, out=tmp_path)
    resumed = MEMBERS[name]()
    fit(resumed, data, config=config, out=tmp_path, resume=True)
    a, b = straight.state_dict(), resumed.state_dict()
    assert all(torch.equal(a[k], b[k]) for k in a)
    model = resumed.export()
    assert not model.training
    with torch.inference_mode():
        assert model(data.images[:2]).shape == (2, 10)
