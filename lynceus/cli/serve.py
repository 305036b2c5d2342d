"""`lynceus serve MODEL...`: a vision server that shows where the milliseconds go."""

from __future__ import annotations

import dataclasses
import os
import signal
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

from lynceus.cli._schema import merged, parse, with_options
from lynceus.core.errors import AdviceError


@dataclass(frozen=True, kw_only=True)
class Options:
    """Answers POST /predict with what a model says of a picture, and where the time went; the page is at /.

    Stops on SIGTERM or Ctrl-C, after what is on the way was answered."""

    models: Positional[tuple[str, ...]] = ()  # run folders, names, python:MODULE:NAME; ALIAS=... or ALIAS@VERSION=...
    pipeline: Path | None = None  # a YAML file of a chain: steps (two models), link, max_objects
    quiet: bool = False  # say nothing but errors


def main(argv: Sequence[str]) -> int:
    options = parse(with_options(Options, config="lynceus.serve.config:ServeConfig"), argv, prog="lynceus serve")
    if not options.models and options.pipeline is None:
        raise AdviceError("Name a model to serve, such as `lynceus serve runs/train/resnet_nano`, or --pipeline FILE.")
    if options.models and options.pipeline is not None:
        raise AdviceError("Serve models, or the chain of --pipeline; start a second server for the other.")
    sys.path.insert(0, str(Path.cwd()))  # where python:MODULE:NAME is looked for first
    from lynceus.serve.config import read_chain
    from lynceus.serve.memory import keep_freed
    from lynceus.serve.server import serve

    keep_freed()

    config = merged(options, "config")
    if config.api_key is None and os.environ.get("LYNCEUS_API_KEY"):  # which no list of processes shows
        config = dataclasses.replace(config, api_key=os.environ["LYNCEUS_API_KEY"])
    if config.host not in ("127.0.0.1", "::1", "localhost") and config.api_key is None:
        print(
            f"lynceus serve: {config.host} is open to all who reach it; set LYNCEUS_API_KEY to ask for a key.",
            file=sys.stderr,
        )
    chain = None if options.pipeline is None else read_chain(options.pipeline)
    stop = threading.Event()
    serving = False

    def told(*_: object) -> None:
        stop.set()
        if not serving:  # there is nothing to answer yet
            raise KeyboardInterrupt("stopped before it served.")

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, told)
    server = serve(chain, config=config)
    serving = True
    try:
        if not options.quiet:
            names = ", ".join(server.labels)
            print(f"lynceus serves {names} at {server.url} (/docs says how to ask; Ctrl-C stops)", flush=True)
        while not stop.wait(0.5):
            if not server.alive:
                raise AdviceError(f"The server ended: {getattr(server, '_error', None) or 'see its log'}.")
    finally:
        clean = server.stop()
    if not clean:
        print("Some requests were not answered in time.", file=sys.stderr)
    return 0 if clean else 1
