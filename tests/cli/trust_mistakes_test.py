"""The mistakes of a first hour with the trust wing: one paragraph and exit code 2, before any long work."""

import sys

import pytest
import torch
from torch import nn

from lynceus import Subject
from lynceus.cli.__main__ import main
from lynceus.core.errors import AdviceError
from lynceus.core.guard import sensible
from lynceus.core.report import Report
from lynceus.trust.attacked import Attacked
from lynceus.trust.level_sets import BlindSpots
from lynceus.trust.shift import ShiftConsistency

FILE = '''
import torch
from torch import nn

torch.manual_seed(0)


class Fixed(nn.Module):
    """Takes 8 x 8 pixels only, and remembers what it was given."""

    def __init__(self, outputs=10):
        super().__init__()
        self.head = nn.Linear(192, outputs)
        self.seen = []

    def forward(self, x):
        self.seen.append((float(x.min()), float(x.max())))
        return self.head(x.flatten(1))


fixed, few = Fixed().eval(), Fixed(7).eval()


def nothing():
    return fixed


def nan(x):
    return torch.full((len(x), 10), float("nan"))


def seven(x):
    return x.mean(1).flatten(1)[:, :7]
'''


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """A folder with the file mine_for_mistakes.py, as the current one."""
    (tmp_path / "mine_for_mistakes.py").write_text(FILE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "mine_for_mistakes", raising=False)
    return "python:mine_for_mistakes:"


def told(capsys, argv, *said):
    """Runs a verb that must refuse: exit code 2, one paragraph that holds `said`, no result, no traceback."""
    code = main([str(a) for a in argv])
    captured = capsys.readouterr()
    assert code == 2, captured
    assert captured.out == ""
    assert "Traceback" not in captured.err
    assert captured.err.count("\n") == 1
    for text in said:
        assert text in captured.err, captured.err


def works(capsys, argv):
    assert main([str(a) for a in argv]) == 0, capsys.readouterr().err
    return capsys.readouterr().out


@pytest.mark.parametrize("check", ["attacks", "verify", "game", "blind-spots", "fooling", "corrupted", "edits", "all"])
@pytest.mark.parametrize("seconds", ["0", "-1", "nan"])
def test_no_time_is_refused_before_the_data_is_opened(mine, capsys, check, seconds):
    told(capsys, ["check", check, mine + "fixed", "nowhere", "--seconds", seconds], "seconds")


@pytest.mark.parametrize(
    ("check", "option", "value"),
    [
        ("attacks", "--steps", "0"),
        ("attacks", "--batch-size", "0"),
        ("attacks", "--restarts", "0"),
        ("attacks", "--epsilons", "nan"),
        ("verify", "--boxes", "0"),
        ("game", "--queries", "-1"),
        ("blind-spots", "--images", "0"),
        ("blind-spots", "--steps", "-1"),
        ("blind-spots", "--drop", "300"),
        ("blind-spots", "--step-size", "0"),
        ("fooling", "--generations", "0"),
        ("corrupted", "--batch-size", "-2"),
        ("attribution", "--count", "0"),
        ("shift", "--batch-size", "0"),
    ],
)
def test_a_number_that_means_nothing_names_its_field(mine, capsys, check, option, value):
    told(capsys, ["check", check, mine + "fixed", "digits", option, value], option[2:].replace("-", "_"), "not")


def test_checks_refuse_such_numbers_from_python_too():
    for check in (Attacked(steps=0), Attacked(epsilons=(0.1, float("nan"))), BlindSpots(drop=-1.0)):
        with pytest.raises(AdviceError, match=type(check).__name__):
            sensible(check)
        with pytest.raises(AdviceError, match=type(check).__name__):
            check(Subject(nn.Flatten(), mean=(0.0,) * 3, std=(1.0,) * 3), [])
    sensible(Attacked())


@pytest.mark.parametrize("check", ["attacks", "shift", "attribution"])
def test_an_out_that_cannot_be_written_is_said_before_the_work(mine, capsys, tmp_path, check):
    (tmp_path / "file").touch()
    told(capsys, ["check", check, mine + "fixed", "digits", "--out", "file"], "--out file is a file")
    told(capsys, ["check", check, mine + "fixed", "digits", "--out", "file/below"], "cannot be written", "--out FOLDER")
    assert main(["check", check, mine + "fixed", "nowhere"]) == 2
    capsys.readouterr()


def test_a_model_of_one_size_is_told_how_to_be_shifted(mine, capsys):
    shift = ["check", "shift", mine + "fixed", "digits", "--limit", "6"]
    told(capsys, shift, "--kind cyclic", "--extend 1 --view 8", "--resize 8")
    for cure in (["--kind", "cyclic"], ["--extend", "1", "--view", "8"], ["--resize", "8"]):
        assert "cyclic" in works(capsys, [*shift, *cure])


def test_shift_refuses_what_is_not_finite_and_leaves_out_an_accuracy_of_other_classes(mine, capsys):
    told(capsys, ["check", "shift", mine + "nan", "digits", "--limit", "6"], "not finite")
    said = works(capsys, ["check", "shift", mine + "seven", "digits", "--limit", "20"])
    assert "No accuracy" in said
    assert "accuracy\n" not in said


def test_what_is_no_model_is_told_from_one(mine, capsys):
    told(capsys, ["check", "game", mine + "Fixed", "digits"], "is the class Fixed", "model = Fixed().eval()")
    told(capsys, ["check", "game", mine + "nothing", "digits"], "cannot answer images of 8 x 8", "TypeError")
    told(capsys, ["check", "attacks", mine + "few", "digits"], "label 9", "7 classes")


def test_a_module_of_pixels_gets_pixels_as_they_are(mine, capsys):
    said = works(capsys, ["check", "shift", mine + "fixed", "digits", "--limit", "6", "--kind", "cyclic"])
    low, high = zip(*sys.modules["mine_for_mistakes"].fixed.seen)
    assert (min(low), max(high)) == (0.0, 1.0)
    assert "Subject(fixed, mean=(0.0,) * 3, std=(1.0,) * 3)" in said


def test_a_model_with_a_mean_of_its_own_is_asked_about():
    model = nn.Flatten()
    model.register_buffer("mean", torch.zeros(3))
    with pytest.raises(AdviceError, match="tensor `mean`"):
        Subject(model)
    assert Subject(model, mean=(0.0,) * 3, std=(1.0,) * 3)(torch.zeros(1, 3, 2, 2)).shape == (1, 12)


def test_the_twin_names_what_was_asked_for_and_nothing_else(mine, capsys):
    shift = ["check", "shift", mine + "fixed", "digits", "--limit", "6", "--kind", "cyclic"]
    assert "ShiftConsistency(kind='cyclic', limit=6)(" in works(capsys, shift)
    assert "Game(queries=30, limit=2)(" in works(
        capsys, ["check", "game", mine + "fixed", "digits", "--limit", "2", "--queries", "30"]
    )


@pytest.mark.parametrize("out", [[], ["--out", "found"]])
def test_a_stop_says_whether_a_second_run_goes_on(mine, capsys, monkeypatch, out):
    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(Attacked, "__call__", stop)
    assert main(["check", "attacks", mine + "fixed", "digits", "--limit", "2", *out]) == 130
    said = capsys.readouterr().err
    assert ("kept in found; the same command goes on" if out else "nothing was kept") in said


def test_a_model_by_its_name_alone_is_called_untrained_and_is_the_same_in_every_run(capsys, tmp_path, monkeypatch):
    def answer(self, subject, data, *, seed=0):
        with torch.no_grad():
            return Report(name="shift", arrays={"said": subject(torch.full((1, 3, 8, 8), 0.5)).numpy()})

    monkeypatch.setattr(ShiftConsistency, "__call__", answer)
    said = []
    for name, seed in (("a", "0"), ("b", "0"), ("c", "1")):
        out = tmp_path / name
        assert main(["check", "shift", "resnet_nano", "digits", "--seed", seed, "--out", str(out)]) == 0
        captured = capsys.readouterr()
        assert "has random weights" in captured.err
        assert f'with borrowed({seed}, "weights"):' in captured.out
        report = Report.load(out)
        assert "has learnt nothing" in " ".join(report.notes)
        said.append(report.arrays["said"])
    assert (said[0] == said[1]).all()
    assert (said[0] != said[2]).any()


def test_a_corrupted_copy_is_refused_before_the_work(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    corrupt = ["data", "corrupt", "digits", "--limit", "2", "--corruptions", "fog", "--severities", "1"]
    told(capsys, [*corrupt, "--side", "-3", "--out", "new"], "--side", "-3")
    told(capsys, [*corrupt, "--out", "file"], "is a file; give a folder")
    told(capsys, [*corrupt, "--out", "file/below"], "cannot be written")
    assert "2 pictures" in works(capsys, [*corrupt, "--out", "new"])


def test_pictures_without_masks_name_the_option_that_guesses_them(mine, capsys):
    told(capsys, ["check", "edits", mine + "fixed", "digits", "--limit", "2"], "no mask", "--masks grabcut")
