"""Ledger: finished pieces of a long job, kept in a file as they come: a second run goes on where one stopped."""

from __future__ import annotations

import base64
import hashlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from lynceus.core.errors import AdviceError


class Ledger:
    """Finished pieces by key, in memory and, with a folder, in one file of JSON lines that grows piece by piece.

    folder: None keeps nothing on disk. name: what the file is called. identity: whatever the pieces depend on (options,
    seed, `model_key`); pieces written under another identity are in another file and are not seen.
    A value is made of None, bool, int, float, str, list, dict, numpy arrays and tensors; arrays come back as numpy. A
    line cut by a kill is dropped, and its piece is done again.
    """

    def __init__(self, folder: str | Path | None, name: str, identity: object):
        self._pieces: dict[str, Any] = {}
        self.path: Path | None = None
        if folder is None:
            return
        digest = hashlib.blake2b(repr(identity).encode(), digest_size=6).hexdigest()
        self.path = Path(folder) / f"{name}-{digest}.jsonl"
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            raw = self.path.read_bytes() if self.path.is_file() else b""
        except OSError as error:
            raise AdviceError(f"Finished pieces cannot be kept in {self.path}: {error.strerror}.") from None
        whole = raw.rfind(b"\n") + 1
        for line in raw[:whole].splitlines():
            try:
                piece = json.loads(line)
                self._pieces[piece["key"]] = _unpacked(piece["value"])
            except (ValueError, KeyError, TypeError, UnicodeDecodeError):
                continue
        if whole != len(raw):
            with self.path.open("r+b") as file:
                file.truncate(whole)

    def __len__(self) -> int:
        return len(self._pieces)

    def __contains__(self, key: str) -> bool:
        return key in self._pieces

    def get(self, key: str) -> Any:
        """The value kept under `key`, None where there is none."""
        return self._pieces.get(key)

    def put(self, key: str, value: Any) -> Any:
        """Keeps `value` and returns it as `get` will give it, so that a first run sees what a resumed one sees."""
        packed = _packed(value)
        if self.path is not None:
            line = json.dumps({"key": key, "value": packed}, ensure_ascii=False)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(line + "\n")
        self._pieces[key] = _unpacked(packed)
        return self._pieces[key]


def _packed(value: Any) -> Any:
    if isinstance(value, Tensor):
        value = value.detach().cpu().numpy()
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, np.ndarray):
        out = io.BytesIO()
        np.save(out, value, allow_pickle=False)
        return {"$npy": base64.b64encode(out.getvalue()).decode()}
    if isinstance(value, dict):
        return {str(k): _packed(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_packed(v) for v in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise AdviceError(f"A ledger keeps numbers, texts, lists, dicts and arrays, not {type(value).__name__}.")


def _unpacked(value: Any) -> Any:
    if isinstance(value, dict):
        if value.keys() == {"$npy"}:
            return np.load(io.BytesIO(base64.b64decode(value["$npy"])), allow_pickle=False)
        return {k: _unpacked(v) for k, v in value.items()}
    return [_unpacked(v) for v in value] if isinstance(value, list) else value
