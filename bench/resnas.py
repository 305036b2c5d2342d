"""ViT-Res with and without the shortcut of its reductions: twelve blocks on digits at 32 x 32, both losses.

python -m bench.resnas                      # two seeds
python -m bench.resnas --epochs 12 --seeds 3 --out figures.json

The paper says that the shortcut makes depth trainable; widths here are a sixth of the reference's.
"""

from __future__ import annotations

import argparse
import json
import statistics

import torch
import torch.nn.functional as F
from torch import nn

from bench.lsnet import digits
from lynceus.backbones.resnas import ResNAS, ResNASConfig

BLOCKS = " // ".join(" ".join([f"{heads}x16|{hidden}"] * 4) for heads, hidden in ((2, 128), (4, 256), (8, 512)))


def train(seed: int, epochs: int, *, skip: bool, batch: int = 64) -> tuple[float, float]:
    """(mean training loss of the last epoch, held-out accuracy)."""
    torch.manual_seed(seed)
    definition = f"C 32,64,128: {BLOCKS}"
    model = ResNAS(
        ResNASConfig(definition=definition, image_size=(32, 32), patch_size=4, num_classes=10, skip=skip)
    ).train()
    x, y, test_x, test_y = digits()
    order, per_epoch = torch.Generator().manual_seed(seed), len(x) // batch
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=epochs * per_epoch)
    last: list[float] = []
    for _ in range(epochs):
        last = []
        for rows in torch.randperm(len(x), generator=order).split(batch)[:per_epoch]:
            loss = F.cross_entropy(model(x[rows]), y[rows])
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 5.0)
            optimizer.step()
            cycle.step()
            last.append(float(loss.detach()))
    model.eval()
    with torch.no_grad():
        reached = float((model(test_x).argmax(1) == test_y).float().mean())
    return statistics.mean(last), reached


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", help="JSON file for the figures")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = []
    for seed in range(args.seeds):
        for skip in (True, False):
            loss, reached = train(seed, args.epochs, skip=skip)
            print(
                f"seed {seed}  {'with' if skip else 'without'} skip  loss {loss:.4f}  {100 * reached:.1f}%", flush=True
            )
            rows.append({"seed": seed, "skip": skip, "loss": loss, "accuracy": reached})
    if args.out:
        with open(args.out, "w") as file:
            json.dump({"epochs": args.epochs, "rows": rows}, file, indent=1)


if __name__ == "__main__":
    main()
