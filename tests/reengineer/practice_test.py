"""Golden records, training checks, environments, defects and model cards."""

import copy
import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lynceus
from lynceus.core.errors import AdviceError
from lynceus.reengineer import bisect, card, defects, env, golden, train_check
from lynceus.reengineer.training import Trace, distance, fit_run, statistics_of, trace_steps

ROOT = Path(__file__).resolve().parents[2]


# golden ---------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["vit_nano", "resnet_nano"])
def test_a_golden_record_holds_under_other_threads_and_dtypes(tmp_path, name):
    model = lynceus.create_model(name)
    before = copy.deepcopy(model.state_dict())
    golden.record(model, tmp_path / "g.json")
    for dtype, threads in [(torch.float64, 1), (torch.float64, 2), (torch.float32, 1), (torch.bfloat16, 1)]:
        report = golden.check(model, tmp_path / "g.json", dtype=dtype, threads=threads)
        assert report.summary["exit_code"] == 0, (dtype, report.rows)
    assert golden.check(model, tmp_path / "g.json", dtype=torch.float32).summary["largest difference / std"] > 0
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_a_changed_default_in_a_dependency_is_caught(tmp_path, monkeypatch):
    model = lynceus.create_model("vit_nano")
    golden.record(model, tmp_path / "g.json")
    plain = F.scaled_dot_product_attention

    def other_default(q, k, v, scale=None, **more):
        return plain(q, k, v, scale=scale or 1.001 * q.shape[-1] ** -0.5, **more)

    monkeypatch.setattr(F, "scaled_dot_product_attention", other_default)
    report = golden.check(model, tmp_path / "g.json")
    assert report.summary["exit_code"] == 1
    assert report.summary["largest difference / std"] > 1e-6
    assert "a default that was replaced" in report.notes[-1]


def test_golden_takes_functions_and_says_what_changed(tmp_path):
    made = golden.record(lambda x: {"double": 2 * x}, tmp_path / "g.json", inputs={"x": {"shape": [3, 4], "seed": 2}})
    assert set(made) >= {"family", "model", "config", "state", "inputs", "outputs"}
    assert golden.check(lambda x: {"double": 2 * x}, tmp_path / "g.json").summary["exit_code"] == 0
    kept = json.loads((tmp_path / "g.json").read_text())
    kept["environment"]["torch"] = "1.0.0"
    kept["environment"]["python"] = "3.5.0"
    (tmp_path / "g.json").write_text(json.dumps(kept))
    report = golden.check(lambda x: {"double": 3 * x}, tmp_path / "g.json")
    assert report.summary["drifted"] == 1
    assert report.notes[-1].index("torch: 1.0.0") < report.notes[-1].index("python: 3.5.0")
    assert golden.drift(lambda x: {"double": 2 * x}, tmp_path).rows[0]["torch"] == "1.0.0"
    with pytest.raises(AdviceError, match=r"golden\.record"):
        golden.check(lambda x: x, tmp_path / "none.json")
    golden.record(nn.Linear(4, 2), tmp_path / "m.json", inputs={"x": {"shape": [3, 4]}})
    assert "the model changed" in golden.check(nn.Linear(4, 2, bias=False), tmp_path / "m.json").notes[0]


# training -------------------------------------------------------------------------------------------------------------
REFERENCE = {
    "weight_decay": 0.05, "warmup": 4, "normalise": True, "batch_size": 32, "lr": 0.02, "width": 24, "seed": 0,
    "workers": 0, "log_every": 1, "name": "a", "pin_memory": False, "drop_last": True,
}  # fmt: skip
OURS = REFERENCE | {
    "weight_decay": 5.0, "warmup": 0, "normalise": False, "workers": 2, "log_every": 10, "name": "b",
    "pin_memory": True,
}  # fmt: skip


def short_run(options, steps=12):
    """A perceptron on scikit-learn's digits; `workers`, `log_every`, `name` and `pin_memory` do nothing to it."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    x = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    y = torch.tensor(digits.target)
    if options["normalise"]:
        x = (x - 0.305) / 0.376
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(options["seed"]))
    with torch.random.fork_rng():
        torch.manual_seed(options["seed"])
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, options["width"]), nn.GELU(), nn.Linear(options["width"], 10))
    optimizer = torch.optim.AdamW(model.parameters(), lr=options["lr"], weight_decay=options["weight_decay"])
    size, warm = options["batch_size"], options["warmup"]
    batches = [(x[order[i * size : (i + 1) * size]], y[order[i * size : (i + 1) * size]]) for i in range(steps)]
    return trace_steps(model, batches, F.cross_entropy, optimizer, lambda s: min(1.0, (s + 1) / warm) if warm else 1.0)


def test_equal_runs_are_equal():
    report = train_check(lambda: short_run(REFERENCE), lambda: short_run(dict(REFERENCE)))
    assert report.summary["exit_code"] == 0
    assert "order of samples" not in [r["what"] for r in report.rows]  # neither run recorded one


@pytest.mark.parametrize(
    ("key", "row"),
    [
        ("normalise", "inputs: mean"),
        ("warmup", "learning rates"),
        ("weight_decay", "norms of the weights at the end"),
        ("width", "loss of the first step"),
    ],
)
def test_the_first_thing_that_differs_is_named(key, row):
    other = REFERENCE | {key: OURS[key] if OURS[key] != REFERENCE[key] else 23}
    report = train_check(short_run(REFERENCE), short_run(other))
    verdicts = {r["what"]: r["verdict"] for r in report.rows}
    assert verdicts[row] == "DIFFERS"
    if key != "weight_decay":
        assert report.notes[0] == f"differs first in: {row}"
    else:  # decay reaches the loss before the norms leave their band
        assert verdicts["loss of the first step"] == verdicts["learning rates"] == "equal"


def test_order_and_class_shares_are_compared():
    a = Trace(losses=[1.0], order=[1, 2, 3, 4], data={"classes": [5.0, 5.0]})
    b = Trace(losses=[1.0], order=[1, 2, 4, 3], data={"classes": [9.0, 1.0]})
    differ = [r["what"] for r in train_check(a, b).rows if r["verdict"] == "DIFFERS"]
    assert differ == ["class shares", "order of samples"]


def test_bisect_finds_three_planted_options_among_twelve_in_fifteen_runs():
    assert len(REFERENCE) == 12
    report = bisect(short_run, REFERENCE, OURS)
    assert report.summary["runs"] <= 15
    found = [r["option"] for r in report.rows if r["verdict"] == "explains"]
    assert set(found) == {"weight_decay", "warmup", "normalise"}


def test_bisect_with_all_twelve_different_still_fits_fifteen_runs():
    worse = OURS | {"batch_size": 32, "lr": 0.02, "width": 24, "seed": 0, "drop_last": False}
    harmless = {f"note{i}": i for i in range(4)}
    good = {**REFERENCE, **harmless}
    bad = {**worse, **{k: v + 1 for k, v in harmless.items()}}
    keys = [k for k in good if good[k] != bad[k]]
    assert len(keys) == 12
    report = bisect(short_run, good, bad)
    assert report.summary["runs"] == 14
    assert {r["option"] for r in report.rows[:3]} == {"weight_decay", "warmup", "normalise"}
    assert all(r["gap"] == 0 for r in report.rows[3:])


def test_bisect_in_groups_when_options_are_many():
    calls = []

    def run(options):
        calls.append(options)
        return Trace(losses=[1.0 + (0.5 if options["k17"] else 0.0)])

    good = {f"k{i}": False for i in range(32)}
    report = bisect(run, good, dict.fromkeys(good, True), budget=15)
    assert len(calls) <= 15
    assert [r["option"] for r in report.rows if r["verdict"] == "explains"] == ["k17"]
    with pytest.raises(AdviceError, match="are equal"):
        bisect(run, good, good)
    with pytest.raises(AdviceError, match="only in one"):
        bisect(run, good, {"k1": True})


def test_statistics_and_distance():
    found = statistics_of(torch.tensor([[[[0.0, 2.0]]], [[[4.0, 6.0]]]]), torch.tensor([0, 2]))
    assert found["mean"] == [3.0]
    assert found["classes"] == [1.0, 0.0, 1.0]
    assert distance(Trace(losses=[1.0, 2.0]), Trace(losses=[1.0, 2.0])) == 0
    assert distance(Trace(losses=[1.0]), Trace(losses=[math.nan])) > 1e3


def test_the_adapter_for_our_own_fit():
    from lynceus.train.fit import FitConfig

    class Quadratic(lynceus.Recipe):
        def __init__(self):
            super().__init__()
            self.lin = nn.Linear(3 * 16, 1)
            nn.init.constant_(self.lin.weight, 0.1)
            nn.init.zeros_(self.lin.bias)

        def forward(self, batch):
            return {"loss": self.lin(batch.pixels().flatten(1)).pow(2).mean()}

        def export(self):
            return self.lin

    g = torch.Generator().manual_seed(0)
    samples = [lynceus.Sample(image=torch.rand(3, 4, 4, generator=g), label=0) for _ in range(16)]

    def make(options):
        return Quadratic(), samples, FitConfig(steps=4, batch_size=8, lr=options["lr"], warmup=0.0, workers=0)

    run = fit_run(make)
    trace = run({"lr": 0.01})
    assert len(trace.losses) == len(trace.lrs) == 4
    assert train_check(trace, run({"lr": 0.01})).summary["exit_code"] == 0
    report = train_check(trace, run({"lr": 0.02}))
    assert report.notes[0] == "differs first in: learning rates"


# environment ----------------------------------------------------------------------------------------------------------
def test_environments_differ_likeliest_first(tmp_path):
    here = env.snapshot()
    assert not env.compare(here).rows or {r["what"] for r in env.compare(here).rows} <= {"threads"}
    there = here | {"python": "3.8.1", "torch": "1.9.0", "threads": "64", "torchvision": "0.10.0"}
    rows = env.compare(here, there).rows
    assert [r["what"] for r in rows] == ["torch", "torchvision", "threads", "python"]
    patch = here | {"torch": ".".join([*here["torch"].split(".")[:2], "99"]), "torchvision": "0.10.0"}
    assert [r["what"] for r in env.compare(here, patch).rows] == ["torchvision", "torch"]
    env.save(tmp_path / "e.json")
    assert json.loads((tmp_path / "e.json").read_text())["torch"] == here["torch"]


# defects --------------------------------------------------------------------------------------------------------------
def test_the_log_of_defects_stands_beside_the_study(tmp_path):
    path = tmp_path / "log.jsonl"
    assert defects.summary(path).summary == {"defects": 0.0}
    for stage, symptom, cause in [
        ("training", "reproducibility", "schedule"),
        ("training", "reproducibility", "normalisation"),
        ("model construction", "reproducibility", "layer options"),
        ("environment", "crash", "interface mismatch"),
    ]:
        defects.add(path, defects.Defect(stage=stage, symptom=symptom, cause=cause, who="re-user"))
    report = defects.summary(path)
    assert report.summary["defects"] == 4
    assert report.summary["reproducibility defects found in training"] == pytest.approx(2 / 3)
    assert "reproducibility defects found in training: 2 of 3 (67%) here, 68% in the study" in report.notes
    assert next(r for r in report.rows if r["stage"] == "training")["causes"] == "normalisation 1, schedule 1"
    with pytest.raises(AdviceError, match="Did you mean 'training'"):
        defects.Defect(stage="trainig", symptom="crash", cause="loss")
    path.write_text(path.read_text() + "{broken\n")
    with pytest.raises(AdviceError, match="line 5"):
        defects.read(path)


# cards ----------------------------------------------------------------------------------------------------------------
def test_every_family_has_a_card_and_the_linter_passes():
    from lynceus.backbones import FAMILIES

    for family in FAMILIES:
        path = ROOT / "docs" / "cards" / f"{family}.json"
        assert path.is_file(), f"python -m lynceus.reengineer.card --records tests/parity makes {path}"
        made = card.Card.load(path)
        assert card.lint(made) == []
        records = {p.stem for p in (ROOT / "tests" / "parity" / family).glob("*.json")}
        assert {r["record"] for r in made.checked} >= records
        assert path.with_suffix(".md").read_text() == made.markdown().rstrip("\n") + "\n"
        assert max(r["largest difference / std"] for r in made.checked) < 1e-6


def test_the_linter_finds_what_is_missing():
    whole = card.Card.load(ROOT / "docs" / "cards" / "resnet.json")
    for change, text in [
        (lambda c: c.deviations.clear(), "the section 'deviations' is empty"),
        (lambda c: c.source.update(code=""), "source: 'code'"),
        (lambda c: c.checked[0].update(verdict="DIFFERS"), "DIFFERS"),
        (lambda c: c.counts[0].update({"parameters measured": 7, "remark": ""}), "7 parameters instead of"),
        (lambda c: c.metrics[0].update(remark=""), "nothing says whether it was measured"),
        (lambda c: c.metrics[0].update(measured=70.0), "without interval or protocol"),
        (lambda c: setattr(c, "date", "yesterday"), "is no date"),
    ]:
        broken = copy.deepcopy(whole)
        change(broken)
        assert any(text in w for w in card.lint(broken)), text


def test_a_card_is_made_from_records_and_counts(tmp_path):
    record = ROOT / "tests" / "parity" / "resnet" / "resnet18_129x97_10classes.json"
    weights = tmp_path / "w.bin"
    weights.write_bytes(b"abc")
    made = card.card("resnet", records=[record], checkpoint=weights, variants=["resnet18"],
                     measured={"resnet18": {"measured": 69.6, "interval": "69.2 - 70.0"}})  # fmt: skip
    assert card.lint(made) == []
    assert made.counts[0]["parameters measured"] == 11_689_512
    assert made.counts[0]["MACs measured (G)"] == pytest.approx(1.814, rel=0.01)
    assert made.source["checkpoint"].endswith("ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad")
    paths = made.save(tmp_path, "resnet")
    assert card.Card.load(paths[1]) == made
    with pytest.raises(AdviceError, match="Did you mean 'resnet'"):
        card.card("resnett")
