"""What is counted: requests, refusals by kind, batch sizes, and a histogram of seconds per span.

Kept in plain arrays and rendered as Prometheus text when asked, so that counting costs a request a few microseconds.
"""

from __future__ import annotations

import bisect
import threading
import time
from collections import deque
from typing import Any

from lynceus.serve.spans import SPANS, Trace

BOUNDS = tuple(
    b * 10.0**e for e in (-5, -4, -3, -2, -1, 0, 1) for b in (1.0, 2.5, 5.0)
)  # seconds: 10 microseconds to 50 seconds
SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
WINDOW = 10  # seconds of the throughput that is told
RECENT = 2048  # latencies kept for the percentiles


class Histogram:
    """Counts per bucket, sum and number."""

    def __init__(self, bounds: tuple[float, ...]):
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def add(self, value: float, count: int = 1) -> None:
        self.counts[bisect.bisect_left(self.bounds, value)] += count
        self.sum += value * count

    def lines(self, name: str, labels: str) -> list[str]:
        """In Prometheus' text form."""
        comma = "," if labels else ""
        total, out = 0, []
        for bound, count in zip((*self.bounds, None), self.counts):
            total += count
            le = "+Inf" if bound is None else f"{bound:g}"
            out.append(f'{name}_bucket{{{labels}{comma}le="{le}"}} {total}')
        inside = f"{{{labels}}}" if labels else ""
        return [*out, f"{name}_sum{inside} {self.sum:.9g}", f"{name}_count{inside} {total}"]


class Metrics:
    """Of one pipeline or server; safe from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.begun = time.time()
        self.spans = {name: Histogram(BOUNDS) for name in SPANS}
        self.latency: dict[str, Histogram] = {}
        self.batches: dict[str, Histogram] = {}
        self.answers: dict[str, int] = {}
        self.refusals: dict[str, int] = {}
        self.statuses: dict[int, int] = {}
        self.restarts = self.redelivered = self.duplicates = 0
        self._recent: deque[tuple[float, float]] = deque(maxlen=RECENT)
        self._seconds: deque[list[float]] = deque(maxlen=WINDOW + 1)  # [second, answers in it]

    def answer(self, model: str, trace: Trace) -> None:
        """One request answered."""
        self.answer_all(model, [trace])

    def answer_all(self, model: str, traces: list[Trace]) -> None:
        now = time.monotonic()
        with self._lock:
            for trace in traces:
                for name, start, end in trace.spans:
                    self.spans[name].add((end - start) / 1e9)
                total = trace.total
                if model not in self.latency:
                    self.latency[model] = Histogram(BOUNDS)
                self.latency[model].add(total)
                self._recent.append((now, total))
            self.answers[model] = self.answers.get(model, 0) + len(traces)
            second = int(now)
            if not self._seconds or self._seconds[-1][0] != second:
                self._seconds.append([second, 0])
            self._seconds[-1][1] += len(traces)

    def span(self, name: str, seconds: float) -> None:
        """A span that ended after its request was counted."""
        with self._lock:
            self.spans[name].add(seconds)

    def batch(self, model: str, size: int, count: int = 1) -> None:
        """So many batches of one size."""
        with self._lock:
            if model not in self.batches:
                self.batches[model] = Histogram(SIZES)
            self.batches[model].add(size, count)

    def refuse(self, kind: str) -> None:
        with self._lock:
            self.refusals[kind] = self.refusals.get(kind, 0) + 1

    def status(self, code: int) -> None:
        """One HTTP answer."""
        self.statuses[code] = self.statuses.get(code, 0) + 1

    def throughput(self) -> float:
        """Answers per second over the last whole seconds, at most WINDOW of them."""
        now = time.monotonic()
        with self._lock:
            inside = [n for s, n in self._seconds if int(now) - WINDOW <= s < int(now)]
            first = next((s for s, _ in self._seconds if s >= int(now) - WINDOW), None)
            current = sum(n for s, n in self._seconds if s == int(now))
        if first is None:
            return 0.0
        if not inside:
            return current / max(now - int(now), 0.05)
        return sum(inside) / max(1, int(now) - first)

    def stats(self) -> dict[str, Any]:
        """Plain values for the page and for GET /stats."""
        rate, now = self.throughput(), time.monotonic()
        with self._lock:
            recent = sorted(t for at, t in self._recent if now - at <= 60)
            sizes = {
                m: {"mean": h.sum / max(1, sum(h.counts)), "count": sum(h.counts)} for m, h in self.batches.items()
            }
            spans = {n: h.sum / sum(h.counts) * 1e3 for n, h in self.spans.items() if sum(h.counts)}
            return {
                "uptime_s": time.time() - self.begun,
                "answered": sum(self.answers.values()),
                "answers": dict(self.answers),
                "refused": dict(self.refusals),
                "statuses": {str(k): v for k, v in self.statuses.items()},
                "throughput": rate,
                "batches": sizes,
                "mean_span_ms": spans,
                "latency_ms": {
                    f"p{p}": recent[min(len(recent) - 1, int(len(recent) * p / 100))] * 1e3 for p in (50, 95, 99)
                }
                if recent
                else {},
                "workers_restarted": self.restarts,
                "redelivered": self.redelivered,
                "duplicates": self.duplicates,
            }

    def text(self, gauges: dict[str, float]) -> str:
        """Prometheus' text format, version 0.0.4."""
        out: list[str] = []

        def head(name: str, kind: str, text: str) -> None:
            out.extend((f"# HELP {name} {text}", f"# TYPE {name} {kind}"))

        with self._lock:
            head("lynceus_span_seconds", "histogram", "Time of one request in one stage.")
            for name, histogram in self.spans.items():
                out += histogram.lines("lynceus_span_seconds", f'span="{name}"')
            head("lynceus_request_seconds", "histogram", "Time of one answered request from its first byte.")
            for model, histogram in self.latency.items():
                out += histogram.lines("lynceus_request_seconds", f'model="{model}"')
            head("lynceus_batch_size", "histogram", "Images at once in the model.")
            for model, histogram in self.batches.items():
                out += histogram.lines("lynceus_batch_size", f'model="{model}"')
            head("lynceus_answers_total", "counter", "Pictures answered.")
            out += [f'lynceus_answers_total{{model="{m}"}} {n}' for m, n in self.answers.items()]
            head("lynceus_refused_total", "counter", "Pictures refused, by kind.")
            out += [f'lynceus_refused_total{{kind="{k}"}} {n}' for k, n in self.refusals.items()]
            head("lynceus_http_total", "counter", "HTTP answers by status.")
            out += [f'lynceus_http_total{{status="{k}"}} {n}' for k, n in self.statuses.items()]
            counters = {
                "worker_restarts": (self.restarts, "Worker processes started again after a crash."),
                "redelivered": (self.redelivered, "Jobs given to another worker after theirs was lost."),
                "duplicates": (self.duplicates, "Second answers to a job, thrown away."),
            }
        for name, (value, text) in counters.items():
            head(f"lynceus_{name}_total", "counter", text)
            out.append(f"lynceus_{name}_total {value}")
        texts = {
            "queue_length": "Requests waiting before a stage.",
            "process": "Of the server's own process.",
        }
        seen: set[str] = set()
        for name, now in gauges.items():
            base = name.partition("{")[0]
            if base not in seen:
                seen.add(base)
                head(base, "gauge", texts.get(base.removeprefix("lynceus_"), "Now."))
            out.append(f"{name} {now:g}")
        return "\n".join(out) + "\n"
