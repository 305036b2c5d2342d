"""One device: a process that holds its sub-models and answers images with features, on one core with one thread.

python -m lynceus.serve.edge FOLDER DEVICE [--core N] [--host H] [--port P] [--rate R] [--delay D]

It prints one line of JSON with its port, and serves until its standard input closes. Who connects must know the token
in the environment variable LYNCEUS_EDGE_TOKEN.
"""

from __future__ import annotations

import argparse
import hmac
import json
import os
import socket
import sys
import threading
import time
from contextlib import suppress
from typing import Any

TOKEN = "LYNCEUS_EDGE_TOKEN"
BATCH = 256  # images in one request


class Worker:
    """The sub-models of one device of a plan's folder."""

    def __init__(self, folder: str, device: str):
        from lynceus.core.errors import unknown
        from lynceus.rewrite.split.plan import load_part, read

        described = read(folder)
        names = [d["name"] for d in described["devices"]]
        if device not in names:
            raise unknown("device of this plan", device, names)
        self.device = device
        self.numbers = [i for i, s in enumerate(described["shares"]) if s["device"] == device]
        self.parts = [load_part(folder, i, described)[0] for i in self.numbers]
        self.shape = tuple(int(n) for n in described["image_shape"])

    def features(self, payload: bytes) -> bytes:
        """The answer to a request: feature.NUMBER (b, width) of each sub-model, and seconds that it took."""
        import torch

        from lynceus.core.types import as_float
        from lynceus.serve.edge.wire import checked_image, pack, unpack

        start = time.perf_counter()
        image = as_float(checked_image(unpack(payload), self.shape, BATCH))
        with torch.inference_mode():
            out = {
                f"feature.{i}": part(image.to(next(part.parameters()).dtype))
                for i, part in zip(self.numbers, self.parts)
            }
        out["seconds"] = torch.tensor([time.perf_counter() - start], dtype=torch.float64)
        return pack(out)

    def warm(self) -> None:
        """Runs once on zeros, so that the first request is no slower than others."""
        import torch

        from lynceus.serve.edge.wire import pack

        for _ in range(2):
            self.features(pack({"image": torch.zeros(1, *self.shape)}))


def serve(worker: Worker, listener: socket.socket, token: str, link: Any) -> None:
    """Answers connections, each in a thread of its own, for ever."""
    while True:
        sock, _ = listener.accept()
        threading.Thread(target=_talk, args=(worker, sock, token, link), daemon=True).start()


def _talk(worker: Worker, sock: socket.socket, token: str, link: Any) -> None:
    """One connection. This thread reads and computes, so that a request wakes nobody else; another says meanwhile that
    the process lives."""
    from lynceus.core.errors import AdviceError
    from lynceus.serve.edge.wire import (
        ANSWER,
        ASK,
        BEAT,
        ERROR,
        HELLO,
        TRY,
        Frame,
        WireError,
        quiet,
        receive,
        said,
        send,
    )

    turn = threading.Lock()  # frames leave one at a time
    over = threading.Event()

    def say(frame: Frame) -> None:
        with turn:
            send(sock, frame)

    def beat(seconds: float) -> None:
        with suppress(OSError):
            while not over.wait(seconds):
                say(Frame(kind=BEAT))

    try:
        with quiet(sock):
            hello = receive(sock, wait=5.0, most=4096)
            if hello.kind != HELLO:
                return
            asked = said(hello.payload)
            if not hmac.compare_digest(str(asked.get("token", "")), token):
                return
            about = {"device": worker.device, "parts": worker.numbers, "pid": os.getpid()}
            say(Frame(kind=HELLO, payload=json.dumps(about).encode()))
            every = asked.get("beat")
            if isinstance(every, (int, float)) and 0.01 <= every <= 3600:
                threading.Thread(target=beat, args=(every,), daemon=True).start()
            while True:
                frame = receive(sock)
                if frame.kind in (ASK, TRY):
                    try:
                        answer = Frame(kind=ANSWER, number=frame.number, payload=worker.features(frame.payload))
                    except (AdviceError, WireError, RuntimeError) as error:
                        say(Frame(kind=ERROR, number=frame.number, payload=str(error).encode()[:2000]))
                        continue
                    if frame.kind == ASK:
                        link.wait(len(answer))
                    say(answer)
                else:
                    return
    except OSError:
        return
    finally:
        over.set()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m lynceus.serve.edge", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder")
    parser.add_argument("device")
    parser.add_argument("--core", type=int)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--rate", type=float, default=float("inf"))
    parser.add_argument("--delay", type=float, default=0.0)
    args = parser.parse_args(argv)
    if args.core is not None and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {args.core})  # before torch makes threads
    import torch

    from lynceus.core.errors import AdviceError
    from lynceus.serve.edge.wire import Link

    torch.set_num_threads(1)
    try:
        worker = Worker(args.folder, args.device)
    except AdviceError as error:
        print(json.dumps({"error": str(error)}), flush=True)
        return 2
    worker.warm()
    listener = socket.create_server((args.host, args.port))
    print(json.dumps({"port": listener.getsockname()[1]}), flush=True)
    serving = (worker, listener, os.environ.get(TOKEN, ""), Link(rate=args.rate, delay=args.delay))
    threading.Thread(target=serve, args=serving, daemon=True).start()
    sys.stdin.buffer.read()  # until whoever started this is gone
    return 0
