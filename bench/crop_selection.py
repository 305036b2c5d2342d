"""Crop selection on real pictures: exactness, same-crop rates, a trained network, certificates, cost.

    python -m bench.crop_selection [--photos FOLDER] [--data train.parquet] [--only 1 2 3 4 5 6 7] [--out figures.json]

The numbers are those of the items under "Must work here" of the card.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.io import ImageReadMode, decode_image
from torchvision.models import resnet18
from torchvision.transforms.v2 import functional as tv

from bench._data import CIFAR10, PHOTOS
from lynceus.core.rng import generator
from lynceus.core.types import as_float
from lynceus.rewrite import crop_selection as cs
from lynceus.trust.shift import shift, shift_set

AXIS, EIGHT = shift_set(1, "4"), shift_set(1, "8")


def photos(folder: str, side: int, count: int) -> Tensor:
    """uint8 (count, 3, side, side): short side resized, centre cut."""
    paths = sorted(p for p in Path(folder).iterdir() if p.suffix.lower() in (".jpeg", ".jpg", ".png"))[:count]
    pictures = (tv.resize(decode_image(str(p), ImageReadMode.RGB), [side], antialias=True) for p in paths)
    return torch.stack([tv.center_crop(x, [side, side]) for x in pictures])


def show(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    for row in rows:
        print(
            "  " + "  ".join(f"{k} {v:.4f}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()), flush=True
        )
    return rows


@torch.no_grad()
def cyclic_exactness(o: argparse.Namespace) -> list[dict[str, Any]]:
    """1. 50 random rolls of 50 photographs, untrained ResNet-18 whose batch norms have statistics."""
    x = photos(o.photos, 224, o.images_of_1).float() / 255
    torch.manual_seed(0)
    net = resnet18()
    net((x - 0.45) / 0.225)
    net.eval()
    model = cs.crop_selection(net, input_size=224, view=224, cyclic=True)
    want = model(x)
    base = net(model.normalise(x)).argmax(1)
    draw = torch.Generator().manual_seed(0)
    equal, same = 0, []
    for _ in range(o.rolls_of_1):
        move = torch.randint(0, 224, (2,), generator=draw).tolist()
        rolled = torch.roll(x, move, (-2, -1))
        out = model(rolled)
        equal += sum(torch.equal(a, b) for a, b in zip(out, want))
        same.append(net(model.normalise(rolled)).argmax(1) == base)
    rate = float(torch.stack(same).double().mean())
    return show([{"images": len(x), "rolls": o.rolls_of_1, "bit-equal": equal / len(x) / o.rolls_of_1, "plain": rate}])


def box(side: int) -> Callable[[Tensor], Tensor]:
    return lambda grey: F.avg_pool2d(grey, side, 1)[:, 0]


def rough(grey: Tensor) -> Tensor:
    laplacian = torch.tensor([[0.0, 1, 0], [1, -4, 1], [0, 1, 0]], dtype=grey.dtype)
    return F.avg_pool2d(F.conv2d(grey, laplacian[None, None]).abs(), 31, 1)[:, 0]


def same_crop_rates(o: argparse.Namespace) -> list[dict[str, Any]]:
    """2. How often the same physical crop is chosen, no network. Seeds of the noise beside the default one."""
    rows = []
    scores: list[tuple[str, Any, int | None, int]] = [("noise 5x5", "noise", None, s) for s in range(4)]
    scores += [("noise 11x11 after Laplacian", "laplacian_noise", None, 0), ("LoG 9x9", "log", None, 0)]
    scores += [("noise 31x31", "noise", 31, 0), ("box mean 31x31", box(31), 31, 0), ("box |Laplacian|", rough, 33, 0)]
    for count in (17, 33, 65, 97):
        view = 223 + count
        x = photos(o.photos, view + 8, 200).float() / 255
        for name, score, kernel, seed in scores if count in (33, 97) else scores[:1]:
            config = cs.CropSelection(input_size=224, view=view, score=score, kernel=kernel, seed=seed)
            model = cs.CropSelected(nn.Identity(), config)
            same = torch.cat([cs.same_crop(model, part, EIGHT) for part in x.split(25)])
            axis = [EIGHT.index(m) for m in AXIS]
            rows.append({
                "K": count, "score": name, "seed": seed, "axis": float(same[:, axis].double().mean()),
                "all 8": float(same.all(1).double().mean()), "bound axis": cs.probability_axis(count, 1),
                "bound all": cs.probability_all(count, 1), "images": len(x),
            })  # fmt: skip
            show(rows[-1:])
    return rows


def white_noise(o: argparse.Namespace) -> list[dict[str, Any]]:
    """3. On white noise the rates are the formulas."""
    rows = []
    for count in (9, 33):
        model = cs.crop_selection(nn.Identity(), input_size=16, view=15 + count)
        moves = [(0, 1), (1, 1), (2, 1), *shift_set(1, "all")]
        x = torch.rand(2000, 3, 19 + count, 19 + count, generator=torch.Generator().manual_seed(count))
        same = torch.cat([cs.same_crop(model, part, moves) for part in x.split(500)])
        found = {"axis 1": same[:, 0], "(1, 1)": same[:, 1], "(2, 1)": same[:, 2], "all up to 1": same[:, 3:].all(1)}
        want = [cs.probability_axis(count, 1), cs.probability_shift(count, (1, 1)), cs.probability_shift(count, (2, 1))]
        for (name, hits), p in zip(found.items(), [*want, cs.probability_all(count, 1)]):
            rate = float(hits.double().mean())
            rows.append(
                {
                    "K": count,
                    "shift": name,
                    "rate": rate,
                    "formula": p,
                    "errors": (rate - p) / (p * (1 - p) / 2000) ** 0.5,
                }
            )
    return show(rows)


def small_net() -> nn.Module:
    def block(a: int, b: int) -> list[nn.Module]:
        return [nn.Conv2d(a, b, 3, padding=1, bias=False), nn.BatchNorm2d(b), nn.ReLU()]

    return nn.Sequential(
        *block(3, 32), *block(32, 32), nn.MaxPool2d(2), *block(32, 64), *block(64, 64), nn.MaxPool2d(2),
        *block(64, 128), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10),
    )  # fmt: skip


def trained_on_cifar(o: argparse.Namespace) -> list[dict[str, Any]]:
    """4. A small network trained on random crops; plain centre crop, crop selection, cyclic crop selection."""
    import lynceus.data

    data = lynceus.data.open(o.data, in_memory=True).take(o.cifar)
    train, test = data.train_test(0.2)
    rows = []
    for side, view in ((24, 32), (22, 30)):
        net = train_crops(train, side, o.steps)
        images, labels = test.images, torch.as_tensor(test.labels)
        plain = partial(centred, net, side)
        crops = [net(as_float(c)).argmax(1) == labels for c in random_crops(images, side, 5)]
        average = float(torch.stack(crops).double().mean())
        chosen = cs.CropSelected(Pixels(net), cs.CropSelection(input_size=side, view=view))
        cyclic = cs.CropSelected(Pixels(net), cs.CropSelection(input_size=side, view=view, cyclic=True))
        for name, model in (
            ("plain centre crop", plain),
            ("crop selection", chosen),
            ("cyclic crop selection", cyclic),
        ):
            kinds = "both" if view < 32 else "cyclic"
            found = shift(model, images, EIGHT, kind=kinds, view=view, labels=labels, batch_size=500)
            row: dict[str, Any] = {
                "model": name,
                "crop": side,
                "view": view,
                "accuracy": float(found.rows[0]["accuracy"]),
            }
            row["random crops"] = average
            for r in found.rows:
                row[f"{r['kind']} consistency"], row[f"{r['kind']} adversarial"] = (
                    float(r["consistency"]),
                    float(r["adversarial"]),
                )
            if "certified" in found.summary:
                row["certified"] = found.summary["certified"]
            rows += show([row])
    return rows


class Pixels(nn.Module):
    """Says that the network takes pixels as they are."""

    owns_pixels = True

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


def centred(net: nn.Module, side: int, x: Tensor) -> Tensor:
    return net(centre(x, side))


def centre(x: Tensor, side: int) -> Tensor:
    top, left = (x.shape[-2] - side) // 2, (x.shape[-1] - side) // 2
    return x[..., top : top + side, left : left + side]


def random_crops(x: Tensor, side: int, count: int) -> list[Tensor]:
    draw = generator(0, "crops")
    corners = torch.randint(0, x.shape[-1] - side + 1, (count, 2), generator=draw).tolist()
    return [x[..., a : a + side, b : b + side] for a, b in corners]


def train_crops(train: Any, side: int, steps: int) -> nn.Module:
    torch.manual_seed(0)
    net, images, labels = small_net().train(), train.images, torch.as_tensor(train.labels)
    optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=steps)
    draw = generator(0, "train", side)
    for _ in range(steps):
        index = torch.randint(len(images), (128,), generator=draw)
        a, b = torch.randint(0, 32 - side + 1, (2, 128), generator=draw)
        windows = images[index].unfold(2, side, 1).unfold(3, side, 1)
        x = as_float(windows[torch.arange(128), :, a, b])
        x = torch.where(torch.rand(128, 1, 1, 1, generator=draw) < 0.5, x.flip(-1), x)
        loss = F.cross_entropy(net(x), labels[index])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
    return net.eval().requires_grad_(False)


def certificates(o: argparse.Namespace) -> list[dict[str, Any]]:
    """5. Every certified (image, shift) is confirmed by brute force."""
    x = photos(o.photos, 274, 200)
    x = torch.cat([x, x.flip(-1)])[:200].float() / 255
    model = cs.crop_selection(nn.Identity(), input_size=224, view=256)
    rows = []
    for d in (1, 2, 4, 8):
        sure = torch.cat([cs.certified(model, part, d) for part in x.split(20)])
        moves = list(itertools.product(range(-d, d + 1), repeat=2))
        held = (
            torch.cat([cs.same_crop(model, part, moves).all(1) for part in x[sure].split(20)])
            if sure.any()
            else sure[:0]
        )
        share = {"images": len(x), "certified": float(sure.double().mean()), "confirmed": float(held.double().mean())}
        rows += show([{"shift": d, **share, "uniform": cs.probability_all(33, d)}])
    return rows


@torch.no_grad()
def cost(o: argparse.Namespace) -> list[dict[str, Any]]:
    """6. Selection and cut against the forward pass of ResNet-18, interleaved in one process."""
    net, rows = resnet18().eval(), []
    for batch, count in itertools.product((1, 8), (33, 97)):
        x = torch.rand(batch, 3, 223 + count, 223 + count)
        model = cs.crop_selection(net, input_size=224, view=223 + count)
        crops, times = model.crops(x), {"selection": [], "forward": []}
        for _ in range(12):
            for name, run in (("selection", partial(model.crops, x)), ("forward", partial(net, crops))):
                start = time.perf_counter()
                run()
                times[name].append(1e3 * (time.perf_counter() - start))
        a, b = (sorted(t)[len(t) // 2] for t in times.values())
        rows.append(
            {
                "batch": batch,
                "K": count,
                "selection ms": a,
                "ResNet-18 ms": b,
                "share": a / b,
                "threads": torch.get_num_threads(),
            }
        )
    return show(rows)


def audit(o: argparse.Namespace) -> list[dict[str, Any]]:
    """7. The audit of an untrained timm model and of an embedding function."""
    import timm

    x = photos(o.photos, 226, 24)
    torch.manual_seed(0)
    rows = []
    model = timm.create_model("resnet18", pretrained=False)
    for name, subject, embedding in (("timm resnet18", model, False), ("8 x 8 pixels", small_pixels, True)):
        report = shift(subject, x, 1, embedding=embedding)
        rows += show([{"subject": name, **{k: v for k, v in r.items() if k != "shifts"}} for r in report.rows])
    return rows


def small_pixels(x: Tensor) -> Tensor:
    return F.interpolate(x, (8, 8), mode="bilinear", antialias=True).flatten(1) - 0.5


ITEMS = (cyclic_exactness, same_crop_rates, white_noise, trained_on_cifar, certificates, cost, audit)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path, default=PHOTOS)
    parser.add_argument("--data", type=Path, default=CIFAR10)
    parser.add_argument("--only", type=int, nargs="+", default=list(range(1, 8)))
    parser.add_argument("--images-of-1", type=int, default=50)
    parser.add_argument("--rolls-of-1", type=int, default=50)
    parser.add_argument("--cifar", type=int, default=10_000)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    found = {}
    for number in options.only:
        item = ITEMS[number - 1]
        print(item.__doc__, flush=True)
        start = time.monotonic()
        found[item.__name__] = item(options)
        print(f"  ({time.monotonic() - start:.0f} s)", flush=True)
    if options.out:
        options.out.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
