"""`lynceus profile MODEL...`: serves models on loopback, loads them, and says where the milliseconds go."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from tyro.conf import Positional

from lynceus.cli._run import run_folder, show, stoppable
from lynceus.cli._schema import merged, parse, with_options
from lynceus.core.errors import AdviceError


@dataclass(frozen=True, kw_only=True)
class Options:
    """A lone request's time stage by stage, throughput against clients, where pictures are brought to size, tuning step
    by step, and a queueing estimate beside what was measured."""

    models: Positional[tuple[str, ...]] = ()  # as for `lynceus serve`: run folders, names, python:MODULE:NAME
    images: Path | None = None  # folder of JPEGs that requests are made of; default: generated ones
    parts: tuple[Literal["alone", "tasks", "clients", "placements", "tuning", "capacity"], ...] | None = (
        None  # default: all
    )
    sizes: tuple[Literal["small", "medium", "large"], ...] = ("small", "medium", "large")  # of pictures
    clients: tuple[int, ...] | None = None  # concurrencies; default: 1 to 512 in doublings
    crowd: int = 32  # clients of the parts that need many
    seconds: float = 5.0  # per measured point
    chain: bool = False  # two models linked in several ways, by objects per frame, instead; MODEL is the second one
    links: tuple[Literal["fused", "memory", "shared", "redis", "file"], ...] | None = None  # of --chain; default: all
    objects: tuple[int, ...] = (0, 1, 3, 5, 9, 15, 25)  # per frame, of --chain
    seed: int = 0  # of arrivals and order
    out: Path | None = None  # folder for report.html and report.json; default: runs/profile/MODEL


@stoppable()
def main(argv: Sequence[str]) -> int:
    options = parse(with_options(Options, config="lynceus.serve.config:ServeConfig"), argv, prog="lynceus profile")
    if options.chain:
        return chain(options)
    if not options.models:
        raise AdviceError("Name a model to profile, such as `lynceus profile runs/train/resnet_nano`.")
    out = run_folder(options.out, "profile", Path(options.models[0]).name.replace(":", "-"))
    sys.path.insert(0, str(Path.cwd()))  # where python:MODULE:NAME is looked for first
    from lynceus.serve.mixes import photos
    from lynceus.serve.profile import PARTS, Profile

    sources = photos(options.images, count=48) if options.images else []
    chosen = {"clients": options.clients} if options.clients else {}
    profile = Profile(
        sizes=options.sizes,
        parts=options.parts or PARTS,
        crowd=options.crowd,
        seconds=options.seconds,
        server=merged(options, "config"),
        **chosen,
    )
    report = profile.measure(None, sources, seed=options.seed)
    given = f"sources = photos({str(options.images)!r})\n" if options.images else "sources = []\n"
    twin = (
        "from lynceus.serve import ServeConfig\nfrom lynceus.serve.mixes import photos\n"
        "from lynceus.serve.profile import Profile\n\n"
        f"config = ServeConfig(models={options.models!r})\n{given}"
        f"report = Profile(server=config, seconds={options.seconds}).measure(None, sources)\nprint(report.table())"
    )
    show(report, out=out, twin=twin)
    for part in report.parts:
        print(f"\n{part.table()}")
    return 0


def chain(options: Any) -> int:
    """The chain experiment."""
    if len(options.models) > 1:
        raise AdviceError("--chain takes one model, the second of the two; its detector is generated.")
    out = run_folder(options.out, "profile", "chain")
    sys.path.insert(0, str(Path.cwd()))
    from lynceus.serve.chain_curve import LINKS, ChainCurve

    more = {"second": options.models[0]} if options.models else {}
    curve = ChainCurve(
        objects=options.objects,
        links=options.links or LINKS,
        clients=options.crowd,
        seconds=options.seconds,
        server=replace(merged(options, "config"), models=(), port=0),
        **more,
    )
    asked = f"objects={options.objects}, clients={options.crowd}, seconds={options.seconds}"
    show(
        curve(),
        out=out,
        twin=f"from lynceus.serve.chain_curve import ChainCurve\n\nprint(ChainCurve({asked})().table())",
    )
    return 0
