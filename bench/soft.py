"""SOFT: growth of one layer with the tokens beside softmax attention, and learning digits.

python -m bench.soft                       # one layer of 64 channels at 3136 and 12544 tokens
python -m bench.soft --digits              # also SOFT and SOFT++ on digits (about a minute a seed on one core)
python -m bench.soft --out figures.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from bench._digits import accuracy, train
from lynceus.backbones.soft import Soft, SoftConfig
from lynceus.core.cost import cost
from lynceus.layers.softmax_free import SoftmaxFreeAttention


def digits_net(*, normalised: bool) -> Soft:
    """Four stages of one block, for 32 pixels."""
    config = SoftConfig(
        image_size=(32, 32),
        dims=(24, 32, 48, 64),
        depths=(1, 1, 1, 1),
        heads=(1, 2, 2, 4),
        ratios=(4, 2, 2),
        normalised=normalised,
        num_classes=10,
    )
    return Soft(config)


def growth(repeats: int) -> list[dict[str, float]]:
    """One layer (64 channels, 2 heads, 49 landmarks) and the core of softmax attention, on 56x56 and 112x112 tokens."""
    rows = []
    for side, ratio in ((56, 8), (112, 16)):
        layer, x = SoftmaxFreeAttention(64, 2, ratio, conv=9).eval(), torch.randn(1, side, side, 64)
        q = torch.randn(1, 2, side * side, 32)
        runs = partial(layer, x), partial(F.scaled_dot_product_attention, q, q, q)
        times: tuple[list[float], list[float]] = ([], [])
        with torch.inference_mode():
            for _ in range(repeats):
                for f, spent in zip(runs, times):
                    start = time.process_time()
                    f()
                    spent.append(time.process_time() - start)
        ours, softmax = (1e3 * statistics.median(t) for t in times)
        row = {"tokens": side * side, "mmacs": cost(layer, x).macs / 1e6, "ours_ms": ours, "softmax_ms": softmax}
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--digits", action="store_true")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=None, help="write the figures as JSON")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    few, many = growth(args.repeats)
    figures: dict[str, Any] = {"torch": torch.__version__, "growth": [few, many]}
    for key, word in (("mmacs", "multiply-adds (M)"), ("ours_ms", "layer (ms)"), ("softmax_ms", "softmax core (ms)")):
        print(f"{word:18} {few[key]:8.1f} -> {many[key]:8.1f}: {many[key] / few[key]:.2f} times for 4 times the tokens")
    for normalised in (False, True) if args.digits else ():
        name = "SOFT++" if normalised else "SOFT"
        reached = []
        for seed in range(args.seeds):
            reached.append(accuracy(train(partial(digits_net, normalised=normalised), 32, seed=seed), 32))
        figures[f"digits, {name}"] = reached
        spread = f" +- {statistics.stdev(reached):.2f}" if len(reached) > 1 else ""
        print(f"digits, {name}: {statistics.mean(reached):.2f}%{spread} ({', '.join(f'{v:.2f}' for v in reached)})")
    if args.out is not None:
        args.out.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
