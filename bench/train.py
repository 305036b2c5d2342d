"""Training: the loop's own cost beside a bare PyTorch loop, and what the nano backbones reach on digits.

python -m bench.train                      # both tables
python -m bench.train --only loop          # throughput of fit beside the bare loop, interleaved in this process
python -m bench.train --only digits        # four nano backbones, three seeds, equal budget
python -m bench.train --out train.json --threads 2
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from lynceus import FitConfig, create_model, fit
from lynceus.core.environment import environment
from lynceus.core.rng import borrowed
from lynceus.data import open_dataset
from lynceus.recipes.supervised import Supervised
from lynceus.tasks.classify import Classify

NANOS = ("convnext_nano", "resnet_nano", "swin_nano", "vit_nano")
BUDGET = FitConfig(epochs=10, batch_size=32, lr=2e-3, quiet=True, device="cpu")  # 440 steps of 1437 images
SIZE = 16  # digits are enlarged from 8 x 8


def bare(model: torch.nn.Module, images: torch.Tensor, labels: torch.Tensor, steps: int, batch: int) -> float:
    """Seconds of the loop that one writes by hand: index, normalise, forward, backward, clip, step."""
    mean = torch.tensor(model.mean).view(1, 3, 1, 1)
    std = torch.tensor(model.std).view(1, 3, 1, 1)
    model.train()
    decay = [p for p in model.parameters() if p.ndim > 1]
    plain = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decay}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, weight_decay=0.05, fused=True)
    start = time.perf_counter()
    order = torch.randperm(len(images))
    per_epoch = len(images) // batch
    for step in range(steps):
        at = step % per_epoch
        if at == 0:
            order = torch.randperm(len(images))
        index = order[at * batch : (at + 1) * batch]
        x = (images[index].float() / 255 - mean) / std
        loss = F.cross_entropy(model(x), labels[index])
        if not torch.isfinite(loss):
            raise RuntimeError("diverged")
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return time.perf_counter() - start


def loop(steps: int, repeats: int, batch: int = 64, side: int = 32) -> list[dict[str, Any]]:
    """Images per second of both loops, taking turns; medians and the median of the ratios."""
    data = open_dataset("digits", size=side)
    assert data.images is not None
    assert data.labels is not None
    labels = torch.from_numpy(data.labels)
    rows = []
    for name in NANOS:
        ratios, ours, theirs = [], [], []
        for repeat in range(repeats + 1):
            with borrowed(repeat):
                recipe = Supervised(Classify(classes=tuple(data.classes or ())), create_model(name))
                model = create_model(name, num_classes=10)
            config = FitConfig(steps=steps, batch_size=batch, log_every=10, quiet=True, device="cpu")
            fitted = float(fit(recipe, data, config=config).summary["images_per_second"])
            hand = steps * batch / bare(model, data.images, labels, steps, batch)
            if repeat:  # the first turn warms up
                ours.append(fitted)
                theirs.append(hand)
                ratios.append(fitted / hand)
        rows.append(
            {
                "model": name,
                "fit images/s": round(statistics.median(ours), 1),
                "bare images/s": round(statistics.median(theirs), 1),
                "ratio": round(statistics.median(ratios), 3),
            }
        )
        print(rows[-1], flush=True)
    return rows


def digits(seeds: int, config: FitConfig = BUDGET) -> list[dict[str, Any]]:
    """Test accuracy from scratch at equal budget; a stratified split of 80% and 20% per seed."""
    from dataclasses import replace

    data = open_dataset("digits", size=SIZE)
    rows = []
    for name in NANOS:
        accuracies, seconds = [], []
        for seed in range(seeds):
            train, test = data.split(0.8, 0.2, seed=seed)
            with borrowed(seed):
                recipe = Supervised(Classify(classes=tuple(data.classes or ())), create_model(name))
            report = fit(recipe, train, config=replace(config, seed=seed), held_out=test)
            accuracies.append(100 * report.summary["accuracy"])
            seconds.append(report.summary["seconds"])
        rows.append(
            {
                "model": name,
                "accuracy %": [round(a, 2) for a in accuracies],
                "mean": round(statistics.mean(accuracies), 2),
                "lowest": round(min(accuracies), 2),
                "seconds": round(statistics.mean(seconds), 1),
            }
        )
        print(rows[-1], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("loop", "digits"))
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    result: dict[str, Any] = {"environment": environment()}
    if args.only != "digits":
        result["loop"] = loop(args.steps, args.repeats)
    if args.only != "loop":
        result["digits"] = digits(args.seeds)
    if args.out is not None:
        args.out.write_text(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
