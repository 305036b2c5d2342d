"""Data scaling on CIFAR-10: sizes x widths x seeds, label noise, long tail, and a longer budget beside.

    python -m bench.scaling --data cifar10/train.parquet --out runs/scaling [--small] [--workers 4]

Killed and started again it goes on where it was. Prints the findings and the figures that the study must show."""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch

from bench._data import CIFAR10
from bench._nets import build
from lynceus import data
from lynceus.gauntlet import fits
from lynceus.gauntlet.cells import Budget, SupervisedCell
from lynceus.gauntlet.scaling import ScalingConfig, learning_curve


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, default=CIFAR10, help="CIFAR-10 as a parquet file or an image folder")
    parser.add_argument("--out", default="runs/scaling")
    parser.add_argument("--small", action="store_true", help="200 to 6400 images instead of 25600")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--longer", action="store_true", help="also 4x the updates for the largest sizes")
    args = parser.parse_args()
    torch.set_num_threads(1)
    start, out = time.time(), Path(args.out)
    whole = data.open(args.data)
    test_at = np.random.default_rng(0).permutation(len(whole))[:2000]
    test, pool = whole.subset(np.sort(test_at)), whole.subset(np.setdiff1d(np.arange(len(whole)), test_at))
    sizes = tuple(200 * 2**i for i in range(6 if args.small else 8))
    config = ScalingConfig(
        sizes=sizes,
        seeds=args.seeds,
        capacities=("8", "24"),
        budget=Budget(kind="steps", amount=700, batch_size=64),
        noise=(0.2,),
        tails=(50.0,),
        extra_sizes=(sizes[-2],),
    )
    cell = SupervisedCell(build=build)
    curve = learning_curve((pool, test), config=config, train_cell=cell, out=out, workers=args.workers)
    report = curve.report()
    report.save(out)
    for note in report.notes:
        print(note)
    figures: dict[str, object] = dict(report.summary)
    for width in config.capacities:
        points = curve.points(width)
        print(f"width {width}:", *(f"{100 * v:.1f}" for v in points.mean))
        head = fits.fit_law("log", points.head(4))
        figures[f"{width}: slope 200-1600, points"] = 100 * head.parameters["b"]
        figures[f"{width}: R2 200-1600"] = head.r2
    if args.longer:
        longer = ScalingConfig(
            sizes=sizes[-4:], seeds=1, capacities=("24",), budget=Budget(kind="steps", amount=2800, batch_size=64)
        )
        more = learning_curve((pool, test), config=longer, train_cell=cell, out=out, workers=args.workers)
        print("width 24, 4x the updates:", *(f"{n}: {100 * v:.1f}" for n, v in zip(more.sizes, more.points("24").mean)))
        figures["24: 4x updates"] = more.points("24").mean.tolist()
    figures["cells run now"], figures["seconds"] = curve.ran, time.time() - start
    print(json.dumps(figures, indent=1, default=float))
    (out / "figures.json").write_text(json.dumps(figures, indent=1, default=float))


if __name__ == "__main__":
    main()
