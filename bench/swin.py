"""Swin-T beside timm's and torchvision's on equal weights, the cost of larger pictures, the shifted-window experiment.

python -m bench.swin                       # speed (fp32, eager, batch 8, 224 px) and cost
python -m bench.swin --experiment          # also trains with and without the shift (about a minute)
python -m bench.swin --threads 4 --out swin.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import lynceus
from lynceus.backbones.keys.swin import SOURCES
from lynceus.backbones.swin import Swin, SwinConfig
from lynceus.core.rng import generator
from lynceus.core.rules import apply_rules
from lynceus.layers.window import WindowAttention

NAME = "swin_tiny_patch4_window7_224"


def speed(batch: int, side: int, repeats: int) -> list[dict[str, Any]]:
    """Interleaved forward passes in one process; the ratio is peer / ours, above 1 we are faster."""
    rows = []
    x = torch.randn(batch, 3, side, side)
    for library in ("timm", "torchvision"):
        peer = (timm.create_model(NAME) if library == "timm" else torchvision.models.swin_t()).eval()
        ours = lynceus.create_model(NAME)
        ours.load_state_dict(apply_rules(SOURCES[library], peer.state_dict()))
        with torch.inference_mode():
            difference = float((ours(x) - peer(x)).abs().max() / peer(x).std())
            times: tuple[list[float], list[float]] = ([], [])
            for _ in range(repeats):
                for model, spent in zip((ours, peer), times):
                    start = time.perf_counter()
                    model(x)
                    spent.append(time.perf_counter() - start)
        ours_ms, peer_ms = (1e3 * statistics.median(t) for t in times)
        rows.append(
            {
                "peer": library,
                "ours_ms": ours_ms,
                "peer_ms": peer_ms,
                "ratio": peer_ms / ours_ms,
                "ratio_of_fastest": min(times[1]) / min(times[0]),
                "difference": difference,
            }
        )
    return rows


def cost(sides: tuple[int, ...] = (224, 448, 896)) -> list[dict[str, Any]]:
    """Multiply-adds of one image, counted on the meta device with attention as plain products."""
    with torch.device("meta"):
        model = lynceus.backbones.swin.build(lynceus.backbones.swin.VARIANTS[NAME]).eval()
    rows = []
    for side in sides:
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            model(torch.empty(1, 3, side, side, device="meta"))
        rows.append({"side": side, "gmacs": counter.get_total_flops() / 2e9})
    for row in rows:
        row["times_the_first"] = row["gmacs"] / rows[0]["gmacs"]
    return rows


def pairs(count: int, random: torch.Generator) -> tuple[Tensor, Tensor]:
    """Two marks in one row, either side of a window border, of two colours each; label: the same colour."""
    x = torch.zeros(count, 3, 8, 8)
    row = torch.randint(8, (count,), generator=random)
    colour = torch.randint(2, (count, 2), generator=random)
    for i, column in enumerate((3, 4)):
        x[torch.arange(count), colour[:, i], row, column] = 1.0
    return x, (colour[:, 0] == colour[:, 1]).long()


def learn_pairs(model: nn.Module, seed: int, *, steps: int = 300) -> float:
    """Held-out accuracy on `pairs` after `steps` of AdamW, one cycle to 2e-3, batch 64."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3, weight_decay=0.05)
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    random = generator(seed, "pairs")
    for _ in range(steps):
        x, y = pairs(64, random)
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        cycle.step()
    x, y = pairs(2048, generator(seed, "held out"))
    with torch.no_grad():
        return float((model.eval()(x).argmax(1) == y).float().mean())


def experiment(shifted: bool, seed: int) -> float:
    """Held-out accuracy with or without the shift of every second block."""
    torch.manual_seed(seed)
    config = SwinConfig(
        image_size=(8, 8), patch_size=1, embed_dim=24, depths=(4,), num_heads=(2,), window_size=4, num_classes=2
    )
    model = Swin(config)
    for module in model.modules():
        if isinstance(module, WindowAttention) and not shifted:
            module.shift = 0
    return learn_pairs(model, seed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--side", type=int, default=224)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--experiment", action="store_true", help="train with and without the shift, two seeds")
    parser.add_argument("--out", type=Path, default=None, help="write the figures as JSON")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    figures: dict[str, Any] = {"torch": torch.__version__, "threads": args.threads, "batch": args.batch}
    figures["cost"] = cost()
    for row in figures["cost"]:
        print(f"{row['side']:5} px {row['gmacs']:8.2f} GMACs, {row['times_the_first']:.3f} times the first")
    figures["speed"] = speed(args.batch, args.side, args.repeats)
    for row in figures["speed"]:
        print(
            f"{row['peer']:12} {row['peer_ms']:8.1f} ms, ours {row['ours_ms']:8.1f} ms: {row['ratio']:.2f}x "
            f"(of the fastest {row['ratio_of_fastest']:.2f}x), logits differ by {row['difference']:.1e} of their std"
        )
    if args.experiment:
        figures["shifted_windows"] = {
            word: [experiment(shifted, seed) for seed in (0, 1)]
            for word, shifted in (("shifted", True), ("plain", False))
        }
        for word, reached in figures["shifted_windows"].items():
            print(f"{word:8} windows: {', '.join(f'{r:.3f}' for r in reached)} held-out")
    if args.out is not None:
        args.out.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
