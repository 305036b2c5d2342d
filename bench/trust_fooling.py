"""Fooling images: what evolution and ascent reach, whether retraining helps, images per second.

    python -m bench.trust_fooling [--only 2 3 4 5 6 7 8] [--seeds 5] [--out figures.json]

The numbers are those of the items under "Must work here" of the card. 5 and 8 need CIFAR-10 ($LYNCEUS_TEST_DATA).
Archives of pyribs stand beside ours in item 8 where `ribs` is installed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench._trust import cifar, cifar_cnn, digits8, digits_cnn, small_cnn, trained
from lynceus import Subject
from lynceus.core.environment import environment
from lynceus.core.errors import AdviceError
from lynceus.core.rng import borrowed, generator
from lynceus.trust import fooling
from lynceus.trust.evolution import Archive
from lynceus.trust.pixels import Pixels
from lynceus.trust.real import resemblance

DIGIT = (1, 8, 8)


@cache
def sure_cnn(seed: int = 0) -> nn.Module:
    """`digits_cnn` trained for 40 epochs, until it is sure of its answers: about 99% of the test digits."""
    x, y, _, _ = digits8()
    with borrowed(seed, "sure cnn"):
        return trained(small_cnn(), x, y, seed=seed, epochs=40)


def grey(model: nn.Module) -> Subject:
    return Subject(model, mean=(0.0,), std=(1.0,), name="digits CNN")


def learn_digits(images: Tensor, labels: Tensor, classes: int, seed: int) -> Subject:
    """20 epochs of the same network: what `retrain` calls."""
    with borrowed(seed, "learn digits"):
        return grey(trained(small_cnn(classes), images.float() / 255, labels, seed=seed, epochs=20))


def share(model: nn.Module) -> float:
    _, _, x, y = digits8()
    with torch.no_grad():
        return float((model(x).argmax(1) == y).double().mean())


def show(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    for row in rows:
        print(
            "  " + "  ".join(f"{k} {v:.5g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()), flush=True
        )
    return rows


def digits(o: argparse.Namespace) -> list[dict[str, Any]]:
    """2. Digits: pixels until generation 30, patterns until 50, by net and seed; and 500 generations of pixels."""
    rows = []
    for name, make in (("sure", sure_cnn), ("15 epochs", digits_cnn)):
        net = make(0)
        for encoding, generations in (("pixels", 30), ("cppn", 50), ("pixels", 500)):
            found, seconds = [], []
            for seed in range(o.seeds if generations < 500 else 1):
                report = fooling.evolve(grey(net), DIGIT, encoding, generations, 200, seed, quiet=True)
                found.append(report.summary)
                seconds.append(report.summary["seconds"])
            rows.append(
                {
                    "net": name,
                    "accuracy": share(net),
                    "encoding": encoding,
                    "generations": generations,
                    "seeds": len(found),
                    "least median": min(f["median_confidence"] for f in found),
                    "least minimum": min(f["minimum_confidence"] for f in found),
                    "minima": str([round(f["minimum_confidence"], 5) for f in found]),
                    "seconds": statistics.median(seconds),
                }
            )
    return show(rows)


def unrecognisable(o: argparse.Namespace) -> list[dict[str, Any]]:
    """3. Largest correlation with a digit of the class, and how often a 1-NN agrees with the network."""
    x, y, tx, ty = digits8()
    likeness = resemblance(fooling.to_bits(tx), ty, x, y)
    rows = [
        {
            "images": "held-out digits",
            "correlation, mean": statistics.mean(v["correlation"] for v in likeness),
            "1-NN agrees, of 10": 10 * statistics.mean(v["nearest"] == int(t) for v, t in zip(likeness, ty)),
        }
    ]
    for encoding in ("pixels", "cppn"):
        for goal, generations in ((0.999, 100), (0.9999, 100), (None, 30), (None, 500)):
            highest, lowest, agree, least = [], [], [], []
            for seed in range(o.seeds):
                report = fooling.evolve(
                    grey(sure_cnn(0)), DIGIT, encoding, generations, 200, seed, real=x, labels=y, goal=goal, quiet=True
                )
                correlation = [r["correlation"] for r in report.rows]
                highest.append(max(correlation))
                lowest.append(min(correlation))
                agree.append(10 * report.summary["nearest_neighbour_agrees"])
                least.append(report.summary["minimum_confidence"])
            rows.append(
                {
                    "images": encoding,
                    "goal": str(goal),
                    "generations": f"<= {generations}",
                    "correlation, lowest": min(lowest),
                    "correlation, highest by seed": str([round(v, 2) for v in highest]),
                    "1-NN agrees, of 10, by seed": str([round(v) for v in agree]),
                    "least confidence": min(least),
                }
            )
    return show(rows)


def ascent(o: argparse.Namespace) -> list[dict[str, Any]]:
    """4. Gradient ascent with three decays."""
    rows = []
    mean = float(digits8()[0].mean())
    for name, make in (("sure", sure_cnn), ("15 epochs", digits_cnn)):
        for seed in range(o.seeds):
            report = fooling.ascend(
                grey(make(0)), None, (0.0, 0.01, 0.05), shape=DIGIT, config=fooling.AscentConfig(mean=mean), seed=seed,
                quiet=True,
            )  # fmt: skip
            for decay in (0.0, 0.01, 0.05):
                mine = [r for r in report.rows if r["decay"] == decay]
                steps = [r["> 0.9999 at step"] for r in mine]
                rows.append(
                    {
                        "net": name,
                        "seed": seed,
                        "decay": decay,
                        "reach .9999": sum(s is not None for s in steps),
                        "first, last step": str((min((s for s in steps if s is not None), default=None),
                                                 max((s for s in steps if s is not None), default=None))),
                        "last: lowest": min(r["last"] for r in mine),
                        "last: highest": max(r["last"] for r in mine),
                        "last below .9": sum(r["last"] < 0.9 for r in mine),
                        "8 bits: lowest": min(r["best in 8 bits"] for r in mine),
                    }
                )  # fmt: skip
    return show(rows)


def colour(o: argparse.Namespace) -> list[dict[str, Any]]:
    """5. CIFAR-10: patterns in colour, 200 generations of 200; an untrained net is refused."""
    net = cifar_cnn()
    x, y = cifar(2000, 45_000)
    with torch.no_grad():
        accuracy = float((net(x.float() / 255).argmax(1) == y).double().mean())
    rows = []
    for seed in range(o.seeds):
        report = fooling.evolve(
            pixels_in(net), (3, 32, 32), "cppn", 200, 200, seed, real=x, labels=y, batch_size=200, quiet=True
        )
        rows.append({"seed": seed, "accuracy": accuracy, **report.summary})
    fresh = nn.Sequential(*list(net.children()))
    head = nn.Linear(128, 10)
    fresh[1].head = head
    for what, real, labels in (("without data", None, None), ("with labelled data", x, y)):
        try:
            fooling.evolve(pixels_in(fresh), (3, 32, 32), "cppn", 1, 20, real=real, labels=labels, quiet=True)
            refused = "NOT refused"
        except AdviceError as error:
            refused = f"refused: {error}"
        rows.append({"net": f"untrained head, {what}", "answer": refused})
    return show(rows)


def pixels_in(net: nn.Module) -> Subject:
    return Subject(net, mean=(0.0,) * 3, std=(1.0,) * 3, name="CIFAR-10 CNN")


def retraining(o: argparse.Namespace) -> list[dict[str, Any]]:
    """6. Three rounds on digits: fooling class of 1,000 images from 5 searches per round."""
    x, y, tx, ty = (fooling.to_bits(v) if v.is_floating_point() else v for v in digits8())
    rows = []
    for encoding in ("pixels", "cppn"):
        report = fooling.retrain(learn_digits, x, y, tx, ty, encoding=encoding, generations=o.generations)
        rows += [{"encoding": encoding, **r} for r in report.rows] + [{"encoding": encoding, **report.summary}]
    return show(rows)


def defence(o: argparse.Namespace) -> list[dict[str, Any]]:
    """7. AUROC of real digits over fooling images."""
    _, _, tx, ty = digits8()
    rows = []
    for encoding in ("pixels", "cppn"):
        for goal in (0.9999, None):
            report = fooling.evolve(
                grey(sure_cnn(0)), DIGIT, encoding, 50, 200, real=tx, labels=ty, goal=goal, quiet=True
            )
            rows.append(
                {
                    "encoding": encoding,
                    "goal": str(goal),
                    "AUROC, max softmax": report.summary["auroc_max_softmax"],
                    "AUROC, energy": report.summary["auroc_energy"],
                }
            )
    return show(rows)


def speed(o: argparse.Namespace) -> list[dict[str, Any]]:
    """8. 200 generations of 200 at 32 x 32, and offers to the archive beside pyribs'."""
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(128, 10)
    )
    rows = []
    for encoding in ("pixels", "cppn"):
        report = fooling.evolve(pixels_in(net), (3, 32, 32), encoding, 200, 200, untrained=True, quiet=True)
        rows.append({"work": f"200 generations of 200, {encoding}", **report.summary})
    rows += inserts(o)
    return show(rows)


def inserts(o: argparse.Namespace) -> list[dict[str, Any]]:
    """200 images offered to 10 and to 1,000 cells, 100 times."""
    rows = []
    for classes in (10, 1000):
        encoding = Pixels((1, 8, 8))
        draw = generator(0, "offers")
        odds = [torch.randn(200, classes, generator=draw, dtype=torch.float64) + i / 50 for i in range(100)]
        genes = encoding.initial(200, 0)
        archive = Archive.empty(classes)
        began = time.perf_counter()
        for o_ in odds:
            archive.offer(o_, genes, encoding)
        ours = time.perf_counter() - began
        row = {"work": f"100 x 200 images to {classes} cells", "ours, s": ours}
        try:
            from ribs.archives import GridArchive

            # an image is beside every cell: (image, class) pairs, the class as the measure
            theirs, warm = (GridArchive(solution_dim=64, dims=[classes], ranges=[(0, classes)]) for _ in range(2))
            measures = torch.arange(classes).double().add(0.5).repeat(200)[:, None].numpy()
            solutions = genes.repeat_interleave(classes, 0).numpy()
            for o_ in odds[:2]:  # numba compiles
                warm.add(solutions, o_.flatten().numpy(), measures)
            began = time.perf_counter()
            for o_ in odds:
                theirs.add(solutions, o_.flatten().numpy(), measures)
            row["pyribs, s"] = time.perf_counter() - began
            best = torch.stack(odds).amax((0, 1))
            kept = torch.from_numpy(theirs.data("objective")).double()
            row["same occupants' odds"] = str(
                bool(torch.allclose(archive.odds, best)) and bool(torch.allclose(kept.sort()[0], best.sort()[0]))
            )
        except ImportError:
            row["pyribs, s"] = "not installed"
        rows.append(row)
    return rows


ITEMS = {2: digits, 3: unrecognisable, 4: ascent, 5: colour, 6: retraining, 7: defence, 8: speed}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", type=int, nargs="+", default=list(ITEMS), choices=list(ITEMS))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--generations", type=int, default=30, help="of each search of the retraining")
    parser.add_argument("--out", type=Path)
    o = parser.parse_args()
    results: dict[str, Any] = {"environment": environment(0)}
    print("  ".join(f"{k} {v}" for k, v in results["environment"].items()))
    for item in o.only:
        print(f"\n{(ITEMS[item].__doc__ or '').strip()}", flush=True)
        results[str(item)] = ITEMS[item](o)
        if o.out:
            o.out.write_text(json.dumps(results, indent=1, default=str))


if __name__ == "__main__":
    main()
