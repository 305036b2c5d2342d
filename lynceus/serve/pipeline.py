"""The staged pipeline, without HTTP: decode and resize in threads, batch, infer, make answers; each stage measured.

    with Pipeline(ServeConfig(max_batch=8), model) as pipeline:
        answer = pipeline.submit(jpeg).result()
        answer.result["label"], answer.trace.seconds()

A request is a Job that goes from queue to queue. Every stage has its own threads; decoding and the model leave Python's
lock to others. What is refused, late or given up leaves at the next stage and frees its place at once.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lynceus.core.errors import AdviceError
from lynceus.serve.batcher import Batcher
from lynceus.serve.config import ServeConfig
from lynceus.serve.decode import decode
from lynceus.serve.engine import Answer, Engine, Job, cores, new_id
from lynceus.serve.errors import Cancelled, Expired, ModelFailed, Refused
from lynceus.serve.metrics import Metrics
from lynceus.serve.models import Registry, Served
from lynceus.serve.preprocess import collate

LONE = 1 << 18  # bytes of a JPEG that the model's own thread decodes when it is the only one on the way


class Pipeline(Engine):
    """Stages of one process for any number of models.

    models: a model, a mapping of names to models, or None for the sources in config.models.
    """

    def __init__(self, config: ServeConfig | None = None, models: Any = None, *, metrics: Metrics | None = None):
        super().__init__(config or ServeConfig(), metrics)
        self.registry = models if isinstance(models, Registry) else Registry.of(models, self.config)
        self._to_decode: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._to_answer: queue.SimpleQueue[tuple[list[Job], Any] | None] = queue.SimpleQueue()
        c = self.config
        self._batches: Batcher[Job] = Batcher(c.max_batch, c.max_wait_ms / 1e3, eager=c.eager)
        self._threads: list[threading.Thread] = []
        self._decoders = 0
        self._torch_threads = c.threads or (torch.get_num_threads() if c.model_threads == 1 else 1)
        self._resize_pool(self._wanted_decoders())
        for _ in range(c.model_threads):
            self._start(self._infer, "infer")
        for _ in range(c.postprocess_workers):
            self._start(self._answer, "answer")

    def _enter(self, job: Job) -> None:
        self._batches.expect()
        if self._count == 1 and self.config.eager and self._small(job.body):  # spared: the way from thread to thread
            job.key, job.ready = ("alone", job.id), time.monotonic_ns()
            self._batches.put(job)
        else:
            self._to_decode.put(job)

    @staticmethod
    def _small(body: Any) -> bool:
        return not isinstance(body, Tensor) and len(body) <= LONE and body[:2] == b"\xff\xd8"

    # stages -----------------------------------------------------------------------------------------
    def _decode(self) -> None:
        torch.set_num_threads(1)
        while True:
            job = self._to_decode.get()
            if job is None:
                return
            if self._gone(job):
                self._batches.forget()
                continue
            if not self._prepared(job):
                self._batches.forget()
                continue
            job.key = (id(job.model), job.image.shape, job.image.dtype)  # type: ignore[union-attr]
            self._batches.put(job)

    def _prepared(self, job: Job) -> bool:
        """Whether the picture is now as its model takes it; else the job was answered with the reason."""
        trace = job.trace
        trace.mark("wait_preprocess")
        try:
            image = self._picture(job)
            trace.mark("decode")
            job.size = (int(image.shape[-2]), int(image.shape[-1]))
            if job.keep:
                job.picture = image
            job.body = b""
            job.image = job.model.prepare(image)
            job.ready = trace.mark("preprocess")
        except Refused as error:
            self._finish(job, error)
            return False
        except Exception as error:  # whatever a foreign picture does, this thread goes on
            self._finish(job, ModelFailed(f"Preparing the picture failed: {type(error).__name__}."))
            return False
        return True

    def _picture(self, job: Job) -> Tensor:
        if isinstance(job.body, Tensor):
            return job.body
        c, model = self.config, job.model
        least = None if c.exact or job.keep else model.size
        image = decode(job.body, max_pixels=c.max_pixels_mp * 1e6, strict=c.strict, least=least)
        if c.placement == "client" and (model.size and tuple(image.shape[-2:]) != model.size):
            raise Refused(f"This server takes tensors (3, {model.size[0]}, {model.size[1]}) as .npy only.")
        return image

    def _infer(self) -> None:
        torch.set_num_threads(self._torch_threads)
        while True:
            jobs = self._batches.take()
            if jobs is None:
                return
            jobs = [job for job in jobs if not self._gone(job) and (job.image is not None or self._prepared(job))]
            if jobs:
                self._infer_batch(jobs)
                del jobs

    def _infer_batch(self, jobs: list[Job]) -> None:
        now = time.monotonic_ns()
        for job in jobs:
            job.trace.mark("wait_batch", now)
        model = jobs[0].model
        try:
            batch = model.to_device(collate([job.image for job in jobs]))  # type: ignore[misc]
            self._mark(jobs, "collate")
            raw = model.run(batch)
            self._mark(jobs, "infer")
        except Exception as error:
            if len(jobs) > 1:  # who of them was it
                for job in jobs:
                    self._infer_batch([job])
            else:
                self._finish(jobs[0], ModelFailed(f"{model.name} raised {type(error).__name__} for this picture."))
            return
        self.metrics.batch(model.label, len(jobs))
        for job in jobs:
            job.image = None
        if len(jobs) == 1 and not len(self._batches):  # nobody waits for this thread: save the way to the next
            self._answer_all(jobs, raw)
        else:
            self._to_answer.put((jobs, raw))

    def _answer(self) -> None:
        torch.set_num_threads(1)
        while True:
            taken = self._to_answer.get()
            if taken is None:
                return
            self._answer_all(*taken)

    def _answer_all(self, jobs: list[Job], raw: Any) -> None:
        try:
            rows: Sequence[Any] = jobs[0].model.rows(raw, [job.size for job in jobs])
        except ModelFailed as error:
            rows = [error] * len(jobs)
        except Exception as error:
            rows = [ModelFailed(f"The outputs cannot be read: {type(error).__name__}.")] * len(jobs)
        self._mark(jobs, "postprocess")
        for job, row in zip(jobs, rows):
            self._finish(job, row if isinstance(row, Refused) else Answer(row, job.trace, job.picture))

    def _mark(self, jobs: list[Job], name: str) -> None:
        now = time.monotonic_ns()
        for job in jobs:
            job.trace.mark(name, now)

    def _gone(self, job: Job) -> bool:
        if job.cancelled:
            self._finish(job, Cancelled("The client has gone."))
        elif time.monotonic_ns() > job.deadline:
            self._finish(job, Expired("The request waited longer than its deadline."))
        else:
            return False
        return True

    # settings and state -----------------------------------------------------------------------------
    def _wanted_decoders(self) -> int:
        return self.config.preprocess_workers or cores()

    def _start(self, work: Callable[[], None], name: str) -> None:
        thread = threading.Thread(target=work, name=f"lynceus-{name}", daemon=True)
        thread.start()
        self._threads.append(thread)

    def _resize_pool(self, count: int) -> None:
        for _ in range(count - self._decoders):
            self._start(self._decode, "decode")
        for _ in range(self._decoders - count):
            self._to_decode.put(None)
        self._decoders = count

    def change(self, **hot: Any) -> ServeConfig:
        """Changes hot settings (see config.HOT), for what waits already too."""
        if hot.get("workers") and not self.config.workers:
            raise AdviceError("This server runs its models itself; start it with --workers 1 or more to change them.")
        with self._lock:
            self.config = replace(self.config, **hot)
            c = self.config
            self._batches.change(c.max_batch, c.max_wait_ms / 1e3, c.eager)
            self._resize_pool(self._wanted_decoders())
        return self.config

    def reload(self, name: str | None = None, version: str | None = None) -> Served:
        """Reads a model's weights again; see Registry.reload."""
        return self.registry.reload(name, version)

    def stats(self) -> dict[str, Any]:
        """Queue lengths, throughput, batch sizes, latencies: what the page shows."""
        queues = {
            "preprocess": self._to_decode.qsize(),
            "batch": len(self._batches),
            "postprocess": self._to_answer.qsize(),
            "on_the_way": self._count,
            "limit": self.config.queue,
        }
        return {"queues": queues, **self.metrics.stats(), "settings": self.config.hot}

    def _shut(self) -> None:
        self._resize_pool(0)
        self._batches.close()
        for _ in range(self.config.postprocess_workers):
            self._to_answer.put(None)
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(timeout=10)


__all__ = ["Answer", "Job", "Pipeline", "new_id"]
