"""`lynceus rewrite split MODEL --data DATA --devices N`: a plan of sub-models for weak devices, as a folder."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tyro.conf import Positional

from lynceus.cli._models import open_model, twin_of
from lynceus.cli._run import run_folder, show
from lynceus.cli._schema import parse
from lynceus.core.errors import AdviceError


@dataclass(frozen=True, kw_only=True)
class Options:
    """A trained ViT, DeiT or Swin as sub-models that each own some classes, pruned, placed and fused. The folder holds
    the plan (`lynceus edge FOLDER PICTURES` runs it), and the same as one predictor (`lynceus predict FOLDER`)."""

    model: Positional[str]  # the run folder of a trained model
    data: str  # labelled images that sub-models and fusion learn from
    split: str | None = None  # train, val or test, where the source has them
    limit: int | None = None  # look at this many images
    held: float = 0.2  # share of the images that is not learnt from but measured on
    devices: int = 2  # equal devices; --cluster describes unequal ones
    cluster: Path | None = None  # YAML file: devices, a list of name, memory, energy, speed, rate, delay, core
    memory: float = math.inf  # bytes for weights on each device
    energy: float = math.inf  # joules of each device for --samples images, by the energy model
    speed: float = 10e9  # FLOPs per second of each device
    rate: float = math.inf  # bytes per second of each device's link
    delay: float = 0.0  # seconds that a message takes on it
    budget: float = math.inf  # bytes of all sub-models together
    samples: int = 1000  # images that energies are for
    parts: int | None = None  # sub-models; default: one per device
    group: Literal["random", "confusion"] = "random"  # which classes go together
    pruned: int | None = None  # shares of the heads that each loses at least; default: half
    measure: Literal["taylor", "fast", "exact", "magnitude", "random"] = "taylor"  # of importance
    rounds: int = 2  # of pruning and retraining
    steps: int = 300  # of retraining in each round
    shift: int = 0  # pixels that images are moved by in training
    flip: bool = False  # and mirrored
    fusion_steps: int = 500  # of training the fusion
    seed: int = 0  # of every random choice
    out: Path | None = None  # folder; default: runs/rewrite/split


def main(argv: Sequence[str]) -> int:
    options = parse(Options, argv, prog="lynceus rewrite split")
    if not 0 < options.held < 1:
        raise AdviceError(f"--held is a share between 0 and 1 of the images, not {options.held}.")
    out = run_folder(options.out, "rewrite", "split")
    import lynceus.data
    from lynceus.rewrite.split import Budget, Retrain, SplitConfig, split
    from lynceus.train.checkpoint import save_model

    model = open_model(options.model)
    data = lynceus.data.open(options.data, split=options.split, limit=options.limit)
    learnt, kept = data.split(1 - options.held, options.held)
    devices = _devices(options)
    config = SplitConfig(
        parts=options.parts,
        group=options.group,
        pruned=options.pruned,
        measure=options.measure,
        rounds=options.rounds,
        retrain=Retrain(steps=options.steps, shift=options.shift, flip=options.flip),
        fusion_steps=options.fusion_steps,
        seed=options.seed,
    )
    budget = Budget(bytes=options.budget, samples=options.samples)
    plan = split(model, devices, learnt, budget, config=config, quiet=False)
    measured = plan.evaluate(kept, dense=model)
    plan.save(out)
    save_model(plan.net, out)
    report = plan.report()
    report.parts.append(measured)
    line, expression = twin_of(options.model)
    twin = (
        f"import lynceus.data\n{line}\n"
        "from lynceus.rewrite.split import Budget, Device, Retrain, SplitConfig, split\n\n"
        f"data = lynceus.data.open({options.data!r}, split={options.split!r}, limit={options.limit!r})\n"
        f"learnt, kept = data.split({1 - options.held!r}, {options.held!r})\nmodel = {expression}\n"
        f"plan = split(model, {list(devices)!r}, learnt, {budget!r}, config={config!r})\n"
        f"print(plan.evaluate(kept, dense=model), plan.report(), plan.save({str(out)!r}))"
    )
    show(report, out=out, twin=re.sub(r"=inf\b", '=float("inf")', twin))
    print(f"\nthe plan: {out}  (lynceus edge {out} PICTURES, lynceus predict {out} PICTURES)")
    return 0


def _devices(options: Options) -> Any:
    from lynceus.core.config import from_dict, load_yaml
    from lynceus.rewrite.split import Device

    if options.cluster is None:
        limits = {n: getattr(options, n) for n in ("memory", "energy", "speed", "rate", "delay")}
        return tuple(Device(name=f"device{i}", **limits) for i in range(options.devices))
    listed = load_yaml(options.cluster).get("devices")
    if not isinstance(listed, list) or not all(isinstance(d, dict) for d in listed):
        raise AdviceError(f"{options.cluster} must hold `devices:`, a list of entries such as `- name: pi0`.")
    return tuple(from_dict(Device, d, where=f"device of {options.cluster}") for d in listed)
