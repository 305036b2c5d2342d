"""Where a server's curve bends: throughput against concurrency, latency against rate, measured until it saturates.

The bend is the point farthest from the chord of the normalised curve (Satopää et al., "Finding a 'Kneedle' in a
Haystack", ICDCSW 2011, without its smoothing: throughput is made monotone instead).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from lynceus.core.errors import AdviceError
from lynceus.core.progress import progress
from lynceus.core.report import Report
from lynceus.serve.load import OK, Load, Request, Result, run


def knee(x: Sequence[float], y: Sequence[float]) -> int:
    """Index of the bend of a curve that rises and flattens (throughput against clients). x ascending.

    Of points that bend alike within 5 %, the first. A straight or falling curve bends at its end or its start."""
    if len(x) != len(y) or len(x) < 1:
        raise AdviceError(f"A curve needs as many x as y, and at least one: here {len(x)} and {len(y)}.")
    xs, ys = np.asarray(x, dtype=float), np.maximum.accumulate(np.asarray(y, dtype=float))
    if np.any(np.diff(xs) <= 0):
        raise AdviceError("The x of a curve must ascend.")
    if len(xs) < 3 or ys[-1] <= ys[0]:
        return 0 if ys[-1] <= ys[0] else len(xs) - 1
    rise = (ys - ys[0]) / (ys[-1] - ys[0]) - (xs - xs[0]) / (xs[-1] - xs[0])
    if rise.max() < 0.05:
        return len(xs) - 1
    return int(np.argmax(rise >= rise.max() - 0.05))


@dataclass(frozen=True, kw_only=True)
class Search:
    """Finds the knee of a server: clients are doubled until they bring no more, then rates around that are offered.

    most: clients at most. rates: shares of the largest throughput that are offered in open loops. seconds: per point.
    gain: doubling the clients must bring this much more throughput, else the curve is flat (two in a row end it).
    served: share of what falls due that must be answered, and not pile up, for a rate to be sustained. limit:
    milliseconds that the 99th percentile may take at a sustained rate; None: no limit. timeout: seconds until an answer
    is given up. processes: of the generator. seed: of arrivals.
    """

    most: int = 512
    rates: tuple[float, ...] = (0.3, 0.5, 0.7, 0.8, 0.9, 1.0, 1.2)
    seconds: float = 5.0
    gain: float = 0.05
    served: float = 0.97
    limit: float | None = None
    timeout: float = 30.0
    processes: int = 1
    seed: int = 0

    def __call__(self, url: str, requests: Sequence[Request], *, header: Mapping[str, str] = {}) -> Knee:
        base = Load(
            concurrency=1,
            duration=self.seconds,
            warmup=min(1.0, 0.3 * self.seconds),
            timeout=self.timeout,
            seed=self.seed,
        )
        closed: list[Result] = []
        opened: list[Result] = []
        with progress("finding the knee", unit="points") as bar:
            clients, flat = 1, 0
            while clients <= self.most and flat < 2:
                load = replace(base, concurrency=clients, processes=min(self.processes, clients))
                closed.append(run(url, requests, load, header=header))
                before = max((r.throughput for r in closed[:-1]), default=0.0)
                flat = flat + 1 if closed[-1].throughput < (1 + self.gain) * before else 0
                clients *= 2
                bar.advance()
            top = max(r.throughput for r in closed)
            for share in self.rates if top > 0 else ():
                load = replace(base, concurrency=None, rate=share * top, processes=self.processes)
                opened.append(run(url, requests, load, header=header))
                bar.advance()
        return Knee(search=self, closed=closed, opened=opened)


@dataclass(frozen=True, kw_only=True)
class Knee:
    """Measured points. clients: of the bend. sustained: the highest rate per second that was answered in time."""

    search: Search
    closed: list[Result] = field(repr=False)
    opened: list[Result] = field(repr=False)

    @property
    def clients(self) -> int:
        at = knee([float(r.load.concurrency or 0) for r in self.closed], [r.throughput for r in self.closed])
        return int(self.closed[at].load.concurrency or 0)

    @property
    def top(self) -> float:
        """The largest throughput of any closed loop."""
        return max(r.throughput for r in self.closed)

    def holds(self, result: Result) -> bool:
        """Is this rate sustained: nearly all that fell due answered, no more waiting at the end than the clients at the
        knee, the tail inside the limit?"""
        lost = (1 - self.search.served) * len(result)
        in_time = self.search.limit is None or 1e3 * result.percentile(99)[0] <= self.search.limit
        return result.count(OK) >= len(result) - lost and result.backlog <= lost + self.clients and in_time

    @property
    def sustained(self) -> float:
        """Requests per second; 0 when none of the rates held."""
        return max((float(r.load.rate or 0) for r in self.opened if self.holds(r)), default=0.0)

    def report(self, name: str = "Knee of the server") -> Report:
        from lynceus.core.plots import lines

        rows: list[dict[str, Any]] = []
        for r in self.closed:
            rows.append({"loop": "closed", "clients": float(r.load.concurrency or 0), **r.summary()})
        for r in self.opened:
            said = r.summary()
            said.pop("offered_per_s")
            rows.append({"loop": "open", "offered_per_s": len(r) / r.load.duration, **said, "held": str(self.holds(r))})
        figures = {"throughput_by_clients.plotly": self._curve()}
        if self.opened:
            rate = [float(r.load.rate or 0) for r in self.opened]
            tails = {f"p{p}": (rate, [1e3 * r.percentile(p)[0] for r in self.opened]) for p in (50, 95, 99)}
            figures["latency_by_rate.plotly"] = lines(tails, x_title="offered per second", y_title="ms", log_y=True)
        lag = max((r.lag for r in self.opened if self.holds(r)), default=0.0)
        notes = [
            "Latency counts from when a request was due, so waiting that a closed loop hides is in the open loops."
        ]
        if lag > 0.002:
            notes.append(f"The generator sent {1e3 * lag:.1f} ms late on average: give it more processes or a core.")
        return Report(
            name=name,
            answer=(
                f"The curve bends at {self.clients} clients; {self.sustained:.0f} requests per second are sustained "
                f"of at most {self.top:.0f}."
            ),
            rows=rows,
            summary={
                "knee_clients": float(self.clients),
                "top_throughput_per_s": self.top,
                "sustained_per_s": self.sustained,
            },
            figures=figures,
            notes=notes,
        )

    def _curve(self) -> bytes:
        from lynceus.core.plots import lines

        clients = [float(r.load.concurrency or 0) for r in self.closed]
        return lines(
            {"throughput": (clients, [r.throughput for r in self.closed])},
            x_title="clients",
            y_title="answers per second",
            log_x=True,
            markers=True,
        )
