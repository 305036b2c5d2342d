"""What the rewrites are measured with: networks trained once and kept, times taken in turns, and a ViT of 6 blocks,
width 192, on CIFAR-10."""

from __future__ import annotations

import hashlib
import inspect
import os
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import lynceus
from bench._trust import KEPT, cifar
from lynceus.core.rng import borrowed, generator
from lynceus.tasks.classify import Classify

TRAIN = 45_000  # pictures that are learnt from; the 5,000 after them are the test set of the measurements
NET: dict[str, Any] = {
    "num_classes": 10, "image_size": (32, 32), "patch_size": 4, "dim": 192, "depth": 6, "heads": 6,
    "class_token": False, "pool": "avg", "init": "scratch",
}  # fmt: skip


def kept(name: str, recipe: str, model: nn.Module, train: Callable[[], None]) -> nn.Module:
    """`model` in eval mode, after `train()` changed it in place; or as an earlier call left it in the folder of the
    temporary files.

    recipe: all that the training depends on, usually its source: with another one the training runs anew."""
    path = KEPT / f"{name}-{hashlib.blake2b(recipe.encode(), digest_size=6).hexdigest()}.safetensors"
    if path.is_file():
        model.load_state_dict(load_file(path))
        return model.eval()
    train()
    KEPT.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}.part")
    save_file(model.state_dict(), part)
    os.replace(part, path)
    return model.eval()


@dataclass(frozen=True, kw_only=True)
class Times:
    """Seconds of one of several models, by the wall's clock and by the processor's, turn by turn."""

    wall: list[float]
    processor: list[float]

    def faster(self, first: Times) -> dict[str, float]:
        """How many times as fast as `first`: medians over the turns, and of the least; the least milliseconds."""
        return {
            "speed": round(statistics.median(a / b for a, b in zip(first.wall, self.wall)), 3),
            "speed, least": round(min(first.wall) / min(self.wall), 3),
            "speed by processor time": round(
                statistics.median(a / b for a, b in zip(first.processor, self.processor)), 3
            ),
            "speed by processor time, least": round(min(first.processor) / min(self.processor), 3),
            "ms": round(1e3 * min(self.wall), 1),
        }


def in_turns(models: Mapping[str, nn.Module], x: Tensor, repeats: int) -> dict[str, Times]:
    """Times of every model on x, `repeats` turns after one that does not count."""
    times = {name: Times(wall=[], processor=[]) for name in models}
    with torch.inference_mode():
        for turn in range(repeats + 1):
            for name, model in models.items():
                wall, processor = time.perf_counter(), time.process_time()
                model(x)
                if turn:
                    times[name].wall.append(time.perf_counter() - wall)
                    times[name].processor.append(time.process_time() - processor)
    return times


def fresh_vit(seed: int = 0) -> nn.Module:
    """The predictor before training: pixels (b, 3, 32, 32), uint8 or float in [0, 1] -> ten logits."""
    with borrowed(seed, "cifar vit"):
        return Classify(num_classes=10).build(lynceus.create_model("vit_nano", **NET))


def cifar_vit(seed: int = 0, *, seconds: float = 600.0) -> tuple[nn.Module, Tensor, Tensor]:
    """The trained predictor in eval mode, test pictures (5000, 3, 32, 32) uint8 and their labels.

    Trained for some processor seconds on one thread, the first part on pictures of half the side (a quarter of the
    tokens). Kept in a folder of the temporary files; a change of this function, the net or the options trains anew."""
    test = cifar(5000, TRAIN)
    model = fresh_vit(seed)
    recipe = inspect.getsource(train_vit) + inspect.getsource(step) + repr((NET, seed, seconds))
    return kept("cifar-vit", recipe, model, lambda: train_vit(model, seed, seconds)), *test


def train_vit(model: nn.Module, seed: int, seconds: float) -> None:
    x, y = cifar(TRAIN)
    draw = generator(seed, "cifar vit order")
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, weight_decay=0.05, betas=(0.9, 0.98))
    model.train()
    start = time.process_time()
    while (done := (time.process_time() - start) / seconds) < 1:
        optimizer.param_groups[0]["lr"] = 1e-3 * min(1.0, 20 * done, 1.02 - done)
        part = torch.randint(len(x), (64,), generator=draw)
        step(model, optimizer, x[part], y[part], draw, half=done < 0.6)


def shifted(image: Tensor, draw: torch.Generator) -> Tensor:
    """A batch of pixels in [0, 1], mirrored half of the time and moved by up to 4 pixels."""
    image = image.float() / 255
    if torch.rand((), generator=draw) < 0.5:
        image = image.flip(-1)
    down, right = torch.randint(0, 9, (2,), generator=draw).tolist()
    return F.pad(image, (4, 4, 4, 4), mode="reflect")[..., down : down + 32, right : right + 32]


def step(
    model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor, draw: torch.Generator, *, half: bool
) -> None:
    image = shifted(x, draw)
    image = F.avg_pool2d(image, 2) if half else image
    loss = F.cross_entropy(model(image), y, label_smoothing=0.1)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


@torch.no_grad()
def accuracy(model: nn.Module, image: Tensor, label: Tensor) -> float:
    """Share of right first answers, in percent."""
    right = [(model(a).argmax(1) == b).float() for a, b in zip(image.split(250), label.split(250))]
    return 100 * float(torch.cat(right).mean())


def main() -> None:
    """Trains and keeps the networks of three seeds."""
    torch.set_num_threads(1)
    for seed in range(3):
        print(f"seed {seed}: {accuracy(*cifar_vit(seed)):.1f} % of the test pictures", flush=True)


if __name__ == "__main__":
    main()
