"""What all engines share: taking requests within bounds, finishing each once, draining.

An engine answers pictures: `Pipeline` with threads of this process, `Fleet` with worker processes behind a broker,
`Chain` with several models one after the other.
"""

from __future__ import annotations

import itertools
import os
import secrets
import threading
import time
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lynceus.serve.config import ServeConfig
from lynceus.serve.errors import Draining, Overloaded, Refused
from lynceus.serve.metrics import Metrics
from lynceus.serve.spans import Trace

_numbers = itertools.count()
_prefix = secrets.token_hex(4)


def new_id() -> str:
    """An id that no other request of this or another server has."""
    return f"{_prefix}{next(_numbers):08x}"


@dataclass(slots=True)
class Answer:
    """What the model says of one picture, as plain values, and where the time went.

    result: "label", "name", "confidence" and "scores" of a classifier; what a Prediction holds of other tasks.
    picture: the decoded picture (3, h, w), where the request asked to keep it."""

    result: dict[str, Any]
    trace: Trace
    picture: Tensor | None = None


class Job:
    """One request on its way. `done` is called once, with an Answer or the Refused that ended it."""

    __slots__ = (
        "body", "cancelled", "deadline", "done", "finished", "id", "image", "keep", "key", "model", "picture", "ready",
        "size", "trace",
    )  # fmt: skip

    def __init__(self, body: Any, model: Any, trace: Trace, deadline: int, done: Callable[[Any], None], keep: bool):
        self.id, self.body, self.model, self.trace = trace.id, body, model, trace
        self.deadline, self.done, self.keep = deadline, done, keep
        self.cancelled = self.finished = False
        self.image: Tensor | None = None  # as the model takes it
        self.picture: Tensor | None = None  # as decoded, where it is kept for a next step
        self.size = (0, 0)
        self.key: Hashable = None
        self.ready = 0


class Engine:
    """Base of all engines; a subclass writes `_enter(job)`, which must not block, and `_shut()`."""

    registry: Any

    def __init__(self, config: ServeConfig, metrics: Metrics | None):
        self.config = config
        self.metrics = metrics or Metrics()
        self._lock = threading.Lock()
        self._idle = threading.Condition(self._lock)
        self._count = 0
        self._draining = self._closed = False

    def _enter(self, job: Job) -> None:
        raise NotImplementedError

    def _shut(self) -> None:
        raise NotImplementedError

    def submit(
        self,
        body: bytes | Tensor,
        *,
        model: str | None = None,
        version: str | None = None,
        trace: Trace | None = None,
        deadline_s: float | None = None,
        keep: bool = False,
    ) -> Future[Answer]:
        """Takes one picture: encoded, a .npy tensor, or a decoded tensor (3, h, w). The future gives its Answer, or
        raises the Refused that says why there is none. Cancelling the future gives the picture up.

        Raises Overloaded at once when too much is on the way, UnknownModel for a name that there is not."""
        future: Future[Answer] = Future()

        def done(outcome: Any) -> None:
            if not future.set_running_or_notify_cancel():
                return
            if isinstance(outcome, Answer):
                future.set_result(outcome)
            else:
                future.set_exception(outcome)

        job = self.start(body, done, model=model, version=version, trace=trace, deadline_s=deadline_s, keep=keep)
        future.add_done_callback(lambda f: self.cancel(job) if f.cancelled() else None)
        return future

    def start(
        self,
        body: bytes | Tensor,
        done: Callable[[Any], None],
        *,
        model: str | None = None,
        version: str | None = None,
        trace: Trace | None = None,
        deadline_s: float | None = None,
        keep: bool = False,
    ) -> Job:
        """As `submit`; `done` is called with the Answer or the Refused, from a thread of the engine."""
        served = self.registry.find(model, version)
        trace = trace or Trace(id=new_id())
        limit = self.config.deadline_s if deadline_s is None else min(deadline_s, self.config.deadline_s)
        job = Job(body, served, trace, trace.begun + int(limit * 1e9), done, keep)
        with self._lock:
            full = self._count >= self.config.queue
            if not (full or self._draining):
                self._count += 1
        if self._draining:
            self.metrics.refuse("draining")
            raise Draining("The server is stopping.")
        if full:
            self.metrics.refuse("overloaded")
            text = f"{self.config.queue} requests are on the way, and no more are taken."
            raise Overloaded(text, retry_after=self.retry_after())
        self._enter(job)
        return job

    def cancel(self, job: Job) -> None:
        """Gives a job up: it leaves at its next stage."""
        job.cancelled = True

    def _finish(self, job: Job, outcome: Answer | Refused) -> None:
        """Ends a job: frees its place, counts it, tells who asked."""
        with self._lock:
            if job.finished:
                return
            job.finished = True
            self._count -= 1
            if self._count == 0:
                self._idle.notify_all()
        job.body = b""
        job.image = job.picture = None
        if isinstance(outcome, Answer):
            self.metrics.answer(job.model.label, job.trace)
        else:
            self.metrics.refuse(outcome.kind)
        try:
            job.done(outcome)
        except Exception:  # the caller's own; this thread goes on
            self.metrics.refuse("callback")

    def retry_after(self) -> float:
        """Seconds after which what is on the way now should be done."""
        rate = self.metrics.throughput()
        return min(30.0, max(1.0, self._count / rate)) if rate > 0 else 1.0

    @property
    def count(self) -> int:
        """Requests on the way."""
        return self._count

    @property
    def ready(self) -> bool:
        """Whether a request would be taken now."""
        return not self._draining and self._count < self.config.queue

    def drain(self, seconds: float | None = None) -> bool:
        """Takes no more requests and waits for those on the way; True when all were answered in time."""
        limit = time.monotonic() + (self.config.drain_s if seconds is None else seconds)
        with self._idle:
            self._draining = True
            while self._count:
                if not self._idle.wait(max(0.0, limit - time.monotonic())) and time.monotonic() >= limit:
                    return False
        return True

    def close(self) -> None:
        """Drains, and ends threads and processes. May be called twice."""
        if not self._closed:
            self._closed = True
            self.drain()
            self._shut()

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def cores() -> int:
    """That this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
