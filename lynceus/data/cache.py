"""What was learned about a dataset's files, kept between runs: arrays under a key, valid while the stamp is the same.

The folder is $LYNCEUS_CACHE, else ~/.cache/lynceus. Losing it costs time only; a folder that cannot be written is no
error.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

FORMAT = 1  # raise it when what is stored changes its meaning


def folder() -> Path:
    return Path(os.environ.get("LYNCEUS_CACHE") or Path.home() / ".cache" / "lynceus") / "index"


def stamp(parts: Iterable[tuple[str, int, int]]) -> str:
    """A mark of files by (name, size, mtime in ns)."""
    digest = hashlib.blake2b(repr(FORMAT).encode(), digest_size=16)
    digest.update("\n".join(f"{n}\0{s}\0{t}" for n, s, t in parts).encode(errors="surrogateescape"))
    return digest.hexdigest()


def file_stamp(path: Path) -> str:
    stat = path.stat()
    return stamp([(str(path), stat.st_size, stat.st_mtime_ns)])


def remember(key: str, mark: str, make: Callable[[], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """The arrays that `make` gave last time under `key` when `mark` is the same, else what it gives now."""
    path = folder() / f"{hashlib.blake2b(key.encode(errors='surrogateescape'), digest_size=12).hexdigest()}.npz"
    try:
        with np.load(path, allow_pickle=False) as stored:
            if str(stored["__mark__"]) == mark:
                return {k: stored[k] for k in stored.files if k != "__mark__"}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        pass
    arrays = make()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, part = tempfile.mkstemp(dir=path.parent, suffix=".part")
        with os.fdopen(handle, "wb") as file:
            np.savez(file, __mark__=np.array(mark), **arrays)  # type: ignore[arg-type]
        os.replace(part, path)
    except OSError:
        pass
    return arrays


def pack(texts: Iterable[str]) -> np.ndarray:
    """Texts as one array of bytes (numpy's own text arrays pad to the longest)."""
    return np.frombuffer("".join(f"{t}\0" for t in texts).encode("utf-8", "surrogateescape"), dtype=np.uint8)


def unpack(packed: np.ndarray) -> list[str]:
    return packed.tobytes().decode("utf-8", "surrogateescape").split("\0")[:-1]
