"""The run folder: config.yaml, environment.json, log.csv, metrics.csv, checkpoints/, report.html and report.json."""

from __future__ import annotations

import csv
import io
import json
import math
import time
from pathlib import Path
from typing import Any

from lynceus.core.config import dump_yaml
from lynceus.core.errors import AdviceError
from lynceus.core.files import write_atomic


class Table:
    """Rows of numbers in memory and, with a path, in a csv file that is flushed row by row.

    Rows of a resumed run beyond the step it continues from are dropped, so that the file reads as if nothing happened.
    """

    def __init__(self, path: Path | None, *, keep_until: int | None = None):
        self.path = path
        self.rows: list[dict[str, float]] = []
        self.columns: list[str] = []
        if path is not None and keep_until is not None and path.is_file():
            with open(path, newline="") as file:
                for row in csv.DictReader(file):
                    try:
                        values = {k: float(v) for k, v in row.items() if k and v not in ("", None)}
                    except ValueError:
                        continue  # the last line of a killed run may be cut
                    if values.get("step", math.inf) <= keep_until:
                        self.rows.append(values)
        if path is not None:
            self._rewrite()

    def add(self, row: dict[str, float]) -> None:
        self.rows.append(row)
        if self.path is None:
            return
        if any(k not in self.columns for k in row):
            self._rewrite()
            return
        with open(self.path, "a", newline="") as file:
            csv.DictWriter(file, self.columns).writerow({k: _short(v) for k, v in row.items()})

    def column(self, name: str) -> tuple[list[float], list[float]]:
        """(steps, values) of the rows that have `name`."""
        have = [r for r in self.rows if name in r]
        return [r["step"] for r in have], [r[name] for r in have]

    def _rewrite(self) -> None:
        assert self.path is not None
        self.columns = list(dict.fromkeys(k for r in self.rows for k in r))
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, self.columns)
        if self.columns:
            writer.writeheader()
        writer.writerows({k: _short(v) for k, v in r.items()} for r in self.rows)
        write_atomic(self.path, text.getvalue())


def _short(value: float) -> str:
    return str(int(value)) if float(value).is_integer() and abs(value) < 1e15 else repr(float(value))


class RunFolder:
    """Where a run writes. `root` None: nowhere."""

    def __init__(self, root: str | Path | None):
        self.root = None if root is None else Path(root)
        if self.root is not None:
            if self.root.is_file():
                raise AdviceError(f"{self.root} is a file; `out` is the folder that a run is written into.")
            try:
                (self.root / "checkpoints").mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise AdviceError(
                    f"The run folder {self.root.resolve()} cannot be made ({error.strerror}); choose another `out`."
                ) from None
            for part in (*self.root.glob(".*.part"), *self.root.glob("checkpoints/.*.part")):
                part.unlink(missing_ok=True)  # what a killed run left behind

    def path(self, *parts: str) -> Path | None:
        return None if self.root is None else self.root.joinpath(*parts)

    @property
    def state(self) -> Path | None:
        """The file that a run resumes from."""
        return self.path("checkpoints", "last.pt")

    def describe(self, config: dict[str, Any], environment: dict[str, Any]) -> None:
        if self.root is not None:
            write_atomic(self.root / "config.yaml", dump_yaml(config))
            write_atomic(self.root / "environment.json", json.dumps(environment, indent=2))


class Clock:
    """Seconds of a run over all of its parts, and images per second of the present part."""

    def __init__(self, before: float = 0.0):
        self.before, self.start, self.images = before, time.monotonic(), 0

    @property
    def seconds(self) -> float:
        return self.before + time.monotonic() - self.start

    @property
    def rate(self) -> float:
        return self.images / max(time.monotonic() - self.start, 1e-9)
