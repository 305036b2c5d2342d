"""What editing objects costs and finds: planted faults, seams, holes, speed. `python -m bench.trust_edits`.

Parts (all by default): planted (cards' items 4 and 5), real (50 photographs and their seams), holes, speed.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lynceus.data
from lynceus.core.report import environment
from lynceus.core.rng import borrowed, generator
from lynceus.core.subject import Subject
from lynceus.core.types import Sample
from lynceus.data.synth.objects import GROUNDS, SMOOTH, objects
from lynceus.trust.edits import audit, edit, find_mask
from lynceus.trust.edits.edit import Scene
from lynceus.trust.edits.remove import grown, margin, remove

SIZE = 48
ASKED = ("size=0.05", "position=random", "direction=45", "background=random", "complexity=0.5", "complexity=-0.5")
VARIED: dict[str, Any] = {"rates": (0.04, 0.3), "turn": 60.0, "centred": False}
PLAIN: dict[str, Any] = {"rates": (0.15, 0.25), "turn": 0.0, "centred": True, "grounds": ("gradient",)}


def scenes(count: int, seed: int, **planted: Any) -> tuple[Tensor, Tensor]:
    """Images (n, 3, h, w) uint8 and labels of generated scenes."""
    made = objects(count, size=SIZE, seed=seed, **planted)
    samples = [made[i] for i in range(count)]
    return torch.stack([s.image for s in samples]), torch.tensor([int(s.label) for s in samples])  # type: ignore[arg-type]


class Net(nn.Module):
    """Four convolutions and global pooling, on pixels in [0, 1]. `flat`: a linear layer on the whole map instead."""

    owns_pixels = True

    def __init__(self, classes: int, *, width: int = 24, flat: bool = False):
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for out in (width, 2 * width, 3 * width, 4 * width):
            layers += [nn.Conv2d(channels, out, 3, padding=1), nn.BatchNorm2d(out), nn.ReLU(), nn.MaxPool2d(2)]
            channels = out
        self.features = nn.Sequential(*layers)
        side = SIZE // 16
        self.head = nn.Linear(channels * side * side if flat else channels, classes)
        self.flat = flat

    def forward(self, image: Tensor) -> Tensor:
        x = self.features((image - 0.45) / 0.25)
        return self.head(x.flatten(1) if self.flat else x.amax((2, 3)))


def train(images: Tensor, labels: Tensor, *, steps: int, flat: bool, seed: int = 0) -> Subject:
    """Adam on one cycle, batches of 64."""
    with borrowed(seed, "edits net"):
        net = Net(int(labels.max()) + 1, flat=flat)
    draw = generator(seed, "edits order")
    optimizer = torch.optim.AdamW(net.parameters(), 3e-3, weight_decay=0.01)
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    net.train()
    for _ in range(steps):
        part = torch.randint(len(images), (64,), generator=draw)
        loss = F.cross_entropy(net(images[part].float() / 255), labels[part])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        cycle.step()
    return Subject(net.eval(), name="planted CNN")


@cache
def planted(kind: str, *, steps: int = 700, count: int = 6000) -> Subject:
    """ "narrow": centred, upright, one ground. "varied": everything varied. "ground": grounds go with classes (95 %)."""
    options = {"narrow": PLAIN, "varied": VARIED, "ground": {**VARIED, "agree": 0.95}}[kind]
    images, labels = scenes(count, 1, **options)
    return train(images, labels, steps=steps, flat=kind == "narrow")


def audits(images: int = 300, **budget: int) -> list[dict[str, Any]]:
    """Items 4 and 5: rows of drops of three planted nets."""
    rows = []
    for kind, options in (
        ("narrow", PLAIN),
        ("varied", PLAIN),
        ("ground", {**VARIED, "agree": 0.95, "rates": (0.1, 0.25)}),
    ):
        began = time.process_time()
        subject = planted(kind, **budget)
        trained = time.process_time() - began
        donors = objects(64, size=SIZE, seed=3, **VARIED)
        report = audit(
            subject,
            objects(images, size=SIZE, seed=2, **options),
            ASKED,
            donors=None if kind == "ground" else donors,
            quiet=True,
        )
        drops = {f"{r['setting']} drop": round(float(r["drop"]), 1) for r in report.rows}
        row = {"net": kind, "accuracy": round(report.summary["accuracy"], 1), **drops}
        rows.append(
            {**row, "training s": round(trained, 1), "audit s": round(time.process_time() - began - trained, 1)}
        )
    return rows


if __name__ == "__main__":
    torch.set_num_threads(1)
    for row in audits():
        print(json.dumps(row))
