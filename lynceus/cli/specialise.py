"""`lynceus train specialise DATA --base RUN`: small models of another task out of a trained one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from lynceus.cli._models import open_model
from lynceus.cli._run import Code, call, options_kept, run_folder, show
from lynceus.cli._schema import parse, real, skeleton, with_options
from lynceus.core.config import dump_yaml

FIT, METHOD = "lynceus.train.fit:FitConfig", "lynceus.recipes.specialise:SpecialiseConfig"


@dataclass(frozen=True, kw_only=True)
class Options:
    """Adapts a trained classifier to labelled images while its channels are pruned step by step; every density gets a
    folder with the fused model and its small delta, which `lynceus rewrite apply_delta` puts onto the base again."""

    data: Positional[str]  # labelled images, as for `lynceus train classify`
    base: Path  # run folder of the trained model; it stays as it is
    limit: int | None = None  # use at most this many images, each class thinned alike
    val: float = 0.2  # share of the images set aside, where the data has no split of its own
    preset: Literal["auto", "plain", "small", "photo"] = "auto"  # crops, shifts and flips
    kind: Literal["splora", "sppara", "splopa"] = "splora"  # adapters: low rank, full at the central tap, prototypes
    rank: float = 8  # of splora: whole, or a share below 1 of the outputs
    full: str | None = None  # regular expression: layers that learn whole; a new classifier does anyway
    fine_tune: bool = False  # learn all weights instead of adapters, for comparison
    resume: bool = False  # go on after the last finished density in --out
    out: Path | None = None  # run folder; default: runs/specialise/BASE


def main(argv: Sequence[str]) -> int:
    gentle = skeleton(FIT)(lr=2e-3, weight_decay=5e-4)  # recipes.specialise.SPECIALISE
    schema = with_options(Options, defaults={"fit": gentle}, method=METHOD, fit=FIT)
    options = parse(schema, argv, prog="lynceus train specialise")
    import lynceus.data
    from lynceus.cli.train import difference_of
    from lynceus.recipes.specialise import specialise
    from lynceus.rewrite.adapters import Adapt

    method, fitting = real(options.method), real(options.fit)
    adapter = None
    if not options.fine_tune:
        rank = int(options.rank) if float(options.rank).is_integer() else options.rank
        adapter = Adapt(kind=options.kind, rank=rank, full=options.full, seed=fitting.seed)
    base = open_model(str(options.base.resolve()))
    dataset = lynceus.data.open(options.data, limit=options.limit)
    out = run_folder(options.out, "specialise", options.base.name, resume=options.resume)
    if not options.fit.quiet:
        print(f"data: {dataset!r}\nrun folder: {out.resolve()}\n")
    with options_kept(out, dump_yaml(options)):
        made, report = specialise(
            base, dataset, adapter=adapter, config=method, fitting=fitting, held_out=options.val,
            preset=options.preset, out=out, resume=options.resume,
        )  # fmt: skip
    more = f", limit={options.limit}" if options.limit else ""
    twin = (
        "import lynceus.data\nfrom lynceus import FitConfig\nfrom lynceus.recipes.specialise import SpecialiseConfig, "
        "specialise\nfrom lynceus.rewrite.adapters import Adapt\nfrom lynceus.train.checkpoint import load_model\n\n"
        "models, report = "
        + call(
            "specialise", Code(f"load_model({str(options.base)!r})"),
            Code(f"lynceus.data.open({options.data!r}{more})"),
            adapter=Code("None" if adapter is None else difference_of(adapter)), config=Code(difference_of(method)),
            fitting=Code(difference_of(fitting)), held_out=options.val, preset=options.preset, out=str(out),
        )
    )  # fmt: skip
    show(report, out=out, twin=twin, quiet=options.fit.quiet)
    last = out / f"left-{round(100 * made[-1].left):02d}"
    print(f"\nnext:\n    lynceus check accuracy {last} {options.data}")
    if adapter is not None:
        print(f"    lynceus rewrite apply_delta {options.base} --delta {last / 'delta.safetensors'}")
    return 0
