"""HaloNet: what the overlap of windows carries, learning digits, and keys and values gathered per query.

python -m bench.halonet                    # two marks across a block border, with and without a halo, three seeds
python -m bench.halonet --digits           # also learns digits (about two minutes a seed on one core)
python -m bench.halonet --out figures.json
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench._digits import accuracy, train
from bench.swin import learn_pairs
from lynceus.backbones.halonet import VARIANTS, Bottleneck, HaloNet, HaloNetConfig
from lynceus.layers.halo import HaloOptions

# 7x7 stem, two stages of two blocks, for 32 pixels
DIGITS = HaloNetConfig(
    layout=("aa", "aa"),
    widths=(32, 64),
    hidden=(32, 64),
    strides=(1, 2),
    attention=(HaloOptions(block_size=4, halo_size=1, heads=4),),
    stem_width=32,
    image_size=(32, 32),
    num_classes=10,
)


class Marks(nn.Module):
    """1x1 convolution, halo blocks without stride, mean, classifier: only the attention can look at a neighbour."""

    def __init__(self, halo: int, *, depth: int = 2, width: int = 24):
        super().__init__()
        attention = HaloOptions(block_size=4, halo_size=halo, heads=2)
        config = HaloNetConfig(
            layout=("a" * depth,), widths=(width,), hidden=(width,), strides=(1,), attention=(attention,)
        )
        self.embed = nn.Conv2d(3, width, 1)
        blocks = [Bottleneck(width, 0, config, kind="a", stride=1, drop_path=0.0) for _ in range(depth)]
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(width, 2)

    def forward(self, image: Tensor) -> Tensor:
        out: Tensor = self.head(self.blocks(self.embed(image)).mean((2, 3)))
        return out


def marks(halo: int, seed: int, *, depth: int = 2) -> float:
    """Held-out accuracy of telling whether two marks, either side of a block border, have the same colour."""
    torch.manual_seed(seed)
    return learn_pairs(Marks(halo, depth=depth), seed)


def gathered() -> dict[str, float]:
    """Keys and values read per query of each named size: (window / block) squared; per-pixel windows read window^2."""
    found = {}
    for name, config in VARIANTS.items():
        if name.startswith("halonet_h"):
            o = config.options(0)
            found[name] = ((o.block_size + 2 * o.halo_size) / o.block_size) ** 2
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--digits", action="store_true")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=None, help="write the figures as JSON")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    figures: dict[str, Any] = {"torch": torch.__version__, "gathered": gathered()}
    for name, ratio in figures["gathered"].items():
        print(f"{name}: {ratio:.2f} keys gathered per query")
    for halo in (1, 0):
        reached = figures[f"marks, halo {halo}"] = [marks(halo, seed) for seed in range(args.seeds)]
        print(f"two marks, halo {halo}: {_spread(reached)} held out")
    if args.digits:
        seeds = range(args.seeds)
        figures["digits"] = [accuracy(train(lambda: HaloNet(DIGITS), 32, seed=s), 32) / 100 for s in seeds]
        print(f"digits: {_spread(figures['digits'])} held out")
    if args.out is not None:
        args.out.write_text(json.dumps(figures, indent=1))


def _spread(values: list[float]) -> str:
    spread = f" +- {statistics.stdev(values):.4f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.4f}{spread} ({', '.join(f'{v:.4f}' for v in values)})"


if __name__ == "__main__":
    main()
