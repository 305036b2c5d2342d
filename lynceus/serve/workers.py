"""Fleet: an engine whose models run in worker processes, linked by a broker.

A worker that dies is started again, and what it held goes to another one; a job that lost `attempts` workers is
answered with 500. Jobs may be delivered twice, but are answered once. No process outlives this one.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from lynceus.core.config import to_dict
from lynceus.core.errors import AdviceError
from lynceus.serve.brokers import DownError, FullError, open_broker
from lynceus.serve.config import ServeConfig
from lynceus.serve.engine import Answer, Engine, Job, new_id
from lynceus.serve.errors import Expired, Overloaded, Refused
from lynceus.serve.links import MalformedError, pack_job, unpack_answer
from lynceus.serve.metrics import Metrics
from lynceus.serve.models import Cards, parse, spare_name
from lynceus.serve.pipeline import Pipeline
from lynceus.serve.worker import Consumer

START_S = 180.0  # for a worker to load its models
QUICK_S = 10.0  # a worker that dies sooner is started again ever more slowly
FRONT = "front"


class _Worker:
    """One place for a worker, and the process that has it now."""

    def __init__(self, number: int):
        self.number, self.generation = number, 0
        self.process: subprocess.Popen[str] | None = None
        self.name = ""
        self.ready = threading.Event()
        self.retired = False
        self.failed = ""
        self.begun = 0.0
        self.delay = 0.0
        self.queues: dict[str, int] = {}
        self.lock = threading.Lock()

    def say(self, **words: Any) -> None:
        with self.lock:
            if self.process is not None and self.process.stdin is not None:
                try:
                    self.process.stdin.write(json.dumps(words) + "\n")
                    self.process.stdin.flush()
                except (OSError, ValueError):
                    pass  # it is dying; its watcher sees to that


class Fleet(Engine):
    """models: a module of this library or a mapping of names to such (written to a folder for the workers), or None
    for the sources of config.models."""

    def __init__(self, config: ServeConfig, models: Any = None, *, metrics: Metrics | None = None):
        super().__init__(config, metrics)
        self._folder = tempfile.TemporaryDirectory(prefix="lynceus-serve-")
        self.sources = sources(models, config, self._folder.name) if config.workers else []
        self._inside: Consumer | None = None
        size = min(1024.0, max(64.0, config.max_buffer_mb))
        self.broker = open_broker(config.broker, capacity_mb=size, slots=2 * config.queue + 64)
        if not self.broker.address and config.workers:
            raise AdviceError("Worker processes cannot share memory of this process; take broker=shared or redis://...")
        self.registry = Cards()
        self._pending: dict[Any, Job] = {}
        self._to_publish: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._workers: list[_Worker] = []
        self._tokens: dict[str, tuple[threading.Event, list[Any]]] = {}
        self._ending = False
        self._hot = threading.Lock()
        try:
            if config.workers:
                self._grow(config.workers)
                self._await_ready()
            else:
                self._inside = self._consume_here(models)
        except BaseException:
            self._end_processes()
            self._folder.cleanup()
            raise
        self._threads = [
            threading.Thread(target=work, name=f"lynceus-{name}", daemon=True)
            for name, work in (("publish", self._publish), ("replies", self._collect), ("watch", self._watch))
        ]
        for thread in self._threads:
            thread.start()

    def _consume_here(self, models: Any) -> Consumer:
        """Without worker processes: a consumer in this one, behind the same broker."""
        own = replace(self.config, queue=max(self.config.queue, 4 * self.config.max_batch))
        pipeline = Pipeline(own, models)
        pipeline.metrics.batch = self.metrics.batch  # type: ignore[method-assign]
        self.registry.learn([m.info() for m in pipeline.registry.all()])
        return Consumer(self.broker, pipeline, f"inside-{new_id()}")

    # processes --------------------------------------------------------------------------------------
    def _grow(self, count: int) -> None:
        while len(self._workers) < count:
            worker = _Worker(len(self._workers))
            self._workers.append(worker)
            self._spawn(worker)
        while len(self._workers) > count:
            worker = self._workers.pop()
            worker.retired = True
            worker.say(stop=True)

    def _spawn(self, worker: _Worker) -> None:
        c = self.config
        worker.generation += 1
        worker.name = f"w{worker.number}-{worker.generation}-{new_id()}"
        worker.ready.clear()
        worker.begun = time.monotonic()
        env = dict(os.environ)
        for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
            env[name] = str(max(1, c.threads))
        worker.process = subprocess.Popen(
            [sys.executable, "-m", "lynceus.serve.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=env,
            process_group=0,  # Ctrl-C is for this process, which tells its workers when to end
        )
        own = replace(
            c,
            models=tuple(self.sources),
            preprocess_workers=c.preprocess_workers or 1,
            threads=max(1, c.threads),
            queue=max(c.queue, 4 * c.max_batch),
            broker="memory",
        )
        told = {
            "config": {k: v for k, v in to_dict(own).items() if k != "api_key"},
            "broker": self.broker.address,
            "name": worker.name,
            "path": [os.getcwd(), *sys.path],
            "again": worker.generation > 1,
        }
        worker.say(**told)
        threading.Thread(
            target=self._hear, args=(worker, worker.process), name=f"lynceus-{worker.name}", daemon=True
        ).start()

    def _hear(self, worker: _Worker, process: subprocess.Popen[str]) -> None:
        """What one process says, until it ends; then another takes its place."""
        name = worker.name
        assert process.stdout is not None
        for line in process.stdout:
            words = json.loads(line)
            if "ready" in words:
                self.registry.learn(words["ready"])
                worker.failed, worker.delay = "", 0.0
                worker.ready.set()
            elif "failed" in words:
                worker.failed = words["failed"]
            elif "batches" in words:
                for model, size, count in words["batches"]:
                    self.metrics.batch(model, size, count)
                worker.queues = words["queues"]
            elif "reloaded" in words:
                event, found = self._tokens.get(words["reloaded"], (None, []))
                if event is not None:
                    found.append(words)
                    event.set()
        process.wait()
        for stream in (process.stdin, process.stdout):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()
        if not worker.ready.is_set() and not worker.failed:
            worker.failed = f"it ended with {process.returncode}"
        first = not worker.ready.is_set() and worker.generation == 1
        worker.ready.set() if first else worker.ready.clear()
        if self._ending or first:
            return
        self._release(name)
        if worker.retired:
            return
        self.metrics.restarts += 1
        if time.monotonic() - worker.begun < QUICK_S:
            time.sleep(worker.delay)
            worker.delay = min(5.0, worker.delay * 2 + 0.1)
        if not self._ending and not worker.retired:
            self._spawn(worker)

    def _release(self, name: str) -> None:
        """What a dead worker held goes to others, once the broker can be reached."""
        while not self._ending:
            try:
                self.metrics.redelivered += self.broker.release("jobs", name)
                self.metrics.redelivered += self.broker.release("suspects", name)
                self.broker.release("replies", name)
                return
            except DownError:
                time.sleep(0.05)

    def _await_ready(self) -> None:
        limit = time.monotonic() + START_S
        for worker in self._workers:
            if not worker.ready.wait(max(0.0, limit - time.monotonic())) or worker.failed:
                raise AdviceError(
                    f"A worker could not load its models: {worker.failed or f'not within {START_S:g} s'}."
                )

    # messages ---------------------------------------------------------------------------------------
    def _enter(self, job: Job) -> None:
        job.key = new_id()
        self._pending[job.key] = job
        self._to_publish.put(job)

    def cancel(self, job: Job) -> None:
        """Frees the place at once; a worker that has the job may still finish it for nobody."""
        super().cancel(job)
        if self._pending.pop(job.key, None) is not None:
            from lynceus.serve.errors import Cancelled

            self._finish(job, Cancelled("The client has gone."))

    def _publish(self) -> None:
        while True:
            job = self._to_publish.get()
            if job is None:
                return
            jobs = [job]
            while len(jobs) < 32 and not self._to_publish.empty():
                more = self._to_publish.get()
                if more is None:
                    self._to_publish.put(None)
                    break
                jobs.append(more)
            self._publish_all([j for j in jobs if not j.finished])

    def _publish_all(self, jobs: list[Job]) -> None:
        while jobs and not self._ending:
            sent = time.monotonic_ns()
            try:
                self.broker.publish("jobs", [pack_job(job, sent) for job in jobs])
                for job in jobs:
                    job.body = b""  # the broker has it
                return
            except DownError:
                time.sleep(0.05)
                jobs = [j for j in jobs if not j.finished]  # those that are late meanwhile were answered
            except FullError:
                for job in jobs:
                    self._end(job.key, Overloaded("The workers are behind.", retry_after=self.retry_after()))
                return

    def _collect(self) -> None:
        while not self._ending:
            try:
                found = self.broker.consume("replies", FRONT, count=64, wait_s=0.5)
                if not found:
                    continue
                taken = time.monotonic_ns()
                for delivery in found:
                    self._answer(delivery.body, taken)
                self.broker.ack("replies", [d.key for d in found])
            except DownError:
                time.sleep(0.05)

    def _answer(self, message: bytes, taken: int) -> None:
        try:
            key, trace, result = unpack_answer(message, taken)
        except MalformedError:
            self.metrics.refuse("malformed_reply")
            return
        job = self._pending.get(key)
        if job is None:
            self.metrics.duplicates += 1
            return
        trace.mark("consume")
        job.trace.spans[:] = trace.spans
        self._end(key, result if isinstance(result, Refused) else Answer(result, job.trace))

    def _end(self, key: Any, outcome: Answer | Refused) -> None:
        job = self._pending.pop(key, None)
        if job is not None:
            self._finish(job, outcome)

    def _watch(self) -> None:
        """Answers what is late, and keeps what is held by this process."""
        touched = time.monotonic()
        while not self._ending:
            time.sleep(0.1)
            now = time.monotonic_ns()
            for key, job in list(self._pending.items()):
                if now > job.deadline:
                    self._end(key, Expired("The request waited longer than its deadline."))
            if time.monotonic() - touched > 5:
                touched = time.monotonic()
                with contextlib.suppress(DownError):
                    self.broker.touch("replies", FRONT)

    # settings and state -----------------------------------------------------------------------------
    def change(self, **hot: Any) -> ServeConfig:
        """Changes hot settings here and in all workers; another number of workers starts or ends some."""
        with self._hot:
            if "workers" in hot and (hot["workers"] < 1) != (self._inside is not None):
                raise AdviceError("A server keeps what it was started with: worker processes, or none.")
            self.config = replace(self.config, **hot)
            if self._inside is not None:
                self._inside.pipeline.change(**{k: v for k, v in hot.items() if k not in ("queue", "workers")})
            for worker in self._workers:
                worker.say(change={k: v for k, v in hot.items() if k not in ("queue", "deadline_s")})
            if "workers" in hot:
                self._grow(self.config.workers)
        return self.config

    def reload(self, name: str | None = None, version: str | None = None) -> Any:
        """Every worker reads the weights again, one after the other; AdviceError when one cannot."""
        card = self.registry.find(name, version)
        if self._inside is not None:
            self.registry.learn([self._inside.pipeline.reload(name, version).info()])
        for worker in [w for w in self._workers if w.ready.is_set()]:
            token = new_id()
            event: threading.Event = threading.Event()
            found: list[Any] = []
            self._tokens[token] = (event, found)
            worker.say(reload=[card.name, card.version], token=token)
            event.wait(START_S)
            del self._tokens[token]
            if not found or "error" in found[0]:
                raise AdviceError(f"A worker could not reload: {found[0]['error'] if found else 'no answer'}.")
            self.registry.learn([found[0]["card"]])
        return self.registry.find(name, version)

    def stats(self) -> dict[str, Any]:
        """Queue lengths, throughput, batch sizes, latencies."""
        queues: dict[str, Any] = {"publish": self._to_publish.qsize()}
        try:
            queues["broker"], queues["held"] = self.broker.depth("jobs")
        except (DownError, ValueError):
            queues["broker"] = queues["held"] = -1
        for stage in ("preprocess", "batch", "postprocess"):
            queues[stage] = sum(w.queues.get(stage, 0) for w in self._workers)
        queues |= {"on_the_way": self._count, "limit": self.config.queue}
        workers = [
            {"pid": w.process.pid if w.process else None, "ready": w.ready.is_set(), "restarts": w.generation - 1}
            for w in self._workers
        ]
        return {"queues": queues, **self.metrics.stats(), "settings": self.config.hot, "workers": workers}

    @property
    def ready(self) -> bool:
        """Whether a request would be taken, and a worker is there for it."""
        return super().ready and (self._inside is not None or any(w.ready.is_set() for w in self._workers))

    def _shut(self) -> None:
        self._ending = True
        self._to_publish.put(None)
        self._end_processes()
        if self._inside is not None:
            self._inside.close()
        for thread in self._threads:
            thread.join(timeout=5)
        forget = getattr(self.broker, "forget", None)
        if forget is not None:
            with contextlib.suppress(DownError):
                forget()
        if not any(t.is_alive() for t in self._threads):
            self.broker.close()
        self._folder.cleanup()

    def _end_processes(self) -> None:
        self._ending = True
        processes = [w.process for w in self._workers if w.process is not None]
        for worker in self._workers:
            worker.say(stop=True)
            if worker.process is not None and worker.process.stdin is not None:
                with contextlib.suppress(OSError):
                    worker.process.stdin.close()
            if worker.process is not None and not worker.ready.is_set():
                worker.process.kill()  # it holds nothing, and hears nothing while it imports
        limit = time.monotonic() + 10
        for process in processes:
            try:
                process.wait(max(0.1, limit - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def sources(models: Any, config: ServeConfig, folder: str) -> list[str]:
    """NAME@VERSION=SOURCE for every model, each of which any process can open to the same weights."""
    from lynceus.serve.models import is_fresh, open_model
    from lynceus.train.checkpoint import exportable, save_model

    table: list[tuple[str, str, Any]] = []
    if models is None:
        table = [parse(text) for text in config.models]
    else:
        given = models if isinstance(models, Mapping) else {spare_name(models): models}
        for text, model in given.items():
            name, version, _ = parse(f"{text}=-")
            table.append((name, version, model))
    if not table:
        raise AdviceError("There is no model to serve; give one, such as `lynceus serve runs/train/resnet_nano`.")
    out, counts = [], dict.fromkeys((n for n, _, _ in table), 0)
    for name, version, model in table:
        counts[name] += 1
        version = version or str(counts[name])
        if isinstance(model, str) and is_fresh(model):
            model = open_model(model)  # every worker would draw weights of its own
        if not isinstance(model, str):
            inner = getattr(model, "model", model) if type(model).__name__ == "Subject" else model
            if not (isinstance(inner, nn.Module) and exportable(inner)):
                raise AdviceError(
                    f"{name} cannot be handed to worker processes; name it python:MODULE:NAME, or serve it with "
                    "workers=0."
                )
            model = str(save_model(inner, f"{folder}/{name.replace(':', '_')}-{version}.safetensors"))
        out.append(f"{name}@{version}={model}")
    return out
