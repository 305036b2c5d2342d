"""Block pruning (LPViT): speed of block-sparse layers beside dense ones and torch's BSR, and accuracy on CIFAR-10.

python -m bench.block_prune                       # speed; one thread, CPU time of this process, in turns
python -m bench.block_prune --quality --seeds 3   # a ViT on CIFAR-10; trains it first if it is not kept
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lynceus
from bench._rewrites import TRAIN, accuracy, cifar_vit, shifted
from bench._trust import cifar
from lynceus.core.environment import environment
from lynceus.core.rng import generator
from lynceus.core.types import Batch
from lynceus.recipes.distil import Distil
from lynceus.rewrite.block_prune import BlockPrune, BlockSparseLinear
from lynceus.rewrite.block_prune.mlp import pair_up
from lynceus.train.optim import param_groups

WIDTHS = {"ViT-S": 384, "ViT-B": 768}


def in_turns(ways: dict[str, Callable[[], Any]], clock: Callable[[], float], repeats: int = 12) -> dict[str, float]:
    """Least milliseconds of each way, measured one after the other in every turn."""
    least = dict.fromkeys(ways, float("inf"))
    with torch.no_grad():  # torch's BSR fails under inference_mode
        for turn in range(repeats + 2):
            for name, run in ways.items():
                start = clock()
                run()
                if turn > 1:
                    least[name] = min(least[name], 1e3 * (clock() - start))
    return least


def random_sparse(layer: nn.Linear, block: tuple[int, int], keep: float, seed: int = 0) -> BlockSparseLinear:
    """The layer with a share of its blocks, drawn at random: the hardest case, no row or column is empty."""
    grid = (layer.out_features // block[0], layer.in_features // block[1])
    kept = torch.zeros(grid[0] * grid[1], dtype=torch.bool)
    kept[torch.randperm(len(kept), generator=generator(seed, "blocks"))[: round(keep * len(kept))]] = True
    return BlockSparseLinear.of(layer, block, kept.view(grid)).eval()


def layers(rows: list[dict[str, Any]], tokens: int, clock: Callable[[], float]) -> None:
    """Single layers, the perceptron and the whole block of ViT-S and ViT-B, blocks drawn at random."""
    for name, width in WIDTHS.items():
        net = lynceus.create_model("vit_small" if width == 384 else "vit_base", num_classes=10, depth=1)
        block = net.blocks[0].eval().requires_grad_(False)
        images = max(tokens // 197, 1)
        x = torch.randn(images, tokens // images, width)
        parts = {"qkv": block.attn.qkv, "proj": block.attn.proj, "fc1": block.mlp.fc1, "fc2": block.mlp.fc2}
        for side in (64, 32):
            for keep in (0.5, 0.3):
                sparse = copy.deepcopy(block)
                for path, layer in (("attn.qkv", parts["qkv"]), ("attn.proj", parts["proj"]),
                                    ("mlp.fc1", parts["fc1"]), ("mlp.fc2", parts["fc2"])):  # fmt: skip
                    sparse.set_submodule(path, random_sparse(layer, (side, side), keep))
                pair_up(sparse)
                row: dict[str, Any] = {"width": name, "tokens": tokens, "block": side, "kept": keep}
                dense_ms, sparse_ms = 0.0, 0.0
                for part, layer in parts.items():
                    wide = torch.randn(images, tokens // images, layer.in_features)
                    thin = sparse.get_submodule(f"{'attn' if part in ('qkv', 'proj') else 'mlp'}.{part}")
                    assert (thin(wide) - F.linear(wide, thin.weight, thin.bias)).abs().max() < 1e-4
                    took = in_turns(
                        {
                            "dense": lambda wide=wide, layer=layer: F.linear(wide, layer.weight, layer.bias),
                            "sparse": lambda wide=wide, thin=thin: thin(wide),
                        },
                        clock,
                    )
                    row[part] = took["dense"] / took["sparse"]
                    dense_ms, sparse_ms = dense_ms + took["dense"], sparse_ms + took["sparse"]
                row["four layers"] = dense_ms / sparse_ms
                took = in_turns({"dense": partial(block.mlp, x), "sparse": partial(sparse.mlp, x)}, clock)
                row["mlp"] = took["dense"] / took["sparse"]
                took = in_turns({"dense": partial(block, x), "sparse": partial(sparse, x)}, clock)
                row |= {"block dense ms": took["dense"], "block sparse ms": took["sparse"]}
                row["whole block"] = took["dense"] / took["sparse"]
                show(rows, row)


def bsr(rows: list[dict[str, Any]], tokens: int, clock: Callable[[], float]) -> None:
    """torch's block layouts on the layer of the card: 3072 x 768."""
    dense = nn.Linear(768, 3072).requires_grad_(False)
    for keep in (0.5, 0.3):
        ours = random_sparse(dense, (64, 64), keep).requires_grad_(False)
        x = torch.randn(tokens, 768)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            packed = ours.weight.contiguous().to_sparse_bsr((64, 64))
        turned = x.t().contiguous()
        took = in_turns(
            {
                "dense": lambda x=x: F.linear(x, dense.weight, dense.bias),
                "ours": lambda x=x, ours=ours: ours(x),
                "F.linear(bsr)": lambda x=x, packed=packed: F.linear(x, packed),
                "bsr @ x^T": lambda packed=packed, turned=turned: packed @ turned,
            },
            clock,
            8,
        )
        show(rows, {"layer": "3072x768", "tokens": tokens, "kept": keep, "dense ms": took["dense"],
                    **{k: took["dense"] / v for k, v in took.items() if k != "dense"}})  # fmt: skip


def quality(
    rows: list[dict[str, Any]], seeds: list[int], block: int, pictures: int, epochs: int, seconds: float
) -> None:
    """Accuracy of the ViT on CIFAR-10 before and after pruning, and after a finetune with distillation."""
    x, y = cifar(TRAIN)
    found: dict[str, list[float]] = {}
    for seed in seeds:
        dense, test, label = cifar_vit(seed, seconds=seconds)
        whole = accuracy(dense, test, label)
        note(found, "dense", whole)
        calibration = x[torch.randperm(TRAIN, generator=generator(seed, "calibration"))[:256]].float() / 255
        for flops in (0.5, 0.3):
            tries: dict[str, dict[str, Any]] = {
                "taylor, curves": {},
                "taylor, curves, no power": {"power": False},
                "taylor, curves, tokens": {"cost": "tokens"},
                "taylor, curves, measured ms": {"cost": "measured"},
                "taylor, uniform": {"spread": "uniform"},
                "L1, uniform": {"ranking": "magnitude", "spread": "uniform"},
            }
            for name, options in tries.items():
                made = BlockPrune(block=block, flops=flops, **options)(dense, calibration)
                note(found, f"{flops:.0%}: {name}", accuracy(made, test, label))
                print(f"seed {seed}", {k: round(v[-1], 1) for k, v in found.items()}, flush=True)
        if pictures:
            made = BlockPrune(block=block, flops=0.5)(dense, calibration)
            tuned = finetuned(made, dense, x, y, seed, pictures, epochs)
            note(found, f"50%: taylor, curves, after {epochs} x {pictures} pictures", accuracy(tuned, test, label))
            print(f"seed {seed}", {k: round(v[-1], 1) for k, v in found.items()}, flush=True)
    for name, values in found.items():
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        show(rows, {"what": name, "accuracy": statistics.mean(values), "spread": spread,
                    "to dense": statistics.mean(values) - statistics.mean(found["dense"])})  # fmt: skip


def note(found: dict[str, list[float]], name: str, value: float) -> None:
    found.setdefault(name, []).append(value)


def finetuned(
    pruned: nn.Module, dense: nn.Module, x: Tensor, y: Tensor, seed: int, pictures: int, epochs: int
) -> nn.Module:
    """Distilled from the dense model for so many epochs of so many pictures."""
    recipe = Distil(copy.deepcopy(pruned), dense).train()
    order = generator(seed, "finetune")
    optimizer = torch.optim.AdamW(param_groups(recipe.model), 5e-4, weight_decay=0.05)
    start, total = time.process_time(), epochs * (pictures // 64)
    step = 0
    for _ in range(epochs):
        for part in torch.randperm(TRAIN, generator=order)[: pictures // 64 * 64].split(64):
            optimizer.param_groups[0]["lr"] = 5e-4 * min(1.0, 20 * step / total, 1.02 - step / total)
            batch = Batch(image=shifted(x[part], order), sizes=[(32, 32)] * len(part), label=y[part])
            loss = recipe(batch)["loss"]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            recipe.after_step(step, total)
            step += 1
    print(f"finetuned on {epochs} x {pictures} pictures in {time.process_time() - start:.0f} s", flush=True)
    return recipe.export()


def show(rows: list[dict[str, Any]], row: dict[str, Any]) -> None:
    rows.append(row)
    print("  ".join(f"{k} {v:.2f}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tokens", type=int, nargs="+", default=[788, 197])
    parser.add_argument("--wall", action="store_true", help="the clock's time, not this process's")
    parser.add_argument("--quality", action="store_true")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--seed", type=int, help="only this one")
    parser.add_argument("--block", type=int, default=32, help="of the quality")
    parser.add_argument("--pictures", type=int, default=TRAIN, help="of an epoch of the finetune; 0: none")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=600.0, help="of processor time that the dense net is trained")
    parser.add_argument("--out", help="a JSON file for the figures")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    clock = time.perf_counter if options.wall else time.process_time
    print(json.dumps(environment(threads=str(options.threads), time="wall" if options.wall else "CPU")))
    rows: list[dict[str, Any]] = []
    if options.quality:
        seeds = list(range(options.seeds)) if options.seed is None else [options.seed]
        quality(rows, seeds, options.block, options.pictures, options.epochs, options.seconds)
    else:
        for tokens in options.tokens:
            layers(rows, tokens, clock)
        bsr(rows, options.tokens[0], clock)
    if options.out:
        Path(options.out).write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
