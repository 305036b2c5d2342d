"""Two models one after the other: a detector, and one that looks at each box; by a link of choice between them.

Crops of one picture fan out and come together again: the answer holds "objects", one for each box, in the detector's
order. The request's trace goes on through the crop that was answered last, so that its spans still sum to its time.
"""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lynceus.core.errors import AdviceError
from lynceus.serve.config import Chain, ServeConfig
from lynceus.serve.engine import Answer, Engine, Job
from lynceus.serve.errors import ModelFailed, Refused
from lynceus.serve.metrics import Metrics
from lynceus.serve.models import Card, Cards, Served, parse, spare_name
from lynceus.serve.pipeline import Pipeline
from lynceus.serve.preprocess import collate
from lynceus.serve.spans import Trace
from lynceus.serve.workers import Fleet


class ChainEngine(Engine):
    """Answers by the chain under its name, and by either model alone under the model's."""

    def __init__(self, chain: Chain, config: ServeConfig | None = None, *, metrics: Metrics | None = None):
        super().__init__(config or ServeConfig(), metrics)
        self.chain = chain
        detect, look = chain.steps
        names = [step.name or (parse(step.model)[0] if isinstance(step.model, str) else spare_name(step.model))
                 for step in chain.steps]  # fmt: skip
        if len({*names, chain.name}) < 3:
            raise AdviceError(f"The chain and its steps need names of their own, not {chain.name}, {', '.join(names)}.")
        self.first = Pipeline(detect.config(self.config), {names[0]: detect.model})
        self.second: Pipeline | Fleet
        room = self.config.queue * chain.max_objects
        try:
            if chain.link in ("fused", "memory"):
                self.second = Pipeline(look.config(self.config, queue=room), {names[1]: look.model})
            else:
                second = look.config(self.config, queue=min(room, 4096), broker=chain.link)
                self.second = Fleet(second, {names[1]: look.model})
        except BaseException:
            self.first.close()
            raise
        self.registry = Cards()
        self.registry.learn([{"name": chain.name, "version": "1", "source": " > ".join(names), "link": chain.link}])
        self.registry.learn([m.info() for e in (self.first, self.second) for m in e.registry.all()])
        self.own: Card = self.registry.find(chain.name)
        self._fuse_lock = threading.Lock()

    def _enter(self, job: Job) -> None:
        left = (job.deadline - job.trace.begun) / 1e9
        if job.model is not self.own:
            engine = self.first if job.model.name in self.first.registry.names() else self.second
            alone: dict[str, Any] = {"trace": job.trace, "deadline_s": left}
            self._pass_on(job, engine, lambda outcome: self._finish(job, outcome), job.model.name, **alone)
            return
        self._pass_on(
            job, self.first, lambda outcome: self._detected(job, outcome), None, trace=job.trace, deadline_s=left,
            keep=True,
        )  # fmt: skip

    def _pass_on(self, job: Job, engine: Engine, done: Any, name: str | None, **options: Any) -> None:
        try:
            job.image = None
            inner = engine.start(job.body, done, model=name, **options)
            job.body = b""
            job.key = (engine, inner)
        except Refused as error:
            self._finish(job, error)

    def cancel(self, job: Job) -> None:
        """Gives up the picture, and the crops of it that have not begun."""
        super().cancel(job)
        if isinstance(job.key, tuple):
            engine, inner = job.key
            engine.cancel(inner)

    def _detected(self, job: Job, outcome: Answer | Refused) -> None:
        """In the thread that finished the first model: crops go on, or there are none."""
        if isinstance(outcome, Refused):
            self._finish(job, outcome)
            return
        try:
            picture = outcome.picture
            assert picture is not None
            boxes = outcome.result.get("boxes")
            if boxes is None:
                raise ModelFailed("The first model of the chain gives no boxes.")
            scores = outcome.result.get("scores") or [1.0] * len(boxes)
            kept = [i for i, s in enumerate(scores) if s >= self.chain.min_score]
            kept = sorted(kept, key=lambda i: -scores[i])[: self.chain.max_objects]
            kept.sort()
            classes = outcome.result.get("classes") or [None] * len(boxes)
            objects = [{"box": boxes[i], "score": scores[i], "class": classes[i]} for i in kept]
            crops = [crop(picture, boxes[i]) for i in kept]
        except ModelFailed as error:
            self._finish(job, error)
            return
        except Exception as error:
            self._finish(job, ModelFailed(f"The boxes cannot be read: {type(error).__name__}."))
            return
        job.trace.mark("publish")
        result = {"objects": objects, "count": len(objects), "found": len(boxes)}
        if not crops:
            self._finish(job, Answer(result, job.trace))
        elif self.chain.link == "fused":
            self._fused(job, result, crops)
        else:
            _Gathering(self, job, result, crops)

    def _fused(self, job: Job, result: dict[str, Any], crops: list[Tensor]) -> None:
        """All crops of this picture through the second model here and now."""
        second = self.second
        assert isinstance(second, Pipeline)
        model: Served = second.registry.find()
        trace = job.trace
        try:
            ready = [model.prepare(c) for c in crops]
            trace.mark("preprocess")
            rows: list[Any] = [None] * len(crops)
            for group in _alike(ready, second.config.max_batch):
                batch = model.to_device(collate([ready[i] for i in group]))
                trace.mark("collate")
                with self._fuse_lock:
                    raw = model.run(batch)
                trace.mark("infer")
                self.metrics.batch(model.label, len(group))
                found = model.rows(raw, [(int(crops[i].shape[1]), int(crops[i].shape[2])) for i in group])
                for i, row in zip(group, found):
                    rows[i] = row
                trace.mark("postprocess")
        except Exception as error:
            text = error.text if isinstance(error, Refused) else f"{model.name} raised {type(error).__name__}."
            self._finish(job, ModelFailed(text))
            return
        for entry, row in zip(result["objects"], rows):
            entry.update(_entry(row))
        self._finish(job, Answer(result, trace))

    # settings and state -----------------------------------------------------------------------------
    def change(self, **hot: Any) -> ServeConfig:
        """Changes hot settings of both steps; the number of workers is the second one's."""
        second = {k: v for k, v in hot.items() if k != "queue"}
        if "workers" in second and isinstance(self.second, Pipeline):
            raise AdviceError("This chain has no workers; take link: shared and workers: 1 for its second step.")
        self.second.change(**second) if second else None
        self.first.change(**{k: v for k, v in hot.items() if k != "workers"})
        self.config = replace(self.config, **hot)
        return self.config

    def reload(self, name: str | None = None, version: str | None = None) -> Any:
        """Reads the weights of a step again, by its name."""
        card = self.registry.find(name, version)
        if card is self.own:
            names = [e.registry.find().name for e in (self.first, self.second)]
            raise AdviceError(f"Reload a step of the chain by its name: {' or '.join(names)}.")
        engine = self.first if card.name in self.first.registry.names() else self.second
        made = engine.reload(card.name, card.version)
        self.registry.learn([made.info()])
        return made

    def stats(self) -> dict[str, Any]:
        """Of the chain, and of its steps under "steps"."""
        queues = {"on_the_way": self._count, "limit": self.config.queue}
        for name, engine in (("first", self.first), ("second", self.second)):
            found = engine.stats()["queues"]
            queues |= {f"{name}_{k}": v for k, v in found.items() if k not in ("limit", "on_the_way")}
        own = self.metrics.stats()
        own["batches"] = {**own["batches"], **self.first.metrics.stats()["batches"]}
        own["batches"] |= self.second.metrics.stats()["batches"] if self.chain.link != "fused" else {}
        return {"queues": queues, **own, "settings": self.config.hot}

    @property
    def ready(self) -> bool:
        return super().ready and self.first.ready and self.second.ready

    def _shut(self) -> None:
        self.first.close()
        self.second.close()


class _Gathering:
    """The crops of one picture that are on their way to the second model."""

    def __init__(self, engine: ChainEngine, job: Job, result: dict[str, Any], crops: list[Tensor]):
        self.engine, self.job, self.result = engine, job, result
        self.lock = threading.Lock()
        self.left = len(crops)
        self.traces = [Trace(id=f"{job.trace.id}.{i}", begun=job.trace.ended) for i in range(len(crops))]
        left = (job.deadline - job.trace.ended) / 1e9
        for i, pixels in enumerate(crops):
            if job.cancelled:
                self.done(i, Refused("The client has gone."))
                continue
            try:
                engine.second.start(pixels, self.teller(i), trace=self.traces[i], deadline_s=max(0.0, left))
            except Refused as error:
                self.done(i, error)

    def teller(self, i: int) -> Any:
        return lambda outcome: self.done(i, outcome)

    def done(self, i: int, outcome: Answer | Refused) -> None:
        self.result["objects"][i].update(_entry(outcome.result if isinstance(outcome, Answer) else outcome))
        with self.lock:
            self.left -= 1
            if self.left:
                return
        trace = self.job.trace
        last = max(self.traces, key=lambda t: t.ended)
        trace.spans.extend(last.spans)
        trace.children = self.traces
        refused = [o for o in self.result["objects"] if "error" in o]
        if len(refused) == len(self.traces):
            self.engine._finish(self.job, ModelFailed(f"No object could be looked at: {refused[0]['error']}"))
        else:
            self.engine._finish(self.job, Answer(self.result, trace))


def crop(picture: Tensor, box: Any) -> Tensor:
    """The pixels (3, h, w) inside a box (xyxy), at least one; a copy, so that the picture can go."""
    h, w = int(picture.shape[1]), int(picture.shape[2])
    x0, y0, x1, y1 = (float(v) for v in box)
    left, top = min(w - 1, max(0, int(x0))), min(h - 1, max(0, int(y0)))
    right, bottom = max(left + 1, min(w, round(x1))), max(top + 1, min(h, round(y1)))
    return picture[:, top:bottom, left:right].clone(memory_format=torch.contiguous_format)


def _entry(row: Any) -> dict[str, Any]:
    """What is told of one object."""
    if isinstance(row, Refused):
        return {"error": row.text}
    more = {k: v for k, v in row.items() if k not in ("label", "name", "confidence", "scores")}
    return {**more, **{k: row[k] for k in ("label", "name", "confidence") if k in row}}


def _alike(images: list[Tensor], most: int) -> list[list[int]]:
    """Indices in groups of one shape, of at most so many."""
    groups: dict[Any, list[int]] = {}
    for i, image in enumerate(images):
        groups.setdefault(image.shape, []).append(i)
    return [g[k : k + most] for g in groups.values() for k in range(0, len(g), most)]
