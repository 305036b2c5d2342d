"""`lynceus predict MODEL SOURCE`: what a trained model says of pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tyro.conf import Positional

from lynceus.cli._models import looks_like_path, open_model, twin_of
from lynceus.cli._run import run_folder, show
from lynceus.cli._schema import parse
from lynceus.core.errors import AdviceError

TASKS = ("classify", "classification")


@dataclass(frozen=True, kw_only=True)
class Options:
    """A row per picture on the screen; predictions.csv, one picture each with its answer, and report.html in the
    folder."""

    model: Positional[str]  # the run folder of a trained model, or a .safetensors file of one
    source: Positional[str]  # a picture, a folder, or whatever `lynceus data` reads
    batch_size: int = 64  # pictures at once
    device: str | None = None  # cpu, cuda, mps; default: what there is
    pictures: int = 200  # write at most this many pictures with their answers drawn in
    quiet: bool = False  # no progress and no table
    out: Path | None = None  # folder; default: runs/predict/MODEL


def main(argv: Sequence[str]) -> int:
    argv = list(argv)
    if argv and argv[0] in TASKS:  # `lynceus predict classify MODEL SOURCE` says the same
        argv = argv[1:]
    options = parse(Options, argv, prog="lynceus predict")
    if not looks_like_path(options.model):
        raise AdviceError(
            f"{options.model!r} is no run folder, and a fresh network knows nothing: train one with "
            f"`lynceus train classify YOUR_IMAGES --model {options.model}`, then "
            f"`lynceus predict runs/train/{options.model} SOURCE`."
        )
    out = run_folder(options.out, "predict", Path(options.model).resolve().name)
    from lynceus.core.progress import track
    from lynceus.train.predict import predict, to_csv

    model = open_model(options.model)
    found = predict(model, options.source, batch_size=options.batch_size, device=options.device, quiet=options.quiet)
    to_csv(found, out / "predictions.csv")
    for i, prediction in enumerate(track(found[: options.pictures], "drawing", quiet=options.quiet)):
        prediction.save(out / "pictures" / f"{i:05d}_{_plain(prediction.id)}.png")
    line, expression = twin_of(options.model)
    twin = (
        f"{line}\nfrom lynceus.train.predict import predict\n\n"
        f"for prediction in predict({expression}, {options.source!r}):\n"
        "    print(prediction.id, prediction.name, prediction.to_dict())"
    )
    show(_report(found, getattr(model, "classes", None)), out=out, twin=twin, quiet=options.quiet)
    print(f"table: {(out / 'predictions.csv').resolve()}\npictures: {(out / 'pictures').resolve()}")
    return 0


def _plain(text: str) -> str:
    """An id as part of a file name."""
    return "".join(c if c.isalnum() or c in "-_." else "_" for c in Path(text).stem)[:80]


def _report(found: list[Any], names: list[str] | None) -> Any:
    from lynceus.core.plots import image_grid
    from lynceus.core.report import Report

    rows = []
    for p in found:
        row: dict[str, Any] = {"picture": p.id, "answer": p.name if p.name is not None else p.label}
        if p.scores is not None:
            best = p.scores.topk(min(2, len(p.scores)))
            row["confidence"] = float(best.values[0])
            if len(best.indices) > 1:
                second = int(best.indices[1])
                row |= {"next": names[second] if names else second, "its confidence": float(best.values[1])}
        rows.append(row)
    figures = {}
    shown = [p for p in found if p.image is not None][:24]
    if shown:
        figures["pictures.png"] = image_grid([p.image for p in shown], [f"{p.name or p.label}" for p in shown])
    sure = [r["confidence"] for r in rows if "confidence" in r]
    summary = {"pictures": float(len(rows))} | ({"mean confidence": sum(sure) / len(sure)} if sure else {})
    return Report(name="predictions", rows=rows, summary=summary, figures=figures)
