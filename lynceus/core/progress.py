"""Progress that suits the place: a bar in a terminal or notebook, one plain line per some seconds in a pipe or log.

    with progress("training", total=n, unit="images") as bar:
        bar.advance(64, loss=0.31)
    for batch in track(loader, "reading"):
        ...

Written to stderr, so that stdout stays the result. Nothing is shown for work that ends within two seconds in a log.
`quiet=True` or the block `silenced()` turns it off; processes with RANK > 0 never show any.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sized
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TextIO, TypeVar

T = TypeVar("T")

SHORT = 2.0  # seconds; shorter work leaves no line behind
_silent: ContextVar[bool] = ContextVar("lynceus_progress_silent", default=False)
_lock = threading.RLock()
_screen: Any = None  # the one live rich display of this process, shared by nested bars
_users = 0


@contextmanager
def silenced(quiet: bool = True) -> Iterator[None]:
    """No progress inside the block (with quiet=False it changes nothing)."""
    token = _silent.set(quiet or _silent.get())
    try:
        yield
    finally:
        _silent.reset(token)


class Progress:
    """One running piece of work; made by `progress`. `done` counts units, `numbers` are the latest named values."""

    def __init__(
        self, text: str, *, total: int | None, unit: str, quiet: bool, done: int, every: float, file: TextIO | None
    ):
        self.text, self.total, self.unit, self.done, self.every = text, total, unit, done, every
        self.numbers: dict[str, Any] = {}
        self.first = done  # work of an earlier run, which says nothing about the speed of this one
        self._file = file if file is not None else sys.stderr
        self._quiet = quiet or _silent.get() or int(os.environ.get("RANK") or 0) > 0
        self._task: Any = None
        self._lines = 0

    def __enter__(self) -> Progress:
        self._start = self._last = time.monotonic()
        self._recent: deque[tuple[float, int]] = deque([(self._start, self.done)], maxlen=64)
        if not self._quiet and _has_screen(self._file):
            self._task = _open_task(self._file, self.text, self.total, self.done)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        if self._task is not None:
            _close_task(self._task)
        if self._quiet or not (self._lines or self.elapsed >= SHORT):
            return
        if kind is None:
            self._print(self.line(final=True))
        else:
            self._print(f"{self.line(final=True)}  stopped by {kind.__name__}")

    def advance(self, count: int = 1, **numbers: Any) -> None:
        """`count` more units are done; named values (loss=0.3) are shown beside."""
        self.done += count
        self.numbers.update(numbers)
        now = time.monotonic()
        if not self._recent or now - self._recent[-1][0] > 0.25:
            self._recent.append((now, self.done))
        if self._task is not None:
            _move_task(self._task, self.done, self.total, self._right())
        elif not self._quiet and now - self._last >= self.every:
            self._last = now
            self._print(self.line())

    def note(self, text: str) -> None:
        """A line of its own, above the bar."""
        if not self._quiet:
            self._print(text)

    @property
    def elapsed(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._start

    @property
    def rate(self) -> float:
        """Units per second over the whole run of this process; 0 before anything is done."""
        return (self.done - self.first) / max(self.elapsed, 1e-9)

    @property
    def eta(self) -> float | None:
        """Seconds to go at the recent speed; None when the total or the speed is unknown."""
        if self.total is None or self.done <= self.first:
            return None
        then, before = self._recent[0]
        now = time.monotonic()
        recent = (self.done - before) / max(now - then, 1e-9)
        return max(self.total - self.done, 0) / recent if recent > 0 else None

    def line(self, *, final: bool = False) -> str:
        """The state in one line of plain text."""
        return "  ".join([self.text, *self._parts(final)])

    def _right(self) -> str:
        return "  ".join(self._parts(False))

    def _parts(self, final: bool) -> list[str]:
        of = f"/{self.total:,}" if self.total is not None else ""
        parts = [f"{self.done:,}{of} {self.unit}"]
        if self.total and not final and self._task is None:
            parts.append(f"{100 * self.done / self.total:.0f}%")
        if self.done > self.first:
            parts.append(f"{_number(self.rate)} {self.unit}/s")
        if final:
            parts.append(f"in {clock(self.elapsed)}")
        elif (eta := self.eta) is not None:
            parts.append(f"ETA {clock(eta)}")
        return [*parts, *(f"{k} {_number(v)}" for k, v in self.numbers.items())]

    def _print(self, text: str) -> None:
        self._lines += 1
        with _lock:
            if _screen is not None:
                _screen.console.print(text, markup=False, highlight=False, soft_wrap=True)
            else:
                print(text, file=self._file, flush=True)


def progress(
    text: str,
    *,
    total: int | None = None,
    unit: str = "items",
    quiet: bool = False,
    done: int = 0,
    every: float = 10.0,
    file: TextIO | None = None,
) -> Progress:
    """A context manager that shows how far a piece of work is.

    total: units to do, None when unknown. unit: what is counted, in the plural. done: units that an earlier run did.
    every: seconds between lines when stderr is no terminal. file: where to write, instead of stderr.
    """
    return Progress(text, total=total, unit=unit, quiet=quiet, done=done, every=every, file=file)


def track(
    iterable: Iterable[T], text: str, total: int | None = None, *, unit: str = "items", quiet: bool = False
) -> Iterator[T]:
    """Goes through `iterable` and shows how far it is; `total` is its length when it has one."""
    if total is None and isinstance(iterable, Sized):
        total = len(iterable)
    with progress(text, total=total, unit=unit, quiet=quiet) as bar:
        for item in iterable:
            yield item
            bar.advance()


def clock(seconds: float) -> str:
    """0.4 s, 12 s, 3:05, 1:02:09."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _number(value: Any) -> str:
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float):
        if value != value or value in (float("inf"), float("-inf")):
            return str(value)
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _has_screen(file: TextIO) -> bool:
    """True in a terminal that can move its cursor, and in a notebook."""
    if os.environ.get("TERM") == "dumb" or os.environ.get("CI"):
        return False
    if file is sys.stderr and "ipykernel" in sys.modules:
        return True
    return bool(getattr(file, "isatty", lambda: False)())


def _open_task(file: TextIO, text: str, total: int | None, done: int) -> Any:
    global _screen, _users
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn
    from rich.progress import Progress as Screen

    with _lock:
        if _screen is None:
            columns = (
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=24),
                TextColumn("{task.percentage:>3.0f}%"),
                TextColumn("{task.fields[right]}", markup=False),
            )
            _screen = Screen(*columns, console=Console(file=file), transient=True, refresh_per_second=8)
            _screen.start()
        _users += 1
        return _screen.add_task(text, total=total, completed=done, right="")


def _move_task(task: Any, done: int, total: int | None, right: str) -> None:
    with _lock:
        if _screen is not None:
            _screen.update(task, completed=done, total=total, right=right)


def _close_task(task: Any) -> None:
    global _screen, _users
    with _lock:
        _screen.remove_task(task)
        _users -= 1
        if _users == 0:
            _screen.stop()
            _screen = None
