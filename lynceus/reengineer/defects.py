"""A local log of defects met while re-engineering, with a summary by stage beside the published study's figures.

Study: Jiang et al., Challenges and Practices of Deep Learning Model Reengineering: A Case Study on Computer Vision,
Empirical Software Engineering 2024, arXiv 2303.07476 (348 defects of 27 open-source projects). The log is one JSON line
per defect, appended; nothing leaves the machine.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lynceus.core.errors import AdviceError, unknown
from lynceus.core.report import Report

KINDS = ("reuse", "replication", "adaptation", "enhancement")
STAGES = ("environment", "data pipeline", "model construction", "training", "evaluation", "deployment")
SYMPTOMS = ("reproducibility", "evolution", "crash", "speed", "memory", "api misuse", "configuration", "documentation")
CAUSES = (
    "interface mismatch", "data shapes", "data types", "normalisation", "initialisation", "loss", "optimiser",
    "schedule", "layer options", "randomness", "library version", "unpublished trick", "other",
)  # fmt: skip

STUDY = {
    "defects": 348,
    "projects": 27,
    "reported by re-users": 0.58,
    "reproducibility defects found in training": 0.68,
    "environment defects about interfaces": 0.88,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Defect:
    """One defect. stage: where it was found. symptom: what was seen. cause, fix: what it was and what mended it.
    who: who met it ("re-user" or "author" make the study's share comparable, any name goes). kind: of the work."""

    stage: str
    symptom: str
    cause: str
    fix: str = ""
    who: str = ""
    kind: str = "replication"
    title: str = ""
    date: str = field(default_factory=lambda: datetime.now(UTC).date().isoformat())

    def __post_init__(self) -> None:
        for name, known in (("stage", STAGES), ("symptom", SYMPTOMS), ("cause", CAUSES), ("kind", KINDS)):
            if getattr(self, name) not in known:
                raise unknown(name, str(getattr(self, name)), known)


def add(path: str | Path, defect: Defect) -> None:
    """Appends a defect to the log (one line, one write)."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(asdict(defect)) + "\n")


def read(path: str | Path) -> list[Defect]:
    """The defects of a log; a line that cannot be read is an AdviceError with its number. No file: none yet."""
    path = Path(path)
    if not path.is_file():
        return []
    out = []
    names = {f.name for f in fields(Defect)}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            values: dict[str, Any] = json.loads(line)
            out.append(Defect(**{k: v for k, v in values.items() if k in names}))
        except (json.JSONDecodeError, TypeError, AdviceError) as error:
            raise AdviceError(f"{path}, line {number}: {error}") from None
    return out


def summary(path: str | Path) -> Report:
    """A row per stage with its symptoms and causes; the shares that the study gives stand beside our own."""
    found = read(path)
    report = Report(name="defects")
    for stage in STAGES:
        here = [d for d in found if d.stage == stage]
        report.rows.append({
            "stage": stage, "defects": len(here), "share": len(here) / len(found) if found else 0.0,
            "symptoms": _count([d.symptom for d in here]), "causes": _count([d.cause for d in here]),
        })  # fmt: skip
    repro = [d for d in found if d.symptom == "reproducibility"]
    place = [d for d in found if d.stage == "environment"]
    shares = {
        "reported by re-users": ([d for d in found if d.who == "re-user"], found),
        "reproducibility defects found in training": ([d for d in repro if d.stage == "training"], repro),
        "environment defects about interfaces": ([d for d in place if d.cause == "interface mismatch"], place),
    }
    report.summary = {"defects": float(len(found))}
    for name, (part, whole) in shares.items():
        own = f"{len(part)} of {len(whole)}" + (f" ({len(part) / len(whole):.0%})" if whole else "")
        report.notes.append(f"{name}: {own} here, {STUDY[name]:.0%} in the study")
        if whole:
            report.summary[name] = len(part) / len(whole)
    report.notes.append(
        f"the study: {STUDY['defects']} defects of {STUDY['projects']} open-source projects (arXiv 2303.07476)"
    )
    return report


def _count(values: list[str]) -> str:
    return ", ".join(f"{v} {values.count(v)}" for v in sorted(set(values), key=lambda v: (-values.count(v), v)))
