"""`lynceus train distil DATA --student RUN --teacher RUN`: a rewritten model learns its accuracy back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from lynceus.cli._run import Code, call, options_kept, run_folder, show
from lynceus.cli._schema import parse, real, skeleton, with_options
from lynceus.core.config import dump_yaml

FIT, METHOD = "lynceus.train.fit:FitConfig", "lynceus.recipes.distil:DistilConfig"


@dataclass(frozen=True, kw_only=True)
class Options:
    """Finetunes a rewritten model (pruned, adapted) towards the labels and the answers of the model it was made of;
    writes checkpoints, log, report and the model into one run folder."""

    data: Positional[str]  # labelled images of the model's classes, as for `lynceus train classify`
    student: Path  # folder of `lynceus rewrite`; it stays as it is
    teacher: Path  # run folder of the model that was rewritten
    limit: int | None = None  # use at most this many images, each class thinned alike
    val: float = 0.2  # share of the images set aside, where the data has no split of its own
    preset: Literal["auto", "plain", "small", "photo", "fine-tune"] = "auto"  # crops, shifts and flips
    resume: bool = False  # go on with the run in --out
    out: Path | None = None  # run folder; default: runs/distil/STUDENT


def main(argv: Sequence[str]) -> int:
    gentle = skeleton(FIT)(epochs=2, lr=5e-4)  # recipes.distil.GENTLE
    schema = with_options(Options, defaults={"fit": gentle}, method=METHOD, fit=FIT)
    options = parse(schema, argv, prog="lynceus train distil")
    import lynceus.data
    from lynceus.cli._models import open_model
    from lynceus.cli.train import difference_of
    from lynceus.recipes.distil import distil

    method, fitting = real(options.method), real(options.fit)
    student, teacher = (open_model(str(p.resolve())) for p in (options.student, options.teacher))
    dataset = lynceus.data.open(options.data, limit=options.limit)
    out = run_folder(options.out, "distil", options.student.name, resume=options.resume)
    if not options.fit.quiet:
        print(f"data: {dataset!r}\nrun folder: {out.resolve()}\n")
    with options_kept(out, dump_yaml(options)):
        _, report = distil(
            student, teacher, dataset, config=method, fitting=fitting, held_out=options.val, preset=options.preset,
            out=out, resume=options.resume,
        )  # fmt: skip
    more = f", limit={options.limit}" if options.limit else ""
    loaded = [Code(f"load_model({str(p)!r})") for p in (options.student, options.teacher)]
    twin = (
        "import lynceus.data\nfrom lynceus import FitConfig\nfrom lynceus.recipes.distil import DistilConfig, distil\n"
        "from lynceus.train.checkpoint import load_model\n\nmodel, report = "
        + call(
            "distil", *loaded, Code(f"lynceus.data.open({options.data!r}{more})"), config=Code(difference_of(method)),
            fitting=Code(difference_of(fitting)), held_out=options.val, preset=options.preset, out=str(out),
        )
    )  # fmt: skip
    show(report, out=out, twin=twin, quiet=options.fit.quiet)
    print(f"\nnext:\n    lynceus check accuracy {out} {options.data}\n    lynceus predict {out} PICTURES")
    return 0
