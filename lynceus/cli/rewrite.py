"""`lynceus rewrite NAME MODEL`: a changed model, saved like a trained one; the old one stays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tyro.conf import Positional

from lynceus.cli._models import is_name, open_model, size_of, twin_of
from lynceus.cli._run import call, run_folder, show
from lynceus.cli._schema import merged, one_of, parse, with_options
from lynceus.cli.train import difference_of
from lynceus.core.errors import AdviceError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from lynceus.core.report import Report

JUDGES = 512  # images that `deploy` compares answers on unless --limit says otherwise

# name -> (class, one line)
REWRITES: dict[str, tuple[str, str]] = {
    "crop_selection": (
        "lynceus.rewrite.crop_selection:CropSelection",
        "the image chooses its own crop, so small shifts change nothing",
    ),
    "swap": (
        "lynceus.rewrite.swap:Swap",
        "other token mixers (attention, hyena, ...) in some blocks; all else keeps its weights",
    ),
    "haloify": (
        "lynceus.rewrite.haloify:Haloify",
        "halo attention in place of 3x3 convolutions, as in HaloNet",
    ),
    "expedite": (
        "lynceus.rewrite.expedite.rewrite:Expedite",
        "some blocks of a transformer run on clusters of tokens; no training, same shapes and weights",
    ),
    "prune_tokens": (
        "lynceus.rewrite.prune_tokens.rewrite:PruneTokens",
        "a Vim or PlainMamba drops unimportant tokens on its way, and knows where they stood",
    ),
    "block_prune": (
        "lynceus.rewrite.block_prune.rewrite:BlockPrune",
        "whole blocks of weights go, as a budget says; what is left runs as block-sparse products",
    ),
    "adapt": (
        "lynceus.rewrite.adapters.adapt:Adapt",
        "few learned numbers beside frozen weights, to train, prune and fuse",
    ),
    "fuse": (
        "lynceus.rewrite.adapters.adapt:Fuse",
        "adapters into the weights: plain layers, the same answers",
    ),
    "prune_channels": (
        "lynceus.rewrite.adapters.prune:PruneChannels",
        "the least important channels and heads go, with all that is coupled with them",
    ),
    "apply_delta": (
        "lynceus.rewrite.adapters.delta:ApplyDelta",
        "a base model and a small delta file give the task's pruned model",
    ),
    "deploy": (
        "lynceus.rewrite.deploy:Deploy",
        "the fastest way to run it on this machine that keeps its answers on your images",
    ),
}
# those with options and an output of their own: name -> (module with main, one line)
OWN: dict[str, tuple[str, str]] = {
    "streaming": (
        "lynceus.cli.rewrite_streaming",
        "a network of video, skeletons or tokens run one frame at a time, with the clip's outputs",
    ),
    "compare": ("lynceus.cli.rewrite_compare", "a model and what rewrites made of it: accuracy against measured time"),
    "split": (
        "lynceus.cli.rewrite_split",
        "sub-models for weak devices, each for some classes: cut, placed under limits, and fused (ED-ViT)",
    ),
    "vlm_tokens": (
        "lynceus.cli.rewrite_vlm",
        "a vision-language model of transformers drops image tokens on the way (FEATHER, FastV)",
    ),
}


@dataclass(frozen=True, kw_only=True)
class Options:
    """One rewrite of one model, saved to a folder; before and after are measured when data is given."""

    model: Positional[str]  # a name of `lynceus models`, timm:NAME, or the run folder of a trained model
    data: str | None = None  # images on which before and after are compared
    split: str | None = None  # train, val or test, where the source has them
    limit: int | None = None  # look at this many images
    size: tuple[int, int] | None = None  # height and width of the example; default: the model's own, else the data's
    batch: int = 8  # images of the example
    weights: Path | None = None  # checkpoint for a model given by name
    seed: int = 0  # of every random choice
    out: Path | None = None  # folder; default: runs/rewrite/NAME


def main(argv: Sequence[str]) -> int:
    name, rest = one_of("rewrite", {**REWRITES, **OWN}, argv, usage="lynceus rewrite NAME MODEL [options]")
    if name is None:
        return 0
    if name in OWN:
        return int(import_module(OWN[name][0]).main(rest))
    target = REWRITES[name][0]
    options = parse(
        with_options(Options, rewrite=target), rest, prog=f"lynceus rewrite {name}", description=REWRITES[name][1]
    )
    if options.batch < 1:
        raise AdviceError(f"--batch {options.batch}: the example has at least 1 image; 8 is the default.")
    if options.size is not None and min(options.size) < 1:
        raise AdviceError(f"--size takes height and width, such as --size 224 224, not {options.size}.")
    rewrite = merged(options, "rewrite")
    import torch

    import lynceus.data
    from lynceus.core.rng import generator
    from lynceus.core.subject import Subject
    from lynceus.train.checkpoint import save_model
    from lynceus.train.evaluate import first_images

    if is_name(options.model):
        torch.manual_seed(options.seed)  # a network without weights begins the same way each time
    model = open_model(options.model, weights=options.weights)
    data = None if options.data is None else lynceus.data.open(options.data, split=options.split, limit=options.limit)
    looks = max(options.batch, getattr(rewrite, "calibration", 0))
    if name == "deploy":
        looks = options.limit or JUDGES
    if data is None:
        size = size_of(model, options.size)
        pixels = torch.rand(options.batch, 3, *size, generator=generator(options.seed, "example"))
    else:
        pixels = first_images(data, model, looks, size=options.size)
    taken = pixels if data is None and name != "deploy" else Subject(model).prepare(pixels)
    out = run_folder(_apart(options), "rewrite", name)
    try:
        if name == "deploy":
            changed = rewrite(model, taken[: options.batch], None if data is None else list(taken.split(options.batch)))
        else:
            changed = rewrite(model, taken)
    except BaseException:
        if not any(out.iterdir()):
            out.rmdir()
        raise
    save_model(changed, out)
    try:
        report = _measured(
            options, name=name, model=model, changed=changed, data=data, pixels=pixels,
            guessed=data is None and hasattr(rewrite, "calibration"),
        )  # fmt: skip
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"interrupted; the changed model is in {out}, measured it is not.") from None
    twin = _twin(options, REWRITES[name][0], rewrite, out, looks=looks, shape=tuple(pixels.shape))
    if name == "deploy":
        after = f"the deployed model: {out}  (lynceus predict {out} PICTURES); on another machine, deploy it anew"
    else:
        after = f"the changed model: {out}  (lynceus predict {out} PICTURES, lynceus check accuracy {out} DATA)"
    show(report, out=out, twin=twin)
    print(f"\n{after}")
    return 0


def _measured(
    options: Any, *, name: str, model: nn.Module, changed: Any, data: Any, pixels: Tensor, guessed: bool
) -> Report:
    """The report of before and after. guessed: the rewrite chose on noise."""
    from lynceus.core.report import Report
    from lynceus.core.subject import Subject
    from lynceus.gauntlet.compare import compare

    report: Report
    if name == "deploy":
        report = changed.report
        if data is not None and options.limit is None and len(pixels) >= JUDGES:
            report.notes.append(f"The first {len(pixels)} images are judged on; --limit says how many.")
        return report
    sized: list[Any] = [model, changed]
    if data is not None and options.size is not None:
        sized = [Subject(m, size=options.size, needs_grad=False) for m in sized]
    report = compare(sized[0], sized[1], data, pixels[: options.batch], seed=options.seed)
    if guessed:
        report.notes.append(
            f"Without --data, {options.batch} images of noise stood for yours, and the choice was made on them."
        )
    if isinstance(getattr(changed, "report", None), Report):
        report.parts.append(changed.report)
    return report


def _apart(options: Any) -> Path | None:
    """--out, where nothing would be lost there or stay in front of what is written."""
    out: Path | None = options.out
    if out is None:
        return None
    if out.resolve() == Path(options.model).resolve():
        raise AdviceError(f"--out {out} is the model itself, which stays as it is; give another folder.")
    trained = [n for n in ("checkpoints", "last.safetensors", "best.safetensors") if (out / n).exists()]
    if trained:
        raise AdviceError(
            f"--out {out} holds a trained model ({trained[0]}), which would be loaded instead of the changed one; "
            "give another folder."
        )
    return out


def _twin(options: Any, target: str, rewrite: Any, out: Path, *, looks: int, shape: tuple[int, ...]) -> str:
    """The Python that does the same, on the same pixels."""
    line, expression = twin_of(options.model, weights=options.weights)
    module, kind = target.split(":")
    deploy, data = kind == "Deploy", options.data is not None
    saves = "from lynceus.train.checkpoint import save_model"
    if line.startswith("from lynceus.train.checkpoint import"):
        line, saves = saves.replace("import", "import load_model,"), ""
    fresh = is_name(options.model)
    imports = ["import lynceus.data"] if data else []
    imports += ["import torch"] if fresh or not data else []
    imports += [line, f"from {module} import {kind}", saves]
    imports += [] if data else ["from lynceus.core.rng import generator"]
    imports += ["from lynceus.core.subject import Subject"] if data or deploy else []
    imports += ["from lynceus.train.evaluate import first_images"] if data else []
    imports += [] if deploy else ["from lynceus.gauntlet.compare import compare"]
    lines = sorted({i for i in imports if i}, key=lambda i: (i.startswith("from"), i))
    lines += ["", *([f"torch.manual_seed({options.seed})"] if fresh else []), f"model = {expression}"]
    size = "" if options.size is None else f", size={tuple(options.size)!r}"
    if data:
        more = call("lynceus.data.open", options.data, split=options.split, limit=options.limit)
        lines += [f"data = {more}", f"pixels = first_images(data, model, {looks}{size})"]
    else:
        lines += [f'pixels = torch.rand({", ".join(map(str, shape))}, generator=generator({options.seed}, "example"))']
    taken = "Subject(model).prepare(pixels)" if data or deploy else "pixels"
    if deploy:
        lines += [f"images = {taken}"]
        judged = f"list(images.split({options.batch}))" if data else "None"
        lines += [f"changed = {difference_of(rewrite)}(model, images[:{options.batch}], {judged})"]
    else:
        lines += [f"changed = {difference_of(rewrite)}(model, {taken})"]
    lines += [f"save_model(changed, {str(out)!r})"]
    if deploy:
        lines += ["print(changed.report.table())"]
    else:
        part = "pixels" if shape[0] <= options.batch else f"pixels[:{options.batch}]"
        both = "model, changed"
        if data and size:
            both = f"*(Subject(m{size}) for m in (model, changed))"
        lines += [f"print(compare({both}, {'data' if data else 'None'}, {part}, seed={options.seed}).table())"]
    return "\n".join(lines)
