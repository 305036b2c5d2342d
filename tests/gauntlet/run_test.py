"""The gauntlet: one table from many subjects; nothing is measured twice; killed runs go on; engines agree."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import lynceus.data
from lynceus.core.errors import AdviceError
from lynceus.core.report import Report
from lynceus.gauntlet import baselines, copies, shifts
from lynceus.gauntlet.course import STATIONS
from lynceus.gauntlet.run import PRESETS, GauntletConfig, gauntlet, preset

QUICK = GauntletConfig(steps=4, batch_size=32, seeds=(0, 1), latency_repeats=2, shift_images=30, limit=200)
NOISY = ("ms, ", "seconds")


def plain(rows):
    return [{k: v for k, v in row.items() if not k.startswith(NOISY)} for row in rows]


@pytest.fixture(scope="module")
def digits():
    return lynceus.data.open("digits")


@pytest.fixture(scope="module")
def first(digits, tmp_path_factory):
    out = tmp_path_factory.mktemp("gauntlet")
    return gauntlet(["resnet_nano", "HOG"], digits, config=QUICK, out=out, quiet=True), out


def test_a_report_of_everything(first):
    report, out = first
    assert {r["subject"] for r in report.rows} == {"resnet_nano", "HOG"}
    for row in report.rows:
        assert 0 <= row["accuracy"] <= 1
        assert {
            "mean z",
            "rank 95%",
            "sd",
            "realistic consistency",
            "cyclic consistency",
            "params",
            "ms, batch 8",
        } <= set(row)
    assert report.answer.startswith("Take HOG: accuracy")
    assert "Equal budget: 4 steps of 32" in report.notes[0]
    assert {"accuracy and cost.plotly", "z-scores.plotly", "seeds.plotly", "learning curves.plotly"} <= set(
        report.figures
    )
    assert sum("best accuracy" in r["verdict"] for r in report.rows) == 1
    assert (out / "report.html").is_file()
    assert plain(Report.load(out).rows) == plain(report.rows)


def test_every_cell_is_stored_with_seed_time_and_settings(first):
    _, out = first
    cells = [json.loads(p.read_text()) for p in (out / "cells").glob("*.json")]
    assert len(cells) == 2 * 2 * len(
        [s for s in STATIONS.values() if "scratch" in s.modes and s.run.__name__ != "selection"]
    )
    for cell in cells:
        assert cell["seed"] in (0, 1)
        assert cell["seconds"] >= 0
        assert cell["settings"]["threads"] == 1
        assert cell["settings"]["protocol"]["steps"] == 4
    curve = next(c["curve"] for c in cells if c["subject"] == "resnet_nano" and c["station"] == "accuracy")
    assert curve[0][-1] == 4
    weights = {c["weights"] for c in cells if c["subject"] == "resnet_nano"}
    assert len(weights) == 2


def test_a_second_call_measures_nothing(first, digits, monkeypatch):
    report, out = first

    def never(*args, **kwargs):
        raise AssertionError("a finished cell was measured again")

    monkeypatch.setattr("lynceus.gauntlet.run.run_job", never)
    again = gauntlet(["resnet_nano", "HOG"], digits, config=QUICK, out=out, quiet=True)
    assert again.rows == report.rows


def test_other_settings_are_other_cells_and_new_subjects_join(first, digits):
    report, out = first
    before = {p: p.stat().st_mtime_ns for p in (out / "cells").glob("*.json")}
    joined = gauntlet(["resnet_nano", "HOG", "colour histogram"], digits, config=QUICK, out=out, quiet=True)
    assert {p: p.stat().st_mtime_ns for p in before} == before
    assert len(joined.rows) == 3
    old = {r["subject"]: r["accuracy"] for r in report.rows}
    assert all(r["accuracy"] == old[r["subject"]] for r in joined.rows if r["subject"] in old)
    gauntlet(["HOG"], digits, config=replace(QUICK, steps=5, stations=("accuracy",)), out=out, quiet=True)
    assert len(list((out / "cells").glob("*.json"))) == len(before) + len(before) // 2 + 2


def test_the_same_whatever_the_number_of_processes(first, digits):
    report, _ = first
    config = replace(QUICK, jobs=2, stations=("accuracy", "shift"))
    other = gauntlet(["resnet_nano", "HOG"], digits, config=config, quiet=True)
    want = {r["subject"]: r for r in report.rows}
    for row in other.rows:
        for name in ("accuracy", "seeds", "realistic consistency", "cyclic consistency"):
            assert row[name] == want[row["subject"]][name]


@pytest.mark.slow
def test_every_row_is_the_same_whatever_the_number_of_processes(first, digits):
    report, _ = first
    other = gauntlet(["resnet_nano", "HOG"], digits, config=replace(QUICK, jobs=2), quiet=True)
    assert plain(other.rows) == plain(report.rows)
    assert np.array_equal(other.arrays["z"], report.arrays["z"])


@pytest.mark.slow
def test_the_same_on_ray(first, digits, tmp_path):
    pytest.importorskip("ray")
    report, _ = first
    config = replace(QUICK, jobs=2)
    other = gauntlet(["resnet_nano", "HOG"], digits, config=config, engine="ray", out=tmp_path, quiet=True)
    assert plain(other.rows) == plain(report.rows)


SCRIPT = """
import sys
from dataclasses import replace
import torch
torch.set_num_threads(1)
import lynceus.data
from lynceus.gauntlet.run import GauntletConfig, gauntlet
config = GauntletConfig(steps=40, batch_size=32, seeds=(0, 1), shift_images=30, limit=200,
                        stations=("accuracy", "calibration", "shift", "ood"))
if __name__ == "__main__":
    models = ["resnet_nano", "vit_nano"]
    report = gauntlet(models, lynceus.data.open("digits"), config=config, out=sys.argv[1], quiet=True)
    print(report.rows)
"""


def run_killed(script, out, after):
    """Runs the script until `after` cells are there, then SIGKILL."""
    process = subprocess.Popen([sys.executable, str(script), str(out)], env={**os.environ, "OMP_NUM_THREADS": "1"})
    start = time.monotonic()
    while (
        len(list(Path(out).glob("cells/*.json"))) < after and process.poll() is None and time.monotonic() - start < 300
    ):
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()


@pytest.mark.slow
@pytest.mark.parametrize("jobs", [1, 2])
def test_a_killed_run_goes_on_and_repeats_nothing(tmp_path, jobs):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.replace("limit=200", f"limit=200, jobs={jobs}"))
    whole = subprocess.run(
        [sys.executable, str(script), str(tmp_path / "whole")], capture_output=True, text=True, check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    out = tmp_path / "killed"
    stamps = {}
    for after in (1, 5, 10):
        run_killed(script, out, after)
        now = {p.name: p.stat().st_mtime_ns for p in out.glob("cells/*.json")}
        assert len(now) >= after
        assert all(now[k] == v for k, v in stamps.items())
        stamps = now
    assert len(stamps) < 16
    last = subprocess.run(
        [sys.executable, str(script), str(out)], capture_output=True, text=True, check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert all((out / "cells" / k).stat().st_mtime_ns == v for k, v in stamps.items())
    assert last.stdout == whole.stdout


class Tiny(nn.Module):
    owns_pixels = True

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.net = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.LazyLinear(12))
        self.net(torch.zeros(1, 3, 8, 8))

    def forward_features(self, x):
        return self.net(x)

    def forward_head(self, x, pre_logits=False):
        return x

    def forward(self, x):
        return self.net(x)


def means(image):
    """A feature function of one's own."""
    return image.flatten(2)[:, :, ::7].flatten(1)


def test_frozen_features_of_modules_functions_and_names(digits, tmp_path):
    config = replace(QUICK, mode="frozen", episodes=3, seeds=(0,), limit=300)
    report = gauntlet(
        [("tiny", Tiny()), means, "raw pixels", "vit_nano"], digits, config=config, out=tmp_path, quiet=True
    )
    assert {r["subject"] for r in report.rows} == {"tiny", "means", "raw pixels", "vit_nano"}
    for row in report.rows:
        assert {"kNN", "logistic", "linear SVM", "few-shot 1 per class", "mAP", "MRR", "accuracy under edges"} <= set(
            row
        )
    best = {r["subject"]: r["kNN"] for r in report.rows}
    assert best["raw pixels"] > best["vit_nano"] > 0.15  # a random network knows less of digits than their pixels
    assert report.answer.startswith("Take ")


def test_trained_weights_come_back_and_are_tuned_further(digits, tmp_path):
    config = replace(QUICK, seeds=(0,), stations=("accuracy",), steps=30)
    gauntlet(["resnet_nano"], digits, config=config, out=tmp_path / "a", quiet=True)
    (weights,) = (tmp_path / "a" / "trained").glob("*/run/model.safetensors")
    frozen = replace(config, mode="frozen", stations=("knn", "fine-tune"), finetune_steps=5)
    report = gauntlet([("mine", weights), "resnet_nano"], digits, config=frozen, out=tmp_path / "b", quiet=True)
    row = {r["subject"]: r for r in report.rows}
    assert row["mine"]["kNN"] > row["resnet_nano"]["kNN"]
    assert row["mine"]["fine-tuned accuracy"] > row["resnet_nano"]["fine-tuned accuracy"]


def test_learning_rates_are_swept_equally_for_all(digits, tmp_path):
    config = replace(QUICK, lr=(1e-5, 3e-3), seeds=(0,), stations=("accuracy",), steps=25)
    gauntlet(["resnet_nano"], digits, config=config, out=tmp_path, quiet=True)
    (cell,) = [json.loads(p.read_text()) for p in (tmp_path / "cells").glob("*.json")]
    assert cell["settings"]["lr"] == 3e-3
    assert {p.name for p in (tmp_path / "trained").glob("*/lr*")} == {"lr1e-05", "lr0.003"}


def test_crop_selection_inside_the_gauntlet(tmp_path):
    generator = torch.Generator().manual_seed(0)
    images = (torch.rand(120, 3, 32, 32, generator=generator) * 255).to(torch.uint8)
    labels = np.arange(120) % 2
    images[labels == 1, 0] //= 3
    data = lynceus.data.open(images, labels=labels)
    data.classes = data.classes or ["a", "b"]
    config = GauntletConfig(steps=3, batch_size=16, seeds=(0,), crop=22, stations=("accuracy", "crop-selection"))
    report = gauntlet(["resnet_nano"], data, config=config, out=tmp_path, quiet=True)
    row = report.rows[0]
    assert row["cyclic selected: cyclic consistency"] == 1
    (path,) = [p for p in (tmp_path / "cells").glob("*.json") if "crop-selection" in p.read_text()]
    values = json.loads(path.read_text())["values"]
    assert values["selected: realistic adversarial"] >= values["selected: certified"] > 0.2
    assert row["selected: certified"] == values["selected: certified"]
    assert values["promised, single moves"] == pytest.approx((8 / 10 + 64 / 98) / 2)
    assert "crop selection" in " ".join(report.notes)


def test_mistakes_are_advised_before_any_work(digits):
    for models, text in (
        (["resnet_nanno"], "resnet_nano"),
        ([], "list of models"),
        ("resnet_nano", "list of models"),
        ([3], "not int"),
        ([("x", Path("nowhere.safetensors"))], "no weights"),
    ):
        with pytest.raises(AdviceError, match=text):
            gauntlet(models, digits, config=QUICK, quiet=True)
    with pytest.raises(AdviceError, match="single class"):
        gauntlet(["HOG"], digits.subset(digits.labels == 3), config=QUICK, quiet=True)
    with pytest.raises(AdviceError, match="knn"):
        gauntlet(["HOG"], digits, config=replace(QUICK, stations=("knnn",)), quiet=True)
    with pytest.raises(AdviceError, match="leaves no room"):
        gauntlet(["HOG"], digits, config=replace(QUICK, crop=16), quiet=True)
    with pytest.raises(AdviceError, match="seeds"):
        GauntletConfig(seeds=(0, 0))
    with pytest.raises(AdviceError, match="scratch"):
        GauntletConfig(mode="scrach")
    with pytest.raises(AdviceError, match="demo"):
        preset("dem")
    assert preset("demo", jobs=3).jobs == 3
    assert set(PRESETS) >= {"demo", "cifar10"}


def test_light_shifts_keep_shape_and_seed():
    x = (torch.rand(5, 3, 24, 24, generator=torch.Generator().manual_seed(0)) * 255).to(torch.uint8)
    for name in shifts.SHIFTS:
        y = shifts.shifted(x, name, seed=1)
        assert y.shape == x.shape
        assert y.dtype == torch.uint8
        assert not torch.equal(x, y)
        assert torch.equal(y, shifts.shifted(x, name, seed=1, batch=2))
    flat = torch.full((1, 3, 16, 16), 99, dtype=torch.uint8)
    assert torch.equal(shifts.shifted(flat, "blur"), flat)
    assert shifts.shifted(flat, "edges").float().mean() == 255


def test_baselines_are_the_functions_they_say():
    x = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert baselines.pixels(x).shape == (2, 768)
    assert torch.allclose(baselines.colours(x).view(2, 5, 64).sum(-1), torch.ones(2, 5))
    ramp = torch.linspace(0, 1, 32).expand(1, 3, 32, 32)
    directions = baselines.hog(ramp).view(-1, 9).sum(0)
    assert (
        directions[:1].sum() + directions[-1:].sum() > 0.99 * directions.sum()
    )  # a ramp along x: gradients point along x
    skimage = pytest.importorskip("skimage.feature")
    want = skimage.hog(x[0].permute(1, 2, 0).numpy(), 9, (8, 8), (2, 2), "L2", channel_axis=-1)
    assert np.corrcoef(want, baselines.hog(x)[0].numpy())[0, 1] > 0.8  # its votes are not shared between bins


def test_class_retrieval_equals_a_direct_count():
    rng = np.random.default_rng(0)
    base, query = rng.standard_normal((60, 5)), rng.standard_normal((30, 5))
    known, asked = rng.integers(0, 4, 60), rng.integers(0, 5, 30)  # class 4 has no picture to find
    got = copies.class_ranking(base, known, query, asked)
    ap, rr = [], []
    for q, label in zip(query / np.linalg.norm(query, axis=1)[:, None], asked):
        order = np.argsort(-(base / np.linalg.norm(base, axis=1)[:, None]) @ q, kind="stable")
        hits = [k + 1 for k, i in enumerate(order) if known[i] == label]
        if hits:
            ap.append(sum((i + 1) / k for i, k in enumerate(hits)) / len(hits))
            rr.append(1 / hits[0])
    assert got["mAP"] == pytest.approx(np.mean(ap), abs=1e-12)
    assert got["MRR"] == pytest.approx(np.mean(rr), abs=1e-12)
    with pytest.raises(AdviceError, match="positive"):
        copies.class_ranking(base, known, query, np.full(30, 9))


def test_copies_of_photographs_are_found(imagenet_jpegs):
    found = copies.copy_detection(baselines.baseline("raw pixels"), imagenet_jpegs[:12])
    assert set(found) == {"copies mAP", "copies MRR", *(f"copies MRR, {a}" for a in copies.ATTACKS)}
    assert found["copies MRR, jpeg"] > 0.9
    assert found["copies MRR"] > 0.5


def test_a_budget_of_seconds_gives_each_subject_its_own_number_of_steps(digits, tmp_path):
    config = replace(QUICK, seconds=0.5, seeds=(0,), stations=("accuracy",))
    report = gauntlet(["resnet_nano", "vit_nano", "HOG"], digits, config=config, out=tmp_path, quiet=True)
    steps = {row["subject"]: row["steps"] for row in report.rows}
    assert steps["HOG"] is None
    budgets = [json.loads(f.read_text()) for f in tmp_path.glob("trained/*/budget.json")]
    for name in ("resnet_nano", "vit_nano"):
        found = next(b for b in budgets if b["steps"] == steps[name])
        assert abs(found["steps"] * found["seconds_per_step"] - 0.5) <= found["seconds_per_step"]
    assert "0.5 processor seconds" in report.notes[0]
    again = gauntlet(["resnet_nano", "vit_nano", "HOG"], digits, config=config, out=tmp_path, quiet=True)
    assert plain(again.rows) == plain(report.rows)


def test_only_finalists_run_with_every_seed(digits, tmp_path):
    config = replace(QUICK, finalists=2, stations=("accuracy", "cost"))
    names = ["resnet_nano", "HOG", "raw pixels", "colour histogram"]
    report = gauntlet(names, digits, config=config, out=tmp_path, quiet=True)
    assert [row["rank"] for row in report.rows] == [1, 2, 3, 4]
    assert sorted(row["subject"] for row in report.rows) == sorted(names)
    counts = [len(row["seeds"].split(", ")) for row in report.rows]
    assert counts == [2, 2, 1, 1]
    kept, left = report.rows[:2], report.rows[2:]
    one = gauntlet(names, digits, config=replace(config, finalists=None, seeds=(0,)), out=tmp_path, quiet=True)
    order = [row["subject"] for row in one.rows]
    assert {row["subject"] for row in kept} == set(order[:2])
    assert [row["subject"] for row in left] == order[2:]
    assert "ran with the first seed" in report.notes[1]
    with pytest.raises(AdviceError, match="at least 2"):
        replace(config, finalists=1)
