"""Shift consistency: exact on networks whose answer to a shift is known."""

import pytest
import torch
from torch import nn

from lynceus.core.errors import AdviceError
from lynceus.core.nouns import Check
from lynceus.core.report import Report
from lynceus.core.subject import Subject
from lynceus.core.types import Sample
from lynceus.rewrite.crop_selection import crop_selection
from lynceus.trust.shift import ShiftConsistency, gather, shift, shift_set


def samples(count=12, side=20, seed=0):
    x = (torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(seed)) * 255).to(torch.uint8)
    return [Sample(image=image, label=i % 2) for i, image in enumerate(x)]


def brightest(x):
    """Two classes, by whether the brightest pixel of the view lies in its upper half: a roll moves it, and wraps it."""
    place = x.mean(1).flatten(1).argmax(1) // x.shape[-1]
    return torch.nn.functional.one_hot((place >= x.shape[-2] // 2).long(), 2).float()


def test_sets_of_shifts():
    assert sorted(shift_set(2, "4")) == [(-2, 0), (0, -2), (0, 2), (2, 0)]
    assert len(shift_set(3, "8")) == 8
    assert len(shift_set(3, "all")) == 48
    with pytest.raises(AdviceError):
        shift_set(0)
    with pytest.raises(AdviceError, match="4, 8, all"):
        shift_set(1, "9")


def test_it_is_a_check_with_both_kinds_side_by_side():
    check = ShiftConsistency(radius=2)
    assert isinstance(check, Check)
    report = check(Subject(brightest), samples())
    assert [r["kind"] for r in report.rows] == ["realistic", "cyclic"]
    assert report.rows[0]["shifts"] == "2 px, 8 directions"
    assert "accuracy" in report.rows[0]
    text = report.table()
    assert "realistic" in text
    assert "cyclic" in text
    again = Report.from_json(report.json())
    assert again.rows == report.rows


def test_it_equals_a_direct_count():
    data = samples(30, 16)
    images, _ = gather(data)
    report = shift(brightest, images, [(1, 0), (-1, 1), (2, -2)], view=10)
    x = images.float() / 255
    base = brightest(x[..., 3:13, 3:13]).argmax(1)
    for name in ("realistic", "cyclic"):
        same = []
        for a, b in [(1, 0), (-1, 1), (2, -2)]:
            if name == "realistic":
                moved = x[..., 3 + a : 13 + a, 3 + b : 13 + b]
            else:
                moved = torch.roll(x[..., 3:13, 3:13], (a, b), (-2, -1))
            same.append(brightest(moved).argmax(1) == base)
        same = torch.stack(same, 1)
        assert report.arrays[name].tolist() == same.tolist()
        row = next(r for r in report.rows if r["kind"] == name)
        assert row["consistency"] == pytest.approx(float(same.double().mean()))
        assert row["adversarial"] == pytest.approx(float(same.all(1).double().mean()))
        assert row["adversarial"] < row["consistency"] < 1


def test_a_mean_colour_model_survives_rolls_but_not_always_the_camera():
    def mean_colour(x):
        return x.double().mean((2, 3)).float()

    report = shift(mean_colour, gather(samples(40))[0], 2)
    assert report.summary["cyclic_adversarial"] == 1
    assert report.summary["realistic_adversarial"] < 1


def test_embeddings_cosine_and_nearest_neighbour():
    images, _ = gather(samples(20, 14))

    def pixels(x):
        return x.flatten(1) - 0.5

    report = shift(pixels, images, 1, embedding=True)
    for row in report.rows:
        assert 0 <= row["nearest changed"] <= 1
        assert row["consistency"] == pytest.approx(1 - row["nearest changed"])
        assert -1 <= row["cosine, worst shift"] <= row["cosine"] < 0.5  # white noise: one pixel away is another vector
    still = shift(lambda x: x.mean((2, 3)), images, 1, kind="cyclic", embedding=True)
    assert still.rows[0]["nearest changed"] == 0
    assert still.rows[0]["cosine"] == pytest.approx(1)
    anchored = shift(lambda x: x.mean((2, 3)), images, 1, kind="cyclic", embedding=True, anchors=torch.eye(3))
    assert anchored.summary["cyclic_consistency"] == 1


def test_an_untrained_timm_model_with_its_features():
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model = timm.create_model("resnet18", pretrained=False, num_classes=10)
    report = shift(model, gather(samples(6, 36))[0], 1, features=True)
    assert {"consistency", "adversarial", "cosine", "nearest changed"} <= set(report.rows[0])
    assert report.rows[0]["cosine"] < 1


def test_crop_selection_keeps_more_answers_and_carries_its_certificate():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.ReLU(), nn.Flatten(), nn.LazyLinear(10))
    net(torch.zeros(1, 3, 16, 16))
    images, _ = gather(samples(100, 34))
    chosen = crop_selection(net, input_size=16, view=32)

    def plain(x):
        return chosen.model(chosen.normalise(x[..., 8:24, 8:24]))

    ours, theirs = shift(chosen, images, 1), shift(plain, images, 1)
    assert ours.summary["realistic_consistency"] > theirs.summary["realistic_consistency"] + 0.1
    sure = torch.from_numpy(ours.arrays["certified"])
    assert 0 < ours.summary["certified"] <= ours.summary["realistic_adversarial"]
    assert bool(torch.from_numpy(ours.arrays["realistic"])[sure].all())
    cyclic = crop_selection(net, input_size=16, view=32, cyclic=True)
    assert shift(cyclic, images, shift_set(1, "8"), kind="cyclic", view=32).summary["cyclic_adversarial"] == 1


def test_photographs_of_many_sizes_need_a_stored_size(imagenet_jpegs):
    from torchvision.io import ImageReadMode, decode_image

    data = [Sample(image=decode_image(str(p), ImageReadMode.RGB)) for p in imagenet_jpegs[:3]]
    with pytest.raises(AdviceError, match="stored="):
        ShiftConsistency()(Subject(brightest), data)
    report = ShiftConsistency(stored=66, view=64)(Subject(brightest), data)
    assert "accuracy" not in report.rows[0]
    assert report.rows[0]["images"] == 3


def test_pictures_without_known_surroundings_are_extended_by_their_border():
    images, _ = gather(samples(8, 12))
    report = shift(brightest, images, 1, extend=1)
    assert report.rows[0]["images"] == 8
    assert "border pixels" in " ".join(report.notes)
    same = shift(brightest, torch.nn.functional.pad(images.float() / 255, (1, 1, 1, 1), mode="replicate"), 1)
    assert same.rows == report.rows


def test_mistakes_are_advised():
    images, _ = gather(samples())
    with pytest.raises(AdviceError, match="leave room"):
        shift(brightest, images, 1, view=20)
    with pytest.raises(AdviceError, match="cyclic"):
        shift(brightest, images, 1, kind="cyclc")
    with pytest.raises(AdviceError, match="empty"):
        ShiftConsistency()(Subject(brightest), [])
    with pytest.raises(AdviceError, match="at least one shift"):
        shift(brightest, images, [])
