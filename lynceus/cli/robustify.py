"""`lynceus train robustify DATA --big RUN --teacher RUN`: a trained model made robust at a part of the cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from lynceus.cli._models import looks_like_path, open_model
from lynceus.cli._run import Code, call, run_folder, show
from lynceus.cli._schema import parse, real, skeleton, with_options
from lynceus.core.config import dump_yaml

FIT, METHOD = "lynceus.train.fit:FitConfig", "lynceus.recipes.robustify:RobustifyConfig"
MIXING = "lynceus.data.augmix:AugMixConfig"


@dataclass(frozen=True, kw_only=True)
class Options:
    """Makes a trained classifier robust to corruptions by tuning its last blocks and two further heads with a small
    robust teacher; writes checkpoints, log, report and the model into one run folder."""

    data: Positional[str]  # labelled images of the model's classes, as for `lynceus train classify`
    big: Path  # run folder of the trained model; it stays as it is
    teacher: str  # run folder of a small robust model, or a name: it is then trained with AugMix first
    limit: int | None = None  # use at most this many images, each class thinned alike
    val: float = 0.2  # share of the images set aside, where the data has no split of its own
    preset: Literal["auto", "plain", "small", "photo"] = "auto"  # crops, shifts and flips
    resume: bool = False  # go on with the run in --out
    out: Path | None = None  # run folder; default: runs/robustify/BIG


def main(argv: Sequence[str]) -> int:
    gentle = skeleton(FIT)(epochs=3, lr=1e-3)  # recipes.robustify.TUNE
    schema = with_options(Options, defaults={"fit": gentle}, method=METHOD, mixing=MIXING, fit=FIT)
    options = parse(schema, argv, prog="lynceus train robustify")
    import lynceus.data
    from lynceus.backbones import check_name
    from lynceus.cli.train import difference_of
    from lynceus.recipes.robustify import robustify

    by_name = options.teacher.startswith("timm:") or not looks_like_path(options.teacher)
    if by_name:
        check_name(options.teacher)
    big = open_model(str(options.big.resolve()))
    teacher = options.teacher if by_name else open_model(options.teacher)
    dataset = lynceus.data.open(options.data, limit=options.limit)
    out = run_folder(options.out, "robustify", options.big.name, resume=options.resume)
    if not options.fit.quiet:
        print(f"data: {dataset!r}\nrun folder: {out.resolve()}\n")
    (out / "options.yaml").write_text(dump_yaml(options), encoding="utf-8")
    method, mixing, fitting = real(options.method), real(options.mixing), real(options.fit)
    _, report = robustify(
        big, teacher, dataset, config=method, mixing=mixing, fitting=fitting, held_out=options.val,
        preset=options.preset, out=out, resume=options.resume,
    )  # fmt: skip
    more = f", limit={options.limit}" if options.limit else ""
    loaded = [Code(f"load_model({str(p)!r})") for p in (options.big, options.teacher)]
    twin = (
        "import lynceus.data\nfrom lynceus import FitConfig\nfrom lynceus.data.augmix import AugMixConfig\n"
        "from lynceus.recipes.robustify import RobustifyConfig, robustify\n"
        "from lynceus.train.checkpoint import load_model\n\nrobust, report = "
        + call(
            "robustify", loaded[0], options.teacher if by_name else loaded[1],
            Code(f"lynceus.data.open({options.data!r}{more})"), config=Code(difference_of(method)),
            mixing=Code(difference_of(mixing)), fitting=Code(difference_of(fitting)), held_out=options.val,
            preset=options.preset, out=str(out),
        )
    )  # fmt: skip
    show(report, out=out, twin=twin, quiet=options.fit.quiet)
    print(f"\nnext:\n    lynceus check accuracy {out} {options.data}\n    lynceus predict {out} PICTURES")
    return 0
