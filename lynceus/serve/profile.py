"""Where a server's milliseconds go: the experiments of a measurement study, on any model and any pipeline.

Paper: Beyond Inference: Performance Analysis of DNN Server Overheads for Computer Vision, DAC 2024, arXiv 2403.12981.
No code is public. One report: lone requests by picture size, throughput against clients, where pictures are brought to
size, tuning step by step, and a queueing estimate beside what was measured.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np

from lynceus.core.errors import AdviceError, unknown
from lynceus.core.progress import Progress, progress
from lynceus.core.report import Report, environment
from lynceus.core.subject import Subject
from lynceus.core.types import Sample
from lynceus.serve import mixes
from lynceus.serve.breakdown import IMPACT, PAPER, Spans, alone, crowd, queueing, row_of
from lynceus.serve.capacity import Capacity, at_once
from lynceus.serve.config import ServeConfig
from lynceus.serve.engine import cores
from lynceus.serve.knee import knee
from lynceus.serve.load import Load, Request, Result, run
from lynceus.serve.spans import PREPROCESSING, SPANS

Part = Literal["alone", "tasks", "clients", "placements", "tuning", "capacity"]
PARTS: tuple[Part, ...] = ("alone", "tasks", "clients", "placements", "tuning", "capacity")
STEPS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("one picture at a time", {"max_batch": 1, "preprocess_workers": 1, "exact": True}),
    ("batches", {"preprocess_workers": 1, "exact": True}),
    ("decoders on all cores", {"exact": True}),
    ("JPEG decoded small, 8 bits", {"exact": False}),
    ("weights packed (way packed)", {"exact": False, "way": "packed"}),
    ("model threads on all cores", {"exact": False, "way": "packed", "model_threads": -1}),
    ("worker processes instead", {"exact": False, "way": "packed", "workers": -1}),
)


@dataclass(frozen=True, kw_only=True)
class Profile:
    """Check: what a request to a server of this model costs, stage by stage.

    sizes: of pictures, small (70 x 60), medium (as they are, else 500 x 375), large (3564 x 2880). parts: which of the
    experiments. clients: concurrencies of the second one. crowd: clients of the others. seconds: per measured point.
    pictures: of each size that differ. rates: shares of the largest throughput at which the estimate is checked.
    """

    needs: ClassVar[frozenset[str]] = frozenset()

    sizes: tuple[Literal["small", "medium", "large"], ...] = ("small", "medium", "large")
    parts: tuple[Part, ...] = PARTS
    clients: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
    crowd: int = 32
    seconds: float = 5.0
    pictures: int = 32
    rates: tuple[float, ...] = (0.3, 0.5, 0.7, 0.85)
    server: ServeConfig = field(default_factory=lambda: ServeConfig(port=0), repr=False)

    def __call__(self, subject: Subject, data: Iterable[Sample], *, seed: int = 0) -> Report:
        """Serves the subject's model on loopback and loads it with JPEGs made of the data's first images."""
        return self.measure({"model": subject}, jpegs(data, self.pictures), seed=seed)

    def measure(self, models: Any, sources: Sequence[bytes] = (), *, seed: int = 0) -> Report:
        """The same of whatever `serve` takes. sources: image files that requests are made of; none: generated ones."""
        for part in self.parts:
            if part not in PARTS:
                raise unknown("part of a profile", part, PARTS)
        if not self.sizes or self.seconds <= 0 or self.crowd < 1 or min(self.clients, default=0) < 1:
            raise AdviceError("A profile needs at least one size, seconds above 0, and clients of at least 1.")
        base = replace(self.server, port=0, queue=max(self.server.queue, 2 * max(self.crowd, *self.clients)))
        pools: dict[str, list[Request]] = {
            kind: mixes.requests({kind: 1.0}, sources=sources, count=self.pictures, seed=seed) for kind in self.sizes
        }
        made = _Run(self, models, base, pools)
        report = Report(name="Profile of the server", environment=environment(seed=seed))
        with progress("profiling", total=len(self.parts), unit="parts") as bar:
            for part in self.parts:
                getattr(made, part)(report, bar)
                bar.advance()
        real = "made of the images given" if sources else "generated"
        report.notes.append(
            f"Pictures are {real}; the generator shares the machine with the server ({cores()} cores, loopback)."
        )
        return report


class _Run:
    """One profile: its parts share what they measure."""

    def __init__(self, asked: Profile, models: Any, base: ServeConfig, pools: dict[str, list[Request]]):
        self.asked, self.models, self.base, self.pools = asked, models, base, pools
        self.header = {"X-API-Key": base.api_key} if base.api_key else {}
        self.middle = "medium" if "medium" in pools else next(iter(pools))
        self.lone: dict[str, Spans] = {}

    @contextmanager
    def serving(self, **changes: Any) -> Iterator[Any]:
        from lynceus.serve.server import serve

        with serve(self.models, config=replace(self.base, **changes)) as server:
            yield server

    def throughput(self, url: str, requests: Sequence[Request]) -> Result:
        load = Load(concurrency=self.asked.crowd, duration=self.asked.seconds, warmup=min(2.0, self.asked.seconds / 2))
        return run(f"{url}/predict", requests, load, header=self.header)

    # 1 ----------------------------------------------------------------------------------------------
    def alone(self, report: Report, bar: Progress) -> None:
        from lynceus.core.plots import bars

        with self.serving() as server:
            for kind, requests in self.pools.items():
                self.lone[kind] = alone(server.url, requests, seconds=self.asked.seconds, header=self.header)
        report.rows = [row_of(kind, found) for kind, found in self.lone.items()]
        for kind, found in self.lone.items():
            report.summary[f"preprocessing share, {kind}"] = found.share(*PREPROCESSING)
            report.summary[f"not inference, {kind}"] = 1 - found.share("infer")
        names = [f"{kind}, {1e3 * found.total.mean():.1f} ms" for kind, found in self.lone.items()]
        used = [n for n in SPANS if any(n in found.seconds for found in self.lone.values())]
        stacks = {n: [100 * found.share(n) for found in self.lone.values()] for n in used}
        report.figures["timeline_of_a_lone_request.plotly"] = bars(
            names, stacks, title="percent of end-to-end time", stacked=True
        )
        report.parts.append(self.beside_the_paper())
        said = ", ".join(f"{100 * (1 - f.share('infer')):.0f} % ({kind})" for kind, f in self.lone.items())
        report.answer = f"Of a lone request's time, what is not the network: {said}."

    def beside_the_paper(self) -> Report:
        rows = []
        for kind, found in self.lone.items():
            paper = PAPER.get(kind)
            rows.append(
                {
                    "share of end-to-end": f"preprocessing, {kind}",
                    "here": found.share(*PREPROCESSING),
                    "paper": f"{paper[0]} {paper[1]:.2f}" if paper else "not known",
                    "of the paper": paper[2] if paper else "",
                }
            )
        return Report(
            name="Beside the paper",
            rows=rows,
            notes=[
                "The paper measured an RTX 4090 under Triton with TensorRT; here it is a CPU. A GPU makes the network "
                "shorter, so the other stages take a larger share there; on a CPU the share of a medium picture is "
                "lower, and a large one is dominated by its decoding on both.",
                "Data movement between host and device, part of the paper's figures, does not exist on a CPU.",
                "The paper's figures are those of its abstract and of published summaries; its full text was not read.",
            ],
        )

    def tasks(self, report: Report, bar: Progress) -> None:
        from lynceus.serve.four_tasks import SIDES, TASKS, network
        from lynceus.serve.server import serve

        rows: list[dict[str, Any]] = []
        for task in TASKS:
            config = replace(self.base, size=SIDES[task], models=())
            with serve({task: network(task)}, config=config) as server:
                for kind, requests in self.pools.items():
                    found = alone(server.url, requests, seconds=self.asked.seconds, header=self.header)
                    rows.append(
                        {
                            "task": task,
                            "size": kind,
                            "end_to_end_ms": 1e3 * float(found.total.mean()),
                            "preprocessing": found.share(*PREPROCESSING),
                            "inference": found.share("infer"),
                            "answer": found.share("postprocess", "serialise"),
                            "answer_kb": found.weight / 1e3,
                        }
                    )
            bar.advance(0, task=task)
        note = (
            "Networks of the four tasks are stand-ins with drawn weights (lynceus.serve.four_tasks), not your model's."
        )
        report.parts.append(Report(name="A lone request by task", rows=rows, notes=[note]))

    # 2 ----------------------------------------------------------------------------------------------
    def clients(self, report: Report, bar: Progress) -> None:
        from lynceus.core.plots import lines

        rows: list[dict[str, Any]] = []
        with self.serving() as server:
            for count in sorted(self.asked.clients):
                result, found = crowd(
                    server.url, self.pools[self.middle], count, seconds=self.asked.seconds, header=self.header
                )
                p50, p95, p99 = (1e3 * v for v in result.percentile(50, 95, 99))
                rows.append(
                    {
                        "clients": float(count),
                        "throughput_per_s": result.throughput,
                        "p50_ms": p50,
                        "p95_ms": p95,
                        "p99_ms": p99,
                        "queueing": queueing(found),
                        "inference": found.share("infer"),
                        "rejected": float(result.count(503)),
                    }
                )
                bar.advance(0, clients=count)
        counts = [float(r["clients"]) for r in rows]
        at = knee(counts, [float(r["throughput_per_s"]) for r in rows])
        part = Report(
            name=f"Throughput against clients, {self.middle} pictures",
            rows=rows,
            summary={
                "knee_clients": counts[at],
                "top_throughput_per_s": max(float(r["throughput_per_s"]) for r in rows),
            },
            answer=f"The curve bends at {counts[at]:.0f} clients; more of them wait: "
            f"{100 * float(rows[-1]['queueing']):.0f} % of the time of a request at {counts[-1]:.0f}.",
        )
        part.figures["throughput.plotly"] = lines(
            {"answers per second": (counts, [float(r["throughput_per_s"]) for r in rows])},
            x_title="clients",
            y_title="answers per second",
            log_x=True,
        )
        part.figures["latency.plotly"] = lines(
            {p: (counts, [float(r[f"{p}_ms"]) for r in rows]) for p in ("p50", "p95", "p99")},
            x_title="clients",
            y_title="ms",
            log_x=True,
            log_y=True,
        )
        report.parts.append(part)

    # 3 ----------------------------------------------------------------------------------------------
    def placements(self, report: Report, bar: Progress) -> None:
        rows: list[dict[str, Any]] = []
        tops: dict[str, float] = {}
        for place in ("client", "image", "batch", "device"):
            with self.serving(placement=place) as server:
                size = server.engine.registry.all()[0].size if hasattr(server.engine, "registry") else None
                for kind, requests in self.pools.items():
                    if place == "client":
                        if size is None or tops:
                            continue  # one row: the client's tensors are the same whatever the picture was
                        requests, kind = tensors(requests, size), "ready"
                    result = self.throughput(server.url, requests)
                    tops.setdefault(kind, result.throughput)
                    ready = tops.get("ready", 0.0)
                    rows.append(
                        {
                            "preprocessing": {"client": "by the client", "image": "picture by picture"}.get(
                                place, f"by the {place}" if place == "device" else "batch by batch"
                            ),
                            "size": kind,
                            "throughput_per_s": result.throughput,
                            "p99_ms": 1e3 * result.percentile(99)[0],
                            "impact": 1 - result.throughput / ready if ready else float("nan"),
                        }
                    )
        part = Report(name=f"Where pictures are brought to size, {self.asked.crowd} clients", rows=rows)
        part.notes.append(
            "impact: what is lost of the throughput that ready tensors have. Of a large picture the paper tells about "
            f"{IMPACT:g}. On a CPU, `device` is the same processor, so it can only show the cost of batching pixels."
        )
        report.parts.append(part)

    # 4 ----------------------------------------------------------------------------------------------
    def tuning(self, report: Report, bar: Progress) -> None:
        kinds = [k for k in self.pools if k != "small"] or [self.middle]
        rows: list[dict[str, Any]] = []
        first: dict[str, float] = {}
        for name, changes in STEPS:
            wanted = {k: cores() if v == -1 else v for k, v in changes.items()}
            row: dict[str, Any] = {"step": name}
            try:
                with self.serving(**wanted) as server:
                    for kind in kinds:
                        result = self.throughput(server.url, self.pools[kind])
                        first.setdefault(kind, result.throughput)
                        row[f"throughput_per_s, {kind}"] = result.throughput
                        row[f"p99_ms, {kind}"] = 1e3 * result.percentile(99)[0]
                        row[f"times, {kind}"] = result.throughput / max(first[kind], 1e-9)
            except AdviceError as error:
                report.notes.append(f"The step {name!r} was left out: {error}")
                continue
            rows.append(row)
        part = Report(name=f"Tuning step by step, {self.asked.crowd} clients", rows=rows)
        part.notes.append("Each step keeps those before it. `times`: of the first step.")
        report.parts.append(part)

    # 5 ----------------------------------------------------------------------------------------------
    def capacity(self, report: Report, bar: Progress) -> None:
        requests = self.pools[self.middle]
        rows: list[dict[str, Any]] = []
        with self.serving() as server:
            found = self.lone.get(self.middle) or alone(
                server.url, requests, seconds=self.asked.seconds, header=self.header
            )
            tops = [self.throughput(server.url, requests).throughput]
            if tops[0] <= 0:
                raise AdviceError("The server answered nothing under load, so its capacity cannot be estimated.")
            measured: list[tuple[float, float, float]] = []
            for share in self.asked.rates:
                rate = share * tops[0]
                load = Load(rate=rate, duration=2 * self.asked.seconds, warmup=min(2.0, self.asked.seconds / 2))
                result = run(f"{server.url}/predict", requests, load, header=self.header)
                measured.append((rate, float(result.latency().mean()), result.percentile(99)[0]))
            tops.append(self.throughput(server.url, requests).throughput)
        top = sum(tops) / 2  # before and after: what else the machine does changes meanwhile
        work = found.total - sum(found.seconds.get(n, 0.0) for n in ("wait_preprocess", "wait_batch"))
        lone = float(found.client.mean())
        estimate = Capacity(
            top=top,
            alone=lone,
            places=at_once(top, lone, cores()),
            spread=float(np.std(work) / max(float(np.mean(work)), 1e-9)),
        )
        for rate, mean, p99 in measured:
            rows.append(
                {
                    "offered_per_s": rate,
                    "of the top": rate / top,
                    "mean_ms": 1e3 * mean,
                    "estimated mean_ms": 1e3 * estimate.latency(rate),
                    "p99_ms": 1e3 * p99,
                    "estimated p99_ms": 1e3 * estimate.percentile(rate, 99),
                    "mean, estimate over measured": estimate.latency(rate) / mean,
                }
            )
        limit = max(5 * estimate.alone, 0.1)
        part = Report(
            name=f"Capacity: a queueing estimate beside what was measured, {self.middle} pictures",
            rows=rows,
            summary={
                "top_per_s": top,
                "top_per_s, after over before": tops[1] / tops[0],
                "places": float(estimate.places),
                "alone_ms": 1e3 * estimate.alone,
                f"per machine with p99 under {1e3 * limit:.0f} ms": estimate.rate_for(limit),
            },
            notes=[
                f"M/G/{estimate.places} from two numbers, the top throughput and the time of a lone request, whose "
                "product is how many requests are worked on at once; see lynceus.serve.capacity. Latency counts from "
                "when a request was due (Poisson arrivals)."
            ],
        )
        report.parts.append(part)


def tensors(requests: Sequence[Request], size: tuple[int, int]) -> list[Request]:
    """The pictures as a client would send them ready for the model: uint8 tensors at its size."""
    from lynceus.serve.decode import decode, npy
    from lynceus.serve.preprocess import prepare

    made = []
    for r in requests:
        image = prepare(decode(r.body, strict=False), size, "crop", exact=False)
        made.append(Request(body=npy(image), kind=r.kind, content_type="application/x-npy"))
    return made


def jpegs(data: Iterable[Sample], count: int) -> list[bytes]:
    """The first images of a data set as files: as they lie on disk where they are JPEGs, else encoded."""
    from lynceus.core.plots import to_picture

    out: list[bytes] = []
    for sample in data:
        if len(out) >= count:
            break
        if sample.path and Path(sample.path).suffix.lower() in (".jpg", ".jpeg") and Path(sample.path).is_file():
            out.append(Path(sample.path).read_bytes())
        else:
            file = io.BytesIO()
            to_picture(sample.image).save(file, "JPEG", quality=95)
            out.append(file.getvalue())
    return out
