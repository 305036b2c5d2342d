"""What every check owes: equal findings for equal seeds, an error that advises on empty data, a report that travels."""

import ast
import dataclasses
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch

import lynceus
from lynceus import data
from lynceus.core.cost import CostCheck
from lynceus.core.errors import AdviceError
from lynceus.core.nouns import Check
from lynceus.core.report import Report
from lynceus.core.subject import Subject
from lynceus.explain.worst_cases import Attribution
from lynceus.gauntlet.probes import KNN, FewShot, LinearProbe, LinearSVM, Logistic
from lynceus.gauntlet.retrieval import Retrieval
from lynceus.gauntlet.scaling import DataScaling, ScalingConfig
from lynceus.gauntlet.trust_report import TrustReport
from lynceus.serve.profile import Profile
from lynceus.train.evaluate import Evaluate
from lynceus.trust.attacked import Attacked
from lynceus.trust.corrupted import Corrupted
from lynceus.trust.edits import Edits
from lynceus.trust.fooling import Fooling
from lynceus.trust.game import Game
from lynceus.trust.level_sets import BlindSpots
from lynceus.trust.shift import ShiftConsistency
from lynceus.trust.verified import Verify

MEMBERS = {
    "kNN": KNN(),
    "linear SVM": LinearSVM(cs=(1.0,)),
    "linear SVM, augmented": LinearSVM(cs=(1.0,), augment=True, max_iter=50),
    "logistic": Logistic(cs=(0.1, 1.0), folds=2),
    "linear probe": LinearProbe(),
    "linear probe, LARS": LinearProbe(optimizer="lars", epochs=20),
    "few-shot": FewShot(shots=(1, 5), episodes=3),
    "retrieval": Retrieval(),
    "data scaling": DataScaling(config=ScalingConfig(sizes=(20, 40, 80), seeds=2, draws=20)),
    "accuracy under attack": Attacked(epsilons=(4 / 255, 0.2), steps=5, limit=24),
    "blind spots": BlindSpots(images=2, steps=5, record=3),
    "common corruptions": Corrupted(corruptions=("noise", "fog", "spatter"), severities=(1, 5), limit=40),
    "attribute edits": Edits(masks="threshold", limit=6, candidates=2, quiet=True),
    "fooling": Fooling(generations=2, population=20, limit=40, untrained=True),
    "fooling, pixels": Fooling(encoding="pixels", generations=2, population=20, limit=40, untrained=True),
    "fooling, ascent": Fooling(encoding="ascent", steps=5, limit=40, untrained=True),
    "shift consistency": ShiftConsistency(limit=40),
    "attribution": Attribution(count=2, steps=5, limit=40),
    "game": Game(queries=150, limit=3),
    "game, one player": Game(queries=100, limit=2, mode="single"),
    "trust report": TrustReport(only=("accuracy", "shift", "edits"), limit=30, seconds=None),
    "verify": Verify(limit=3, pixels=2, boxes=4, steps=4, radius=0.01),
    "evaluate": Evaluate(quiet=True),
    "cost": CostCheck(repeats=0),  # times differ from call to call
}
TIMES_ALONE = [Profile()]  # nothing that it finds is the same twice; tests/serve/profile_test.py holds it
ROOT = Path(lynceus.__file__).parent
NEEDS_NO_DATA = {"cost"}  # reads the size of the first image, when there is one
MEASURED = ("per_second", "seconds")  # of the machine and the moment


def plain_numbers(report):
    keep = {k: v for k, v in report.summary.items() if not any(m in k for m in MEASURED)}
    return keep, [{k: v for k, v in row.items() if not any(m in k for m in MEASURED)} for row in report.rows]


@pytest.fixture(scope="module")
def subject():
    torch.manual_seed(0)
    return Subject(lynceus.create_model("resnet_nano", num_classes=10), size=32)


@pytest.fixture(scope="module")
def digits():
    return data.open("digits").take(150)


def test_every_check_is_on_the_sheet():
    """Whoever writes a class with `needs` and a call puts it into MEMBERS."""
    listed = {cls for check in (*MEMBERS.values(), *TIMES_ALONE) for cls in type(check).__mro__}
    for file in ROOT.rglob("*.py"):
        for node in ast.parse(file.read_text()).body:
            body = node.body if isinstance(node, ast.ClassDef) else []
            if any(isinstance(n, ast.AnnAssign) and getattr(n.target, "id", "") == "needs" for n in body):
                name = ".".join(("lynceus", *file.relative_to(ROOT).with_suffix("").parts))
                cls = getattr(import_module(name), node.name)
                assert cls is Check or cls in listed, f"{name}.{node.name} is not in tests/sheets/check_test.py"


@pytest.mark.parametrize("name", MEMBERS)
def test_it_is_a_frozen_check(name):
    check = MEMBERS[name]
    assert isinstance(check, Check)
    assert isinstance(check.needs, frozenset)
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(check, dataclasses.fields(check)[0].name, None)


@pytest.mark.parametrize("name", MEMBERS)
def test_seeded_twice_it_finds_the_same_and_its_report_travels(name, subject, digits):
    check = MEMBERS[name]
    first, second = (check(subject, digits, seed=3) for _ in range(2))
    assert first.rows
    assert first.summary
    for a, b in zip(plain_numbers(first), plain_numbers(second)):
        np.testing.assert_equal(a, b)
    again = Report.from_json(first.json())
    np.testing.assert_equal(again.summary, first.summary)
    assert len(again.rows) == len(first.rows)
    assert again.figures == first.figures
    for key, value in first.arrays.items():
        np.testing.assert_array_equal(again.arrays[key], value)
    assert first.html().startswith("<!")
    assert first.table()


@pytest.mark.parametrize("name", [n for n in MEMBERS if n not in NEEDS_NO_DATA])
@pytest.mark.parametrize("empty", ["list", "dataset"])
def test_empty_data_is_an_error_that_advises(name, empty, subject, digits):
    with pytest.raises(AdviceError) as caught:
        MEMBERS[name](subject, [] if empty == "list" else digits.subset([]))
    assert len(str(caught.value)) > 20


@pytest.mark.parametrize("name", [n for n, check in MEMBERS.items() if "features" in check.needs])
def test_what_has_no_features_is_refused_before_any_work(name, digits):
    with pytest.raises(AdviceError, match="features"):
        MEMBERS[name](Subject(lambda x: x.mean((2, 3)), name="function"), digits)
