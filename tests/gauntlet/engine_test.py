"""Local and ray engines: equal results in order, failures that arrive whole."""

import os

import pytest
import torch

from lynceus.core.errors import AdviceError
from lynceus.gauntlet.engine import nap, run_jobs


def sums(seed):
    x = torch.randn(200, 200, generator=torch.Generator().manual_seed(seed))
    return float((x @ x).std()), torch.get_num_threads()


def fail(job):
    raise AdviceError(f"job {job} cannot be done")


def test_here_in_order_with_its_threads_given_back():
    before = torch.get_num_threads()
    ticks = []
    out = run_jobs(sums, [3, 1, 2], threads=1, tick=lambda: ticks.append(1))
    assert out == [sums_with(1, s) for s in (3, 1, 2)]
    assert len(ticks) == 3
    assert torch.get_num_threads() == before
    assert run_jobs(sums, []) == []


def sums_with(threads, seed):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    out = sums(seed)
    torch.set_num_threads(before)
    return out


def test_processes_give_the_same_in_the_same_order():
    assert run_jobs(nap, [0.3, 0.0, 0.1], workers=2) == [0.3, 0.0, 0.1]
    if "PYTEST_XDIST_WORKER" not in os.environ:
        assert run_jobs(torch.tensor, [1, 2], workers=2) == [torch.tensor(1), torch.tensor(2)]


def test_failures_and_mistakes():
    with pytest.raises(AdviceError, match="job 7"):
        run_jobs(fail, [7])
    with pytest.raises(AdviceError, match="local"):
        run_jobs(nap, [0.0], engine="locl")
    with pytest.raises(AdviceError, match="at least 1"):
        run_jobs(nap, [0.0], workers=0)


@pytest.mark.slow
def test_ray_gives_the_same():
    pytest.importorskip("ray")
    assert run_jobs(nap, [0.2, 0.0, 0.1], engine="ray", workers=2) == [0.2, 0.0, 0.1]
