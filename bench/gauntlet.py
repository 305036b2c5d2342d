"""The gauntlet on CIFAR-10 and on frozen features: the items of its card, as figures.

    python -m bench.gauntlet --data train.parquet --photos imagenet-sample --out runs/bench-gauntlet

Three courses, each resumable (kill it, start it again with the same --out):
  families: the nano of every family from scratch on 20,000 pictures, each with the same processor time (--seconds);
  scratch: four nano backbones at an equal budget on 10,000 pictures, with crop selection on each trained network;
  frozen: random ResNet-18, random ViT-Tiny, a small ResNet trained on classes 0-4 and on all, HOG, colour histogram,
  raw pixels; probes, few-shot, light shifts, class retrieval, copy detection, fine-tuning; then the card's sanity.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path

import lynceus.data
from bench._data import CIFAR10 as IMAGES
from bench._data import PHOTOS
from lynceus.backbones import FAMILIES
from lynceus.gauntlet.entries import enter, train_subject
from lynceus.gauntlet.run import CIFAR10, GauntletConfig, gauntlet

TRAINED = ("trained on 0-4", "trained on all")
RANDOM = ("timm:resnet18", "timm:vit_tiny_patch16_224")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=IMAGES)
    parser.add_argument("--photos", type=Path, default=PHOTOS)
    parser.add_argument("--course", choices=("families", "scratch", "frozen", "both"), default="both")
    parser.add_argument("--models", nargs="+", default=["convnext_nano", "resnet_nano", "swin_nano", "vit_nano"])
    parser.add_argument("--steps", type=int, default=CIFAR10.steps)
    parser.add_argument("--seconds", type=float, default=240.0, help="processor time of each in the course of families")
    parser.add_argument("--seeds", type=int, default=3, help="of the frozen course")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("runs/bench-gauntlet"))
    options = parser.parse_args()
    found = {}
    if options.course == "families":
        found["families"] = families(options)
    if options.course in ("scratch", "both"):
        found["scratch"] = scratch(options)
    if options.course in ("frozen", "both"):
        found["frozen"] = frozen(options)
    (options.out / "figures.json").write_text(json.dumps(found, indent=1))


def families(options: argparse.Namespace) -> dict[str, object]:
    """Every family's nano from scratch at an equal budget of processor time."""
    config = GauntletConfig(
        seconds=options.seconds, limit=20_000, augment="small", seeds=(0,), jobs=options.jobs,
        stations=("accuracy", "cost"),
    )  # fmt: skip
    names = [f"{family}_nano" for family in FAMILIES]
    report = gauntlet(names, lynceus.data.open(options.data), config=config, out=options.out / "families")
    print(report.table())
    return {"answer": report.answer, "rows": report.rows, "notes": report.notes}


def scratch(options: argparse.Namespace) -> dict[str, object]:
    """From scratch at an equal budget, crop selection included."""
    start = time.monotonic()
    config = replace(CIFAR10, steps=options.steps, jobs=options.jobs)
    report = gauntlet(options.models, lynceus.data.open(options.data), config=config, out=options.out / "scratch")
    print(report.table())
    print(f"scratch: {time.monotonic() - start:.0f} s in this call")
    return {"answer": report.answer, "rows": report.rows, "notes": report.notes}


def frozen(options: argparse.Namespace) -> dict[str, object]:
    """Frozen features of at least six subjects, and what a faithful run must show."""
    start = time.monotonic()
    data = lynceus.data.open(options.data).take(3000)
    train, test = data.train_test(1 / 3)
    seeds = tuple(range(options.seeds))
    made = trained_subjects(options, lynceus.data.open(options.data))
    config = GauntletConfig(
        mode="frozen", seeds=seeds, jobs=options.jobs, photos=options.photos, finetune_steps=100, batch_size=32,
        shift_images=100, episodes=20, latency_repeats=5, lr=(1e-3,),
        stations=("knn", "logistic", "few-shot", "retrieval", "copies", "ood", "shift", "fine-tune", "cost", "latency"),
    )  # fmt: skip
    models = [*RANDOM, *made, "HOG", "colour histogram", "raw pixels"]
    report = gauntlet(models, (train, test), config=config, out=options.out / "frozen")
    print(report.table())
    seconds = time.monotonic() - start
    print(f"frozen: {len(models)} subjects, {seconds:.0f} s in this call")
    checks = sanity(options.out / "frozen")
    for text, holds in checks.items():
        print(f"{'holds' if holds else 'FAILS'}: {text}")
    return {"answer": report.answer, "rows": report.rows, "notes": report.notes, "seconds": seconds, "sanity": checks}


def trained_subjects(options: argparse.Namespace, data) -> list[tuple[str, Path]]:
    """A small ResNet trained here, on pictures that the frozen course does not test on: five classes, then all."""
    pool = data.subset(range(30_000, 40_000))
    out = []
    for label, part in zip(TRAINED, (pool.subset(pool.labels < 5), pool)):
        folder = options.out / "made" / label.replace(" ", "-")
        config = GauntletConfig(steps=options.steps, batch_size=64, augment="small", seeds=(0,))
        trained = train_subject(enter(["resnet_nano"])[0], 0, part, config, folder)
        assert trained.model is not None
        out.append((label, folder / "run" / "model.safetensors"))
    return out


def sanity(folder: Path) -> dict[str, bool]:
    """The card's item 4, read from the cells."""
    values: dict[tuple[str, int, str], float] = {}
    for path in (folder / "cells").glob("*.json"):
        cell = json.loads(path.read_text())
        for name, value in cell["values"].items():
            values[cell["subject"], cell["seed"], name] = value
    seeds = sorted({k[1] for k in values})
    tasks = ["kNN", "logistic", "few-shot 1 per class", "few-shot 5 per class", "few-shot 10 per class", "mAP", "MRR"]
    out = {}
    for task in tasks:
        ok = all(values[t, s, task] > values[r, s, task] for t in TRAINED for r in RANDOM for s in seeds)
        out[f"trained above random in {task}, all {len(seeds)} seeds"] = ok
    for t in TRAINED:
        ok = all(values[t, s, "fine-tuned accuracy"] > values[t, s, "logistic"] for s in seeds)
        out[f"{t}: fine-tuning above the linear probe"] = ok
    for name in ("raw pixels", "HOG"):
        out[f"{name} above random ViT in kNN"] = all(
            values[name, s, "kNN"] > values[RANDOM[1], s, "kNN"] for s in seeds
        )
    return out


if __name__ == "__main__":
    main()
