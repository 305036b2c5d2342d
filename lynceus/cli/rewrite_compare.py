"""`lynceus rewrite compare MODEL...`: accuracy against measured time of a model and of what rewrites made of it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tyro.conf import Positional

from lynceus.cli._models import open_model, size_of
from lynceus.cli._run import call, run_folder, show
from lynceus.cli._schema import parse
from lynceus.cli.rewrite import REWRITES
from lynceus.core.errors import AdviceError

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True, kw_only=True)
class Options:
    """Models beside each other, timed in turns on the same images; the first is what the others are held against."""

    models: Positional[tuple[str, ...]]  # run folders or names, the unchanged model first
    data: str | None = None  # images for accuracy and agreement; without it only cost and time are compared
    split: str | None = None  # train, val or test, where the source has them
    limit: int | None = None  # look at this many images
    size: tuple[int, int] | None = None  # height and width of the images that are timed
    batch: int = 8  # images per timed pass
    repeats: int = 20  # timed passes of each model
    seed: int = 0  # of the timed images
    out: Path | None = None  # folder; default: runs/rewrite/compare


def main(argv: Sequence[str]) -> int:
    options = parse(Options, argv, prog="lynceus rewrite compare")
    import torch

    import lynceus.data
    from lynceus.core.rng import generator
    from lynceus.gauntlet.compare import compare_all
    from lynceus.train.evaluate import first_images

    if len(set(options.models)) < 2:
        raise AdviceError(
            "Name the model and what rewrites made of it, two or more: "
            f"lynceus rewrite compare {options.models[0] if options.models else 'RUN'} runs/rewrite/swap --data DATA."
        )
    for name in ("batch", "repeats"):
        if getattr(options, name) < 1:
            raise AdviceError(f"--{name} is at least 1, not {getattr(options, name)}.")
    if options.size is not None and min(options.size) < 1:
        raise AdviceError(f"--size takes height and width, such as --size 224 224, not {options.size}.")
    models = opened(options.models)
    out = run_folder(options.out, "rewrite", "compare")
    data = None if options.data is None else lynceus.data.open(options.data, split=options.split, limit=options.limit)
    first = next(iter(models.values()))
    if data is None:
        size = size_of(first, options.size)
        example = torch.rand(options.batch, 3, *size, generator=generator(options.seed, "example"))
    else:
        example = first_images(data, first, options.batch, size=options.size)
    report = compare_all(models, data, example, repeats=options.repeats, seed=options.seed)
    show(report, out=out, twin=_twin(options, tuple(example.shape)))
    return 0


def _twin(options: Options, shape: tuple[int, ...]) -> str:
    """The Python that compares the same models on the same images."""
    lines = ["from lynceus.cli.rewrite_compare import opened", "from lynceus.gauntlet.compare import compare_all"]
    made = [f"models = opened({list(options.models)!r})"]
    if options.data is None:
        lines = ["import torch", "from lynceus.core.rng import generator", *lines]
        drawn = f'generator=generator({options.seed}, "example")'
        made += ["data = None", f"example = torch.rand({', '.join(map(str, shape))}, {drawn})"]
    else:
        lines = ["import lynceus.data", *lines, "from lynceus.train.evaluate import first_images"]
        source = call("lynceus.data.open", options.data, split=options.split, limit=options.limit)
        size = "" if options.size is None else f", size={tuple(options.size)!r}"
        first = f"next(iter(models.values())), {options.batch}{size}"
        made += [f"data = {source}", f"example = first_images(data, {first})"]
    more = f"repeats={options.repeats}, seed={options.seed}"
    return "\n".join(
        [
            *sorted(lines, key=lambda i: (i.startswith("from"), i)),
            "",
            *made,
            f"print(compare_all(models, data, example, {more}).table())",
        ]
    )


# what signs a model in place of the rewrite that looked at data
PLANS = {"KeptBlocks": "block_prune", "KeepChannels": "prune_channels"}


def opened(names: Sequence[str]) -> dict[str, nn.Module]:
    """The models by names that tell them apart: of their folders, and of what was done to them."""
    from lynceus.rewrite.swap import rewrites_of

    made: dict[str, nn.Module] = {}
    for name in names:
        model = open_model(name)
        short = Path(name).name or name
        steps = [_verb(type(r).__name__) for r in rewrites_of(model)]
        if steps and steps[-1] not in short:  # runs/rewrite/swap-2 says it already
            short = f"{short} ({', '.join(steps)})"
        made[short if short not in made else name] = model
    return made


def _verb(kind: str) -> str:
    """The name in `lynceus rewrite NAME` of the class that signed a model."""
    known = {target.partition(":")[2]: name for name, (target, _) in REWRITES.items()}
    return PLANS.get(kind) or known.get(kind) or re.sub(r"(?<!^)(?=[A-Z])", "_", kind).lower()
