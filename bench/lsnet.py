"""LSNet's accuracy per multiply-add at small scale: nanos side by side on digits at 32 x 32, several seeds.

python -m bench.lsnet                                      # the card's net and a few nanos, three seeds
python -m bench.lsnet --models lsnet_nano vit_nano --epochs 12 --seeds 3 --out figures.json

AdamW, one cycle up to 2e-3, batch 64, gradients clipped at 5; 360 of the 1,797 digits are held out. The paper's claim
is about ImageNet, where neither pictures nor hours are at hand; this is what can be said without them.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lynceus
from lynceus.core.cost import cost

CARD: dict[str, Any] = {
    "image_size": (32, 32),
    "stem_stride": 8,
    "embed_dim": (32, 48, 64, 96),
    "depth": (1, 2, 2, 2),
    "num_heads": (3, 3, 3, 4),
}
MODELS = ("lsnet_card", "lsnet_nano", "convnext_nano", "resnet_nano", "swin_nano", "vit_nano")


def model_of(name: str) -> nn.Module:
    """A nano, or "lsnet_card": the small LSNet of the paper's stem (stride 8)."""
    if name == "lsnet_card":
        return lynceus.create_model("lsnet_nano", num_classes=10, **CARD)
    return lynceus.create_model(name, num_classes=10)


def digits(side: int = 32, held: int = 360) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(train images, labels, held-out images, labels), enlarged to `side`."""
    from sklearn.datasets import load_digits

    data = load_digits()
    x = torch.from_numpy(data.images).float()[:, None] / 16
    x = F.interpolate((x - x.mean()) / x.std(), (side, side), mode="bilinear").repeat(1, 3, 1, 1)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    x, y = x[order], torch.from_numpy(data.target)[order]
    return x[held:], y[held:], x[:held], y[:held]


def trained_accuracy(name: str, seed: int, epochs: int, batch: int = 64) -> float:
    torch.manual_seed(seed)
    model = model_of(name).train()
    x, y, test_x, test_y = digits()
    order, steps = torch.Generator().manual_seed(seed), epochs * (len(x) // batch)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for _ in range(epochs):
        for rows in torch.randperm(len(x), generator=order).split(batch)[: len(x) // batch]:
            loss = F.cross_entropy(model(x[rows]), y[rows])
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 5.0)
            optimizer.step()
            cycle.step()
    model.eval()
    with torch.no_grad():
        return float((model(test_x).argmax(1) == test_y).float().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="*", default=list(MODELS))
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", help="JSON file for the figures")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = []
    print(f"{'model':16}{'params k':>10}{'MMACs':>8}{'accuracy %':>12}{'spread':>8}{'seconds':>9}")
    for name in args.models:
        counted = cost(model_of(name), torch.empty(1, 3, 32, 32))
        start = time.process_time()
        found = [100 * trained_accuracy(name, seed, args.epochs) for seed in range(args.seeds)]
        seconds = (time.process_time() - start) / args.seeds
        mean, spread = statistics.mean(found), max(found) - min(found)
        print(
            f"{name:16}{counted.params / 1e3:10.0f}{counted.macs / 1e6:8.2f}{mean:12.2f}{spread:8.2f}{seconds:9.1f}",
            flush=True,
        )
        rows.append({"model": name, "macs": counted.macs, "accuracy": found, "cpu_seconds": seconds})
    if args.out:
        with open(args.out, "w") as file:
            json.dump({"epochs": args.epochs, "rows": rows}, file, indent=1)


if __name__ == "__main__":
    main()
