"""`lynceus check NAME MODEL DATA`: one check of one model."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from tyro.conf import Positional

from lynceus.cli._models import is_name, open_subject, takes_pixels, twin_of
from lynceus.cli._run import run_folder, show
from lynceus.cli._schema import merged, one_of, parse, with_options

# name -> (class, one line)
CHECKS: dict[str, tuple[str, str]] = {
    "accuracy": ("lynceus.train.evaluate:Evaluate", "accuracy, calibration and confusion of a trained classifier"),
    "knn": ("lynceus.gauntlet.probes:KNN", "nearest neighbours on frozen features"),
    "svm": ("lynceus.gauntlet.probes:LinearSVM", "linear SVM on frozen features"),
    "logistic": ("lynceus.gauntlet.probes:Logistic", "logistic regression on frozen features"),
    "linear": ("lynceus.gauntlet.probes:LinearProbe", "batch-normalised linear probe on frozen features"),
    "fewshot": ("lynceus.gauntlet.probes:FewShot", "a few labels per class on frozen features"),
    "retrieval": ("lynceus.gauntlet.retrieval:Retrieval", "finding the same picture or class by frozen features"),
    "edits": ("lynceus.trust.edits.audits:Edits", "which attribute of the scene does the model lean on?"),
    "shift": ("lynceus.trust.shift:ShiftConsistency", "does the answer change when the camera moves by a pixel?"),
    "fooling": ("lynceus.trust.fooling:Fooling", "meaningless images that the model names with near certainty"),
    "attacks": ("lynceus.trust.attacked:Attacked", "accuracy when every image may be changed within a small ball"),
    "blind-spots": ("lynceus.trust.level_sets:BlindSpots", "pictures of something else that the model is as sure of"),
    "attribution": ("lynceus.explain.worst_cases:Attribution", "which pixels the worst answers rest on"),
    "game": ("lynceus.trust.game:Game", "how few painted pixels change the answer, found from outputs alone?"),
    "corrupted": ("lynceus.trust.corrupted:Corrupted", "noise, blur, weather, digital damage at five severities; mCE"),
    "verify": ("lynceus.trust.verified:Verify", "which answers are proven, and how far may an image move?"),
    "scaling": ("lynceus.gauntlet.scaling:DataScaling", "how accuracy grows with data, and what more data would bring"),
    "all": (
        "lynceus.gauntlet.trust_report:TrustReport",
        "every check of trust that fits, in one report under one budget",
    ),
    "cost": ("lynceus.core.cost:CostCheck", "parameters, multiply-adds, memory, latency"),
}


@dataclass(frozen=True, kw_only=True)
class Options:
    """One check of one model on one data set."""

    model: Positional[str]  # a name of `lynceus models`, timm:NAME, a run folder, http://HOST/PATH, python:MODULE:NAME
    data: Positional[str] = "digits"  # digits, a folder, a .parquet, .csv or .json file
    split: str | None = None  # train, val or test, where the source has them
    limit: int | None = None  # look at this many images, spread evenly
    resize: int | None = None  # side that images are resized to before the model; default: as they are
    weights: Path | None = None  # checkpoint for a model given by name
    seed: int = 0  # of every random choice
    out: Path | None = None  # folder for report.html and report.json


def main(argv: Sequence[str]) -> int:
    name, rest = one_of("check", CHECKS, argv, usage="lynceus check NAME MODEL DATA [options]")
    return 0 if name is None else run(name, rest, prog=f"lynceus check {name}")


def run(name: str, argv: Sequence[str], *, prog: str) -> int:
    """One check by its name, with the options that follow it."""
    target = CHECKS[name][0]
    options = parse(with_options(Options, check=target), argv, prog=prog, description=CHECKS[name][1])
    check = merged(options, "check")
    _sensible(check)
    import lynceus.data
    from lynceus.core.rng import borrowed

    dataset = lynceus.data.open(options.data, split=options.split, limit=options.limit)
    if options.out is not None:
        run_folder(options.out, "check", name, resume=True)  # a folder that cannot be written is said before the work
    classes = len(dataset.classes) if dataset.classes else None
    asked = _asked(check)
    if options.out is not None and getattr(check, "keep", options.out) is None:
        check = replace(check, keep=options.out)  # finished pieces: a second run of the same command goes on
    untrained = options.weights is None and is_name(options.model)
    with borrowed(options.seed, "weights"):  # a model by its name alone: the same random weights in every run
        subject = open_subject(
            options.model, weights=options.weights, num_classes=classes, classes=dataset.classes, size=options.resize
        )
    untold = (
        f"{options.model} has random weights, drawn with seed {options.seed}: it has learnt nothing, and neither do "
        "figures of its answers tell anything. Give --weights FILE, or the run folder of `lynceus train`."
    )
    if untrained:
        print(f"lynceus check: {untold}", file=sys.stderr)
    try:
        report = check(subject, dataset, seed=options.seed)
    except KeyboardInterrupt:
        keeps = getattr(check, "keep", None)
        how = f"finished pieces are kept in {keeps}; the same command goes on" if keeps else "nothing was kept"
        raise KeyboardInterrupt(f"interrupted; {how}.") from None
    if untrained:
        report.notes.append(untold)
    line, expression = twin_of(options.model, weights=options.weights, num_classes=classes)
    module, kind = target.split(":")
    more = "".join(f", {k}={v!r}" for k, v in (("split", options.split), ("limit", options.limit)) if v is not None)
    size = f", size={options.resize}" if options.resize else ""
    if options.model.startswith("python:") and takes_pixels(subject.model):
        size += ", mean=(0.0,) * 3, std=(1.0,) * 3"
    if untrained:
        line += "\nfrom lynceus.core.rng import borrowed"
        made, expression = expression, "model"
        before = f'with borrowed({options.seed}, "weights"):\n    model = {made}\n'
    else:
        before = ""
    twin = (
        f"import lynceus.data\nfrom lynceus import Subject\n{line}\nfrom {module} import {kind}\n\n{before}"
        f"data = lynceus.data.open({options.data!r}{more})\n"
        f"report = {asked}(Subject({expression}{size}), data, seed={options.seed})\nprint(report.table())"
    )
    show(report, out=options.out, twin=twin)
    return 0


def _asked(check: Any) -> str:
    """Source text of `check`, with what differs from its defaults."""
    given = {f.name: getattr(check, f.name) for f in fields(check)}
    changed = {f.name: given[f.name] for f in fields(check) if given[f.name] != f.default}
    parts = [f"{name}={(str(v) if isinstance(v, Path) else v)!r}" for name, v in changed.items()]
    return f"{type(check).__name__}({', '.join(parts)})"


def _sensible(check: Any) -> None:
    """Numbers that mean nothing, before the data is opened. Whoever gives a check no time at all wants no check."""
    from lynceus.core.errors import AdviceError
    from lynceus.core.guard import sensible

    sensible(check)
    if getattr(check, "seconds", None) == 0:
        raise AdviceError("--seconds 0 leaves no time for a single image; give more, or leave it out for no limit.")
