"""Attacks beside foolbox: robust accuracy and seconds of the same PGD, and what APGD adds, on CIFAR-10.

    python -m bench.trust_attacks [--images 200] [--steps 40] [--repeats 3] [--cases linf:8 l2:0.1] [--out figures.json]

One small CNN trained here on 40,000 pictures (kept in the temporary files), attacked on pictures that it never saw.
Both PGDs take the same steps of the same size from a random start; ours stops on an image once it is broken, and is
also timed without that ("every step").
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench._trust import cifar, cifar_cnn
from lynceus.core.environment import environment, version
from lynceus.core.subject import Subject
from lynceus.trust.adapters import to_foolbox
from lynceus.trust.attacks import apgd, fmn, pgd


def timed(run: Callable[[], Tensor], repeats: int) -> tuple[Tensor, float]:
    """The answer (success per image) and the median of the processor seconds, which other work does not lengthen."""
    seconds = []
    for _ in range(repeats):
        start = time.process_time()
        success = run()
        seconds.append(time.process_time() - start)
    return success, sorted(seconds)[len(seconds) // 2]


def beside_foolbox(o: argparse.Namespace, norm: str, epsilon: float) -> dict[str, Any]:
    import foolbox

    net = cifar_cnn()
    for p in net.parameters():
        p.requires_grad_(False)
    subject = Subject(net, mean=(0.0,) * 3, std=(1.0,) * 3, name="CIFAR CNN")
    images, labels = cifar(o.images, 45_000)
    x = images.float() / 255
    clean = subject(x).argmax(1) == labels
    step = epsilon / 30  # foolbox' own step for L-inf: 0.01 / 0.3 of the radius
    attack = foolbox.attacks.LinfPGD if norm == "linf" else foolbox.attacks.L2PGD
    theirs, their_seconds = timed(
        lambda: attack(steps=o.steps, rel_stepsize=1 / 30)(to_foolbox(subject), x, labels, epsilons=epsilon)[2],
        o.repeats,
    )
    same: dict[str, Any] = {"epsilon": epsilon, "norm": norm, "steps": o.steps, "step_size": step}
    ours, our_seconds = timed(lambda: pgd(subject, x, labels, **same).success, o.repeats)
    every, every_seconds = timed(lambda: pgd(subject, x, labels, **same, early_stop=False).success, o.repeats)
    ball: dict[str, Any] = {"epsilon": epsilon, "norm": norm, "steps": o.steps}
    ce, ce_seconds = timed(lambda: apgd(subject, x, labels, **ball).success, 1)
    dlr, dlr_seconds = timed(lambda: apgd(subject, x, labels, **ball, loss="dlr").success, 1)
    smallest = fmn(subject, x, labels, norm=norm, steps=100)

    def left(success: Tensor) -> float:
        return 1 - float(success.double().mean())

    return {
        "norm": norm,
        "epsilon": epsilon,
        "clean": float(clean.double().mean()),
        "foolbox PGD": left(theirs),
        "PGD": left(ours),
        "PGD, every step": left(every),
        "APGD-CE": left(ce),
        "APGD-DLR": left(dlr),
        "APGD, both": left(ce | dlr),
        "FMN": left(smallest.success & (smallest.distance <= epsilon)),
        "foolbox seconds": their_seconds,
        "PGD seconds": our_seconds,
        "PGD seconds, every step": every_seconds,
        "APGD-CE seconds": ce_seconds,
        "APGD-DLR seconds": dlr_seconds,
        "time / foolbox": our_seconds / their_seconds,
        "time / foolbox, every step": every_seconds / their_seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--cases", nargs="+", default=["linf:8", "linf:2", "linf:1", "linf:0.5", "l2:0.25", "l2:0.1"])
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    found: dict[str, Any] = {"environment": environment(0, foolbox=version("foolbox") or "not installed")}
    print("  ".join(f"{k} {v}" for k, v in found["environment"].items()), flush=True)
    rows = found["rows"] = []
    for case in options.cases:
        norm, _, text = case.partition(":")
        epsilon = float(text) / 255 if norm == "linf" else float(text)
        torch.manual_seed(0)
        rows.append(beside_foolbox(options, norm, epsilon))
        print(
            "  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in rows[-1].items()), flush=True
        )
    if options.out:
        options.out.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
