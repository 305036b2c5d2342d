"""Subject: pixels in [0, 1] at the door whatever stands behind it."""

import pytest
import torch
from torch import nn

from lynceus.core.errors import AdviceError
from lynceus.core.rng import borrowed, capture, derive, generator, restore
from lynceus.core.subject import Normalise, Subject


class Seen(nn.Module):
    """Gives back the mean pixel that it was shown, per channel."""

    mean, std = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)

    def forward(self, x):
        return x.mean((-2, -1))


def test_normalises_with_the_models_own_numbers():
    out = Subject(Seen())(torch.full((2, 3, 4, 4), 0.75))
    torch.testing.assert_close(out, torch.ones(2, 3))


def test_leaves_models_that_own_their_pixels_and_functions_alone():
    class Owner(Seen):
        owns_pixels = True

    pixels = torch.full((1, 3, 4, 4), 0.75)
    torch.testing.assert_close(Subject(Owner())(pixels), torch.full((1, 3), 0.75))
    torch.testing.assert_close(Subject(lambda x: x.mean((-2, -1)))(pixels), torch.full((1, 3), 0.75))


def test_subject_of_subject_normalises_once():
    inner = Subject(Seen(), classes=["a", "b", "c"], size=8)
    outer = Subject(inner)
    pixels = torch.rand(1, 3, 5, 6)
    torch.testing.assert_close(outer(pixels), inner(pixels))
    assert outer.classes == ["a", "b", "c"]
    assert outer.prepare(pixels).shape[-2:] == (8, 8)


def test_uint8_counts_as_pixels():
    torch.testing.assert_close(
        Subject(Seen())(torch.full((1, 3, 2, 2), 255, dtype=torch.uint8)), Subject(Seen())(torch.ones(1, 3, 2, 2))
    )


@pytest.mark.parametrize("bad", [torch.rand(3, 4, 4), torch.rand(1, 5, 4, 4)])
def test_wrong_shapes_advise(bad):
    with pytest.raises(AdviceError, match=r"\(b, 3, h, w\)"):
        Subject(Seen())(bad)


def test_names_and_non_models_advise():
    with pytest.raises(AdviceError, match="create_model"):
        Subject("resnet50")
    with pytest.raises(AdviceError, match="module or a function"):
        Subject(3)
    with pytest.raises(AdviceError, match="one of each per channel"):
        Normalise((0.5,), (1.0, 1.0))


def test_features_of_a_function_advise_unless_given():
    plain = Subject(lambda x: x.mean((-2, -1)), name="api")
    with pytest.raises(AdviceError, match="api"):
        plain.features(torch.rand(1, 3, 4, 4))
    with pytest.raises(AdviceError, match="features"):
        plain.require(frozenset({"features"}))
    with pytest.raises(AdviceError, match="gradients"):
        plain.require(frozenset({"gradients"}))
    known = Subject(lambda x: x.mean((-2, -1)), features=lambda x: [x, x.mean((-2, -1))])
    known.require(frozenset({"features"}))
    assert [f.shape for f in known.features(torch.rand(2, 3, 4, 4))] == [(2, 3, 4, 4), (2, 3)]
    assert known.embed(torch.rand(2, 3, 4, 4)).shape == (2, 3)


def test_gradients_reach_the_pixels_only_when_wanted():
    pixels = torch.rand(1, 3, 4, 4, requires_grad=True)
    assert Subject(Seen())(pixels).requires_grad
    assert not Subject(Seen(), needs_grad=False)(pixels).requires_grad


def test_seeds_are_derived_and_global_state_given_back():
    assert derive(0, "a") == derive(0, "a")
    assert len({derive(0, "a"), derive(0, "b"), derive(1, "a")}) == 3
    assert torch.rand(1, generator=generator(0, "x")).equal(torch.rand(1, generator=generator(0, "x")))
    before = torch.get_rng_state()
    with borrowed(3):
        first = torch.rand(2)
    with borrowed(3):
        assert torch.rand(2).equal(first)
    assert torch.get_rng_state().equal(before)
    state = capture()
    drawn = torch.rand(3)
    restore(state)
    assert torch.rand(3).equal(drawn)
