"""A run that is killed and resumed ends with the weights of the unbroken one, bit for bit."""

import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch

from lynceus.core.errors import AdviceError
from lynceus.train.checkpoint import read_state
from lynceus.train.fit import FitConfig, Interrupted, fit


class Program:
    """worker.py as a program of its own, with the face of the fixture `forked`."""

    def __init__(self, file):
        self.file, self.processes = file, {}

    def start(self, arguments):
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen([sys.executable, str(self.file), *map(str, arguments)], env=env)
        self.processes[process.pid] = process
        return process.pid

    def running(self, pid):
        return self.processes[pid].poll() is None

    def wait(self, pid):
        assert self.processes.pop(pid).wait(300) == 0

    def kill(self, pid):
        process = self.processes.pop(pid)
        process.send_signal(signal.SIGKILL)
        return process.wait() == -signal.SIGKILL


def equal_states(a, b):
    assert a.keys() == b.keys()
    for key in a:
        assert torch.equal(a[key], b[key]), key


def kill_and_compare(runner, folder, kills, *options):
    """Kills the run `kills` times at random moments, resuming each time; compares its end with the unbroken run's.

    Each part is killed after it has written a checkpoint of its own, so that the whole comes to an end."""
    runner.wait(runner.start([folder / "whole", *options]))
    state = folder / "broken" / "checkpoints" / "last.pt"
    draw = random.Random(0)
    seen = []
    while len(seen) < kills:
        stamp = state.stat().st_mtime_ns if state.is_file() else 0
        process = runner.start([folder / "broken", "--resume", *options])
        while (state.stat().st_mtime_ns if state.is_file() else 0) == stamp:
            assert runner.running(process), f"the run ended after {len(seen)} kills"
            time.sleep(0.001)
        time.sleep(draw.uniform(0, 0.05))
        assert runner.kill(process), f"the run ended after {len(seen)} kills, at steps {seen}"
        seen.append(read_state(state)["step"])  # always a whole file
    runner.wait(runner.start([folder / "broken", "--resume", *options]))
    whole, broken = read_state(folder / "whole/checkpoints/last.pt"), read_state(state)
    assert whole["step"] == broken["step"]
    equal_states(whole["recipe"], broken["recipe"])
    equal_states(whole["ema"], broken["ema"])
    for name in ("last", "best"):
        files = [(folder / run / "checkpoints" / f"{name}.safetensors").read_bytes() for run in ("whole", "broken")]
        assert files[0] == files[1]
    # the logs read as if nothing had happened, timing aside
    for name, columns in (("log.csv", 5), ("metrics.csv", 7)):
        rows = [
            [line.split(",")[:columns] for line in (folder / run / name).read_text().splitlines()]
            for run in ("whole", "broken")
        ]
        assert rows[0] == rows[1]
    return seen


def test_killed_three_times(forked, tmp_path):
    kill_and_compare(forked, tmp_path, 3, "--steps", 150)


def test_killed_while_views_are_made_per_sample(forked, tmp_path):
    kill_and_compare(forked, tmp_path, 1, "--steps", 80, "--loader", "--save-every", 7)


@pytest.mark.slow
def test_killed_fifteen_times(forked, tmp_path):
    seen = kill_and_compare(forked, tmp_path, 15, "--steps", 1200, "--width", 64)
    assert len(set(seen)) > 10, seen


@pytest.mark.slow
def test_killed_ten_times_as_a_program(worker_file, tmp_path):
    kill_and_compare(Program(worker_file), tmp_path, 10, "--steps", 800)


class Stopper:
    """An evaluation that sends Ctrl-C at one of its calls."""

    def __init__(self, at, how=signal.SIGINT):
        self.calls, self.at, self.how = 0, at, how

    def __call__(self, subject, data):
        self.calls += 1
        if self.calls == self.at:
            os.kill(os.getpid(), self.how)
        return {"calls": self.calls}


CONFIG = FitConfig(epochs=3, batch_size=50, ema=0.9, evaluate_every=1, quiet=True, device="cpu", log_every=3)


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_saves_says_how_to_go_on_and_goes_on(worker, small, tmp_path, how):
    unbroken = worker.recipe()
    fit(unbroken, small[0], config=CONFIG)
    broken = worker.recipe()
    with pytest.raises(Interrupted, match="resume=True"):
        fit(broken, small[0], config=CONFIG, evaluate=Stopper(1, how), out=tmp_path)
    assert read_state(tmp_path / "checkpoints/last.pt")["step"] == 8
    again = worker.recipe(seed=99)  # its weights come from the checkpoint
    report = fit(again, small[0], config=CONFIG, evaluate=Stopper(0), out=tmp_path, resume=True)
    equal_states(unbroken.state_dict(), again.state_dict())
    assert report.summary["steps"] == 24


def test_ctrl_c_without_a_folder_says_that_nothing_was_saved(worker, small):
    before = signal.getsignal(signal.SIGINT)  # a shell in the background starts programs that ignore it
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(Interrupted, match="nothing was saved"):
            fit(worker.recipe(), small[0], config=CONFIG, evaluate=Stopper(1))
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.fixture
def halfway(worker, small, tmp_path):
    with pytest.raises(Interrupted):
        fit(worker.recipe(), small[0], config=CONFIG, evaluate=Stopper(1), out=tmp_path)
    return tmp_path


def test_a_changed_configuration_is_refused_by_name(worker, small, halfway):
    from dataclasses import replace

    with pytest.raises(AdviceError, match=r"fit\.lr: 0\.002 -> 0\.001"):
        fit(worker.recipe(), small[0], config=replace(CONFIG, lr=1e-3), out=halfway, resume=True)
    with pytest.raises(AdviceError, match=r"supervised\.crop: 1 -> 2"):
        fit(worker.recipe(crop=2), small[0], config=CONFIG, out=halfway, resume=True)
    with pytest.raises(AdviceError, match=r"backbone\.config\.dropout"):
        fit(worker.recipe(dropout=0.5), small[0], config=CONFIG, out=halfway, resume=True)
    with pytest.raises(AdviceError, match=r"data\.images: 400 -> 399"):
        fit(worker.recipe(), small[0].subset(range(399)), config=CONFIG, out=halfway, resume=True)
    # how it runs may change; and one may insist
    fit(worker.recipe(), small[0], config=replace(CONFIG, log_every=1, save_every=5), out=halfway, resume=True)


def test_one_may_insist_on_a_changed_configuration(worker, small, halfway):
    from dataclasses import replace

    report = fit(worker.recipe(), small[0], config=replace(CONFIG, lr=1e-3), out=halfway, resume="changed")
    assert report.summary["steps"] == 24


def test_a_folder_with_a_run_is_not_overwritten(worker, small, halfway):
    with pytest.raises(AdviceError, match="already holds a run"):
        fit(worker.recipe(), small[0], config=CONFIG, out=halfway)


def test_resume_needs_a_folder_and_is_a_new_run_in_an_empty_one(worker, small, tmp_path):
    with pytest.raises(AdviceError, match="out="):
        fit(worker.recipe(), small[0], config=CONFIG, resume=True)
    report = fit(worker.recipe(), small[0], config=CONFIG, out=tmp_path / "new", resume=True)
    assert report.summary["steps"] == 24


def test_a_finished_run_resumes_to_its_report(worker, small, tmp_path):
    first = fit(worker.recipe(), small[0], config=CONFIG, held_out=small[1], out=tmp_path)
    again = worker.recipe(seed=5)
    second = fit(again, small[0], config=CONFIG, held_out=small[1], out=tmp_path, resume=True)
    assert second.summary["accuracy"] == first.summary["accuracy"]
    assert second.summary["train_loss"] == first.summary["train_loss"]


def test_a_broken_checkpoint_is_an_advising_error(worker, small, tmp_path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints/last.pt").write_bytes(b"not a checkpoint")
    with pytest.raises(AdviceError, match="no checkpoint"):
        fit(worker.recipe(), small[0], config=CONFIG, out=tmp_path, resume=True)
