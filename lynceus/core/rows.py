"""Rows as a table: which columns there are, how their numbers are written, how rows of two tables are matched."""

from __future__ import annotations

import io
import math
import numbers
import shutil
import sys
from collections.abc import Callable, Sequence
from typing import Any

from lynceus.core.errors import AdviceError

Rows = Sequence[dict[str, Any]]
NONE = "–"


def columns(rows: Rows) -> list[str]:
    """Every key of the rows, in order of first appearance."""
    return list(dict.fromkeys(key for row in rows for key in row))


def scalar(value: Any) -> Any:
    """numpy and torch scalars as Python numbers; everything else as it is."""
    if hasattr(value, "item") and getattr(value, "shape", None) in ((), (1,)):
        return value.item()
    return value


def is_number(value: Any) -> bool:
    """True for real numbers that are no booleans."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def is_numeric(values: Sequence[Any]) -> bool:
    """True when a column holds numbers and nothing else, gaps aside."""
    present = [v for v in map(scalar, values) if v is not None]
    return bool(present) and all(is_number(v) for v in present)


MIXED = frozenset({"before", "after", "delta"})  # columns of a comparison, whose numbers are of different kinds


def writers(rows: Rows) -> dict[str, Callable[[Any], str]]:
    """How to write the cells of each column."""
    names = columns(rows)
    mixed = MIXED if "number" in names else frozenset()
    return {n: number if n in mixed else writer([row.get(n) for row in rows]) for n in names}


def writer(values: Sequence[Any]) -> Callable[[Any], str]:
    """How to write the cells of one column, so that its numbers have the same number of decimals."""
    cells = [scalar(v) for v in values]
    floats = [abs(float(v)) for v in cells if is_number(v) and not isinstance(v, int) and math.isfinite(v)]
    decimals: int | None = None
    if floats:
        big, small = max(floats), min((v for v in floats if v), default=0.0)
        decimals = 0 if big == 0 else min(4, max(0, 4 - math.floor(math.log10(big)) - 1))
        if big >= 1e12 or 0 < big < 0.01 or 0 < small < 10.0**-decimals / 2:
            decimals = None

    def write(value: Any) -> str:
        value = scalar(value)
        if value is None:
            return NONE
        if isinstance(value, bool):
            return "yes" if value else "no"
        if is_number(value):
            if not math.isfinite(value):
                return str(float(value))
            if isinstance(value, int):
                return f"{value:,}"
            return _digits(value) if decimals is None else f"{value:,.{decimals}f}"
        if isinstance(value, (list, tuple)):
            return ", ".join(write(v) for v in value)
        if isinstance(value, dict):
            return ", ".join(f"{k}: {write(v)}" for k, v in value.items())
        return str(value)

    return write


def _digits(value: float) -> str:
    """Three digits, with an exponent only where plain figures would be unreadable."""
    if 1e3 <= abs(value) < 1e12:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def number(value: Any) -> str:
    """One number on its own, to about four digits; counts (whole numbers above 1) without decimals."""
    value = scalar(value)
    if isinstance(value, float) and value.is_integer() and 1 < abs(value) < 1e15:
        value = int(value)
    return writer([value])(value)


def text_table(rows: Rows, *, width: int | None = None) -> str:
    """The rows as lines of text. A table wider than `width` is cut into several that repeat its first column."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    width = width or screen_width()
    names = columns(rows)
    cells = {name: [write(row.get(name)) for row in rows] for name, write in writers(rows).items()}
    right = {name for name in names if is_numeric([row.get(name) for row in rows])}
    out = io.StringIO()
    console = Console(file=out, width=width, color_system=None, force_terminal=False, legacy_windows=False)
    for i, part in enumerate(_parts(names, cells, right, width)):
        if i:
            console.print()
        table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
        for name in part:
            is_right = name in right
            table.add_column(_plain(name), justify="right" if is_right else "left", no_wrap=is_right, overflow="fold")
        for row in zip(*(cells[name] for name in part)):
            table.add_row(*map(_plain, row))
        console.print(table)
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines())


def _plain(text: str) -> Any:
    from rich.text import Text

    return Text(text)


def _parts(names: list[str], cells: dict[str, list[str]], right: set[str], width: int) -> list[list[str]]:
    """Columns that fit beside each other, the first one in each part."""
    if not names:
        return []
    need = {n: max([len(n), *(len(c) for c in cells[n])]) for n in names}
    need = {n: w if n in right else min(w, max(12, width // 4)) for n, w in need.items()}
    parts, part, used = [], [names[0]], need[names[0]]
    for name in names[1:]:
        if used + 3 + need[name] > width and len(part) > 1:
            parts.append(part)
            part, used = [names[0]], need[names[0]]
        part.append(name)
        used += 3 + need[name]
    return [*parts, part]


def screen_width() -> int:
    """Columns of the terminal; 120 when there is none."""
    return shutil.get_terminal_size((120, 24)).columns if sys.stdout.isatty() else 120


def identifying(before: Rows, after: Rows) -> list[str]:
    """The fewest leading columns whose values tell the rows of both tables apart: texts first, then whole numbers.

    Empty when no such columns exist."""
    shared = [c for c in columns(before) if c in set(columns(after))]

    def holds(kind: type | tuple[type, ...], name: str) -> bool:
        return all(isinstance(scalar(r.get(name)), kind) or r.get(name) is None for r in [*before, *after])

    texts = [c for c in shared if holds((str, bool), c)]
    wholes = [c for c in shared if c not in texts and holds(int, c)]
    chosen: list[str] = []
    for name in [*texts, *wholes]:
        chosen.append(name)
        if _unique(before, chosen) and _unique(after, chosen):
            return chosen
    return []


def _unique(rows: Rows, names: Sequence[str]) -> bool:
    keys = [key(row, names) for row in rows]
    return len(set(keys)) == len(keys)


def key(row: dict[str, Any], names: Sequence[str]) -> tuple[Any, ...]:
    """The values of `names` in a row, as something that can be looked up."""
    return tuple(str(v) if isinstance(v, (list, dict)) else v for v in (scalar(row.get(n)) for n in names))


def compare(before: Rows, after: Rows, by: Sequence[str] | None = None) -> tuple[list[dict[str, Any]], list[str]]:
    """One row per matched row and shared number: before, after, delta (after - before), ratio (after / before).

    Returns the rows and the notes on what could not be matched. Raises AdviceError when `by` does not tell rows apart.
    """
    notes: list[str] = []
    names = list(by) if by is not None else identifying(before, after)
    if by is not None and not (_unique(before, names) and _unique(after, names)):
        raise AdviceError(f"The columns {names} do not tell the rows apart; there are {columns(after)}.")
    if names or (not before and not after):
        left = {key(r, names): r for r in before}
        right = {key(r, names): r for r in after}
    else:
        names = ["row"]
        left = {(i + 1,): r for i, r in enumerate(before)}
        right = {(i + 1,): r for i, r in enumerate(after)}
        notes.append("No column tells the rows apart, so they were matched by their position.")
    rows = []
    for k in dict.fromkeys([*left, *right]):
        label = " / ".join(str(v) for v in k)
        if k not in left or k not in right:
            notes.append(f"Only {'after' if k in right else 'before'}: {label}")
            continue
        a, b = left[k], right[k]
        for name in columns([a, b]):
            if name not in names and is_number(scalar(a.get(name))) and is_number(scalar(b.get(name))):
                rows.append({**dict(zip(names, k)), "number": name, **change(a[name], b[name])})
    return rows, notes


def change(before: Any, after: Any) -> dict[str, Any]:
    """before, after, delta and ratio of two numbers; no ratio when before is 0."""
    before, after = scalar(before), scalar(after)
    return {"before": before, "after": after, "delta": after - before, "ratio": after / before if before else None}
