"""`lynceus load URL`: puts a load on a server and says what it bore."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from lynceus.cli._run import call, run_folder, show, stoppable
from lynceus.cli._schema import parse
from lynceus.core.errors import AdviceError


@dataclass(frozen=True, kw_only=True)
class Options:
    """Sends JPEGs to a server: at a rate (open loop: requests fall due whatever the server does), from a number of
    clients (closed loop), or with --knee until the curve bends. Latency counts from when a request was due."""

    url: Positional[str]  # http://HOST:PORT, of `lynceus serve`; another path than /predict may stand behind it
    rate: float | None = None  # requests per second that fall due (open loop)
    concurrency: int | None = None  # clients that wait for their answer before they ask again (closed loop); default 8
    knee: bool = False  # double the clients until they bring no more, then offer rates around that
    seconds: float = 10.0  # measured, per point
    warmup: float = 1.0  # seconds before, not counted
    arrivals: Literal["poisson", "uniform"] = "poisson"  # gaps of the open loop
    images: Path | None = None  # folder of JPEGs; default: generated ones
    mix: str | None = None  # sizes, small=0.2,medium=0.7,large=0.1; default: --images as they are, else medium
    limit: float | None = None  # milliseconds that the 99th percentile may take at a rate called sustained (--knee)
    timeout: float = 30.0  # seconds until an answer is given up
    connections: int = 512  # at most, in the open loop
    processes: int = 1  # that share the load; one sends some thousand requests per second
    key: str | None = None  # API key, sent as X-API-Key
    seed: int = 0  # of arrivals and order
    out: Path | None = None  # folder for report.html and report.json


@stoppable()
def main(argv: Sequence[str]) -> int:
    options = parse(Options, argv, prog="lynceus load")
    if options.rate is not None and options.concurrency is not None:
        raise AdviceError("--rate is an open loop and --concurrency a closed one; give one of them.")
    if options.knee and (options.rate is not None or options.concurrency is not None):
        raise AdviceError("--knee chooses its own clients and rates; leave --rate and --concurrency out.")
    from lynceus.serve import mixes
    from lynceus.serve.knee import Search
    from lynceus.serve.load import Load, run, target

    host, port, path = target(options.url)
    url = f"http://{host}:{port}{'/predict' if path == '/' else path}"
    sources = mixes.photos(options.images, count=64) if options.images else []
    mix = options.mix or ("" if sources else "medium")
    made = mixes.requests(mixes.parse_mix(mix), sources=sources, seed=options.seed) if mix else mixes.given(sources)
    header = {"X-API-Key": options.key} if options.key else {}
    if options.out is not None:
        run_folder(options.out, "load", "server", resume=True)
    if options.knee:
        search = Search(
            seconds=options.seconds,
            limit=options.limit,
            timeout=options.timeout,
            processes=options.processes,
            seed=options.seed,
        )
        report = search(url, made, header=header).report()
        how = f"Search(seconds={options.seconds}, limit={options.limit})({url!r}, requests).report()"
        line = "from lynceus.serve.knee import Search"
    else:
        load = Load(
            rate=options.rate,
            concurrency=8 if options.rate is None and options.concurrency is None else options.concurrency,
            duration=options.seconds,
            warmup=options.warmup,
            arrivals=options.arrivals,
            connections=options.connections,
            timeout=options.timeout,
            seed=options.seed,
            processes=options.processes,
        )
        report = run(url, made, load, header=header).report()
        asked = call("Load", rate=load.rate, concurrency=load.concurrency, duration=load.duration)
        how = f"run({url!r}, requests, {asked}).report()"
        line = "from lynceus.serve.load import Load, run"
    bodies = (
        f"mixes.requests(mixes.parse_mix({mix!r}))"
        if not sources
        else f"mixes.given(mixes.photos({str(options.images)!r}))"
    )
    show(
        report,
        out=options.out,
        twin=f"{line}\nfrom lynceus.serve import mixes\n\nrequests = {bodies}\nprint({how}.table())",
    )
    return 0
