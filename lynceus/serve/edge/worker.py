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
import queue
import socket
import sys
import threading
import time
from contextlib import suppress
from typing import Any

TOKEN = "LYNCEUS_EDGE_TOKEN"
BATCH = 256  # images in one request
WAITING = 16  # requests that may wait


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

        image = as_float(checked_image(unpack(payload), self.shape, BATCH))
        start = time.perf_counter()
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
    from lynceus.core.errors import AdviceError
    from lynceus.serve.edge.wire import (
        ANSWER,
        ASK,
        ERROR,
        HELLO,
        PING,
        PONG,
        Frame,
        WireError,
        quiet,
        receive,
        said,
        send,
    )

    turn = threading.Lock()  # answers and pongs leave one at a time
    asked: queue.Queue[Frame | None] = queue.Queue(WAITING)

    def say(frame: Frame, over: Any = None) -> None:
        if over is not None:
            over.wait(len(frame))
        with turn:
            send(sock, frame)

    def work() -> None:
        while (frame := asked.get()) is not None:
            try:
                say(Frame(kind=ANSWER, number=frame.number, payload=worker.features(frame.payload)), link)
            except (AdviceError, WireError, RuntimeError) as error:
                if isinstance(error, OSError) and not isinstance(error, WireError):
                    return
                try:
                    say(Frame(kind=ERROR, number=frame.number, payload=str(error).encode()[:2000]))
                except OSError:
                    return
            except OSError:
                return

    try:
        with quiet(sock):
            hello = receive(sock, wait=5.0, most=4096)
            if hello.kind != HELLO or not hmac.compare_digest(str(said(hello.payload).get("token", "")), token):
                return
            about = {"device": worker.device, "parts": worker.numbers, "pid": os.getpid()}
            say(Frame(kind=HELLO, payload=json.dumps(about).encode()))
            threading.Thread(target=work, daemon=True).start()
            while True:
                frame = receive(sock)
                if frame.kind == PING:
                    say(Frame(kind=PONG, number=frame.number))
                elif frame.kind == ASK:
                    try:
                        asked.put_nowait(frame)
                    except queue.Full:
                        say(Frame(kind=ERROR, number=frame.number, payload=b"too many requests wait here"))
                else:
                    return
    except OSError:
        return
    finally:
        with suppress(queue.Full):
            asked.put_nowait(None)


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
