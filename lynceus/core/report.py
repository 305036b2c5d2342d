"""Report: what every check, run and rewrite returns. A table, JSON, one self-contained HTML page, and a comparison."""

from __future__ import annotations

import base64
import json
import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lynceus.core.errors import MissingError


@dataclass(kw_only=True)
class Report:
    """Findings. `rows`: one dict per finding, the table. `summary`: the few numbers that matter.

    figures: name -> bytes; a name ending in ".plotly" holds a plotly figure as JSON (drawn interactive), one ending in
    ".png" a picture. arrays: name -> numpy array, kept beside the report. environment: versions, device, seed, commit.
    notes: sentences that the reader must know (what was skipped, what does not hold).
    """

    name: str
    rows: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, float] = field(default_factory=dict)
    figures: dict[str, bytes] = field(default_factory=dict)
    arrays: dict[str, np.ndarray] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=lambda: environment())
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "summary": self.summary,
            "rows": self.rows,
            "notes": self.notes,
            "environment": self.environment,
            "arrays": {k: {"dtype": str(v.dtype), "shape": list(v.shape), "values": v.tolist()} for k, v in self.arrays.items()},
            "figures": {k: base64.b64encode(v).decode() for k, v in self.figures.items()},
        }

    def json(self) -> str:
        """Everything in the report, figures included, as JSON; `Report.from_json` reads it back."""
        return json.dumps(self.to_dict(), default=_plain)

    @classmethod
    def from_json(cls, text: str) -> Report:
        d = json.loads(text)
        d["figures"] = {k: base64.b64decode(v) for k, v in d["figures"].items()}
        d["arrays"] = {k: np.array(v["values"], dtype=v["dtype"]).reshape(v["shape"]) for k, v in d["arrays"].items()}
        return cls(**d)

    def save(self, folder: str | Path) -> Path:
        """Writes report.json and report.html into `folder`; returns the path of the page."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in (("report.json", self.json()), ("report.html", self.html())):
            part = folder / f".{name}.part"
            part.write_text(text, encoding="utf-8")
            os.replace(part, folder / name)
        return folder / "report.html"

    @classmethod
    def load(cls, path: str | Path) -> Report:
        """The report in a report.json, or in the folder that holds one."""
        path = Path(path)
        path = path / "report.json" if path.is_dir() else path
        if not path.is_file():
            raise MissingError(f"There is no report at {path.resolve()}; a run folder holds report.json.")
        return cls.from_json(path.read_text())


def _plain(value: Any) -> Any:
    if hasattr(value, "item") and getattr(value, "size", 1) == 1:
        return value.item()
    if hasattr(value, "tolist"):
        return value.tolist()
    return str(value)


def environment(seed: int | None = None, **more: Any) -> dict[str, str]:
    """Where and with what a figure was made: versions, device, threads, commit of the library, seed."""
    import torch

    import lynceus

    out = {
        "lynceus": lynceus.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "threads": str(torch.get_num_threads()),
    }
    if seed is not None:
        out["seed"] = str(seed)
    return out | {k: str(v) for k, v in more.items()}
