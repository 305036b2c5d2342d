"""Wrong use is caught before any long work, with the sample or the layer and the cure."""

import pytest
import torch
from torch import nn

from lynceus import data
from lynceus.core.errors import AdviceError, AdviceWarning
from lynceus.core.subject import Subject
from lynceus.core.types import Sample
from lynceus.trust.guard import collect, examine, first_not_finite

LABELS = frozenset({"labels"})


class Net(nn.Module):
    owns_pixels = True

    def __init__(self, classes=3):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.norm = nn.BatchNorm2d(8)
        self.head = nn.Linear(8, classes)

    def forward(self, x):
        return self.head(self.norm(self.conv(x)).relu().mean((-2, -1)))


@pytest.fixture(scope="module")
def images():
    return torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net()


def samples(images, labels=None):
    return [
        Sample(image=x, label=None if labels is None else labels[i], id=f"picture {i}") for i, x in enumerate(images)
    ]


def test_a_sound_subject_passes_without_a_word(net, images, recwarn):
    found = collect(Subject(net), samples(images, [0, 1, 2, 0, 1, 2]), needs=LABELS)
    assert (len(found), found.classes, found.notes) == (6, 3, [])
    assert found.labels.tolist() == [0, 1, 2, 0, 1, 2]
    assert found.images.equal(images)
    assert not [w for w in recwarn if issubclass(w.category, AdviceWarning)]


def test_digits_and_photographs_of_different_sizes(net):
    digits = data.open("digits").take(20)
    assert collect(Subject(Net(10)), digits, needs=LABELS, limit=5).images.shape == (5, 3, 8, 8)
    mixed = samples([torch.rand(3, 20, 30), torch.rand(3, 40, 24)])
    with pytest.raises(AdviceError, match="one size"):
        collect(Subject(net), mixed)
    fitted = collect(Subject(net, size=16), mixed).images
    assert fitted.shape == (2, 3, 16, 16)
    torch.testing.assert_close(fitted * 255, (fitted * 255).round())


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (lambda x: x * 255, "0..255.*divide|divide"),
        (lambda x: (x - 0.5) / 0.25, "normalised already"),
        (lambda x: torch.where(x > 0.99, torch.nan, x), "not finite"),
    ],
)
def test_wrong_pixels_name_the_sample(net, images, bad, words):
    wrong = [x if i != 4 else bad(x).clamp_min(-9) for i, x in enumerate(images)]
    wrong[4][0, 0, 0] = bad(torch.ones(1))[0]
    with pytest.raises(AdviceError, match=words) as caught:
        collect(Subject(net), samples(wrong))
    assert "picture 4" in str(caught.value)
    assert "picture 3" not in str(caught.value)


def test_a_label_that_the_model_does_not_have_names_the_sample(net, images):
    with pytest.raises(AdviceError, match=r"picture 3.*label 7.*3 classes"):
        collect(Subject(net), samples(images, [0, 1, 2, 7, 0, 1]), needs=LABELS)
    with pytest.raises(AdviceError, match="picture 1"):
        collect(Subject(net), samples(images, [0, -1, 2, 1, 0, 1]), needs=LABELS)
    with pytest.raises(AdviceError, match="No image has a label"):
        collect(Subject(net), samples(images), needs=LABELS)


def test_a_wrong_number_of_classes(net, images):
    with pytest.raises(AdviceError, match=r"10 classes.*gives 3"):
        collect(Subject(net), data.open("digits").subset([0, 1, 2]), needs=LABELS)
    with pytest.raises(AdviceError, match="10 classes"):
        collect(Subject(Net(20)), data.open("digits").take(5), needs=LABELS)
    with pytest.raises(AdviceError, match="names 2 classes"):
        examine(Subject(net, classes=["a", "b"]), images)


@pytest.mark.parametrize("layer", ["conv", "norm", "head"])
def test_numbers_that_are_not_finite_name_the_layer_and_the_sample(net, images, layer):
    with torch.no_grad():
        next(getattr(net, layer).parameters()).fill_(torch.nan)
    with pytest.raises(AdviceError, match=f"sample 0, sample 1, sample 2 and 1 more.*'{layer}'"):
        examine(Subject(net), images)
    assert first_not_finite(Subject(net), images) == layer


def test_a_function_that_answers_one_sample_with_nan(images):
    def odd(x):
        out = x.mean((-2, -1))
        out[x[:, 0, 0, 0] == images[2, 0, 0, 0]] = torch.nan
        return out

    with pytest.raises(AdviceError, match=r"sample 2 with numbers"):
        examine(Subject(odd, name="odd"), images)


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (lambda x: x, r"gives \(4, 3, 8, 8\)"),
        (lambda x: x.mean((1, 2, 3))[:, None], "one number per image"),
        (lambda x: x.mean((0, 2, 3))[None], "for 4 images"),
        (lambda x: x.mean((-2, -1)).softmax(0), "whole"),
        (lambda x: (x - x.mean(0)).mean((-2, -1)), "whole"),
    ],
)
def test_answers_of_a_wrong_form(images, function, words):
    with pytest.raises(AdviceError, match=words):
        examine(Subject(function, name="f"), images)


def test_training_mode_is_refused_here_and_warned_of_everywhere(net, images):
    subject = Subject(net)
    net.norm.train()
    with pytest.raises(AdviceError, match=r"norm.*model.eval\(\)"):
        examine(subject, images)
    net.train()
    with pytest.warns(AdviceWarning, match=r"model.eval\(\)"):
        subject(images)


def test_pixels_in_a_wrong_range_are_warned_of_by_the_subject_itself(net, images):
    with pytest.warns(AdviceWarning, match="divide them by 255"):
        Subject(net)(images * 255)
    with pytest.warns(AdviceWarning, match="normalises inside"):
        Subject(net)((images - 0.5) / 0.25)


def test_a_subject_that_gives_probabilities(net, images):
    twice = Subject(nn.Sequential(net, nn.Softmax(1)), mean=(0, 0, 0), std=(1, 1, 1), name="soft")
    (note,) = examine(twice, images)
    assert "probabilities=True" in note
    mended = Subject(twice, probabilities=True)
    assert examine(mended, images) == []
    torch.testing.assert_close(mended(images), net(images).log_softmax(1))
    assert Subject(mended).probabilities
    x = images.clone().requires_grad_()
    torch.nn.functional.cross_entropy(mended(x), torch.zeros(6, dtype=torch.long)).backward()
    y = images.clone().requires_grad_()
    torch.nn.functional.cross_entropy(net(y), torch.zeros(6, dtype=torch.long)).backward()
    torch.testing.assert_close(x.grad, y.grad, atol=1e-7, rtol=1e-4)


def test_a_random_function_is_noted(images):
    (note,) = examine(Subject(lambda x: x.mean((-2, -1)) + torch.rand(len(x), 3), name="dice"), images)
    assert "asked twice" in note


def test_masks(net, images):
    masks = torch.zeros(1, 8, 8, dtype=torch.bool)
    good = Sample(image=images[0], masks=~masks, id="good")
    need = frozenset({"masks"})
    assert collect(Subject(net), [good], needs=need).masks[0].all()
    for bad, words in [
        (masks, "without a single pixel"),
        (masks[:0], "no mask"),
        (None, "no mask"),
        (torch.ones(1, 4, 4, dtype=torch.bool), "one size"),
    ]:
        with pytest.raises(AdviceError, match=words) as caught:
            collect(Subject(net), [good, Sample(image=images[1], masks=bad, id="the other")], needs=need)
        assert "the other" in str(caught.value)


def test_images_without_a_label_are_left_out_and_it_is_said(net, images):
    found = collect(Subject(net), samples(images, [0, None, 2, 1, None, 1])).labelled()
    assert found.ids == ["picture 0", "picture 2", "picture 3", "picture 5"]
    assert "2 images without a label" in found.notes[0]
    with pytest.raises(AdviceError, match="No image has a label"):
        collect(Subject(net), samples(images)).labelled()
