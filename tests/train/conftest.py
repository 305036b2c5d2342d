"""What the tests of training share: the toy backbone of `worker.py`, and the digits cut small."""

import importlib.util
import os
import sys
import traceback
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
    """Runs worker.py's main in a forked process: as separate as a program, without importing torch again."""

    def __init__(self):
        self.module = _load()

    def start(self, arguments, environment=None):
        pid = os.fork()
        if pid:
            return pid
        code = 1
        try:
            os.environ.update(environment or {})
            sys.argv = ["worker.py", *map(str, arguments)]
            self.module.main()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)

    def running(self, pid):
        return os.waitpid(pid, os.WNOHANG)[0] == 0

    def wait(self, pid):
        status = os.waitpid(pid, 0)[1]
        assert os.waitstatus_to_exitcode(status) == 0

    def kill(self, pid):
        """SIGKILL; True when the process was still running."""
        os.kill(pid, 9)
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -9


@pytest.fixture(scope="session")
def forked():
    return Forked()


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
