"""What a worker process does first."""

from __future__ import annotations

import os
import threading
from multiprocessing import parent_process

import torch


def begin(threads: int = 1) -> None:
    """Sets torch's threads, and ends this process as soon as its parent is gone: a worker whose parent was killed must
    not go on behind the back of the next run."""
    torch.set_num_threads(threads)
    threading.Thread(target=_follow, daemon=True).start()


def _follow() -> None:
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
