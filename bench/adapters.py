"""Structured pruning adapters beside fine-tuning and pruning: CIFAR-10 classes 0-4 to 5-9 at 50, 30, 10% of channels.

`python -m bench.adapters [accuracy|speed] [--seeds 0 1 2]`. accuracy needs CIFAR-10 (see bench/_data.py): a CNN of half
a million parameters learns classes 0-4, then becomes a model of classes 5-9 by SPLoRA r8, SPPaRA, and fine-tuning of
all weights, with the same pruning steps. speed: one training step beside the reference package and peft, where they are
installed, and the pruned CNN's time beside the dense one's. Times are medians of interleaved runs.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import inspect
import json
import os
import statistics
import time
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bench._trust import KEPT
from lynceus.core.cost import cost
from lynceus.core.report import environment
from lynceus.rewrite.adapters import Adapt, fuse, prune
from lynceus.rewrite.adapters.importance import CRITERIA
from lynceus.train.fit import FitConfig

WIDTHS = (64, 128, 128, 128, 128)
STRIDES = (2, 2, 2, 1, 1)
BASE, TRAIN, VALID, TEST = 4500, 700, 300, 300  # images of each class; VALID follow TRAIN, TEST are the last
LEFT = (0.5, 0.3, 0.1)
MULTIPLES = (1, 8, 16)  # of channels, in the speed part
METHODS: dict[str, tuple[Adapt | None, float]] = {  # with its learning rate
    "SPLoRA r8": (Adapt(rank=8), 2e-2),
    "SPLoRA r32": (Adapt(rank=32), 1e-2),
    "SPPaRA": (Adapt(kind="sppara"), 2e-2),
    "fine-tuning": (None, 8e-3),
}


class Cnn(nn.Module):
    """Five 3x3 convolutions with batch norm and ReLU, mean over the map, classifier: 0.52 M parameters."""

    head_name, mean, std = "fc", (0.49, 0.48, 0.45), (0.25, 0.24, 0.26)

    def __init__(self, num_classes: int = 5):
        super().__init__()
        layers: list[nn.Module] = []
        for inside, outside, stride in zip((3, *WIDTHS), WIDTHS, STRIDES):
            layers += [nn.Conv2d(inside, outside, 3, stride, 1, bias=False), nn.BatchNorm2d(outside), nn.ReLU()]
        self.features, self.fc, self.num_classes = nn.Sequential(*layers), nn.Linear(WIDTHS[-1], 0), 0
        self.reset_classifier(num_classes)

    def reset_classifier(self, num_classes: int) -> None:
        self.fc, self.num_classes = nn.Linear(self.fc.in_features, num_classes), num_classes

    def forward(self, image: Tensor) -> Tensor:
        return self.fc(self.features(image).mean((2, 3)))


@cache
def halves() -> dict[str, Any]:
    """CIFAR-10 as two tasks, classes 0-4 and 5-9, each as (train, validation, test); validation images are training
    images that no measured model learns from. Images are taken class by class, in order."""
    import lynceus.data
    from bench._data import CIFAR10
    from lynceus.data.door import read_array

    path = KEPT / f"adapters-halves-{BASE}-{TRAIN}-{VALID}-{TEST}.npz"
    if not path.is_file():
        data = lynceus.data.open(CIFAR10)
        labels, kept = np.array(data.labels), {}
        for name, classes in (("base", range(5)), ("task", range(5, 10))):
            rows = [np.flatnonzero(labels == c) for c in classes]
            cut = BASE if name == "base" else TRAIN
            parts = {"train": slice(0, cut), "valid": slice(cut, cut + VALID), "test": slice(-TEST, None)}
            for part, where in parts.items():
                chosen = np.sort(np.concatenate([r[where] for r in rows]))
                kept[f"{name}.{part}"] = np.stack([data[int(i)].image.numpy() for i in chosen])
                kept[f"{name}.{part}.label"] = labels[chosen] - classes[0]
            kept[f"{name}.classes"] = np.array([data.classes[c] for c in classes])
        KEPT.mkdir(parents=True, exist_ok=True)
        np.savez(f"{path}.{os.getpid()}.npz", **kept)
        os.replace(f"{path}.{os.getpid()}.npz", path)
    kept = np.load(path)
    return {
        name: tuple(
            read_array(
                kept[f"{name}.{part}"],
                labels=kept[f"{name}.{part}.label"],
                classes=kept[f"{name}.classes"].tolist(),
            )
            for part in ("train", "valid", "test")
        )
        for name in ("base", "task")
    }


def base_of(seed: int) -> Any:
    """The CNN trained on classes 0-4 for some minutes; kept in a folder of the temporary files."""
    from safetensors.torch import load_file, save_file

    from lynceus.core.rng import borrowed
    from lynceus.recipes.supervised import SMALL, Supervised
    from lynceus.tasks.classify import Classify
    from lynceus.train.fit import fit

    train = halves()["base"][0]
    with borrowed(seed, "cnn"):
        predictor = Classify(classes=tuple(train.classes)).build(Cnn())
    text = inspect.getsource(base_of) + inspect.getsource(Cnn) + repr((WIDTHS, STRIDES, BASE, seed))
    path = KEPT / f"adapters-base-{hashlib.blake2b(text.encode(), digest_size=6).hexdigest()}.safetensors"
    if not path.is_file():
        recipe = Supervised(predictor.task, predictor.backbone, SMALL)
        fit(recipe, train, config=FitConfig(epochs=10, lr=3e-3, weight_decay=0.02, seed=seed, quiet=True))
        KEPT.mkdir(parents=True, exist_ok=True)
        save_file(recipe.export().state_dict(), str(path) + f".{os.getpid()}")
        os.replace(str(path) + f".{os.getpid()}", path)
    predictor.load_state_dict(load_file(path))
    return predictor.eval()


SCHEDULE: dict[str, Any] = {"left": LEFT, "step": 0.2, "before": 1.5, "between": 0.5, "finish": 2.5}


def special(name: str, lr: float, seed: int, test: Any) -> tuple[Any, list[Any], list[dict[str, Any]]]:
    """A method's run from the base of a seed: the base, the models, and their rows as evaluated on `test`."""
    from lynceus.recipes.specialise import SpecialiseConfig, specialise

    base = base_of(seed)
    before = copy.deepcopy(base.state_dict())
    fitting = FitConfig(lr=lr, weight_decay=5e-4, seed=seed, quiet=True)
    made, report = specialise(
        base, halves()["task"][0], adapter=METHODS[name][0], config=SpecialiseConfig(**SCHEDULE), held_out=test,
        preset="small", fitting=fitting,
    )  # fmt: skip
    assert all(torch.equal(v, before[k]) for k, v in base.state_dict().items())
    return base, made, report.rows


def search(names: list[str], seed: int = 0) -> None:
    """Accuracies on the validation images by learning rate; METHODS holds the best rates."""
    for name in names:
        for lr in (2e-3, 4e-3, 8e-3) if METHODS[name][0] is None else (1e-2, 2e-2, 4e-2):
            _, _, rows = special(name, lr, seed, halves()["task"][1])
            print(json.dumps({"method": name, "lr": lr, "valid": [r["accuracy"] for r in rows]}), flush=True)


def accuracy(seeds: list[int], names: list[str]) -> list[dict[str, Any]]:
    """One row per seed, method and density, on the test images."""
    rows = []
    for seed in seeds:
        for name in names:
            start = time.process_time()
            base, made, found = special(name, METHODS[name][1], seed, halves()["task"][2])
            spent = time.process_time() - start
            for row, one in zip(found, made):
                ms = interleaved({"dense": runner(base), "small": runner(one.fused)})
                rows.append(
                    {"seed": seed, "method": name, **row, "ms": ms["small"], "ms_dense": ms["dense"], "cpu_s": spent}
                )
                print(json.dumps(rows[-1]), flush=True)
    return rows


def runner(model: nn.Module, batch: int = 32, grad: bool = False) -> Callable[[], Any]:
    x = torch.rand(batch, 3, 32, 32, generator=torch.Generator().manual_seed(0))

    def run() -> Any:
        with torch.inference_mode(not grad):
            return model(x)

    return run


def interleaved(runs: dict[str, Callable[[], Any]], count: int = 15) -> dict[str, float]:
    """Median milliseconds of each, taken in turns after a warm-up."""
    times: dict[str, list[float]] = {n: [] for n in runs}
    for k in range(count + 2):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if k >= 2:
                times[name].append(1e3 * (time.perf_counter() - start))
    return {n: statistics.median(v) for n, v in times.items()}


# speed ----------------------------------------------------------------------------------------
def step_of(model: nn.Module, batch: int = 64) -> Callable[[], Any]:
    """One training step: forward, backward, AdamW."""
    model.train()
    x = torch.rand(batch, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    y = torch.arange(batch) % 5
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-3)

    def run() -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()

    return run


def learned(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def small_vit() -> nn.Module:
    from lynceus import create_model

    return create_model("vit_nano", num_classes=5)


def speed() -> list[dict[str, Any]]:
    """Training steps and their learned numbers, per network and method; then pruned against dense CNNs."""
    rows = []
    for net, build in (("cnn", Cnn), ("vit_nano", small_vit)):
        torch.manual_seed(0)
        plain: nn.Module = build()
        models = {"fine-tuning": copy.deepcopy(plain), "SPLoRA r8": Adapt(rank=8)(plain)}
        if net == "cnn":
            models["SPPaRA"] = Adapt(kind="sppara")(plain)
        models |= peers(plain)
        ms = interleaved({n: step_of(m) for n, m in models.items()}, 9)
        for name, model in models.items():
            rows.append(
                {"network": net, "method": name, "step_ms": ms[name], "ratio": ms[name] / ms["fine-tuning"],
                 "learned": learned(model)}
            )  # fmt: skip
            print(json.dumps(rows[-1]), flush=True)
    x = torch.rand(2, 3, 32, 32)
    dense = Cnn().eval()
    adapted = Adapt(rank=8)(dense, x)
    for left in LEFT:
        kept = {k: fuse(prune(adapted, 1 - left, example=x, scope="layer", multiple=k)).eval() for k in MULTIPLES}
        ms = interleaved({"dense": runner(dense)} | {str(k): runner(m) for k, m in kept.items()}, 41)
        for k, small in kept.items():
            widths = [m.out_channels for m in small.modules() if isinstance(m, nn.Conv2d)]
            share = cost(small, x).macs / cost(dense, x).macs
            rows.append({"left": left, "multiple": k, "widths": widths, "dense_ms": ms["dense"],
                         "small_ms": ms[str(k)], "time": ms[str(k)] / ms["dense"], "macs": share})  # fmt: skip
            print(json.dumps(rows[-1]), flush=True)
    return rows


def peers(plain: nn.Module) -> dict[str, nn.Module]:
    """The same network adapted by the reference package and by peft's LoRA, where they can be imported."""
    found: dict[str, nn.Module] = {}
    try:
        from sp_adapters import SPLoRA

        found["reference SPLoRA r8"] = SPLoRA(copy.deepcopy(plain), rank=8)
        for n, p in found["reference SPLoRA r8"].named_parameters():
            module = found["reference SPLoRA r8"].get_submodule(n.rpartition(".")[0])
            if hasattr(module, "adapter") and n.endswith(".weight"):
                p.requires_grad_(False)
    except ImportError as error:
        print(f"no reference package: {error}")
    try:
        from peft import LoraConfig, get_peft_model

        names = [n for n, m in plain.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
        found["peft LoRA r8"] = get_peft_model(copy.deepcopy(plain), LoraConfig(r=8, target_modules=names))
    except ImportError as error:
        print(f"no peft: {error}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("what", nargs="?", choices=("accuracy", "search", "speed", "all"), default="all")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--importance", choices=CRITERIA, default="taylor")
    args = parser.parse_args()
    SCHEDULE["importance"] = args.importance
    print(json.dumps(environment()), flush=True)
    if args.what in ("speed", "all"):
        speed()
    if args.what in ("accuracy", "all"):
        table(accuracy(args.seeds, args.methods))
    if args.what == "search":
        search(args.methods, args.seeds[0])


def table(rows: list[dict[str, Any]]) -> None:
    """Means over the seeds, with the range of the accuracies."""
    for name in METHODS:
        for left in LEFT:
            some = [r for r in rows if r["method"] == name and r["left"] == left]
            if some:
                hits = [100 * r["accuracy"] for r in some]
                ratio, one = statistics.mean(r["ms"] / r["ms_dense"] for r in some), some[0]
                print(
                    f"{name:12} {left:4.0%}  accuracy {statistics.mean(hits):.1f} ({min(hits):.1f} to {max(hits):.1f})"
                    f"  learned {one['learned']:,}  file {one['delta_kb']:.0f} kB of {one['weights_kb']:.0f}"
                    f"  MACs {one['macs_share']:.3f}  time {ratio:.2f}"
                )


if __name__ == "__main__":
    main()
