"""`lynceus diff A B`: the first module in which two models differ, or two reports side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

from lynceus.cli._models import open_model, size_of, twin_of
from lynceus.cli._run import show
from lynceus.cli._schema import parse


@dataclass(frozen=True, kw_only=True)
class Options:
    """Two models: run on the same images in float64 and compared module by module; exit code 1 when they differ.
    Two reports (report.json or the folders that hold them): before and after."""

    a: Positional[str]  # model name, timm:NAME, run folder, or report.json
    b: Positional[str]  # the same kind of thing
    size: tuple[int, int] | None = None  # height and width of the images; default: the size that A was made for
    weights_a: Path | None = None  # checkpoint for A
    weights_b: Path | None = None  # checkpoint for B; default: that of A, or equal fresh weights
    tolerance: float = 1e-6  # largest relative difference that counts as equal
    seed: int = 0  # of the images and of fresh weights
    out: Path | None = None  # folder for report.html and report.json


def main(argv: Sequence[str]) -> int:
    options = parse(Options, argv, prog="lynceus diff")
    if _is_report(options.a) and _is_report(options.b):
        from lynceus.core.report import Report

        report = Report.load(options.a).against(Report.load(options.b))
        pair = f"Report.load({options.a!r}).against(Report.load({options.b!r}))"
        twin = f"from lynceus import Report\n\nprint({pair}.table())"
        show(report, out=options.out, twin=twin)
        return 0
    from lynceus.core.rng import borrowed, generator
    from lynceus.reengineer.divergence import diff

    with borrowed(options.seed):
        a = open_model(options.a, weights=options.weights_a)
    with borrowed(options.seed):
        b = open_model(options.b, weights=options.weights_b or options.weights_a)
    import torch

    images = torch.rand(2, 3, *size_of(a, options.size), generator=generator(options.seed, "diff"), dtype=torch.float64)
    report = diff(a, b, images, tolerance=options.tolerance)
    first, second = (
        twin_of(options.a, weights=options.weights_a),
        twin_of(options.b, weights=options.weights_b or options.weights_a),
    )
    lines = dict.fromkeys(["import torch", first[0], second[0], "from lynceus.reengineer.divergence import diff"])
    twin = "\n".join(lines) + f"\n\nprint(diff({first[1]}, {second[1]}, torch.rand{tuple(images.shape)!r}).table())"
    show(report, out=options.out, twin=twin)
    return int(report.summary["exit_code"])


def _is_report(text: str) -> bool:
    path = Path(text)
    if path.is_file() and path.suffix == ".json":
        return path.name == "report.json" or '"environment"' in path.read_text(errors="ignore")
    return path.is_dir() and (path / "report.json").is_file() and not list(path.glob("*.safetensors"))
