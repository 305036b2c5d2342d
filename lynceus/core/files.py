"""Files that are whole or not there."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any


def write_atomic(path: Path, fill: Callable[[Any], None] | bytes | str) -> Path:
    """Writes a file beside it, fsync, replace: a kill at any moment leaves either the old one or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident():x}.part")
    try:
        with open(part, "wb") as file:
            if callable(fill):
                fill(file)
            else:
                file.write(fill.encode() if isinstance(fill, str) else fill)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    try:
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)
    except OSError:  # not every system lets a folder be synced
        pass
    return path
