"""A worker: takes jobs from a broker, answers them with a pipeline of its own, and acknowledges what was answered.

As a process (`python -m lynceus.serve.worker`, started by `Fleet`) it is told what to do by lines of JSON on its
standard input; when that ends its parent is gone, and so is it.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import sys
import threading
import time
from collections import Counter
from typing import Any

from lynceus.serve.brokers import Broker, Delivery, DownError, FullError, open_broker
from lynceus.serve.config import ServeConfig
from lynceus.serve.engine import Answer
from lynceus.serve.errors import Expired, Refused, WorkerLost
from lynceus.serve.links import MalformedError, pack, pack_answer, unpack, unpack_job
from lynceus.serve.memory import keep_freed
from lynceus.serve.metrics import Metrics
from lynceus.serve.pipeline import Pipeline
from lynceus.serve.spans import Trace

TOGETHER = 32  # answers that go to the broker at once
LOOK_S = (20.0, 0.05)  # between looks at suspects: of a worker in its first life, and of one that was started again


class BatchCounts(Metrics):
    """Also keeps the sizes of batches since they were last asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: Counter[tuple[str, int]] = Counter()

    def batch(self, model: str, size: int, count: int = 1) -> None:
        super().batch(model, size, count)
        with self._lock:
            self.sizes[model, size] += count

    def taken(self) -> list[list[Any]]:
        with self._lock:
            found, self.sizes = self.sizes, Counter()
        return [[model, size, count] for (model, size), count in found.items()]


class Consumer:
    """The loop between a broker and a pipeline, in a thread of its own.

    A job that was given out before may have killed its worker. A worker in its first life hands it on to the topic
    "suspects", which one that was started again (`again`) looks after, each job alone: a picture that kills its
    worker takes down no healthy one, and no other job with it."""

    def __init__(self, broker: Broker, pipeline: Pipeline, name: str, *, again: bool = False):
        self.broker, self.pipeline, self.name, self.again = broker, pipeline, name, again
        self._room = threading.Condition()
        self._held = 0
        self._stop = False
        self._replies: queue.SimpleQueue[tuple[str, Any, bytes] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=f"lynceus-consumer-{name}", daemon=True)
        self._replier = threading.Thread(target=self._send, name=f"lynceus-replier-{name}", daemon=True)
        self._thread.start()
        self._replier.start()

    def _run(self) -> None:
        touched = looked = time.monotonic()
        while not self._stop:
            c = self.pipeline.config
            with self._room:
                free = 2 * c.max_batch - self._held
                if free <= 0:
                    self._room.wait(0.1)
            now = time.monotonic()
            if now - touched > 5:
                touched = now
                for topic in ("jobs", "suspects"):
                    self._down(lambda topic=topic: self.broker.touch(topic, self.name))
            if free <= 0:
                continue
            try:
                if now - looked > LOOK_S[self.again]:
                    looked = now
                    for delivery in self.broker.consume("suspects", self.name, count=1, wait_s=0.0):
                        self._take_suspect(delivery)
                wait = min(0.5, LOOK_S[self.again])
                found = self.broker.consume("jobs", self.name, count=free, wait_s=wait, share=max(1, c.workers))
            except DownError:
                time.sleep(0.05)
                continue
            for delivery in found:
                if delivery.attempt == 1:
                    self._take("jobs", delivery.key, delivery.body, 1)
                else:
                    handed = pack([delivery.attempt], delivery.body)
                    self._down(lambda handed=handed: self.broker.publish("suspects", [handed]))
                    self._ack("jobs", delivery.key)
                    looked = 0.0 if self.again else looked

    def _take_suspect(self, delivery: Delivery) -> None:
        try:
            (attempt,), body = unpack(delivery.body)
        except (MalformedError, TypeError, ValueError):
            self._ack("suspects", delivery.key)
            return
        self._wait_until_idle()
        self._take("suspects", delivery.key, body, int(attempt) + delivery.attempt - 1)
        self._wait_until_idle()

    def _ack(self, topic: str, delivery: Any) -> None:
        self._down(lambda: self.broker.ack(topic, [delivery]))

    def _take(self, topic: str, delivery: Any, message: bytes, attempt: int) -> None:
        taken = time.monotonic_ns()
        try:
            key, trace, deadline, model, version, body = unpack_job(message, taken)
        except MalformedError:
            self._ack(topic, delivery)
            return
        with self._room:
            self._held += 1

        def done(outcome: Any) -> None:
            self._reply(topic, delivery, key, outcome, trace)

        left = (deadline - time.monotonic_ns()) / 1e9
        if attempt > self.pipeline.config.attempts:
            done(WorkerLost(f"{attempt - 1} workers were lost with this picture; it is not tried again."))
        elif left <= 0:
            done(Expired("The request waited longer than its deadline."))
        else:
            trace.mark("consume")
            begun = (taken - trace.begun) / 1e9  # the pipeline counts from the beginning of the trace
            try:
                self.pipeline.start(body, done, model=model, version=version, trace=trace, deadline_s=begun + left)
            except Refused as error:
                done(error)

    def _wait_until_idle(self) -> None:
        with self._room:
            while self._held and not self._stop:
                self._room.wait(0.1)

    def _reply(self, topic: str, delivery: Any, key: str, outcome: Answer | Refused, trace: Trace) -> None:
        message = pack_answer(key, outcome, trace, time.monotonic_ns())
        if self._held > 1:  # the rest of its batch comes right after it: one way to the broker for all
            self._replies.put((topic, delivery, message))
        else:
            self._send_all([(topic, delivery, message)])

    def _send(self) -> None:
        while (first := self._replies.get()) is not None:
            found = [first]
            while len(found) < TOGETHER and not self._replies.empty():
                more = self._replies.get()
                if more is None:
                    self._replies.put(None)
                    break
                found.append(more)
            self._send_all(found)

    def _send_all(self, found: list[tuple[str, Any, bytes]]) -> None:
        """Answers before acknowledgements: a kill between them answers twice, and the front takes the first."""
        messages = [message for _, _, message in found]
        try:
            self.broker.publish("replies", messages)
        except (DownError, FullError):
            for message in messages:  # there may be room for some
                self._down(lambda message=message: self.broker.publish("replies", [message]))
        for topic in dict.fromkeys(topic for topic, _, _ in found):
            keys = [delivery for of, delivery, _ in found if of == topic]
            self._down(lambda topic=topic, keys=keys: self.broker.ack(topic, keys))
        with self._room:
            self._held -= len(found)
            self._room.notify_all()

    def _down(self, work: Any) -> None:
        """Again and again while the broker is away or full: what was promised is kept."""
        wait = 0.01
        while True:
            try:
                work()
                return
            except (DownError, FullError):
                if self._stop:
                    return
                time.sleep(wait)
                wait = min(0.5, wait * 2)

    def close(self) -> None:
        """Takes nothing more, lets the pipeline answer what is held, and sends that."""
        self._stop = True
        self._thread.join(timeout=5)
        self.pipeline.close()
        self._replies.put(None)
        self._replier.join(timeout=5)


# as a process --------------------------------------------------------------------------------------
def main() -> None:
    for number in (signal.SIGINT, signal.SIGTERM):  # the parent hears them too, and says when to end
        signal.signal(number, signal.SIG_IGN)
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what a model prints is no word to the parent
    told = json.loads(sys.stdin.readline())
    threading.Thread(target=_listen, args=(told, out), daemon=True).start()
    threading.Event().wait()


def _say(out: Any, **words: Any) -> None:
    out.write(json.dumps(words) + "\n")


def _listen(told: dict[str, Any], out: Any) -> None:
    """Hears the parent to the end, also while the models are being loaded."""
    state: dict[str, Any] = {}
    threading.Thread(target=_work, args=(told, out, state), daemon=True).start()
    for line in sys.stdin:
        words = json.loads(line)
        pipeline: Pipeline | None = state.get("pipeline")
        if "stop" in words:
            if pipeline is not None:
                state["consumer"].close()
            break
        if pipeline is None:
            continue
        if "change" in words:
            pipeline.change(**words["change"])
        elif "reload" in words:
            name, version = words["reload"]
            try:
                card = pipeline.reload(name, version).info()
                _say(out, reloaded=words["token"], card=card)
            except Exception as error:
                _say(out, reloaded=words["token"], error=f"{type(error).__name__}: {error}")
    os._exit(0)


def _work(told: dict[str, Any], out: Any, state: dict[str, Any]) -> None:
    try:
        sys.path[:0] = [p for p in told["path"] if p not in sys.path]
        import torch

        keep_freed()
        config = ServeConfig(**{**told["config"], "models": tuple(told["config"]["models"])})
        torch.set_num_threads(max(1, config.threads))
        counts = BatchCounts()
        pipeline = Pipeline(config, None, metrics=counts)
        broker = open_broker(told["broker"])
        state["consumer"] = Consumer(broker, pipeline, told["name"], again=told["again"])
        state["pipeline"] = pipeline
        _say(out, ready=[m.info() for m in pipeline.registry.all()])
    except Exception as error:
        from lynceus.core.errors import AdviceError

        text = str(error) if isinstance(error, AdviceError) else f"{type(error).__name__}: {error}"
        _say(out, failed=text)
        os._exit(1)
    while True:
        time.sleep(0.5)
        _say(out, batches=counts.taken(), queues=pipeline.stats()["queues"])


if __name__ == "__main__":
    main()
