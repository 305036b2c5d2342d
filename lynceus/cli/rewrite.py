"""`lynceus rewrite NAME MODEL`: a changed model, saved like a trained one; the old one stays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tyro.conf import Positional

from lynceus.cli._models import open_model, twin_of
from lynceus.cli._run import run_folder, show
from lynceus.cli._schema import merged, one_of, parse, with_options

if TYPE_CHECKING:
    from torch import Tensor, nn

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
    size: tuple[int, int] | None = None  # height and width of the example when there is no data
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
    out = run_folder(options.out, "rewrite", name)
    import torch

    import lynceus.data
    from lynceus.core.report import Report
    from lynceus.core.rng import generator
    from lynceus.gauntlet.compare import compare
    from lynceus.train.checkpoint import save_model

    model = open_model(options.model, weights=options.weights)
    rewrite = merged(options, "rewrite")
    data = None if options.data is None else lynceus.data.open(options.data, split=options.split, limit=options.limit)
    inner = getattr(model, "backbone", model)
    size = (
        tuple(data[0].image.shape[-2:])
        if data is not None
        else options.size or getattr(inner, "input_size", (224, 224))
    )
    example = torch.rand(options.batch, 3, *size, generator=generator(options.seed, "example"))
    if data is not None and name != "deploy":
        example = _pictures(model, data, max(options.batch, getattr(rewrite, "calibration", 0)))
    if name == "deploy":
        return _deploy(options, model, rewrite, data, example, out)
    changed = rewrite(model, example)
    save_model(changed, out)
    report = compare(model, changed, data, example[: options.batch], seed=options.seed)
    if isinstance(getattr(changed, "report", None), Report):
        report.parts.append(changed.report)
    line, expression = twin_of(options.model, weights=options.weights)
    module, kind = target.split(":")
    source = (
        "None"
        if options.data is None
        else f"lynceus.data.open({options.data!r}, split={options.split!r}, limit={options.limit!r})"
    )
    twin = (
        f"import torch\nimport lynceus.data\n{line}\nfrom {module} import {kind}\n"
        "from lynceus.gauntlet.compare import compare\nfrom lynceus.train.checkpoint import save_model\n\n"
        f"model, example = {expression}, torch.rand({options.batch}, 3, {size[0]}, {size[1]})\n"
        f"changed = {rewrite!r}(model, example)\nsave_model(changed, {str(out)!r})\n"
        f"print(compare(model, changed, {source}, example).table())"
    )
    show(report, out=out, twin=twin)
    print(f"\nthe changed model: {out}  (lynceus predict {out} PICTURES, lynceus check accuracy {out} DATA)")
    return 0


def _pictures(model: nn.Module, data: Any, count: int) -> Tensor:
    """The first `count` images, sized as the model takes them."""
    import torch

    from lynceus.core.subject import Subject
    from lynceus.train.evaluate import batches

    subject, parts, seen = Subject(model), [], 0
    for batch in batches(data, subject, count):
        parts.append(subject.prepare(batch.image))
        seen += len(batch)
        if seen >= count:
            break
    return torch.cat(parts)[:count]


def _deploy(options: Any, model: nn.Module, rewrite: Any, data: Any, example: Tensor, out: Path) -> int:
    """Measures on the images themselves, and shows everything that was tried."""
    from lynceus.core.subject import Subject
    from lynceus.train.checkpoint import save_model
    from lynceus.train.evaluate import batches

    subject, images, seen = Subject(model), None, 0
    if data is not None:
        images = []
        for batch in batches(data, subject, options.batch):
            images.append(subject.prepare(batch.image))
            seen += len(batch)
            if options.limit is None and seen >= JUDGES:
                break
    first = next((b for b in images or () if len(b) == options.batch), None)
    changed = rewrite(model, subject.prepare(example) if first is None else first, images)
    save_model(changed, out)
    if options.limit is None and seen >= JUDGES:
        changed.report.notes.append(f"The first {seen} images are judged on; --limit says how many.")
    line, expression = twin_of(options.model, weights=options.weights)
    shape = tuple(example.shape if first is None else first.shape)
    twin = (
        f"import torch\n{line}\nfrom lynceus.rewrite.deploy import Deploy\n"
        "from lynceus.train.checkpoint import save_model\n\n"
        f"# images: your own, in batches as the model takes them\n"
        f"fast = {rewrite!r}({expression}, torch.rand{shape!r}, images=None)\n"
        f"save_model(fast, {str(out)!r})\nprint(fast.report.table())"
    )
    show(changed.report, out=out, twin=twin)
    print(f"\nthe deployed model: {out}  (lynceus predict {out} PICTURES); on another machine, deploy it anew")
    return 0
