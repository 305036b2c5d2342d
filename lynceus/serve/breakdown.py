"""The paper's first two experiments on a running server: where a lone request's time goes, and what a crowd adds."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from lynceus.core.errors import AdviceError
from lynceus.serve.load import Load, Request, Result, run
from lynceus.serve.spans import PREPROCESSING, QUEUEING, SPANS

# The abstract of the paper and two summaries of it; the full text was not at hand. Shares of end-to-end latency.
PAPER = {
    "small": None,
    "medium": ("at most", 0.56, "data processing and movement of a medium image, abstract"),
    "large": ("about", 0.97, "preprocessing of a large image, summaries"),
}
IMPACT = 0.8  # of a large image on throughput, abstract


@dataclass(frozen=True, kw_only=True)
class Spans:
    """Spans of many answered requests. seconds: name -> per request, in the order of SPANS. total: of each trace.
    client: seconds of the same requests seen by the client. weight: mean bytes of an answer."""

    seconds: dict[str, np.ndarray]
    total: np.ndarray
    client: np.ndarray
    weight: float

    def mean(self, *names: str) -> float:
        """Mean seconds of the spans together."""
        return float(sum(self.seconds[n].mean() for n in names if n in self.seconds))

    def share(self, *names: str) -> float:
        """Of the end-to-end time, by the means."""
        return self.mean(*names) / float(self.total.mean())


def spans_of(result: Result) -> Spans:
    """The traces that a run against /predict?trace=1 kept."""
    traces = []
    for body in result.bodies:
        said = json.loads(body)
        if "trace" not in said:
            raise AdviceError("The answers hold no trace; ask for them with /predict?trace=1.")
        traces.append(said["trace"])
    if not traces:
        raise AdviceError("No request was answered, so there is nothing to break down.")
    seconds: dict[str, np.ndarray] = {}
    for name in SPANS:
        values = np.array([sum(s["ms"] for s in t["spans"] if s["name"] == name) for t in traces]) / 1e3
        if values.any():
            seconds[name] = values
    total = np.array([t["total_ms"] for t in traces]) / 1e3
    return Spans(
        seconds=seconds, total=total, client=result.latency(), weight=sum(map(len, result.bodies)) / len(result.bodies)
    )


def alone(url: str, requests: Sequence[Request], *, seconds: float, header: Mapping[str, str] = {}) -> Spans:
    """One client, one request at a time: zero load. Longer than `seconds` where that holds fewer than three answers."""
    while True:
        load = Load(concurrency=1, duration=seconds, warmup=min(1.0, seconds / 3))
        result = run(f"{url}/predict?trace=1", requests, load, keep=100_000, header=header)
        if len(result.bodies) >= 3 or seconds > 60:
            return spans_of(result)
        seconds *= 3


def crowd(
    url: str, requests: Sequence[Request], clients: int, *, seconds: float, header: Mapping[str, str] = {}
) -> tuple[Result, Spans]:
    """A closed loop of `clients`; the spans of at most 2000 of its requests."""
    load = Load(concurrency=clients, duration=seconds, warmup=min(2.0, seconds / 2))
    result = run(f"{url}/predict?trace=1", requests, load, keep=2000, header=header)
    return result, spans_of(result)


def row_of(kind: str, found: Spans) -> dict[str, float | str]:
    """One row of the breakdown: milliseconds and shares."""
    total = float(found.total.mean())
    row: dict[str, float | str] = {
        "size": kind,
        "requests": float(len(found.total)),
        "end_to_end_ms": 1e3 * total,
        "client_ms": 1e3 * float(found.client.mean()),
        "preprocessing": found.share(*PREPROCESSING),
        "inference": found.share("infer"),
        "not_inference": 1 - found.share("infer"),
        "spans_over_end_to_end": found.mean(*SPANS) / total,
    }
    return row | {f"{name}_ms": 1e3 * found.mean(name) for name in SPANS if name in found.seconds}


def queueing(found: Spans) -> float:
    """Share of waiting: before decoding, for a batch, at a broker, and outside the server's own clock."""
    inside = found.mean(*QUEUEING)
    outside = max(0.0, float(found.client.mean()) - float(found.total.mean()))
    return (inside + outside) / max(float(found.client.mean()), float(found.total.mean()))
