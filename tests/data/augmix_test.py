"""AugMix' changes mean what Pillow's mean, its mixture stays between pictures, its randomness is its generator's."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from lynceus.core.errors import AdviceError
from lynceus.data import augmix as am
from lynceus.data.augmix import AugMixConfig, augmix


def pictures(n=4, h=32, w=32, seed=0):
    """Smooth pictures whose channels span different ranges, and a flat one."""
    draw = torch.Generator().manual_seed(seed)
    coarse = torch.rand(n, 3, 4, 4, generator=draw)
    x = torch.nn.functional.interpolate(coarse, (h, w), mode="bilinear")
    x = x * torch.rand(n, 3, 1, 1, generator=draw) + 0.05 * torch.rand(n, 3, h, w, generator=draw)
    x[-1] = 0.5
    return (x.clamp(0, 1) * 255).to(torch.uint8)


def pillow(x, change):
    made = [np.asarray(change(Image.fromarray(i.permute(1, 2, 0).numpy()))) for i in x]
    return torch.from_numpy(np.stack(made)).permute(0, 3, 1, 2)


@pytest.mark.parametrize("size", [(32, 32), (17, 40), (64, 64)])
def test_changes_of_levels_are_pillows(size):
    x = pictures(6, *size)
    full = torch.full((6,), 1)
    assert torch.equal(am.autocontrast(x), pillow(x, ImageOps.autocontrast))
    assert torch.equal(am.equalize(x), pillow(x, ImageOps.equalize))
    for bits in (1, 3, 4, 8):
        assert torch.equal(am.posterize(x, bits * full), pillow(x, lambda p, b=bits: ImageOps.posterize(p, b)))
    for threshold in (0, 1, 180, 254, 255, 256):
        want = pillow(x, lambda p, t=threshold: ImageOps.solarize(p, t))
        assert torch.equal(am.solarize(x, threshold * full), want)


@pytest.mark.parametrize("size", [(32, 32), (17, 40)])
@pytest.mark.parametrize("kind", range(len(am.GEOMETRIC)))
@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_moves_are_pillows_within_a_level(size, kind, sign):
    h, w = size
    x = pictures(5, h, w)
    strength = np.full(5, 0.28)
    ours = am.moved(x, torch.from_numpy(am.affine(np.full(5, kind), strength, np.full(5, sign), h, w)))
    shear, shift_x, shift_y = sign * 0.28 * 0.3, sign * int(0.28 * w / 3), sign * int(0.28 * h / 3)
    matrix = [
        None,
        (1, shear, 0, 0, 1, 0),
        (1, 0, 0, shear, 1, 0),
        (1, 0, shift_x, 0, 1, 0),
        (1, 0, 0, 0, 1, shift_y),
    ][kind]
    bilinear = Image.Resampling.BILINEAR

    def change(p):
        if matrix is None:
            return p.rotate(sign * int(0.28 * 30), resample=bilinear)
        return p.transform(p.size, Image.Transform.AFFINE, matrix, resample=bilinear)

    theirs = pillow(x, change)
    apart = (ours.int() - theirs.int()).abs()
    assert apart.max() <= 1
    assert (apart > 0).float().mean() < 0.01


@pytest.mark.parametrize("kind", [3, 4])
@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_large_pictures_are_shifted_by_copies_as_small_ones_by_interpolation(kind, sign):
    x = pictures(6, 70, 90)
    strength = np.linspace(0, 0.9, 6)
    number = np.full(6, kind)
    want = am.moved(x, torch.from_numpy(am.affine(number, strength, np.full(6, sign), 70, 90)))
    made = x.clone()
    am._change(made, number + len(am.POINTWISE), strength, np.full(6, sign))
    assert torch.equal(made, want)
    assert not torch.equal(made[1:], x[1:])


@settings(max_examples=25, deadline=None)
@given(
    n=st.integers(1, 5),
    h=st.integers(1, 40),
    w=st.integers(1, 40),
    severity=st.floats(1, 10),
    width=st.integers(1, 4),
    depth=st.integers(0, 4),
    real=st.booleans(),
    seed=st.integers(0, 2**40),
)
def test_any_batch_stays_a_batch_of_pictures(n, h, w, severity, width, depth, real, seed):
    x = pictures(n, h, w, seed=seed % 1000)
    x = x.float() / 255 if real else x
    before = x.clone()
    config = AugMixConfig(severity=severity, width=width, depth=depth)
    made = augmix(x, torch.Generator().manual_seed(seed), config)
    again = augmix(x, torch.Generator().manual_seed(seed), config)
    assert made.shape == x.shape
    assert made.dtype == torch.float32
    assert torch.equal(made, again)
    assert torch.equal(x, before)
    assert made.min() >= -1e-6
    assert made.max() <= 1 + 1e-6


def test_pixels_in_unit_range_and_bytes_give_the_same():
    x = pictures(8)
    a = augmix(x, torch.Generator().manual_seed(1))
    b = augmix(x.float() / 255, torch.Generator().manual_seed(1))
    assert torch.allclose(a, b, atol=1e-6)


def test_a_mixture_lies_between_the_picture_and_its_chains():
    """With one chain of one change, the mixture is (1 - m) x + m change(x) for one of the nine changes."""
    x = pictures(64, seed=3)[:1].repeat(64, 1, 1, 1)
    made = augmix(x, torch.Generator().manual_seed(0), AugMixConfig(width=1, depth=1))
    moved = (made * 255 - x).abs().amax((1, 2, 3))
    assert (moved > 1).sum() > 32  # most changes are seen
    assert len({round(float(v), 2) for v in moved}) > 20  # and shares and strengths differ


def test_the_shares_follow_their_distributions(monkeypatch):
    """With changes that blacken, mixture / picture = 1 - m, uniform for Beta(1, 1)."""
    monkeypatch.setattr(am, "_change", lambda chains, kind, strength, sign: chains.zero_())
    x = torch.full((4000, 3, 1, 1), 255, dtype=torch.uint8)
    keep = augmix(x, torch.Generator().manual_seed(0))[:, 0, 0, 0]
    assert abs(float(keep.mean()) - 0.5) < 0.02
    assert abs(float(keep.std()) - 12**-0.5) < 0.01


def test_changes_are_drawn_evenly_and_chains_have_one_to_three(monkeypatch):
    seen = []
    monkeypatch.setattr(am, "_change", lambda chains, kind, strength, sign: seen.append((kind, strength, sign)))
    augmix(torch.zeros(3000, 3, 1, 1, dtype=torch.uint8), torch.Generator().manual_seed(0))
    assert len(seen) == 3
    done = [float((kind >= 0).mean()) for kind, _, _ in seen]
    assert np.allclose(done, [1, 2 / 3, 1 / 3], atol=0.02)
    counts = np.bincount(seen[0][0], minlength=9)
    assert counts.min() > 900  # of 9,000 draws over nine changes
    assert 0.01 <= seen[0][1].min() < seen[0][1].max() <= 0.3
    assert abs(seen[0][2].mean()) < 0.05


def test_bad_options_are_told():
    for options in ({"severity": 0}, {"severity": 11}, {"width": 0}, {"depth": -1}, {"alpha": 0}):
        with pytest.raises(AdviceError, match=next(iter(options))):
            AugMixConfig(**options)
