"""Throughput of `lynceus serve` beside a naive server, LitServe and Ray Serve: one model, the same JPEGs, one run.

LYNCEUS_TEST_DATA=data python -m bench.serve --out serve.json            # all, with the chain and the breakdown
python -m bench.serve --only throughput --servers naive ours litserve --sizes medium --seconds 4 --rounds 1

Goals: 2.25 times the naive server on large pictures and 1.5 times on medium ones at 32 clients; 1.5 times LitServe at
the best of the settings below; Ray Serve's at least; with batching off, and one client, within 5 % of the naive server.
Servers run one after the other, every round anew in another order; figures are medians over the rounds. `processor` is
the server's own time per answer (of Ray Serve only a part, its processes leave the session): on a busy machine it says
more than the rate. LitServe and Ray Serve are looked for with --peers FOLDER (`pip install --target FOLDER litserve
"ray[serve]"`), else skipped.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import signal
import socket
import statistics
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench._data import PHOTOS
from lynceus.core.files import write_atomic
from lynceus.serve import mixes
from lynceus.serve.load import Load, Request, run

CORES = len(os.sched_getaffinity(0))
MODEL = "python:bench._serve_servers:MOBILENET"


@dataclass(frozen=True, kw_only=True)
class Server:
    """name: of the setting. group: whose. command: without interpreter and port."""

    name: str
    group: str
    command: tuple[str, ...]


def servers() -> list[Server]:
    """Every server and setting that is tried."""
    n = str(CORES)
    ours = ("lynceus.cli", "serve", f"m={MODEL}", "--quiet", "--queue", "1024")
    quick = (*ours, "--no-exact")
    naive = ("bench._serve_servers", "naive")
    lit = ("bench._serve_litserve", "--fast-queue")
    ray = ("bench._serve_servers", "ray")
    made = [
        Server(name="naive", group="naive", command=naive),
        Server(name="naive, 1 thread", group="naive", command=(*naive, "--threads", "1")),
        Server(name="ours, threads", group="ours", command=(*quick, "--threads", "1")),
        Server(name=f"ours, {n} model threads", group="ours", command=(*quick, "--model-threads", n)),
        Server(
            name=f"ours, {n} model threads, packed",
            group="ours",
            command=(*quick, "--model-threads", n, "--way", "packed", "--max-batch", "8"),
        ),
        Server(name=f"ours, {n} processes", group="ours", command=(*quick, "--workers", n, "--threads", "1")),
        Server(
            name=f"ours, {n} processes, packed",
            group="ours",
            command=(*quick, "--workers", n, "--threads", "1", "--way", "packed", "--max-batch", "8"),
        ),
        Server(name="ours, exact pixels", group="ours exact", command=(*ours, "--threads", "1")),
        Server(
            name="ours, batching off",
            group="ours off",
            command=(*ours, "--max-batch", "1", "--preprocess-workers", "1"),
        ),
        Server(
            name="ours, batching off, 1 thread",
            group="ours off",
            command=(*ours, "--max-batch", "1", "--preprocess-workers", "1", "--threads", "1"),
        ),
    ]
    for decode in ("pil", "turbo"):
        for workers, threads, batch, wait in ((1, 4, 16, 0.005), (4, 1, 1, 0.0), (4, 1, 8, 0.005), (2, 2, 16, 0.01)):
            settings = f"--workers {workers} --threads {threads} --batch {batch} --wait {wait} --decode {decode}"
            name = f"litserve, {decode}, {workers} workers, batch {batch}"
            made.append(Server(name=name, group=f"litserve {decode}", command=(*lit, *settings.split())))
        for batch in (1, 8):
            settings = f"--workers {n} --threads 1 --batch {batch} --decode {decode}"
            made.append(
                Server(
                    name=f"ray serve, {decode}, {n} replicas, batch {batch}",
                    group=f"ray {decode}",
                    command=(*ray, *settings.split()),
                )
            )
    return made


class Running:
    """A server in a process group of its own, until it answers; killed at the end."""

    def __init__(self, server: Server, peers: str | None, body: bytes):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        path = os.pathsep.join(p for p in (os.getcwd(), peers or "", os.environ.get("PYTHONPATH", "")) if p)
        env = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"} | {"PYTHONPATH": path}
        command = [sys.executable, "-W", "ignore", "-m", *server.command, "--port", str(self.port)]
        self.process = subprocess.Popen(
            command, env=env, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )
        self.url = f"http://127.0.0.1:{self.port}/predict"
        try:
            self.answer = self.first(server, body)
        except BaseException:
            self.stop()
            raise

    def first(self, server: Server, body: bytes) -> Any:
        """The answer to a first request, asked until there is one."""
        limit = time.monotonic() + 120
        while True:
            try:
                request = urllib.request.Request(self.url, data=body, headers={"Content-Type": "image/jpeg"})
                return json.load(urllib.request.urlopen(request, timeout=30))
            except (OSError, urllib.error.URLError) as error:
                if self.process.poll() is not None or time.monotonic() > limit:
                    raise RuntimeError(f"{server.name} does not answer ({error})") from None
                time.sleep(0.2)

    def cpu_seconds(self) -> float:
        """Processor time of the server and its processes up to now; nan where they cannot be told apart."""
        ticks = 0
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                with contextlib.suppress(OSError):
                    fields = (entry / "stat").read_text().rpartition(")")[2].split()
                    if int(fields[3]) == self.process.pid:  # its session
                        ticks += int(fields[11]) + int(fields[12])
        return ticks / os.sysconf("SC_CLK_TCK")

    def stop(self) -> None:
        for number, wait in ((signal.SIGTERM, 15), (signal.SIGKILL, 5)):
            try:
                os.killpg(self.process.pid, number)
                self.process.wait(wait)
            except (ProcessLookupError, subprocess.TimeoutExpired):
                continue
        if self.process.stderr is not None:
            self.process.stderr.close()


def pools(sizes: list[str]) -> dict[str, list[Request]]:
    sources = mixes.photos(PHOTOS, count=64) if PHOTOS.is_dir() else []
    return {size: mixes.requests({size: 1.0}, sources=sources, count=64) for size in sizes}


def throughput(args: argparse.Namespace) -> list[dict[str, Any]]:
    """A row per server setting, size and number of clients."""
    chosen = [s for s in servers() if any(s.group.startswith(g) or s.name == g for g in args.servers)]
    requests = pools(args.sizes)
    found: dict[tuple[str, str, int], list[dict[str, float]]] = {}
    absent: set[str] = set()
    for number in range(args.rounds):
        for server in chosen[:: -1 if number % 2 else 1]:
            if server.group.split()[0] in absent:
                continue
            try:
                running = Running(server, args.peers, next(iter(requests.values()))[0].body)
            except RuntimeError as error:
                print(f"skipped: {error}", flush=True)
                absent.add(server.group.split()[0])
                continue
            try:
                for size, pool in requests.items():
                    for clients in args.clients:
                        if clients == 1 and server.group not in ("naive", "ours off"):
                            continue
                        load = Load(concurrency=clients, duration=args.seconds, warmup=min(2.0, args.seconds / 2))
                        before = running.cpu_seconds()
                        result = run(running.url, pool, load)
                        said = result.summary()
                        answered = max(result.count(200), 1) * (1 + load.warmup / load.duration)
                        said["cpu_ms"] = 1e3 * (running.cpu_seconds() - before) / answered
                        found.setdefault((server.name, size, clients), []).append(said)
                        print(
                            f"{server.name:42} {size:7} {clients:4} clients {said['throughput_per_s']:8.1f}/s "
                            f"p50 {said['p50_ms']:8.1f} p99 {said['p99_ms']:8.1f} ms, "
                            f"processor {said['cpu_ms']:6.1f} ms",
                            flush=True,
                        )
            finally:
                running.stop()
    groups = {s.name: s.group for s in chosen}
    return [
        {
            "server": name,
            "group": groups[name],
            "size": size,
            "clients": clients,
            **{k: statistics.median(r[k] for r in rounds) for k in rounds[0]},
        }
        for (name, size, clients), rounds in found.items()
    ]


def ratios(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Ours over each peer, each at its best setting for that size; p99 beside."""
    out: dict[str, float] = {}

    def best(group: str, size: str, clients: int) -> float:
        fitting = [
            r["throughput_per_s"]
            for r in rows
            if (r["group"] == group or r["group"].startswith(group + " "))
            and (r["size"], r["clients"]) == (size, clients)
        ]
        return max(fitting, default=float("nan"))

    for size in dict.fromkeys(r["size"] for r in rows):
        for clients in dict.fromkeys(r["clients"] for r in rows):
            for peer in ("naive", "litserve pil", "litserve turbo", "ray pil", "ray turbo"):
                mine, theirs = max(best("ours", size, clients), 0.0), best(peer, size, clients)
                if clients > 1 and theirs == theirs:
                    out[f"ours over {peer}, {size}, {clients} clients"] = mine / theirs
            off, naive = best("ours off", size, clients), best("naive", size, clients)
            if off == off and naive == naive:
                out[f"batching off over naive, {size}, {clients} clients"] = off / naive
    return out


def compared(args: argparse.Namespace) -> dict[str, Any]:
    """The servers beside each other, and ours over each peer."""
    rows = throughput(args)
    found = ratios(rows)
    for name, value in found.items():
        print(f"{name:56} {value:6.2f}")
    return {"throughput": rows, "ratios": found}


def breakdown(args: argparse.Namespace) -> dict[str, Any]:
    """Where our server's milliseconds go."""
    from lynceus.serve import ServeConfig
    from lynceus.serve.profile import Profile

    sources = mixes.photos(PHOTOS, count=48) if PHOTOS.is_dir() else []
    report = Profile(seconds=args.seconds, server=ServeConfig(models=(f"m={MODEL}",), port=0)).measure(None, sources)
    for part in (report, *report.parts):
        print(f"\n{part.table(width=180)}", flush=True)
    return {
        "breakdown": report.rows,
        "parts": {part.name: {"rows": part.rows, "summary": part.summary} for part in report.parts},
    }


def chain(args: argparse.Namespace) -> dict[str, Any]:
    """Two models, by link and objects per frame."""
    from lynceus.serve.chain_curve import ChainCurve

    report = ChainCurve(seconds=args.seconds)()
    print(f"\n{report.table(width=180)}", flush=True)
    return {"chain": {"rows": report.rows, "summary": report.summary}}


PARTS: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "throughput": compared,
    "breakdown": breakdown,
    "chain": chain,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="*", choices=tuple(PARTS), help="in this order; default: all")
    parser.add_argument("--servers", nargs="*", default=["naive", "ours", "litserve", "ray"])
    parser.add_argument("--sizes", nargs="*", default=["medium", "large"], choices=tuple(mixes.SIZES))
    parser.add_argument("--clients", nargs="*", type=int, default=[1, 32])
    parser.add_argument("--seconds", type=float, default=8.0, help="measured per point")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peers", default=os.environ.get("LYNCEUS_PEERS"), help="folder with litserve and ray[serve]")
    parser.add_argument("--out", help="JSON file for the figures")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # servers are stopped on the way out
    made: dict[str, Any] = {
        "environment": {
            "machine": platform.platform(),
            "cores": CORES,
            "torch": torch.__version__,
            "load": os.getloadavg()[0],
        }
    }
    for part in dict.fromkeys(args.only or PARTS):
        made |= PARTS[part](args)
        if args.out:  # after each part: what is measured is kept, whatever happens to the next
            write_atomic(Path(args.out), json.dumps(made, indent=1).encode())


if __name__ == "__main__":
    main()
