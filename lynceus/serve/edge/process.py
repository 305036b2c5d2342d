"""The process of a device, started on this machine."""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

from lynceus.core.errors import AdviceError
from lynceus.serve.edge.wire import Link
from lynceus.serve.edge.worker import TOKEN


def started(
    folder: Path, device: str, *, token: str, core: int | None, link: Link, seconds: float
) -> tuple[subprocess.Popen[bytes], int]:
    """The process of a plan's device and the port that it listens on. AdviceError when it is not ready in time."""
    command = [sys.executable, "-m", "lynceus.serve.edge", str(folder), device]
    if core is not None:
        command += ["--core", str(core)]
    if link.shaped:
        command += ["--rate", repr(link.rate), "--delay", repr(link.delay)]
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env={**os.environ, **threads, TOKEN: token}
    )
    try:
        return process, _port(process, seconds)
    except BaseException:
        process.kill()
        process.wait()
        raise


def _port(process: subprocess.Popen[bytes], seconds: float) -> int:
    """The port in the one line that a worker prints when it is ready."""
    got: queue.Queue[bytes] = queue.Queue()
    assert process.stdout is not None
    threading.Thread(target=lambda: got.put(process.stdout.readline()), daemon=True).start()  # type: ignore[union-attr]
    try:
        line = got.get(timeout=seconds)
    except queue.Empty:
        process.kill()
        raise AdviceError(
            f"its process was not ready after {seconds:g} s; EdgeConfig(start=) gives it longer."
        ) from None
    if not line:
        raise AdviceError(f"its process ended with {process.wait()} before it was ready; its messages stand above.")
    told: dict[str, Any] = json.loads(line)
    if "port" not in told:
        raise AdviceError(str(told.get("error", told)))
    return int(told["port"])
