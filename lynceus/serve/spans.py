"""Where the time of one request goes: spans that follow each other without gaps, on the monotonic clock.

A span begins where the one before ended, so that they sum to the end-to-end time whatever the threads and processes
they were taken in: on one machine the monotonic clock is the same for all processes.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

SPANS = (
    "receive",
    "wait_preprocess",
    "decode",
    "preprocess",
    "wait_batch",
    "collate",
    "infer",
    "postprocess",
    "publish",
    "broker_wait",
    "consume",
    "serialise",
)
PREPROCESSING = ("decode", "preprocess")
QUEUEING = ("wait_preprocess", "wait_batch", "broker_wait")


@dataclass(slots=True)
class Trace:
    """The spans of one request, in order: (name of SPANS, start, end) in nanoseconds of time.monotonic_ns().

    A name may come more than once (a link to another process has publish, broker_wait and consume on both ways). The
    spans of a request in a chain go on through the crop that was answered last; `children` are the traces of all crops.
    """

    id: str = ""
    spans: list[tuple[str, int, int]] = field(default_factory=list)
    begun: int = field(default_factory=time.monotonic_ns)
    children: list[Trace] = field(default_factory=list)

    @property
    def ended(self) -> int:
        """When the last span ended; where there is none, the beginning."""
        return self.spans[-1][2] if self.spans else self.begun

    @property
    def total(self) -> float:
        """Seconds from the beginning to the end of the last span."""
        return (self.ended - self.begun) / 1e9

    def mark(self, name: str, at: int | None = None) -> int:
        """Ends the span `name`, begun where the last one ended, at `at` or now. Returns the end."""
        spans = self.spans
        at = time.monotonic_ns() if at is None else at
        spans.append((name, spans[-1][2] if spans else self.begun, at))
        return at

    def seconds(self) -> dict[str, float]:
        """Seconds per name, in the order of SPANS; names that did not occur are left out."""
        found: dict[str, int] = {}
        for name, start, end in self.spans:
            found[name] = found.get(name, 0) + end - start
        return {name: found[name] / 1e9 for name in SPANS if name in found}

    def to_dict(self) -> dict[str, Any]:
        """Plain values; nanoseconds are counted from `begun`, so that they are small."""
        made: dict[str, Any] = {
            "id": self.id,
            "total_ms": self.total * 1e3,
            "spans": [{"name": n, "start_ms": (a - self.begun) / 1e6, "ms": (b - a) / 1e6} for n, a, b in self.spans],
        }
        if self.children:
            made["children"] = [child.to_dict() for child in self.children]
        return made

    def chrome(self) -> dict[str, Any]:
        """Chrome's trace format: load it in chrome://tracing or ui.perfetto.dev. Crops get rows of their own."""
        events: list[dict[str, Any]] = []
        for row, trace in enumerate([self, *self.children]):
            name = "request" if trace is self else f"object {row}"
            events.append({"ph": "M", "name": "thread_name", "pid": 1, "tid": row, "args": {"name": name}})
            events += [
                {
                    "ph": "X",
                    "name": name,
                    "cat": "serve",
                    "pid": 1,
                    "tid": row,
                    "ts": start / 1e3,
                    "dur": (end - start) / 1e3,
                    "args": {"id": trace.id},
                }
                for name, start, end in trace.spans
            ]
        return {"traceEvents": events, "displayTimeUnit": "ms"}

    def plain(self) -> list[Any]:
        """What crosses a link between processes."""
        return [self.id, self.begun, [list(s) for s in self.spans], [c.plain() for c in self.children]]

    @classmethod
    def read(cls, values: list[Any]) -> Trace:
        """The reverse of `plain`. Raises ValueError for anything else."""
        identity, begun, spans, children = values
        made = [(str(n), int(a), int(b)) for n, a, b in spans]
        return cls(id=str(identity), begun=int(begun), spans=made, children=[cls.read(c) for c in children])
