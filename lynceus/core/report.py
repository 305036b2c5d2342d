"""Report: what every check, run and rewrite returns. A table, JSON, one self-contained HTML page, and a comparison."""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lynceus.core.environment import environment as environment
from lynceus.core.errors import AdviceError, MissingError
from lynceus.core.files import write_atomic
from lynceus.core.rows import change, compare, number, text_table


@dataclass(kw_only=True)
class Report:
    """Findings. `rows`: one dict per finding, the table. `summary`: the few numbers that matter.

    figures: name -> bytes; a name ending in ".plotly" holds a plotly figure as JSON (drawn interactive), one ending in
    ".png" a picture (`lynceus.core.plots` makes both). arrays: name -> numpy array, kept beside the report.
    environment: versions, device, seed, commit; also "command" and "twin" (the same in Python), shown as code.
    notes: sentences that the reader must know (what was skipped, what does not hold).
    answer: the finding in a sentence, where there is one; it stands on top.
    parts: further reports that belong to this one, each shown as a section with its own table, figures and notes.
    """

    name: str
    rows: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, float] = field(default_factory=dict)
    figures: dict[str, bytes] = field(default_factory=dict)
    arrays: dict[str, np.ndarray] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=lambda: environment())
    notes: list[str] = field(default_factory=list)
    answer: str = ""
    parts: list[Report] = field(default_factory=list)

    def table(self, *, width: int | None = None) -> str:
        """Name, summary, rows and notes as text of at most `width` columns (default: the terminal's, else 120).

        Of the parts, the answers and notes; their tables are on the page."""
        parts = [self.name]
        if self.answer:
            parts.append(self.answer)
        if self.summary:
            side = max(len(k) for k in self.summary)
            parts.append("\n".join(f"  {k:<{side}}  {number(v)}" for k, v in self.summary.items()))
        if self.rows:
            parts.append(text_table(self.rows, width=width))
        if self.notes:
            parts.append("\n".join(f"Note: {note}" for note in self.notes))
        for part in self.parts:
            said = [part.answer, *(f"Note: {note}" for note in part.notes)]
            parts.append("\n".join([f"── {part.name}", *(line for line in said if line)]))
        return "\n\n".join(parts)

    def __str__(self) -> str:
        return self.table()

    def html(self) -> str:
        """The report as one page with everything inside: it opens from a file, with no network."""
        from lynceus.core.html import page

        return page(self)

    def _repr_html_(self) -> str:
        from lynceus.core.html import fragment

        return fragment(self)

    def against(self, other: Report, *, by: Sequence[str] | None = None) -> Report:
        """What changed from `other` (before, the peer) to this report (after, us).

        One row per shared number: before, after, delta = after - before, ratio = after / before; first those of the
        summary, then those of the rows matched by the columns `by` (default: the fewest that tell the rows apart).
        """
        summary = {k: change(other.summary[k], v) for k, v in self.summary.items() if k in other.summary}
        rows, notes = compare(other.rows, self.rows, by)
        lead = next(iter(rows[0])) if rows else "row"
        shared = [{lead: "(summary)", "number": k, **v} for k, v in summary.items()]
        for key in dict.fromkeys([*other.environment, *self.environment]):
            before, after = other.environment.get(key, "nothing"), self.environment.get(key, "nothing")
            if before != after and key not in ("date", "command", "twin"):
                notes.append(f"Environment differs: {key} {before} -> {after}")
        return Report(
            name=f"{self.name} against {other.name}" if self.name != other.name else f"{self.name}: before and after",
            rows=[*shared, *rows],
            summary={f"{k} (change)": v["delta"] for k, v in summary.items()},
            environment=dict(self.environment),
            notes=notes,
            parts=[p.against(q) for p in self.parts for q in other.parts if p.name == q.name],
        )

    def to_dict(self) -> dict[str, Any]:
        """The report as plain values; arrays as .npy and figures as bytes, both in base64."""
        return {
            "name": self.name,
            "summary": self.summary,
            "rows": self.rows,
            "notes": self.notes,
            "answer": self.answer,
            "environment": self.environment,
            "arrays": {k: base64.b64encode(_npy(v)).decode() for k, v in self.arrays.items()},
            "figures": {k: base64.b64encode(v).decode() for k, v in self.figures.items()},
            **({"parts": [p.to_dict() for p in self.parts]} if self.parts else {}),
        }

    def json(self) -> str:
        """Everything in the report, figures included, as strict JSON; `Report.from_json` reads it back."""
        return json.dumps(_plain(self.to_dict()), allow_nan=False, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> Report:
        """The report that `json` wrote. Raises AdviceError when the text is something else."""
        try:
            return cls._from_dict(json.loads(text, object_hook=_number_back))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise AdviceError(
                f"This is no report of lynceus ({error}); give the report.json of a run folder."
            ) from None

    @classmethod
    def _from_dict(cls, d: dict[str, Any]) -> Report:
        d["figures"] = {k: base64.b64decode(v) for k, v in d["figures"].items()}
        d["arrays"] = {k: np.load(io.BytesIO(base64.b64decode(v)), allow_pickle=False) for k, v in d["arrays"].items()}
        d["parts"] = [cls._from_dict(p) for p in d.get("parts", [])]
        return cls(**d)

    def save(self, folder: str | Path) -> Path:
        """Writes report.json and report.html into `folder`; returns the path of the page."""
        folder = Path(folder)
        try:
            for name, text in (("report.json", self.json()), ("report.html", self.html())):
                write_atomic(folder / name, text)
        except (PermissionError, NotADirectoryError, FileExistsError) as error:
            raise AdviceError(f"The report cannot be written to {folder.resolve()}: {error.strerror}.") from None
        return folder / "report.html"

    @classmethod
    def load(cls, path: str | Path) -> Report:
        """The report in a report.json, or in the folder that holds one."""
        path = Path(path)
        path = path / "report.json" if path.is_dir() else path
        if not path.is_file():
            raise MissingError(f"There is no report at {path.resolve()}; a run folder holds report.json.")
        try:
            return cls.from_json(path.read_text(encoding="utf-8"))
        except (AdviceError, UnicodeDecodeError):
            raise AdviceError(
                f"{path.resolve()} is no report of lynceus; give the report.json of a run folder."
            ) from None


def _npy(array: np.ndarray) -> bytes:
    out = io.BytesIO()
    np.save(out, np.asarray(array), allow_pickle=False)
    return out.getvalue()


def _plain(value: Any) -> Any:
    """JSON has no nan and no infinity: they become {"$number": "nan"}, and come back as they were."""
    if hasattr(value, "item") and getattr(value, "shape", None) in ((), (1,)):
        value = value.item()
    if isinstance(value, float):
        return value if math.isfinite(value) else {"$number": str(value)}
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(v) for v in value]
    return str(value)


def _number_back(d: dict[str, Any]) -> Any:
    return float(d["$number"]) if d.keys() == {"$number"} else d
