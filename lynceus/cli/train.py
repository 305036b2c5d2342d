"""`lynceus train classify DATA`: a model for your images. `robustify` and `specialise` are in files of their own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from lynceus.cli._run import Code, call, run_folder, show
from lynceus.cli._schema import load_function, parse, real, with_options
from lynceus.core.config import dump_yaml

FIT = "lynceus.train.fit:FitConfig"


@dataclass(frozen=True, kw_only=True)
class Options:
    """Trains a backbone on labelled images; writes checkpoints, log, report and the model into one run folder.

    `lynceus train robustify` makes a trained model robust, `lynceus train specialise` small models of another task."""

    task: Positional[Literal["classify", "classification"]]  # what to learn
    data: Positional[str]  # a folder with one folder per class, a .csv, .parquet or COCO .json file, or digits
    model: str = "resnet_nano"  # a name of `lynceus models`, or timm:NAME
    weights: Path | None = None  # checkpoint to start from (the classifier is made new)
    size: int | None = None  # side of the square that images are brought to; default: by images and model
    limit: int | None = None  # use at most this many images, each class thinned alike
    val: float = 0.2  # share of the images set aside, where the data has no split of its own
    preset: Literal["auto", "plain", "small", "photo", "fine-tune"] = "auto"  # augmentation
    recipe: Literal["supervised", "augmix"] = "supervised"  # augmix: robust to corruptions, three times the work
    label_smoothing: float = 0.0  # share of the target spread over all classes
    loss: str | None = None  # a function of your own, module:function, (raw, batch) -> {"loss": tensor}
    resume: bool = False  # go on with the run in --out
    out: Path | None = None  # run folder; default: runs/train/MODEL


def main(argv: Sequence[str]) -> int:
    if argv and argv[0] == "robustify":
        from lynceus.cli import robustify

        return robustify.main(argv[1:])
    if argv and argv[0] == "distil":
        from lynceus.cli import distil

        return distil.main(argv[1:])
    if argv and argv[0] == "specialise":
        from lynceus.cli import specialise

        return specialise.main(argv[1:])
    options = parse(with_options(Options, fit=FIT), argv, prog="lynceus train")
    loss = None if options.loss is None else load_function(options.loss, "--loss")
    name = options.model.replace(":", "-").replace("/", "-")
    import lynceus.data
    from lynceus.backbones import check_name
    from lynceus.recipes.classify import train_classifier

    check_name(options.model)
    dataset = lynceus.data.open(options.data, limit=options.limit)
    out = run_folder(options.out, "train", name, resume=options.resume)
    if not options.fit.quiet:
        print(f"data: {dataset!r}\nrun folder: {out.resolve()}\n")
    config = real(options.fit)
    (out / "options.yaml").write_text(dump_yaml(options), encoding="utf-8")
    arguments = {
        "size": options.size,
        "held_out": options.val,
        "preset": options.preset,
        "recipe": options.recipe,
        "label_smoothing": options.label_smoothing or None,
        "weights": str(options.weights) if options.weights else None,
    }
    _, report = train_classifier(
        dataset,
        options.model,
        config=config,
        loss=loss,
        out=out,
        resume=options.resume,
        **{k: v for k, v in arguments.items() if v is not None},
    )
    more = f", limit={options.limit}" if options.limit else ""
    lines = [
        "import lynceus.data",
        "from lynceus import FitConfig",
        "from lynceus.recipes.classify import train_classifier",
    ]
    if options.loss:
        lines.insert(0, "from {} import {}".format(*options.loss.split(":")))
        arguments["loss"] = Code(options.loss.split(":")[1])
    source = Code(f"lynceus.data.open({options.data!r}{more})")
    twin = (
        "\n".join(lines)
        + "\n\npredictor, report = "
        + call("train_classifier", source, options.model, **arguments, config=Code(difference_of(config)), out=str(out))
    )
    show(report, out=out, twin=twin, quiet=options.fit.quiet)
    print(
        f"\nnext:\n    lynceus predict {out} PICTURES\n    lynceus export {out}\n"
        f"    lynceus train --config {out / 'options.yaml'} {options.task} {options.data}"
    )
    return 0


def difference_of(config: object) -> str:
    """Source text of a configuration: only what differs from its defaults."""
    import dataclasses

    changed = {
        f.name: getattr(config, f.name)
        for f in dataclasses.fields(config)  # type: ignore[arg-type]
        if f.default is not dataclasses.MISSING and getattr(config, f.name) != f.default
    }
    return call(type(config).__name__, **changed)
