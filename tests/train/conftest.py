"""What the tests of training share: the toy backbone of `worker.py`, and the digits cut small."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

WORKER = Path(__file__).with_name("worker.py")


def _load():
    if "lynceus_test_worker" not in sys.modules:
        spec = importlib.util.spec_from_file_location("lynceus_test_worker", WORKER)
        module = importlib.util.module_from_spec(spec)
        sys.modules["lynceus_test_worker"] = module
        spec.loader.exec_module(module)
    return sys.modules["lynceus_test_worker"]


@pytest.fixture(scope="session")
def worker():
    """The module worker.py: Toy, ToyConfig, recipe."""
    return _load()


@pytest.fixture(scope="session")
def worker_file():
    return WORKER


class Forked:
    """Runs worker.py's main in a process forked from `zygote.py`: as separate as a program, quicker to start."""

    def __init__(self):
        zygote = [sys.executable, str(WORKER.with_name("zygote.py"))]
        self.zygote = subprocess.Popen(zygote, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(self, **request):
        self.zygote.stdin.write(json.dumps(request) + "\n")
        self.zygote.stdin.flush()
        return int(self.zygote.stdout.readline())

    def start(self, arguments, environment=None):
        return self.ask(start=[str(a) for a in arguments], environment=environment or {})

    def running(self, pid):
        return bool(self.ask(poll=pid))

    def wait(self, pid):
        assert self.ask(wait=pid) == 0

    def kill(self, pid):
        """SIGKILL; True when the process was still running."""
        return self.ask(kill=pid) == -9


@pytest.fixture(scope="session")
def forked():
    made = Forked()
    yield made
    made.zygote.stdin.close()
    made.zygote.wait()


@pytest.fixture(scope="session")
def digits():
    from lynceus.data import open_dataset

    return open_dataset("digits")


@pytest.fixture(scope="session")
def small(digits):
    """(400 digits to learn from, 100 to measure on)."""
    return digits.subset(range(400)), digits.subset(range(400, 500))


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
