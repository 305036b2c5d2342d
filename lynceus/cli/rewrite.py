"""`lynceus rewrite NAME MODEL`: a changed model, saved like a trained one; the old one stays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

from lynceus.cli._models import open_model, twin_of
from lynceus.cli._run import run_folder, show
from lynceus.cli._schema import merged, one_of, parse, with_options

# name -> (class, one line)
REWRITES: dict[str, tuple[str, str]] = {
    "crop_selection": ("lynceus.rewrite.crop_selection:CropSelection", "the image chooses its own crop, so small shifts change nothing"),
}


@dataclass(frozen=True, kw_only=True)
class Options:
    """One rewrite of one model, saved to a folder; before and after are measured when data is given."""

    model: Positional[str]  # a name of `lynceus models`, timm:NAME, or the run folder of a trained model
    data: str | None = None  # images on which before and after are compared
    split: str | None = None  # train, val or test, where the source has them
    limit: int | None = None  # look at this many images
    weights: Path | None = None  # checkpoint for a model given by name
    seed: int = 0  # of every random choice
    out: Path | None = None  # folder; default: runs/rewrite/NAME


def main(argv: Sequence[str]) -> int:
    name, rest = one_of("rewrite", REWRITES, argv, usage="lynceus rewrite NAME MODEL [options]")
    if name is None:
        return 0
    target = REWRITES[name][0]
    options = parse(with_options(Options, rewrite=target), rest, prog=f"lynceus rewrite {name}", description=REWRITES[name][1])
    out = run_folder(options.out, "rewrite", name)
    import lynceus.data
    from lynceus.rewrite.apply import apply

    model = open_model(options.model, weights=options.weights)
    rewrite = merged(options, "rewrite")
    data = None if options.data is None else lynceus.data.open(options.data, split=options.split, limit=options.limit)
    _, report = apply(rewrite, model, data, out=out, seed=options.seed)
    line, expression = twin_of(options.model, weights=options.weights)
    module, kind = target.split(":")
    source = "None" if options.data is None else f"lynceus.data.open({options.data!r}, split={options.split!r}, limit={options.limit!r})"
    twin = (
        f"import lynceus.data\n{line}\nfrom {module} import {kind}\nfrom lynceus.rewrite.apply import apply\n\n"
        f"model, report = apply({rewrite!r}, {expression}, {source}, out={str(out)!r})\nprint(report.table())"
    )
    show(report, out=out, twin=twin)
    return 0
