"""The ladder from ResNet-50 to ConvNeXt-T: parameters and MACs of every rung; a shortened ladder trained on CIFAR-10.

python -m bench.convnext_ladder                    # counts at 224 px, then 3 epochs on 10,000 images at width 16
python -m bench.convnext_ladder --epochs 0         # counts alone
python -m bench.convnext_ladder --data FOLDER/train.parquet --out ladder.json

Accuracy at this scale says that every rung learns, not which is better.
"""

from __future__ import annotations

import argparse
import io
import json
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from bench._data import CIFAR10
from lynceus.backbones.convnext_ladder import RUNGS, Ladder, narrow
from lynceus.core.rng import borrowed, generator


@dataclass
class Row:
    rung: str
    parameters: int
    gmacs: float  # one image of 224 x 224
    small_parameters: int = 0
    loss: float = float("nan")  # last epoch, training
    accuracy: float = float("nan")  # held-out, percent
    seconds: float = 0.0


def macs(model: nn.Module, side: int) -> int:
    """Multiply-adds of one image, counted on the meta device."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.to("meta")(torch.empty(1, 3, side, side, device="meta"))
    return counter.get_total_flops() // 2


def cifar10(path: Path, count: int) -> tuple[Tensor, Tensor]:
    """`count` images (n, 3, 32, 32) normalised, and labels."""
    import pyarrow.parquet as parquet
    from PIL import Image

    table = parquet.read_table(path).slice(0, count)
    images = next(n for n in table.column_names if n in ("img", "image"))
    pictures = [np.asarray(Image.open(io.BytesIO(row["bytes"])).convert("RGB")) for row in table[images].to_pylist()]
    x = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 255
    x = (x - x.mean((0, 2, 3), keepdim=True)) / x.std((0, 2, 3), keepdim=True)
    return x.contiguous(memory_format=torch.channels_last), torch.tensor(table["label"].to_pylist())


def train(model: nn.Module, x: Tensor, y: Tensor, *, epochs: int, batch: int = 128, lr: float = 2e-3) -> float:
    """AdamW, one cycle, mirrored images. The mean loss of the last epoch."""
    steps = epochs * (len(x) // batch)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.05)
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)
    shuffle = generator(0, "ladder")
    losses: list[float] = []
    for _ in range(epochs):
        losses = []
        for part in torch.randperm(len(x), generator=shuffle)[: len(x) // batch * batch].split(batch):
            images = x[part].flip(-1) if torch.rand((), generator=shuffle) < 0.5 else x[part]
            loss = F.cross_entropy(model(images), y[part])
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 5.0)
            optimizer.step()
            cycle.step()
            losses.append(loss.item())
    return float(np.mean(losses))


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    model.eval()
    hits = sum(int((model(a).argmax(1) == b).sum()) for a, b in zip(x.split(500), y.split(500)))
    return 100 * hits / len(x)


def ladder(
    *, data: Path | None, epochs: int, count: int = 10_000, width: int = 16, only: list[str] | None = None
) -> list[Row]:
    rows = []
    held = count // 5
    x, y = cifar10(data, count + held) if data is not None and epochs else (torch.empty(0), torch.empty(0))
    print(f"{'rung':18}{'parameters':>12}{'GMACs':>8}{'small':>10}{'loss':>8}{'top-1 %':>9}{'seconds':>9}")
    for name, config in RUNGS.items():
        if only and name not in only:
            continue
        model = Ladder(config)
        row = Row(name, sum(p.numel() for p in model.parameters()), round(macs(model, 224) / 1e9, 3))
        if len(x):
            start = time.perf_counter()
            with borrowed(0, "ladder", name):
                # gamma from 1: three epochs are too few to wait for 1e-6
                small = replace(narrow(config, width), num_classes=10, layer_scale=1.0 if config.layer_scale else 0.0)
                net = Ladder(small).to(memory_format=torch.channels_last).train()
                row.small_parameters = sum(p.numel() for p in net.parameters())
                row.loss = train(net, x[:count], y[:count], epochs=epochs)
                row.accuracy = accuracy(net, x[count:], y[count:])
            row.seconds = time.perf_counter() - start
        rows.append(row)
        print(
            f"{row.rung:18}{row.parameters:12,}{row.gmacs:8.3f}{row.small_parameters:10,}{row.loss:8.3f}"
            f"{row.accuracy:9.2f}{row.seconds:9.1f}",
            flush=True,
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=CIFAR10, help="CIFAR-10 as parquet (img or image, label)")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=None, help="write the table as JSON")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = ladder(data=args.data, epochs=args.epochs, count=args.count, width=args.width)
    if args.out is not None:
        args.out.write_text(json.dumps([asdict(r) for r in rows], indent=1))


if __name__ == "__main__":
    main()
