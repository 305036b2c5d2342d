"""Few images: ConViT beside the same network with plain attention, with shares of CIFAR-10; mean and spread of seeds.

    python -m bench.small_data --data train.parquet                     # the card's budgets, two seeds: an hour of CPU
    python -m bench.small_data --ratios 0.02 --epochs 12 --out few.json # minutes

Both arms have equal data, order of data, budget and seeds. `sampling_ratio` keeps that share of each class of the
50,000 training pictures; 2,000 others are the test. Gates and mean distances of attention are logged every epoch.
ConViT, ICML 2021, arXiv 2103.10697, claims an advantage from few images on ImageNet at 224 pixels; the authors' own
code did not show it at this scale (43.8% against 45.9% with 5,000 images, one seed).
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import lynceus.data
from bench._data import CIFAR10
from lynceus import FitConfig, Subject, fit
from lynceus.backbones.convit import ConViT, ConViTConfig
from lynceus.core.report import environment
from lynceus.data.dataset import Dataset
from lynceus.explain.locality import locality
from lynceus.recipes.supervised import Supervised
from lynceus.tasks.classify import Classify
from lynceus.train.evaluate import Evaluate

NET = ConViTConfig(image_size=(32, 32), patch_size=4, dim=96, depth=6, heads=4, num_classes=10)
ARMS = {"convit": 4, "plain": 0}  # blocks of gated positional attention


def sampled(data: Dataset, sampling_ratio: float, seed: int = 0) -> Dataset:
    """That share of every class, always the same for a seed."""
    return data if sampling_ratio >= 1 else data.split(sampling_ratio, seed=seed)[0]


def train(local_layers: int, data: Dataset, test: Dataset, *, epochs: int, seed: int) -> dict[str, Any]:
    """Held-out accuracy after one cycle of AdamW to 1e-3, and where gates and distances went."""
    torch.manual_seed(seed)
    model = ConViT(replace(NET, local_layers=local_layers))
    some = test.batch(list(range(32))).image
    history: list[dict[str, float]] = []

    def look(subject: Subject, held_out: Any) -> dict[str, float]:
        found = Evaluate(details=False, quiet=True)(subject, held_out).summary
        seen = {"accuracy": found["accuracy"], **locality(subject.model, some).summary}
        history.append(seen)
        return seen

    config = FitConfig(
        epochs=epochs, lr=1e-3, batch_size=64, schedule="one-cycle", seed=seed, quiet=True,
        evaluate_every=max(1, epochs // 4),
    )  # fmt: skip
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        report = fit(
            Supervised(Classify(classes=data.classes), model),
            data,
            held_out=test,
            config=config,
            evaluate=look,
            out=out,
        )
        logged = (out / "metrics.csv").read_text().splitlines()[0].split(",")
    gates = [float((b.attn.gating_param.detach() - 1).abs().max()) for b in model.blocks[:local_layers]]
    return {
        "accuracy": report.summary["accuracy"],
        "gate shift": max(gates, default=0.0),
        "distances": [v for k, v in history[-1].items() if k.startswith("distance")],
        "logged": [name for name in logged if name.startswith(("gate", "distance"))],
        "seconds": time.monotonic() - began,
    }


def compare(data: Dataset, test: Dataset, ratio: float, epochs: int, seeds: int) -> dict[str, Any]:
    """Both arms at one share of the data."""
    train_part = sampled(data, ratio)
    found: dict[str, Any] = {"sampling_ratio": ratio, "images": len(train_part), "epochs": epochs}
    for arm, layers in ARMS.items():
        runs = [train(layers, train_part, test, epochs=epochs, seed=seed) for seed in range(seeds)]
        scores = [100 * r["accuracy"] for r in runs]
        spread = statistics.stdev(scores) if seeds > 1 else None
        found[arm] = {"accuracy": scores, "mean": statistics.mean(scores), "spread": spread, "runs": runs}
        told = f" +- {spread:.1f}" if spread is not None else ""
        line = f"{len(train_part):6} images x {epochs:3} epochs  {arm:7}{statistics.mean(scores):6.1f}%{told}"
        if layers:
            line += f"  gates moved by up to {max(r['gate shift'] for r in runs):.3f}"
            line += "  distances " + " ".join(f"{d:.2f}" for d in runs[0]["distances"])
        print(line, flush=True)
    found["convit - plain"] = found["convit"]["mean"] - found["plain"]["mean"]
    print(f"{'':32}ConViT - plain {found['convit - plain']:+.1f} points", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, default=CIFAR10)
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.1, 0.02], help="sampling_ratio: share per class")
    parser.add_argument("--epochs", type=int, nargs="+", default=[10, 40], help="one per ratio")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--test", type=int, default=2000, help="held-out images")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", help="JSON file for the figures")
    options = parser.parse_args()
    if len(options.epochs) != len(options.ratios):
        parser.error("give one number of epochs per ratio")
    torch.set_num_threads(options.threads)
    whole = lynceus.data.open(options.data)
    test, data = whole.split(options.test / len(whole), seed=1)
    pairs = zip(options.ratios, options.epochs)
    rows = [compare(data, test, ratio, epochs, options.seeds) for ratio, epochs in pairs]
    if options.out:
        Path(options.out).write_text(json.dumps({"environment": environment(0), "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
