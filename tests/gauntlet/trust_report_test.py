"""The trust report: every section that fits, under one budget, resumable, the same for the same seed."""

import json
import time

import pytest
import torch
from torch import nn

from lynceus import data
from lynceus.cli.__main__ import main
from lynceus.core.errors import AdviceError
from lynceus.core.report import Report
from lynceus.core.subject import Subject
from lynceus.gauntlet.trust_report import SECTIONS, TrustReport


class Grey(nn.Module):
    """A linear classifier of grey 8x8 pictures: it takes one size only."""

    owns_pixels = True

    def __init__(self):
        super().__init__()
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(64, 24), nn.ReLU(), nn.Linear(24, 10))

    def forward(self, x):
        return self.head(x.mean(1, keepdim=True))


@pytest.fixture(scope="module")
def digits():
    return data.open("digits").take(120)


@pytest.fixture(scope="module")
def net(digits):
    torch.manual_seed(0)
    net = Grey()
    x = torch.stack([s.image for s in digits]).float() / 255
    y = torch.tensor([s.label for s in digits])
    optimizer = torch.optim.Adam(net.parameters(), 0.02)
    for _ in range(80):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        optimizer.step()
    return net.eval()


def plain(report):
    """Everything but times and the date."""
    value = report.to_dict()

    def without(v):
        if isinstance(v, dict):
            return {k: without(x) for k, x in v.items() if "second" not in k and k not in ("environment", "answer")}
        return [without(x) for x in v] if isinstance(v, list) else v

    return json.loads(json.dumps(without(value), default=str))


QUICK = ("accuracy", "shift", "corrupted", "edits", "attribution")


@pytest.fixture(scope="module")
def made(net, digits, tmp_path_factory):
    keep = tmp_path_factory.mktemp("trust")
    check = TrustReport(only=QUICK, limit=12, seconds=None, keep=keep)
    return keep, check, check(Subject(net, name="grey"), digits, seed=1)


def test_every_section_is_a_part_with_its_own_finding(made):
    _, _, report = made
    rows = {r["section"]: r for r in report.rows}
    assert [r["section"] for r in report.rows] == [SECTIONS[n].title for n in SECTIONS if n in QUICK]
    assert rows[SECTIONS["edits"].title]["state"] == "left out"
    assert "masks" in rows[SECTIONS["edits"].title]["finding"]
    assert {p.name for p in report.parts} == {r["section"] for r in report.rows if r["state"] == "done"}
    assert len(report.parts) == 4
    assert all(r["finding"] for r in report.rows)
    assert report.summary["accuracy"] > 0.5
    assert "repeated" in " ".join(next(p for p in report.parts if p.name == SECTIONS["shift"].title).notes)
    page = report.html()
    assert all(p.name in page for p in report.parts)


def test_a_second_run_reads_what_is_kept_and_says_the_same(made, net, digits):
    _, check, first = made
    began = time.monotonic()
    again = check(Subject(net, name="grey"), digits, seed=1)
    assert time.monotonic() - began < sum(r.get("seconds", 0.0) for r in first.rows) + 60
    assert plain(again) == plain(first)


def test_equal_seeds_give_equal_json_except_times(made, net, digits):
    _, check, first = made
    fresh = TrustReport(only=check.only, limit=check.limit, seconds=None)(Subject(net, name="grey"), digits, seed=1)
    a, b = plain(first), plain(fresh)
    assert a == b
    assert Report.from_json(fresh.json()).json() == fresh.json()


def test_a_function_gets_the_black_box_sections(net, digits):
    subject = Subject(lambda x: net(x).detach(), name="service")
    report = TrustReport(only=("accuracy", "attacks", "verify", "attribution"), limit=6, seconds=None)(subject, digits)
    state = {r["section"]: r["state"] for r in report.rows}
    assert state[SECTIONS["accuracy"].title] == state[SECTIONS["attribution"].title] == "done"
    assert state[SECTIONS["attacks"].title] == state[SECTIONS["verify"].title] == "left out"


def test_a_section_that_breaks_does_not_cost_the_others(net, digits, monkeypatch):
    from lynceus.trust.corrupted import Corrupted

    def broken(self, subject, data, *, seed=0):
        raise ZeroDivisionError("planted")

    monkeypatch.setattr(Corrupted, "__call__", broken)
    report = TrustReport(only=("accuracy", "corrupted"), limit=6)(Subject(net), digits)
    assert [r["state"] for r in report.rows] == ["done", "failed"]
    assert "planted" in report.rows[1]["finding"]


def test_mistakes_are_said_before_any_section_runs(net, digits):
    for check in (TrustReport(only=("nothing",)), TrustReport(seconds=0.0), TrustReport(skip=tuple(SECTIONS))):
        with pytest.raises(AdviceError):
            check(Subject(net), digits)
    torch.manual_seed(0)
    broken = Grey()
    with torch.no_grad():
        broken.head[1].weight.fill_(torch.nan)
    with pytest.raises(AdviceError, match=r"head\.1"):
        TrustReport()(Subject(broken), digits)


def test_the_command_line_names_functions_of_python_files(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine_for_trust.py").write_text(
        "import torch\ndef predict(x):\n    return torch.stack([x.mean((1, 2, 3)) * i for i in range(10)], 1)\n"
    )
    code = main(
        ["trust", "python:mine_for_trust:predict", "digits", "--limit", "8", "--only", "accuracy", "--out", "found"]
    )
    assert code == 0
    out = capsys.readouterr().out
    assert "from mine_for_trust import predict" in out
    assert Report.load(tmp_path / "found").parts[0].name == "Clean accuracy"
    assert list((tmp_path / "found").glob("trust-*.jsonl"))
    for wrong in (
        "python:mine_for_trust:nothing",
        "python:no_such_file:f",
        "python:mine_for_trust",
        "http://127.0.0.1:9/",
    ):
        assert main(["check", "all", wrong, "digits"]) == 2


@pytest.mark.parametrize("name", SECTIONS)
def test_every_section_names_a_check_with_the_options_that_it_is_given(name):
    from dataclasses import fields

    from lynceus.core.nouns import Check
    from lynceus.gauntlet.trust_report import _load

    kind = _load(SECTIONS[name].check)
    assert isinstance(kind(), Check)
    assert set(SECTIONS[name].options or {}) <= {f.name for f in fields(kind)}


def test_the_certificate_of_crop_selection_stands_on_top():
    from lynceus.core.types import Sample
    from lynceus.rewrite.crop_selection import CropSelection

    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)).eval()
    net.owns_pixels = True
    images = (torch.rand(8, 3, 40, 40, generator=torch.Generator().manual_seed(0)) * 255).to(torch.uint8)
    samples = [Sample(image=x, label=0, id=str(i)) for i, x in enumerate(images)]
    report = TrustReport(only=("shift",), seconds=None)(Subject(CropSelection(input_size=24, view=32)(net)), samples)
    assert report.summary["certified for shifts"] <= report.summary["unmoved by every shift of 1 px"]
