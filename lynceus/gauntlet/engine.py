"""Many independent jobs, here or on a cluster: the results are the same, whoever computes them and in whatever order.

"local" runs in this process (one worker) or in processes of `concurrent.futures`; "ray" needs the extra `cluster`.
Every worker computes with the same number of threads, since the order of a sum depends on it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from multiprocessing import get_context
from typing import Any, Literal, TypeVar

import torch

from lynceus.core.errors import AdviceError, missing_extra, unknown
from lynceus.core.workers import begin

Engine = Literal["local", "ray"]
Job = TypeVar("Job")
Result = TypeVar("Result")


def run_jobs(
    function: Callable[[Job], Result],
    jobs: Sequence[Job],
    *,
    engine: Engine = "local",
    workers: int = 1,
    threads: int = 1,
    tick: Callable[[], None] = lambda: None,
) -> list[Result]:
    """function(job) for every job, in the order of `jobs`.

    workers: processes. threads: of torch in each. tick: called now and then, and after every job, in this process. With
    more than one worker, function and jobs travel to other processes and must be picklable. A failure ends the run.
    """
    if engine not in ("local", "ray"):
        raise unknown("engine", str(engine), ("local", "ray"))
    if workers < 1 or threads < 1:
        raise AdviceError(f"jobs and threads are at least 1, not {workers} and {threads}.")
    if not jobs:
        return []
    if engine == "ray":
        return _ray(function, jobs, workers, threads, tick)
    if workers == 1 or len(jobs) == 1:
        return _here(function, jobs, threads, tick)
    return _processes(function, jobs, workers, threads, tick)


def _here(
    function: Callable[[Job], Result], jobs: Sequence[Job], threads: int, tick: Callable[[], None]
) -> list[Result]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    out = []
    try:
        for job in jobs:
            out.append(function(job))
            tick()
    finally:
        torch.set_num_threads(before)
    return out


def _processes(
    function: Callable[[Job], Result], jobs: Sequence[Job], workers: int, threads: int, tick: Callable[[], None]
) -> list[Result]:
    # spawn: a forked process inherits torch's thread pools in a broken state
    pool = ProcessPoolExecutor(
        min(workers, len(jobs)), mp_context=get_context("spawn"), initializer=begin, initargs=(threads,)
    )
    try:
        futures = [pool.submit(function, job) for job in jobs]
        waiting = set(futures)
        while waiting:
            done, waiting = wait(waiting, timeout=0.5, return_when=FIRST_COMPLETED)
            for future in done:
                future.result()
            tick()
        return [future.result() for future in futures]
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _ray(
    function: Callable[[Job], Result], jobs: Sequence[Job], workers: int, threads: int, tick: Callable[[], None]
) -> list[Result]:
    try:
        import ray
    except ImportError:
        raise missing_extra("ray", "cluster", use="engine='ray'") from None
    started = not ray.is_initialized()
    if started:
        ray.init(num_cpus=workers, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    try:
        remote = ray.remote(num_cpus=1, max_retries=0)(_threaded)
        parcel = ray.put((function, threads))
        references = [remote.remote(parcel, job) for job in jobs]
        waiting = list(references)
        while waiting:
            done, waiting = ray.wait(waiting, timeout=0.5)
            for reference in done:
                try:
                    ray.get(reference)
                except ray.exceptions.RayTaskError as error:
                    raise error.cause if isinstance(error.cause, Exception) else error from None
            tick()
        return list(ray.get(references))
    finally:
        if started:
            ray.shutdown()


def _threaded(parcel: Any, job: Any) -> Any:
    function, threads = parcel
    torch.set_num_threads(threads)
    return function(job)


def nap(seconds: float) -> float:
    """Sleeps; a job for tests of the engines."""
    time.sleep(seconds)
    return seconds
