"""`lynceus gauntlet DATA`: which backbone should I take for these images?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from lynceus.cli._run import Code, call, show
from lynceus.cli._schema import merged, parse, take_option, with_options
from lynceus.core.config import dump_yaml

CONFIG = "lynceus.gauntlet.run:GauntletConfig"
NANOS = (  # one of every family; written out, since help must not import torch
    "convit_nano",
    "convnext_nano",
    "cvt_nano",
    "halonet_nano",
    "hornet_nano",
    "hyena_vit_nano",
    "lsnet_nano",
    "plain_mamba_nano",
    "resnas_nano",
    "resnet_nano",
    "sam_vit_nano",
    "soft_nano",
    "spartan_nano",
    "swin_nano",
    "swin_v2_nano",
    "vim_nano",
    "vit_nano",
    "volo_nano",
)


@dataclass(frozen=True, kw_only=True)
class Options:
    """Several models through one course under equal conditions, ranked, with an answer in words. A run that was
    interrupted goes on with the same command. --preset demo or cifar10 sets other defaults.

    models: names of `lynceus models`, timm:NAME, run folders, 'raw pixels', HOG, 'colour histogram'"""

    data: Positional[str] = "digits"  # digits, a folder with one folder per class, a .parquet, .csv or .json file
    test: str | None = None  # data to test on; default: the data's own test split, or a stratified share
    models: tuple[str, ...] = NANOS
    engine: Literal["local", "ray"] = "local"  # where the work runs
    fresh: bool = False  # throw away what an earlier run left in the folder
    quiet: bool = False  # no progress and no table
    out: Path | None = None  # folder; default: runs/gauntlet/DATA


def main(argv: Sequence[str], *, verb: str = "gauntlet", preset: str | None = None) -> int:
    argv = list(argv)
    preset = take_option(argv, "--preset") or preset
    defaults = {}
    if preset is not None and not {"-h", "--help"} & set(argv):
        from lynceus.gauntlet.run import preset as named

        defaults = {"config": named(preset)}
    options = parse(with_options(Options, defaults=defaults, config=CONFIG), argv, prog=f"lynceus {verb}")
    import lynceus.data
    from lynceus.core.errors import AdviceError
    from lynceus.gauntlet.run import gauntlet

    out = options.out or Path("runs") / verb / Path(options.data).stem
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise AdviceError(
            f"{out.resolve()} cannot be written ({error.strerror}). Choose another folder with --out FOLDER."
        ) from None
    dataset = lynceus.data.open(options.data)
    data = dataset if options.test is None else (dataset, lynceus.data.open(options.test))
    if not options.quiet:
        print(f"data: {dataset!r}\ncandidates: {', '.join(options.models)}\nfolder: {out.resolve()}\n", flush=True)
    config = merged(options, "config")
    (out / "options.yaml").write_text(dump_yaml(options), encoding="utf-8")
    report = gauntlet(
        options.models,
        data,
        config=config,
        out=out,
        resume=not options.fresh,
        engine=options.engine,
        quiet=options.quiet,
    )
    from lynceus.cli.train import difference_of

    source = call("lynceus.data.open", options.data)
    if options.test is not None:
        source = f"({source}, {call('lynceus.data.open', options.test)})"
    twin = "import lynceus.data\nfrom lynceus.gauntlet.run import GauntletConfig, gauntlet\n\nreport = " + call(
        "gauntlet", list(options.models), Code(source), config=Code(difference_of(config)), out=str(out),
        engine=None if options.engine == "local" else options.engine,
    )  # fmt: skip
    show(report, out=out, twin=twin + "\nprint(report.table())", quiet=options.quiet)
    return 0
