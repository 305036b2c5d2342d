"""`lynceus cost MODEL`: parameters, MACs, memory and time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

from lynceus.cli._models import open_model, twin_of
from lynceus.cli._run import show
from lynceus.cli._schema import parse


@dataclass(frozen=True, kw_only=True)
class Options:
    """Parameters, multiply-adds (MACs), peak activation memory and latency of a model, and what was not counted."""

    model: Positional[str]  # a name of `lynceus models`, timm:NAME, or a run folder
    size: tuple[int, int] | None = None  # height and width; default: the size the model was made for
    batch: int = 1  # images at once
    threads: int | None = None  # CPU threads for the timing; default: torch's
    out: Path | None = None  # folder for report.html and report.json


def main(argv: Sequence[str]) -> int:
    options = parse(Options, argv, prog="lynceus cost")
    from lynceus.core.cost import CostCheck
    from lynceus.core.subject import Subject

    model = open_model(options.model)
    check = CostCheck(size=options.size, batch=options.batch, threads=options.threads)
    report = check(Subject(model), [])
    line, expression = twin_of(options.model)
    twin = (
        f"{line}\nfrom lynceus import Subject\nfrom lynceus.core.cost import CostCheck\n\n"
        f"print({check!r}(Subject({expression}), []).table())"
    )
    show(report, out=options.out, twin=twin)
    return 0
