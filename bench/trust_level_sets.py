"""Blind spots: the figures of the card, on digits and CIFAR-10, and an ordinary beside a robust network.

    python -m bench.trust_level_sets [--only digits cifar robust] [--pairs 64] [--out figures.json]

digits: 200 pairs, CNN of two convolutions trained for 40 epochs; distances, confidence, straight lines, 1-NN in pixels.
cifar: 64 pairs of confident sources, the small CNN; distance, lines, triangles, seconds. robust: the same network
trained with L-inf PGD (8/255, 5 steps), beside the ordinary one, with bootstrap intervals.
"""

from __future__ import annotations

import argparse
import hashlib
import inspect
import json
import os
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from bench._nets import ConvNet
from bench._trust import KEPT, Centre, cifar, cifar_cnn, digits8, digits_cnn
from lynceus.core.environment import environment
from lynceus.core.rng import borrowed, generator
from lynceus.core.subject import Subject
from lynceus.core.types import Sample
from lynceus.trust.attacks import pgd
from lynceus.trust.level_sets import BlindSpots, compare
from lynceus.trust.level_shape import line, rmse
from lynceus.trust.walks import walk

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def sure_cnn() -> nn.Module:
    """The digits CNN, trained until it is as sure as the card's."""
    return digits_cnn(epochs=40)


def digit_pairs(net: nn.Module, count: int = 200) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sources that are answered rightly and targets of other classes: (sources, targets, labels, target labels)."""
    _, _, x, y = digits8()
    right = net(x).argmax(1) == y
    x, y = x[right], y[right]
    draw = generator(0, "pairs")
    targets = []
    for i in range(count):
        others = (y != y[i]).nonzero()[:, 0]
        targets.append(int(others[torch.randint(len(others), (1,), generator=draw)]))
    return x[:count], x[targets], y[:count], y[targets]


def nearest_class(images: Tensor) -> Tensor:
    """1-NN in pixels among the training digits."""
    x, y, _, _ = digits8()
    return y[torch.cdist(images.flatten(1), x.flatten(1)).argmin(1)]


def digits(o: argparse.Namespace) -> list[dict[str, Any]]:
    """200 pairs of digits; card: ratio .413 (.651 on the straight line), p .999 (.990), 1-NN target 82%; and .341."""
    net = sure_cnn()
    _, _, test, answers = digits8()
    sources, targets, labels, wanted = digit_pairs(net)
    rows = []
    for name, options in (
        ("eta .05", {"step_size": 0.05, "steps": 100, "drop": 0.05, "adversarial_step": 1 / 255}),
        ("eta .01, not adversarial", {"step_size": 0.01, "steps": 400, "drop": 0.2, "adversarial": False}),
    ):
        start = time.perf_counter()
        found = walk(net.forward, sources, targets, labels, generator=generator(0, "jitter"), **options)
        seconds = time.perf_counter() - start
        before, after = rmse(sources, targets), rmse(found.image, targets)
        p = line(net.forward, sources, targets, labels, points=101)
        inside = found.clean[:, None] - p < options["drop"]
        furthest = torch.where(inside, torch.linspace(0, 1, 101), torch.zeros(())).amax(1)
        rows.append(
            {
                "walk": name,
                "accuracy": float((net(test).argmax(1) == answers).double().mean()),
                "ratio": float((after / before).mean()),
                "ratio, straight line": float((1 - furthest).mean()),
                "source class": float((net(found.image).argmax(1) == labels).double().mean()),
                "p median": float(found.confidence.median()),
                "p least": float(found.confidence.min()),
                "1-NN says target": float((nearest_class(found.image) == wanted).double().mean()),
                "refused": 1 - float(found.accepted.mean()),
                "seconds": seconds,
            }
        )
    return rows


def robust_cnn(*, width: int = 32, seconds: float = 300.0, seed: int = 0) -> nn.Module:
    """The small CNN trained on PGD images (L-inf 8/255, 5 steps), kept like the ordinary one."""
    net = nn.Sequential(Centre(), ConvNet(width, 10, pooled=True))
    key = hashlib.blake2b(
        inspect.getsource(robust_cnn).encode() + repr((width, seconds, seed)).encode(), digest_size=6
    ).hexdigest()
    path = KEPT / f"cifar-robust-{key}.safetensors"
    if path.is_file():
        net.load_state_dict(load_file(path))
        return net.eval()
    x, y = cifar(40_000)
    draw = generator(seed, "robust cnn")
    with borrowed(seed, "robust cnn"):
        net = nn.Sequential(Centre(), ConvNet(width, 10, pooled=True))
    optimizer = torch.optim.AdamW(net.parameters(), 2e-3, weight_decay=0.02)
    start, step = time.process_time(), 0
    while (done := (time.process_time() - start) / seconds) < 1:
        part = torch.randint(len(x), (128,), generator=draw)
        image = x[part].float() / 255
        if torch.rand((), generator=draw) < 0.5:
            image = image.flip(-1)
        net.eval()  # attacked in eval mode, trained in train mode
        attack = pgd(net, image, y[part], epsilon=8 / 255, steps=5, step_size=2 / 255, early_stop=False, seed=step)
        net.train()
        optimizer.param_groups[0]["lr"] = 2e-3 * min(1.0, 10 * done, 1.02 - done)
        loss = F.cross_entropy(net(attack.image), y[part])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        step += 1
    KEPT.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(f".{os.getpid()}.part")
    save_file(net.state_dict(), unfinished)
    os.replace(unfinished, path)
    return net.eval()


def subject_of(net: nn.Module, name: str) -> Subject:
    for p in net.parameters():
        p.requires_grad_(False)
    return Subject(net, mean=(0.0,) * 3, std=(1.0,) * 3, name=name, classes=CLASSES)


def unseen(count: int = 1000) -> list[Sample]:
    x, y = cifar(count, 45_000)
    return [Sample(image=a, label=int(b), id=f"cifar {45_000 + i}") for i, (a, b) in enumerate(zip(x, y))]


def accuracy(net: nn.Module, count: int = 1000) -> float:
    x, y = cifar(count, 45_000)
    with torch.no_grad():
        return float((net(x.float() / 255).argmax(1) == y).double().mean())


def _check(sources: int, targets: int, confident: float) -> BlindSpots:
    return BlindSpots(
        images=sources,
        targets=targets,
        confident=confident,
        step_size=0.05,
        steps=100,
        drop=0.05,
        adversarial_step=1 / 255,
        limit=1000,
    )


def on_cifar(o: argparse.Namespace) -> list[dict[str, Any]]:
    """64 pairs of confident sources (p > .9); card: RMSE .040 from .341 (.12), lines .97, triangle .95, 60 s."""
    net = cifar_cnn()
    report = _check(o.pairs // 2, 2, 0.9)(subject_of(net, "CIFAR CNN"), unseen())
    s = report.summary
    sources, targets = unseen(2 * o.pairs)[: o.pairs], unseen(2 * o.pairs)[o.pairs :]
    x = torch.stack([a.image for a in sources]).float() / 255
    t = torch.stack([a.image for a in targets]).float() / 255
    with torch.no_grad():
        y = net(x).argmax(1)
    start = time.perf_counter()
    walk(net, x, t, y, step_size=0.05, steps=100, drop=0.05, adversarial_step=1 / 255)
    seconds = time.perf_counter() - start
    keys = (
        "walks",
        "RMSE to target, before",
        "RMSE to target",
        "share of the way left",
        "SSIM to target",
        "confidence, median",
        "confidence, least",
        "largest drop",
        "steps accepted",
        "lines within drop",
        "triangle mean",
        "triangle within 0.1",
        "triangle within 0.1, low",
        "triangle within 0.1, high",
        "RMSE of the smallest flip",
    )
    return [{"accuracy": accuracy(net), **{k: s[k] for k in keys}, f"seconds of {o.pairs} pairs x 100": seconds}]


def beside_robust(o: argparse.Namespace) -> list[dict[str, Any]]:
    """Ordinary and L-inf trained, the same walks; accuracy under PGD at 8/255 (200 pictures) beside."""
    nets = {"ordinary": cifar_cnn(), "robust": robust_cnn(seconds=o.seconds)}
    report = compare({n: subject_of(net, n) for n, net in nets.items()}, unseen(), check=_check(o.pairs // 2, 2, 0.0))
    x, y = cifar(200, 45_000)
    rows = []
    for row in report.rows:
        net = nets[str(row["model"])]
        left = 1 - float(pgd(net, x.float() / 255, y, epsilon=8 / 255, steps=20).success.double().mean())
        rows.append({**row, "accuracy": accuracy(net), "accuracy under PGD": left})
    print(report.answer, flush=True)
    return rows


ITEMS = {"digits": digits, "cifar": on_cifar, "robust": beside_robust}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(ITEMS), default=list(ITEMS))
    parser.add_argument("--pairs", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=300.0, help="processor seconds of robust training")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    found: dict[str, Any] = {"environment": environment(0)}
    print("  ".join(f"{k} {v}" for k, v in found["environment"].items()), flush=True)
    for name in options.only:
        print(ITEMS[name].__doc__, flush=True)
        found[name] = ITEMS[name](options)
        for row in found[name]:
            print("  " + "  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()))
    if options.out:
        options.out.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
