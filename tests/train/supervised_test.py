"""Augmentation: what each piece does to images and labels."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lynceus.core import rng
from lynceus.core.errors import AdviceError
from lynceus.core.types import Sample
from lynceus.recipes.supervised import PRESETS, SupervisedConfig, erase, mix, random_resized_crop, random_shift


def images(n=32, h=12, w=10):
    return torch.randint(1, 256, (n, 3, h, w), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@given(by=st.integers(1, 4), seed=st.integers(0, 50))
@settings(max_examples=20, deadline=None)
def test_shift_moves_every_image_by_itself(by, seed):
    x = images()
    out = random_shift(x, by, rng.generator(seed))
    assert out.shape == x.shape
    seen = set()
    for before, after in zip(x, out):
        padded = torch.nn.functional.pad(before, (by,) * 4)
        found = [
            (i, j)
            for i in range(2 * by + 1)
            for j in range(2 * by + 1)
            if torch.equal(padded[:, i : i + 12, j : j + 10], after)
        ]
        assert len(found) == 1
        seen.add(found[0])
    assert len(seen) > 3


def test_erasing_takes_a_grey_rectangle_of_the_right_area():
    x = images(400, 32, 32)
    x[x == 128] = 127
    out = erase(x, 0.5, rng.generator(0))
    hit = (out != x).any(1)
    share = hit.flatten(1).any(1).float().mean()
    assert 0.4 < float(share) < 0.6
    for mask, picture in zip(hit[:50], out):
        if mask.any():
            rows, cols = mask.any(1), mask.any(0)
            assert torch.equal(mask, rows[:, None] & cols[None, :])  # a rectangle
            assert (picture[:, mask] == 128).all()
    area = hit.flatten(1).float().mean(1)
    assert float(area.max()) < 0.45
    assert torch.equal(erase(x, 0.0, rng.generator(0)), x)


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_mixed_labels_are_the_shares_of_the_pixels(kind):
    n = 20
    x = torch.arange(n).float().view(n, 1, 1, 1).expand(n, 3, 16, 16).contiguous() / n
    label = torch.eye(n)
    for seed in range(20):
        out, mixed = mix(x, label, SupervisedConfig(**{kind: 1.0}), rng.generator(seed))
        expected = (mixed * torch.arange(n)).sum(-1) / n  # the mean brightness says how much of which image is there
        torch.testing.assert_close(out.mean((1, 2, 3)), expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(mixed.sum(-1), torch.ones(n))


def test_mixing_follows_its_chances():
    x, label = torch.rand(8, 3, 8, 8), torch.eye(8)
    never = [mix(x, label, SupervisedConfig(mixup=1.0, mix_prob=0.0), rng.generator(s))[1] for s in range(20)]
    assert all(torch.equal(m, label) for m in never)
    config = SupervisedConfig(mixup=1.0, cutmix=1.0, switch_prob=0.3)
    cut = [bool(np.isin(mix(x, label, config, rng.generator(s))[0].numpy(), x.numpy()).all()) for s in range(300)]
    assert 0.2 < np.mean(cut) < 0.4


@given(h=st.integers(1, 70), w=st.integers(1, 70), seed=st.integers(0, 20))
@settings(max_examples=60, deadline=None)
def test_a_crop_has_its_size_whatever_the_image(h, w, seed):
    image = torch.randint(0, 256, (3, h, w), dtype=torch.uint8)
    out = random_resized_crop(image, 24, (0.08, 1.0), rng.generator(seed))
    assert out.shape == (3, 24, 24)
    assert out.dtype == torch.uint8


def test_a_crop_of_everything_is_nearly_the_image():
    gradient = torch.linspace(0, 1, 24).expand(3, 24, 24)
    out = [random_resized_crop(gradient, 24, (1.0, 1.0), rng.generator(s)) for s in range(10)]
    assert all(float((o - gradient).abs().max()) < 0.2 for o in out)


@pytest.mark.parametrize("options", [{"flip": 2}, {"mixup": -1}, {"scale": (0.5, 0.2)}, {"crop": -1}, {"erase": 1.5}])
def test_options_are_checked(options):
    with pytest.raises(AdviceError):
        SupervisedConfig(**options)


def test_the_plain_preset_changes_nothing(worker, small):
    plain = worker.recipe(crop=0, mixup=0, cutmix=0, flip=0, erase=0)
    assert plain.config == PRESETS["plain"]
    batch = small[0].batch(range(8))
    assert torch.equal(plain.augment(batch, rng.generator(0)).image, batch.image)


def test_mixing_needs_all_labels(worker, small):
    batch = small[0].batch(range(8))
    batch.label = torch.tensor([0, 1, 2, 3, -1, 5, 6, 7])
    with pytest.raises(AdviceError, match="every image"):
        worker.recipe().augment(batch, rng.generator(0))


def test_views_keep_what_is_known_of_the_image(worker):
    sample = Sample(image=torch.zeros(3, 20, 30, dtype=torch.uint8), label=3, id="a", path="/a.png", extra={"k": 1})
    view = worker.recipe(view=8).transform(sample, rng.generator(0))
    assert (view.label, view.id, view.path, view.extra) == (3, "a", "/a.png", {"k": 1})
    assert view.image.shape == (3, 8, 8)
