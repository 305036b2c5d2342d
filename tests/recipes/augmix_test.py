"""AugMix: its divergence is what the paper defines, the recipe adds it, and only self-mixtures are taken."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from lynceus import FitConfig, create_model
from lynceus.core import rng
from lynceus.core.errors import AdviceError
from lynceus.core.types import Batch
from lynceus.data import open_dataset
from lynceus.recipes.augmix import AugMix, consistency, mixtures
from lynceus.recipes.classify import train_classifier
from lynceus.recipes.supervised import SupervisedConfig
from lynceus.tasks.classify import Classify


@settings(max_examples=40, deadline=None)
@given(b=st.integers(1, 6), k=st.integers(2, 12), scale=st.floats(0.01, 8), seed=st.integers(0, 1000))
def test_consistency_is_a_divergence(b, k, scale, seed):
    draw = torch.Generator().manual_seed(seed)
    logits = [scale * torch.randn(b, k, generator=draw, dtype=torch.float64) for _ in range(3)]
    value = consistency(*logits)
    p = torch.stack([x.softmax(-1) for x in logits])
    entropy = -(p * p.clamp(min=1e-300).log()).sum(-1).mean()
    middle = p.mean(0)
    want = -(middle * middle.log()).sum(-1).mean() - entropy  # Jensen-Shannon: H(mean) - mean H
    assert math.isclose(float(value), float(want), rel_tol=1e-4, abs_tol=1e-6)
    assert -1e-9 <= float(value) <= math.log(3) + 1e-9
    assert torch.isclose(value, consistency(*logits[::-1]))


def test_equal_answers_agree_and_the_clamp_keeps_far_ones_finite():
    x = torch.randn(4, 5)
    assert float(consistency(x, x, x)) == pytest.approx(0, abs=1e-6)
    far = torch.tensor([[1e4, -1e4]], requires_grad=True)
    value = consistency(far, far, far)
    value.backward()
    assert torch.isfinite(value)
    assert torch.isfinite(far.grad).all()


def small(**options):
    torch.manual_seed(0)
    return AugMix(Classify(num_classes=10), create_model("convnext_nano", num_classes=10), **options)


def test_the_loss_is_cross_entropy_of_the_clean_picture_plus_twelve_consistencies():
    recipe = small().eval()
    data = open_dataset("digits", size=16).subset(range(8)).batch(range(8))
    batch = recipe.augment(data, rng.generator(0))
    out = recipe(batch)
    clean, mixed = batch.pixels(), mixtures(batch)
    logits = [recipe.model(x) for x in (clean, mixed[:, 0], mixed[:, 1])]
    want = F.cross_entropy(logits[0], batch.label) + 12 * consistency(*logits)
    assert torch.allclose(out["loss"], want, atol=1e-4)
    assert torch.allclose(out["consistency"], consistency(*logits), atol=1e-5)
    assert not torch.allclose(mixed[:, 0], mixed[:, 1])


def test_pixels_of_either_kind_are_learnt_from():
    recipe = small(views=SupervisedConfig(crop=1, flip=0.5))
    real = Batch(image=torch.rand(4, 3, 16, 16), sizes=[(16, 16)] * 4, label=torch.arange(4))
    made = recipe.augment(real, rng.generator(0))
    assert mixtures(made).shape == (4, 2, 3, 16, 16)
    assert torch.isfinite(recipe(made)["loss"])


def test_mistakes_are_told():
    with pytest.raises(AdviceError, match="mixup=0"):
        small(views=SupervisedConfig(mixup=0.8))
    with pytest.raises(AdviceError, match="weight"):
        small(weight=-1)
    task = Classify(num_classes=10, multi_label=True)
    with pytest.raises(AdviceError, match="one class each"):
        AugMix(task, create_model("convnext_nano", num_classes=10))
    bare = Batch(image=torch.rand(2, 3, 8, 8), sizes=[(8, 8)] * 2, label=torch.arange(2))
    with pytest.raises(AdviceError, match="augment"):
        small()(bare)
    with pytest.raises(AdviceError, match="augmix"):
        train_classifier("digits", "convnext_nano", recipe="augmax")


def test_train_classifier_offers_it():
    data = open_dataset("digits", size=16).take(80)
    config = FitConfig(steps=3, batch_size=16, quiet=True, device="cpu")
    model, report = train_classifier(data, "convnext_nano", recipe="augmix", config=config)
    assert "accuracy" in report.summary
    assert model(torch.rand(2, 3, 16, 16)).shape == (2, 10)
