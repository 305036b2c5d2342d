"""The check under common corruptions: counts by hand, mCE by its definition, resume, budgets, mistakes."""

import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from lynceus.core.errors import AdviceError
from lynceus.core.report import Report
from lynceus.core.subject import Subject
from lynceus.core.types import Sample
from lynceus.data.corrupt import ALEXNET, ALEXNET_CLEAN, BENCHMARK, corrupt, picture_generators
from lynceus.trust.corrupted import Corrupted, Reference, corruption_error, reference_of


class Bright(nn.Module):
    """Class 1 when the picture's mean is above a half."""

    owns_pixels = True

    def __init__(self, classes=2):
        super().__init__()
        self.classes_ = classes
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        mean = x.mean((1, 2, 3))
        out = torch.full((len(x), self.classes_), -9.0)
        out[:, 0], out[:, 1] = 0.5 - mean, mean - 0.5
        return out


def pictures(count=20, side=24):
    rng = np.random.default_rng(0)
    out = []
    for i in range(count):
        x = np.clip(rng.normal(80 + 95 * (i % 2), 30, (3, side, side)), 0, 255).astype(np.uint8)
        out.append(Sample(image=torch.from_numpy(x), label=i % 2, id=f"p{i}"))
    return out


def test_errors_are_counted_as_by_hand():
    data, check = pictures(), Corrupted(corruptions=("brightness", "fog"), severities=(2, 5), batch_size=7)
    report = check(Subject(Bright()), data, seed=3)
    x = torch.stack([s.image for s in data])
    y = torch.tensor([s.label for s in data])
    for row, name in zip(report.rows, ("fog", "brightness")):
        assert row["corruption"] == name
        for severity in (2, 5):
            seeds = picture_generators(3, name, severity, range(len(x)))
            bad = corrupt(x, name, severity, generator=seeds, scale="cifar").float() / 255
            want = float((Bright()(bad).argmax(1) != y).float().mean())
            assert row[f"severity {severity}"] == pytest.approx(want)
    assert report.summary["clean error"] == 0
    assert report.summary["mean corruption error, un-normalised"] == pytest.approx(report.arrays["errors"].mean())
    assert "mCE" not in report.summary
    assert any("No mCE" in n for n in report.notes)
    assert any(k.startswith("worst corruption") for k in report.figures)
    assert "error by severity.plotly" in report.figures


def test_batches_do_not_change_the_findings():
    data = pictures()
    reports = [
        Corrupted(corruptions=("noise",), severities=(3,), batch_size=n)(Subject(Bright()), data) for n in (3, 64)
    ]
    np.testing.assert_array_equal(reports[0].arrays["errors"], reports[1].arrays["errors"])


def test_mce_is_hendrycks():
    """A model with AlexNet's errors has mCE 1 and relative mCE 1; ResNet-50's published CEs average to 76.7 %."""
    alexnet = Reference(name="AlexNet", errors=ALEXNET, clean=ALEXNET_CLEAN)
    ce = corruption_error({n: [e] * 5 for n, e in ALEXNET.items()}, alexnet, clean=ALEXNET_CLEAN)
    assert np.mean([v for v, _ in ce.values()]) == pytest.approx(1)
    assert np.mean([v for _, v in ce.values()]) == pytest.approx(1)
    half = corruption_error({"fog": [0.1, 0.2, 0.3, 0.4, 0.5]}, alexnet, clean=0.1)
    assert half["fog"][0] == pytest.approx(1.5 / (5 * ALEXNET["fog"]))
    assert half["fog"][1] == pytest.approx((1.5 - 0.5) / (5 * (ALEXNET["fog"] - ALEXNET_CLEAN)))
    published = (80, 82, 83, 75, 89, 78, 80, 78, 75, 66, 57, 71, 85, 77, 77)  # ResNet-50, in the benchmark's order
    errors = {n: [p / 100 * ALEXNET[n]] for n, p in zip(BENCHMARK, published)}
    mce = np.mean([v for v, _ in corruption_error(errors, alexnet).values()])
    assert mce == pytest.approx(0.767, abs=0.003)
    assert np.isnan(corruption_error(errors, alexnet)["fog"][1])


def test_alexnet_stands_for_imagenet_only():
    data = pictures(6, 64)
    thousand = Subject(Bright(1000))
    report = Corrupted()(thousand, data)
    assert report.summary["mCE"] > 0
    assert any("AlexNet" in n for n in report.notes)
    assert any("imagenet" in n for n in report.notes)
    with pytest.raises(AdviceError, match="2 classes"):
        Corrupted(reference="alexnet")(Subject(Bright()), data)
    with pytest.raises(AdviceError, match="cifar"):
        Corrupted(reference="alexnet", scale="cifar")(thousand, data)
    with pytest.raises(AdviceError, match="five severities"):
        Corrupted(reference="alexnet", severities=(1, 2))(thousand, data)


def test_a_named_baseline_gives_mce(tmp_path):
    data, check = pictures(12), Corrupted(severities=(2, 5))
    base = check(Subject(Bright(), name="base"), data)
    base.save(tmp_path / "base")
    again = Corrupted(severities=(2, 5), reference=str(tmp_path / "base"))(Subject(Bright(), name="other"), data)
    errors = again.arrays["errors"].mean(1)
    if (errors > 0).all():
        assert again.summary["mCE"] == pytest.approx(1)
    assert any("errors of base" in n for n in again.notes)
    for row in again.rows:
        assert row["CE"] == pytest.approx(1) or np.isnan(row["CE"])
    with pytest.raises(AdviceError, match="other pictures"):
        Corrupted(severities=(2, 5), reference=str(tmp_path / "base"))(Subject(Bright()), data[:10])
    with pytest.raises(AdviceError, match="other pictures"):
        Corrupted(severities=(2, 5), reference=str(tmp_path / "base"))(Subject(Bright()), data, seed=1)
    with pytest.raises(AdviceError, match="has no errors"):
        Corrupted(reference=str(tmp_path / "base"))(Subject(Bright()), data)
    with pytest.raises(AdviceError, match="corrupted"):
        reference_of(Report(name="cost"), ["fog"], [1])


def test_a_second_run_goes_on(tmp_path):
    data = pictures(20)
    check = Corrupted(corruptions=("digital",), severities=(1, 4), batch_size=8, keep=tmp_path)
    first = check(Subject(Bright()), data)
    file = next(tmp_path.glob("*.jsonl"))
    lines = file.read_text().splitlines()
    assert len(lines) == 3 * 5
    file.write_text("\n".join(lines[:6]) + "\n" + lines[6][:20])  # killed while writing
    model = Bright()
    second = check(Subject(model), data)
    np.testing.assert_array_equal(first.arrays["errors"], second.arrays["errors"])
    assert first.answer == second.answer
    assert first.figures == second.figures
    # a third finds everything done: only the guard and the gallery ask
    model = Bright()
    check(Subject(model), data)
    done = model.calls
    model = Bright()
    Corrupted(corruptions=("digital",), severities=(1, 4), batch_size=8)(Subject(model), data)
    assert done < model.calls


def test_a_budget_that_ends_early_is_said():
    class Slow(Bright):
        def forward(self, x):
            time.sleep(0.05)
            return super().forward(x)

    data = pictures(20)
    report = Corrupted(corruptions=("noise",), batch_size=10, seconds=0.9)(Subject(Slow()), data)
    counts = [r["images"] for r in report.rows]
    assert min(counts) < 20
    assert any("Time ran out" in n for n in report.notes)
    unreached = [i for i, c in enumerate(counts) if c == 0]
    assert np.isnan(report.arrays["errors"][unreached]).all()
    assert Report.from_json(report.json()).rows[0]["corruption"] == "gaussian_noise"
    none = Corrupted(corruptions=("noise",), seconds=0.0)(Subject(Slow()), data)
    assert "Time ran out" in none.answer
    assert np.isnan(none.arrays["errors"]).all()


def test_grey_pictures_and_plain_functions():
    data = [SimpleNamespace(image=s.image[:1], label=s.label, id=s.id, masks=None) for s in pictures(8)]
    seen = set()

    def answer(x):
        seen.add(x.shape[1])
        mean = x.mean((1, 2, 3))
        return torch.stack([0.5 - mean, mean - 0.5], 1)

    report = Corrupted(corruptions=("weather",), severities=(5,))(Subject(answer, name="function"), data)
    assert seen == {1}
    assert len(report.rows) == 4


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"corruptions": ("fgo",)}, "fog"),
        ({"corruptions": ()}, "at least one"),
        ({"severities": (0,)}, "1 to 5"),
        ({"severities": ()}, "1 to 5"),
        ({"scale": "tiny"}, "scale"),
        ({"reference": "/nowhere"}, "no report"),
    ],
)
def test_wrong_options_are_explained_before_any_work(options, word):
    with pytest.raises(AdviceError, match=word):
        Corrupted(**options)(Subject(Bright()), pictures(4))


def test_bad_models_and_data_are_named():
    data = pictures(6)

    class Nan(Bright):
        def forward(self, x):
            return super().forward(x) * float("nan")

    class Sometimes(Bright):
        def forward(self, x):
            return super().forward(x) / (x.mean() < 0.7)  # infinite where it is too bright

    with pytest.raises(AdviceError, match="not finite"):
        Corrupted()(Subject(Nan()), data)
    with pytest.raises(AdviceError, match="under brightness 5"):
        Corrupted(corruptions=("brightness",), severities=(5,))(Subject(Sometimes()), data)
    data[1].label = 7
    with pytest.raises(AdviceError, match="p1"):
        Corrupted()(Subject(Bright()), data)
    with pytest.raises(AdviceError, match=r"\[0, 1\]"):
        Corrupted()(Subject(Bright()), [Sample(image=torch.full((3, 8, 8), 3.0), label=0, id="odd")])
    with pytest.raises(AdviceError, match="label"):
        Corrupted()(Subject(Bright()), [Sample(image=s.image) for s in pictures(4)])
