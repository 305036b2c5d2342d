"""Laws on curves drawn from them, subsets, noise, tails, and a study that is killed and goes on."""

import os
import runpy
import signal
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lynceus import data
from lynceus.core.errors import AdviceError
from lynceus.core.report import Report
from lynceus.gauntlet import fits
from lynceus.gauntlet.baselines import baseline
from lynceus.gauntlet.cells import Budget, SupervisedCell, TransferCell
from lynceus.gauntlet.scaling import DataScaling, ScalingConfig, learning_curve
from lynceus.gauntlet.subsets import Relabelled, corrupt, near_duplicates, nested, thumbnails

N = np.array([200 * 2**i for i in range(8)], float)
TRUTH = {"log": (-0.05, 0.17), "power": (0.7, 4.5, 0.45), "error": (0.75, 0.22)}
SHAPE = {"log": "b", "power": "alpha", "error": "alpha"}


def drawn(law, seeds=3, n_test=2000, seed=0, n=N):
    p = fits.predict(law, np.array(TRUTH[law]), n)
    return fits.Points(
        n=n, accuracy=np.random.default_rng(seed).binomial(n_test, p, (seeds, len(n))) / n_test, n_test=n_test
    )


@pytest.mark.parametrize("law", TRUTH)
def test_the_right_law_is_chosen_and_covered(law):
    chosen = covered = rejected = 0
    for seed in range(50):
        found = fits.fit(drawn(law, seed=seed), draws=400, seed=seed)
        chosen += found.chosen == law
        low, high = found.laws[law].interval(SHAPE[law])
        covered += low <= TRUTH[law][fits.LAWS[law].index(SHAPE[law])] <= high
        rejected += found.laws["log"].rejected
    assert chosen >= 40
    assert covered >= 45
    assert rejected <= 3 if law == "log" else rejected == 50  # both other curves bend


def test_fits_agree_with_scipy_and_each_other():
    points = drawn("log")
    weights = 1 / points.error
    b, a = np.polyfit(np.log10(points.n), points.mean, 1, w=weights)
    law = fits.fit_law("log", points)
    assert np.allclose(law.values, (a, b), atol=1e-7)
    from scipy.optimize import curve_fit

    points = drawn("power")
    law = fits.fit_law("power", points)
    peer, _ = curve_fit(lambda n, t, c, k: t - c * n**-k, points.n, points.mean, (0.7, 4, 0.4), points.error)
    assert np.allclose(law.values, peer, rtol=1e-3)
    many = fits.fit_many("power", points.mean[None], points.n, points.error)[0]
    assert np.allclose(many, law.values, rtol=2e-2)


def test_exact_curves_give_their_parameters_back():
    for name, values in TRUTH.items():
        y = fits.predict(name, np.array(values), N)
        points = fits.Points(n=N, accuracy=np.stack([y, y]), n_test=10**9)
        assert np.allclose(fits.fit_law(name, points, draws=2).values, values, rtol=1e-4)


def test_leave_last_out_and_forecast():
    found = fits.fit(drawn("error", n_test=20_000))
    assert found.last_error < 0.02
    need = fits.more_examples(found)
    target = float(found.best(N[-1])) + 0.01
    assert need.examples is not None
    assert need.low < need.examples < need.high
    assert found.best(N[-1] + need.examples) == pytest.approx(target, abs=1e-6)


def test_forecasts_beyond_a_decade_are_refused():
    found = fits.fit(drawn("power"))
    assert fits.more_examples(found, 0.05).examples is None
    assert "decade" in fits.more_examples(found, 0.05).why
    flat = fits.Points(n=N, accuracy=np.full((3, 8), 0.5), n_test=2000)
    assert fits.more_examples(fits.fit(flat)).examples is None
    short = fits.fit(fits.Points(n=N[:3], accuracy=drawn("log").accuracy[:, :3], n_test=2000))
    assert "4 sizes" in fits.more_examples(short).why


def test_the_bend_is_found():
    y = np.minimum(fits.predict("log", np.array([-0.08, 0.19]), N), 0.56)
    points = fits.Points(n=N, accuracy=np.random.default_rng(0).binomial(2000, y, (3, 8)) / 2000, n_test=2000)
    assert fits.fit_law("log", points).rejected
    assert fits.bend(points) in (4, 5)
    assert fits.bend(drawn("log")) == 8


def test_points_in_percent_advise():
    with pytest.raises(AdviceError, match="fractions"):
        fits.Points(n=N, accuracy=np.full((1, 8), 50.0), n_test=100)


@settings(max_examples=50, deadline=None)
@given(
    st.integers(2, 6), st.integers(0, 5), st.sampled_from([1.0, 3.0, 20.0]), st.sampled_from(["stratified", "random"])
)
def test_subsets_are_nested_and_keep_their_proportions(classes, seed, tail, how):
    labels = np.random.default_rng(seed).permutation(np.arange(600) % classes)
    sizes = [17, 40, 90]
    sets = nested(labels, sizes, seed=seed, how=how, tail=tail)
    for size, small, large in zip(sizes, sets, [*sets[1:], np.arange(600)]):
        assert len(small) == len(set(small)) == size
        assert set(small) <= set(large)
    if how == "stratified" or tail > 1:
        share = tail ** (-np.arange(classes) / (classes - 1))
        for size, small in zip(sizes, sets):
            assert np.abs(np.bincount(labels[small], minlength=classes) - size * share / share.sum()).max() <= 1
    assert np.array_equal(nested(labels, [40], seed=seed, how=how, tail=tail)[0], sets[1])


def test_class_limited_subsets_and_what_the_pool_cannot_give():
    labels = np.arange(600) % 6
    (some,) = nested(labels, [90], seed=0, classes=2)
    assert len(np.unique(labels[some])) == 2
    with pytest.raises(AdviceError, match="at most"):
        nested(labels, [500], seed=0, tail=50.0)
    with pytest.raises(AdviceError, match="601"):
        nested(labels, [601], seed=0)


def test_label_noise():
    labels = np.arange(20_000) % 10
    noisy = corrupt(labels, 0.2, seed=0)
    assert abs((noisy != labels).mean() - 0.2) < 0.01
    more = corrupt(labels, 0.4, seed=0)
    assert ((noisy != labels) <= (more != labels)).all()
    pair = corrupt(labels, 0.3, seed=0, how="pair")
    assert set(np.unique((pair - labels) % 10)) == {0, 1}
    multi = np.ones((5000, 4), int)
    assert abs(1 - corrupt(multi, 0.25, seed=0, how="missing").mean() - 0.25) < 0.02


def test_near_duplicates_are_found_and_left_out():
    digits = data.open("digits").take(300)
    images = digits.images.clone()
    images[7] = images[250]  # equal
    images[8] = (images[251].float() * 0.9 + 4).to(images.dtype)  # nearly
    pool, test = digits.hold(images).subset(np.arange(200)), digits.hold(images).subset(np.arange(200, 300))
    pairs = near_duplicates(thumbnails(test), thumbnails(pool), cosine=0.999)
    assert {(50, 7), (51, 8)} <= {(int(a), int(b)) for a, b in pairs}
    report = learning_curve(
        (pool, test),
        config=ScalingConfig(sizes=(20, 40, 80), seeds=1, capacities=("a",), cosine=0.999, draws=20),
        train_cell=fake,
    )
    assert report.duplicates >= 2


def fake(capacity, cell, budget, seed):
    """Pretends to learn: accuracy follows the log law, capacities differ in slope, noise and tails cost something."""
    n, noise = len(cell.labels), float((cell.labels != np.asarray(cell.train.data.labels)).mean())
    slope = {"a": 0.12, "b": 0.17}[capacity]
    rng = np.random.default_rng(seed % 2**32 + n)
    accuracy = float(np.clip(0.1 + slope * np.log10(n) - 0.5 * noise + 0.004 * rng.normal(), 0, 1))
    counts = np.bincount(cell.labels, minlength=cell.classes)
    per_class = np.clip(accuracy + 0.1 * np.log10(np.maximum(counts, 1) / counts.mean()), 0, 1)
    return {"accuracy": accuracy, "train_loss": 0.1, "class_accuracy": per_class.tolist()}


def test_the_report_says_what_the_grid_found():
    config = ScalingConfig(
        sizes=(50, 100, 200, 400, 800), capacities=("a", "b"), noise=(0.2,), tails=(20.0,), cosine=0.0, draws=200
    )
    curve = learning_curve(data.open("digits"), config=config, train_cell=fake)
    assert curve.ran == len(curve.cells) == 5 * 3 * 2 + 6
    report = curve.report()
    text = "\n".join(report.notes)
    assert abs(report.summary["a: slope per decade"] - 0.12) < 0.03
    assert report.summary["gap growth, low end"] > 0
    assert report.summary["cost of 20% noise at 400"] > 0.05
    assert report.summary["head - tail at ratio 20"] > 0.05
    assert "fixed steps" in text
    assert "half the clean data" in text
    assert "balanced" in text
    tail = next(r for r in report.rows if r["kind"] == "tail")
    assert tail["balanced"] < tail["accuracy"]
    again = Report.from_json(report.json())
    assert again.rows == report.rows
    assert again.figures.keys() == {"learning curve.plotly"}


def test_a_flat_end_with_an_unlearned_training_set_is_budget_limited():
    def cell(capacity, cell, budget, seed):
        n = len(cell.labels)
        accuracy = 0.1 + 0.25 * np.log10(min(n, 200) / 10) + 1e-3 * (seed % 7)
        return {"accuracy": accuracy, "train_loss": 1.5 if n > 200 else 0.01}

    config = ScalingConfig(sizes=(25, 50, 100, 200, 400, 800, 1400), capacities=("a",), cosine=0.0, draws=50)
    report = learning_curve(data.open("digits"), config=config, train_cell=cell).report()
    assert report.summary["a: budget-limited"] == 1
    assert report.summary["a: bend after n"] in (200, 400)
    assert any("budget-limited" in note for note in report.notes)


KILLED = """
    import os, sys, time
    import numpy as np
    from lynceus import data
    from lynceus.gauntlet.scaling import ScalingConfig, learning_curve

    def cell(capacity, part, budget, seed):
        time.sleep(0.1)
        return {"accuracy": 0.1 + 0.1 * np.log10(len(part.labels)), "train_loss": 0.1}

    config = ScalingConfig(sizes=(20, 40, 80, 160), capacities=("a", "b"), cosine=0.0, draws=20)
    curve = learning_curve(data.open("digits"), config=config, train_cell=cell, out=sys.argv[1], quiet=True)
    print(curve.ran, repr(curve.report().summary))
"""


def test_a_killed_study_goes_on_where_it_was(tmp_path, monkeypatch, capsys):
    script = tmp_path / "study.py"
    script.write_text(textwrap.dedent(KILLED))
    out = tmp_path / "run"
    process = subprocess.Popen([sys.executable, str(script), str(out)], stdout=subprocess.DEVNULL)
    for _ in range(1200):
        if len(list(out.glob("cells/*.json"))) >= 5:
            break
        time.sleep(0.1)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    done = len(list(out.glob("cells/*.json")))
    assert 5 <= done < 24
    text = []
    for folder in (out, tmp_path / "straight"):
        monkeypatch.setattr(sys, "argv", [str(script), str(folder)])
        runpy.run_path(str(script))
        text.append(capsys.readouterr().out.split(" ", 1))
    (resumed, found), (straight, wanted) = text
    assert resumed == str(24 - done)
    assert straight == "24"
    assert found == wanted


def test_training_from_scratch_is_repeatable_and_learns():
    config = ScalingConfig(
        sizes=(100, 300, 900), seeds=1, capacities=("resnet_nano",), budget=Budget(amount=25), cosine=0.0, draws=20
    )
    cell = SupervisedCell(lr=(0.1,), mirror=False)
    digits = data.open("digits")
    first = learning_curve(digits, config=config, train_cell=cell)
    assert [r["accuracy"] for r in first.results] == [
        r["accuracy"] for r in learning_curve(digits, config=config, train_cell=cell).results
    ]
    assert first.results[-1]["accuracy"] > 0.3
    assert first.results[-1]["updates"] == 25
    assert Budget(kind="epochs", amount=2, batch_size=50).steps(101) == 6


def test_frozen_features_have_a_learning_curve():
    config = ScalingConfig(smallest=0, seeds=2, draws=50)
    report = DataScaling(config=config)(baseline("raw pixels"), data.open("digits"))
    sizes = [r for r in report.rows if r["kind"] == "size"]
    assert len(sizes) >= 5
    assert sizes[-1]["accuracy"] > sizes[0]["accuracy"] > 0.3


def test_grids_and_relabelled_data():
    assert ScalingConfig(smallest=100).grid(1000) == (100, 200, 400, 800)
    with pytest.raises(AdviceError, match="smallest"):
        ScalingConfig().grid(150)
    with pytest.raises(AdviceError, match="increase"):
        ScalingConfig(sizes=(10, 10, 20)).grid(100)
    digits = data.open("digits").take(10)
    other = Relabelled(digits, (digits.labels + 1) % 10)
    assert other[3].label == (digits[3].label + 1) % 10
    assert len(other) == 10
    assert other.fingerprint() != digits.fingerprint()


def test_a_training_function_that_forgets_something_is_told():
    with pytest.raises(AdviceError, match="train_loss"):
        learning_curve(
            data.open("digits"),
            config=ScalingConfig(sizes=(20, 40, 80), cosine=0.0),
            train_cell=lambda *a: {"accuracy": 0.5},
        )


def test_transfer_gives_both_curves():
    digits = data.open("digits")
    low, high = digits.subset(digits.labels < 5), digits.subset(digits.labels >= 5)
    train, test = high.take(100, seed=1), high.take(150, seed=2)
    cell = TransferCell(downstream=(train, test), pretrain=SupervisedCell(mirror=False), finetune=Budget(amount=8))
    config = ScalingConfig(
        sizes=(40, 80, 160), seeds=1, capacities=("resnet_nano",), budget=Budget(amount=8), cosine=0.0, draws=20
    )
    curve = learning_curve(low, config=config, train_cell=cell)
    assert curve.points("resnet_nano").n_test == 150
    report = curve.report()
    assert report.arrays["finetune accuracy resnet_nano"].shape == (1, 3)
    assert "resnet_nano: fine-tuned slope per decade" in report.summary
    assert curve.points("resnet_nano").mean.min() > 0.4
