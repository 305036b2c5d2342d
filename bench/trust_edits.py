"""What editing objects costs and finds: planted faults, seams, holes, speed. `python -m bench.trust_edits`.

Parts (all by default): planted (what audits find in nets with planted faults), seams (can a net see where photographs
were blended?), real (50 photographs without an exception), holes (how near to the truth they are filled), speed.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lynceus.data
from bench._data import FOLDER, PHOTOS
from lynceus.core.report import environment
from lynceus.core.rng import borrowed, generator
from lynceus.core.subject import Subject
from lynceus.core.types import Sample
from lynceus.data.synth.objects import GROUNDS, NIGHT, objects
from lynceus.trust.edits import audit, edit, find_mask, setting
from lynceus.trust.edits.remove import grown, margin, remove
from lynceus.trust.edits.scene import Scene, fitted, pixels
from lynceus.trust.edits.settings import STANDARD

SIZE = 48
ASKED = ("size=0.05", "position=random", "direction=45", "background=random", "complexity=0.5", "complexity=-0.5")
VARIED: dict[str, Any] = {"rates": (0.04, 0.3), "turn": 60.0, "centred": False, "grounds": (*GROUNDS, NIGHT)}
PLAIN: dict[str, Any] = {"rates": (0.15, 0.25), "turn": 0.0, "centred": True, "grounds": (NIGHT,)}
AGREEING: dict[str, Any] = {"rates": (0.03, 0.15), "turn": 60.0, "centred": False, "agree": 0.95}


def scenes(count: int, seed: int, **planted: Any) -> tuple[Tensor, Tensor]:
    """Images (n, 3, h, w) uint8 and labels of generated scenes."""
    made = objects(count, size=SIZE, seed=seed, **planted)
    samples = [made[i] for i in range(count)]
    return torch.stack([s.image for s in samples]), torch.tensor([int(s.label) for s in samples])  # type: ignore[arg-type]


class Net(nn.Module):
    """Four convolutions and global pooling, on pixels in [0, 1]. `flat`: a linear layer on the whole map instead."""

    owns_pixels = True

    def __init__(self, classes: int, *, width: int = 16, flat: bool = False):
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
def planted(kind: str) -> Subject:
    """ "narrow": centred, upright, one ground. "varied": everything varied. "ground": grounds go with classes, 95 %."""
    options = {"narrow": PLAIN, "varied": VARIED, "ground": AGREEING}[kind]
    more = kind == "varied"  # more to learn
    images, labels = scenes(8000 if more else 5000, 1, **options)
    return train(images, labels, steps=900 if more else 500, flat=kind == "narrow")


NETS: dict[str, dict[str, Any]] = {
    "narrow": PLAIN,
    "varied": PLAIN,
    "ground": AGREEING,
}


def audits(images: int = 300, *, nets: Iterable[str] = tuple(NETS)) -> list[dict[str, Any]]:
    """Drops of three planted nets. The narrow one and the varied one are asked about the same scenes."""
    rows = []
    for kind in nets:
        began = time.process_time()
        subject = planted(kind)
        trained = time.process_time() - began
        donors = objects(64, size=SIZE, seed=3, **VARIED) if kind != "ground" else None
        scenes_ = objects(images, size=SIZE, seed=2, **NETS[kind])
        report = audit(subject, scenes_, ASKED, donors=donors, quiet=True)
        row: dict[str, Any] = {"net": kind, "accuracy": round(report.summary["accuracy"], 1)}
        row |= {f"{r['setting']} drop": round(float(r["drop"]), 1) for r in report.rows}
        row |= {"training s": round(trained, 1), "audit s": round(time.process_time() - began - trained, 1)}
        rows.append(row)
    return rows


def photographs(count: int, side: int = 256, *, folder: Path = PHOTOS) -> list[Sample]:
    """Photographs cut square, with GrabCut's masks of what stands in their middle."""
    data = lynceus.data.open(folder)
    out = []
    for sample in data:
        image = torch.from_numpy(fitted(pixels(sample.image), (side, side))).permute(2, 0, 1).contiguous()
        mask = find_mask(pixels(image), "grabcut")
        if 0.02 <= mask.mean() <= 0.6:
            out.append(Sample(image=image, masks=torch.from_numpy(mask[None]), id=sample.id))
        if len(out) == count:
            break
    return out


def edge_patches(sample: Sample, count: int, rng: np.random.Generator, side: int = 16) -> Tensor:
    """Patches (n, 3, 16, 16) whose middle lies on the mask's edge."""
    assert sample.masks is not None
    mask = sample.masks[0].numpy()
    edge = mask & grown(~mask, 1)
    half = side // 2
    rows, columns = np.nonzero(edge[half:-half, half:-half])
    if len(rows) == 0:
        return torch.empty(0, 3, side, side)
    pick = rng.choice(len(rows), min(count, len(rows)), replace=False)
    cut = [sample.image[:, r : r + side, c : c + side] for r, c in zip(rows[pick], columns[pick])]
    return torch.stack(cut).float() / 255


class Seams(nn.Module):
    """A small classifier of patches: three convolutions, the last pooled by mean and maximum."""

    def __init__(self, width: int = 24):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, width, 3),
            nn.ReLU(),
            nn.Conv2d(width, width, 3),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(width, 2 * width, 3),
            nn.ReLU(),
        )
        self.head = nn.Linear(2 * 2 * width, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.body((x - x.mean((2, 3), keepdim=True)) / 0.2)
        return self.head(torch.cat([x.mean((2, 3)), x.amax((2, 3))], 1))


def seam_accuracy(real: list[Tensor], edited: list[Tensor], *, steps: int = 600, seed: int = 0) -> float:
    """How well patches of edited pictures are told from real ones, on the half of the pictures never trained on."""
    half = len(real) // 2
    parts = []
    for chosen in (slice(0, half), slice(half, None)):
        pairs = [(torch.cat(real[chosen]), 0), (torch.cat(edited[chosen]), 1)]
        parts.append((torch.cat([x for x, _ in pairs]), torch.cat([torch.full((len(x),), k) for x, k in pairs])))
    with borrowed(seed, "seams"):
        net = Seams()
    draw = generator(seed, "seams")
    optimizer = torch.optim.AdamW(net.parameters(), 2e-3, weight_decay=0.02)
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    (x, y), (tx, ty) = parts
    for _ in range(steps):
        part = torch.randint(len(x), (96,), generator=draw)
        batch = x[part]
        if torch.rand((), generator=draw) < 0.5:
            batch = batch.flip(-1)
        if torch.rand((), generator=draw) < 0.5:
            batch = batch.transpose(2, 3)
        loss = F.cross_entropy(net(batch), y[part])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        cycle.step()
    with torch.no_grad():
        right = (net(tx).argmax(1) == ty).float()
    return 50 * float(right[ty == 0].mean() + right[ty == 1].mean())


def seams(count: int = 120, *, per: int = 24, folder: Path = PHOTOS) -> list[dict[str, Any]]:
    """Each object moved within its picture, blended or pasted; can a small net see the edge?"""
    samples = photographs(count, folder=folder)
    rng = np.random.default_rng(0)
    real = [edge_patches(s, per, rng) for s in samples]
    rows = []
    scenes_ = [Scene.of(s) for s in samples]
    for blend in ("feather", "poisson", "paste"):
        made = [edit(s, position="random", blend=blend) for s in scenes_]  # type: ignore[arg-type]
        edited = [edge_patches(m, per, rng) for m in made]
        rows.append({"blend": blend, "pictures": len(samples), "told apart %": round(seam_accuracy(real, edited), 1)})
    return rows


def real(count: int = 50, *, folder: Path = PHOTOS) -> list[dict[str, Any]]:
    """Every standard edit of photographs (GrabCut's masks) and of the COCO panoptic sample; what was raised."""
    samples = photographs(count, folder=folder)
    for file, masks in panoptic():
        samples.append(Sample(image=file, masks=masks, id="coco"))
    asked = [setting(t) for t in STANDARD if t not in ("background=adversarial", "background=random")]
    made, refused = 0, []
    for sample in samples:
        scene = Scene.of(sample)
        for plan in asked:
            try:
                edit(scene, size=plan.size, angle=plan.direction, position=plan.position, complexity=plan.complexity)
                made += 1
            except Exception as error:  # counted, not hidden: the row says how many and which
                refused.append(f"{sample.id} {plan.name}: {error}")
    return [{"pictures": len(samples), "edits": made, "exceptions": len(refused), "first": refused[:3]}]


def panoptic() -> Iterator[tuple[Tensor, Tensor]]:
    """Pictures (3, h, w) and the masks (k, h, w) of their segments: ids are R + 256 G + 65536 B of a PNG."""
    from PIL import Image

    for png in sorted((FOLDER / "panoptic-sample" / "panoptic_examples").glob("*.png")):
        code = np.array(Image.open(png).convert("RGB")).astype(int) @ np.array([1, 256, 65536])
        masks = np.stack([code == v for v in np.unique(code) if v])
        image = lynceus.data.read_image(FOLDER / "panoptic-sample" / "input_images" / f"{png.stem}.jpg")
        yield image, torch.from_numpy(masks)


def holes(count: int = 120, *, side: int = 256) -> list[dict[str, Any]]:
    """PSNR in the hole per family of grounds, beside filling with the mean colour of the rest."""
    found: dict[tuple[str, str], list[float]] = {}
    for sample in objects(count, size=side, rates=(0.08, 0.22), turn=180, centred=False, seed=7):
        truth = sample.extra["ground"].permute(1, 2, 0).numpy().astype(float)
        image, mask = sample.image.permute(1, 2, 0).numpy(), sample.masks[0].numpy()
        hole = grown(mask, margin(mask.shape))
        mean = image.copy()
        mean[mask] = image[~mask].mean(0)
        filled = {"mean colour": mean} | {m: remove(image, hole, method=m).image for m in ("moved", "telea")}
        for name, made in filled.items():
            error = ((made[mask] - truth[mask]) ** 2).mean()
            found.setdefault((sample.extra["family"], name), []).append(10 * np.log10(255**2 / error))
    return [
        {"ground": g, **{f"{n} dB": round(float(np.mean(v)), 1) for (h, n), v in found.items() if h == g}}
        for g in GROUNDS
    ]


SPEED: dict[str, dict[str, Any]] = {
    "size": {"size": 0.05},
    "full": {"size": "full"},
    "angle": {"angle": 30.0},
    "position": {"position": "random"},
    "plain": {"background": "plain"},
    "calmer": {"complexity": -0.5},
    "busier": {"complexity": 0.5},
    "all at once": {"size": 0.1, "angle": 20.0, "position": "random", "complexity": 0.3},
}


def speed(count: int = 24, *, side: int = 256) -> list[dict[str, Any]]:
    """Edits per second of processor time on one core, each from the picture and mask alone."""
    made = objects(count, size=side, rates=(0.08, 0.2), turn=30, centred=False, seed=1)
    samples = [made[i] for i in range(count)]
    rows, total = [], 0.0
    for name, options in SPEED.items():
        began = time.process_time()
        for sample in samples:
            edit(sample, **options)
        seconds = time.process_time() - began
        total += seconds
        rows.append({"edit": name, "per second": round(count / seconds, 1)})
    return [*rows, {"edit": "all kinds", "per second": round(count * len(SPEED) / total, 1)}]


PARTS: dict[str, Callable[..., list[dict[str, Any]]]] = {
    "planted": audits,
    "seams": seams,
    "real": real,
    "holes": holes,
    "speed": speed,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", default=list(PARTS), help=", ".join(PARTS))
    parser.add_argument("--nets", nargs="*", default=list(NETS))
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(json.dumps(environment(0)))
    for part in options.parts:
        rows = audits(nets=options.nets) if part == "planted" else PARTS[part]()
        for row in rows:
            print(json.dumps({"part": part, **row}), flush=True)


if __name__ == "__main__":
    main()
