"""Progress: lines in a log, a bar in a terminal, silence when asked for."""

import io
import subprocess
import sys

import pytest

from lynceus.core import progress as module
from lynceus.core.progress import clock, progress, silenced, track


class Clock:
    """Time that moves only when told."""

    def __init__(self, monkeypatch):
        self.now = 100.0
        monkeypatch.setattr(module.time, "monotonic", lambda: self.now)


@pytest.fixture
def hands(monkeypatch):
    return Clock(monkeypatch)


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_log_gets_one_line_per_interval_and_a_last_one(hands):
    out = io.StringIO()
    with progress("training", total=1000, unit="images", every=10, file=out) as bar:
        for _ in range(50):
            hands.now += 1
            bar.advance(20, loss=0.25)
    lines = out.getvalue().splitlines()
    assert len(lines) == 6
    assert lines[0] == "training  200/1,000 images  20%  20 images/s  ETA 40 s  loss 0.25"
    assert lines[-1] == "training  1,000/1,000 images  20 images/s  in 50 s  loss 0.25"


def test_short_work_leaves_a_log_alone(hands):
    out = io.StringIO()
    with progress("reading", total=10, file=out) as bar:
        hands.now += 1.5
        bar.advance(10)
    assert out.getvalue() == ""


def test_resumed_work_counts_only_its_own_speed(hands):
    with progress("training", total=100, done=80, quiet=True) as bar:
        hands.now += 5
        bar.advance(10)
        assert bar.rate == 2
        assert bar.eta == 5


def test_unknown_total_has_no_eta(hands):
    with progress("reading", quiet=True) as bar:
        hands.now += 2
        bar.advance(4)
        assert bar.eta is None
        assert bar.line() == "reading  4 items  2 items/s"


@pytest.mark.parametrize("quiet", [True, False])
def test_quiet(hands, quiet):
    out = io.StringIO()
    with silenced(quiet), progress("x", total=2, every=1, file=out) as bar:
        hands.now += 3
        bar.advance()
    assert (out.getvalue() == "") is quiet


def test_an_error_is_told_and_not_swallowed(hands):
    out = io.StringIO()
    with pytest.raises(KeyError), progress("x", total=2, every=1, file=out) as bar:  # noqa: PT012
        hands.now += 3
        bar.advance()
        raise KeyError("k")
    assert out.getvalue().splitlines()[-1].endswith("stopped by KeyError")


def test_a_terminal_gets_a_bar_and_nested_bars_share_it(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("CI", raising=False)
    out = Terminal()
    with progress("outer", total=2, file=out) as outer:
        with progress("inner", total=3, file=out) as inner:
            inner.advance(3, loss=0.5)
            assert module._users == 2
            module._screen.refresh()
        outer.advance(2)
    text = out.getvalue()
    assert "outer" in text
    assert "inner" in text
    assert "3/3 items" in text
    assert module._screen is None


def test_track_gives_every_item():
    assert list(track(range(5), "counting", quiet=True)) == [0, 1, 2, 3, 4]
    assert list(track(iter("ab"), "counting", total=2, quiet=True)) == ["a", "b"]


def test_nothing_reaches_stdout_of_a_pipe():
    code = "import time\nfrom lynceus.core.progress import progress\nimport lynceus.core.progress as p\np.SHORT = 0\n"
    code += "with progress('work', total=2, every=0) as bar:\n    bar.advance(); bar.advance()\nprint('result')"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "result\n"
    assert len(run.stderr.splitlines()) == 3
    assert "\x1b" not in run.stderr


def test_clock():
    assert [clock(s) for s in (0.42, 9.96, 12, 185, 3729)] == ["0.4 s", "10 s", "12 s", "3:05", "1:02:09"]
