"""`lynceus rewrite compare MODEL...`: accuracy against measured time of a model and of what rewrites made of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tyro.conf import Positional

from lynceus.cli._models import open_model, size_of
from lynceus.cli._run import run_folder, show
from lynceus.cli._schema import parse
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
    size = options.size or (tuple(data[0].image.shape[-2:]) if data is not None else size_of(first))
    example = torch.rand(options.batch, 3, *size, generator=generator(options.seed, "example"))
    report = compare_all(models, data, example, repeats=options.repeats, seed=options.seed)
    source = (
        "None"
        if options.data is None
        else f"lynceus.data.open({options.data!r}, split={options.split!r}, limit={options.limit!r})"
    )
    twin = (
        "import torch\nimport lynceus.data\nfrom lynceus.cli.rewrite_compare import opened\n"
        "from lynceus.gauntlet.compare import compare_all\n\n"
        f"models = opened({list(options.models)!r})\n"
        f"print(compare_all(models, {source}, torch.rand{tuple(example.shape)!r}, repeats={options.repeats}).table())"
    )
    show(report, out=out, twin=twin)
    return 0


def opened(names: Sequence[str]) -> dict[str, nn.Module]:
    """The models by the shortest names that tell them apart."""
    made: dict[str, nn.Module] = {}
    for name in names:
        short = Path(name).name or name
        made[short if short not in made else name] = open_model(name)
    return made
