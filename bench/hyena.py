"""Hyena N-D: what its bias does for 300 images, and how its cost grows with the map.

python -m bench.hyena                                  # both: about 4 minutes on one core
python -m bench.hyena --part growth --threads 2        # milliseconds of one layer, 28x28 to 112x112 cells
python -m bench.hyena --part few --seeds 0 1 2 --out hyena.json

few: scikit-learn's digits at 16 x 16, 300 to learn from and 360 others to test on; 4 blocks of width 48, patch 2;
AdamW, one cycle to 2e-3, 180 steps of 50. Attention is far from converged by then: the gap is speed of learning from
few images. With the authors' code in $LYNCEUS_PEERS (bench/authors.py), its layer is timed too.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lynceus.data
from bench.authors import folder_of, imported
from bench.peers import Absent, interleaved
from lynceus.backbones.hyena_vit import HyenaViT, HyenaViTConfig
from lynceus.core.rng import borrowed, generator
from lynceus.layers.attention import MapAttention
from lynceus.layers.hyena import Hyena

SMALL = HyenaViTConfig(
    image_size=(16, 16), patch_size=2, dim=48, depth=4, heads=3, mlp_ratio=2.0, width=16, num_classes=10
)
FORMS: dict[str, dict[str, Any]] = {
    "attention": {"method": "attention"},
    "hyena, joint, seq": {},
    "hyena, product, 4dir": {"form": "product", "direction": "4dir"},
    "hybrid, hyena first": {"method": "hyena2dattn"},
    "hybrid, attention first": {"method": "attnhyena2d"},
}


def digits(count: int = 300, test: int = 360) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images (n, 3, 16, 16) and labels to learn from, then to test on: a fixed stratified cut."""
    parts = []
    for split, n in (("train", count), ("test", test)):
        data = lynceus.data.open("digits", split=split)
        chosen = torch.randperm(len(data), generator=generator(0, "few", split))[:n].tolist()
        samples = [data[i] for i in chosen]
        images = torch.stack([torch.as_tensor(s.image).float() / 255 for s in samples])
        parts += [F.interpolate(images, (16, 16), mode="bilinear"), torch.tensor([s.label for s in samples])]
    mean, std = parts[0].mean(), parts[0].std()
    return (parts[0] - mean) / std, parts[1], (parts[2] - mean) / std, parts[3]


def accuracy(options: dict[str, Any], seed: int, data: tuple[Tensor, ...], epochs: int = 30) -> float:
    """Per cent of the test images that a fresh net, trained for `epochs`, puts right."""
    x, y, test, truth = data
    with borrowed(seed, "few"):
        model = HyenaViT(replace(SMALL, **options))
    shuffle, steps = generator(seed, "order"), epochs * (len(x) // 50)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    model.train()
    for _ in range(epochs):
        for part in torch.randperm(len(x), generator=shuffle).split(50):
            loss = F.cross_entropy(model(x[part]), y[part])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            cycle.step()
    model.eval()
    with torch.inference_mode():
        return 100 * float((model(test).argmax(1) == truth).float().mean())


def few(seeds: list[int]) -> list[dict[str, Any]]:
    data, rows = digits(), []
    for name, options in FORMS.items():
        start = time.process_time()
        found = [accuracy(options, seed, data) for seed in seeds]
        spread = statistics.stdev(found) if len(found) > 1 else 0.0
        rows.append({"form": name, "accuracy": found, "mean": statistics.mean(found), "spread": spread})
        per = (time.process_time() - start) / len(seeds)
        shown = ", ".join(f"{v:.1f}" for v in found)
        print(f"{name:26s} {statistics.mean(found):5.1f} +- {spread:.1f} %   ({shown})   {per:.0f} s each", flush=True)
    return rows


class Materialised(MapAttention):
    """The same attention with the whole map of weights in memory, as the equations have it."""

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:  # type: ignore[override]
        b, h, w, c = x.shape
        q, k, v = self.qkv(x).reshape(b, h * w, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        weights = ((c // self.heads) ** -0.5 * q @ k.transpose(-2, -1)).softmax(-1)
        return self.proj((weights @ v).transpose(1, 2).reshape(b, h, w, c))


def authors_layer(side: int, dim: int) -> nn.Module:
    """The layer of the authors' code; Absent when it is not here."""
    code = imported(folder_of("Itamarzimm/HyenaND"), "pytorch-image-models/timm/models/layers/hyena2d.py")
    with contextlib.redirect_stdout(io.StringIO()):
        made: nn.Module = code.HyenaOperator2d(dim, side, hyena2d_filter=True)
    return made


def growth(sides: list[int], dim: int = 192, *, cpu: bool = False) -> list[dict[str, Any]]:
    """Milliseconds of one layer, batch 1, by the side of its map."""
    rows = []
    for side in sides:
        x = torch.randn(1, side, side, dim)
        layers: dict[str, nn.Module] = {
            "hyena": Hyena(dim, (side, side)),
            "hyena, product": Hyena(dim, (side, side), form="product"),
            "attention, fused": MapAttention(dim, 3),
        }
        if side <= 56:
            layers["attention, materialised"] = Materialised(dim, 3)
        try:
            layers["hyena, authors"] = authors_layer(side, dim)
        except Absent as why:
            print(f"(authors' layer: {why})")

        def runner(layer: nn.Module, x: Tensor = x) -> Callable[[], Any]:
            def run() -> None:
                with torch.inference_mode():
                    layer(x)

            return run

        clock = time.process_time if cpu else time.perf_counter
        times = interleaved({name: runner(layer.eval()) for name, layer in layers.items()}, 4.0, clock=clock)
        found = {name: 1e3 * statistics.median(t) for name, t in times.items()}
        rows.append({"side": side, **found})
        print(f"{side:4d}x{side:<4d}" + "".join(f"  {name} {ms:.1f} ms" for name, ms in found.items()), flush=True)
    for name in rows[0]:
        if name != "side" and len(rows) > 1 and name in rows[1]:
            print(f"{name}: {rows[1][name] / rows[0][name]:.1f} times the time for four times the cells")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=["few", "growth", "both"], default="both")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--sides", type=int, nargs="+", default=[28, 56, 112])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--cpu-time", action="store_true", help="of this process alone; with one thread, where others run"
    )
    parser.add_argument("--out", help="file for the figures (JSON)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    found: dict[str, Any] = {"torch": torch.__version__, "threads": args.threads}
    if args.part in ("few", "both"):
        found["few"] = few(args.seeds)
    if args.part in ("growth", "both"):
        found["growth"] = growth(args.sides, cpu=args.cpu_time)
    if args.out:
        with open(args.out, "w") as file:
            json.dump(found, file, indent=2)


if __name__ == "__main__":
    main()
