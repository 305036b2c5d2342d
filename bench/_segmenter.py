"""Generated scenes with textures and thin parts, and small ViT segmenters trained on them: for the rewrites of dense
models."""

from __future__ import annotations

import inspect
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench._rewrites import kept
from lynceus.backbones.vit import ViT, ViTConfig
from lynceus.core.rng import borrowed, generator

SIDE, CLASSES = 128, 6  # ground, stripes, checks, plain blob, rods, rings
STEPS, BATCH = 700, 8


def scenes(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Pictures (n, 3, 128, 128) of about zero mean and classes (n, 128, 128): smooth ground; blobs of stripes, checks
    and plain colour; rods and rings 4 to 8 pixels thin on top."""
    draw = generator(seed, "scenes")

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(count, *shape, 1, 1, generator=draw)

    y, x = torch.meshgrid(torch.arange(SIDE).float(), torch.arange(SIDE).float(), indexing="ij")
    coarse = torch.randn(count, 3, 9, 9, generator=draw)
    image = 0.5 * F.interpolate(coarse, (SIDE, SIDE), mode="bicubic") + 0.15 * torch.randn(
        count, 3, SIDE, SIDE, generator=draw
    )
    label = torch.zeros(count, SIDE, SIDE, dtype=torch.long)

    def paint(inside: Tensor, colour: Tensor, kind: int) -> None:
        label[inside] = kind
        image.copy_(torch.where(inside[:, None], colour + 0.1 * torch.randn(image.shape, generator=draw), image))

    for kind in (1, 2, 3, 1, 2, 3):
        cy, cx, a, b, turn = (uniform(*r) for r in ((8, 120), (8, 120), (12, 30), (12, 30), (0, torch.pi)))
        u, v = turned(y - cy, x - cx, turn)
        one, two = uniform(-1.2, 1.2, 3), uniform(-1.2, 1.2, 3)
        period = uniform(5, 9)
        if kind == 1:
            wave = (u * 2 * torch.pi / period).sin()[:, None]
        elif kind == 2:
            wave = ((u * 2 * torch.pi / period).sin() * (v * 2 * torch.pi / period).sin()).sign()[:, None]
        else:
            wave = torch.ones(count, 1, 1, 1)
        paint((u / a).square() + (v / b).square() < 1, one + (two - one) * (wave + 1) / 2, kind)
    for _ in range(2):
        cy, cx, length, width, turn = (uniform(*r) for r in ((10, 118), (10, 118), (25, 60), (2, 4), (0, torch.pi)))
        u, v = turned(y - cy, x - cx, turn)
        paint((u.abs() < length) & (v.abs() < width), uniform(-1.5, 1.5, 3), 4)
    cy, cx, radius, width = (uniform(*r) for r in ((20, 108), (20, 108), (12, 26), (2, 4)))
    paint((((y - cy).square() + (x - cx).square()).sqrt() - radius).abs() < width, uniform(-1.5, 1.5, 3), 5)
    return image, label


def turned(y: Tensor, x: Tensor, angle: Tensor) -> tuple[Tensor, Tensor]:
    return y * angle.cos() + x * angle.sin(), x * angle.cos() - y * angle.sin()


class Segmenter(nn.Module):
    """A plain ViT of 8 blocks, width 192, patch 8 with class token; a linear layer on its normed tokens, enlarged."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone: nn.Module = ViT(
            ViTConfig(image_size=(SIDE, SIDE), patch_size=8, dim=192, depth=8, heads=3, num_classes=0, init="scratch")
        )
        self.decode = nn.Linear(192, CLASSES)

    def forward(self, image: Tensor) -> Tensor:
        tokens = self.backbone.forward_features(image)[:, 1:]  # type: ignore[operator]
        logits = self.decode(tokens).transpose(1, 2).unflatten(2, (image.shape[-2] // 8, -1))
        return F.interpolate(logits, image.shape[-2:], mode="bilinear")


@cache
def segmenter(seed: int = 0) -> Segmenter:
    """Trained for some processor minutes; kept in a folder of the temporary files."""
    recipe = inspect.getsource(scenes) + inspect.getsource(Segmenter) + repr((seed, STEPS, BATCH))
    with borrowed(seed, "segmenter"):
        net = Segmenter()
    kept("segmenter", recipe, net, lambda: train_segmenter(net, seed))
    return net


def train_segmenter(net: Segmenter, seed: int) -> None:
    draw = generator(seed, "segmenter order")
    optimizer = torch.optim.AdamW(net.parameters(), 1e-3, weight_decay=0.05)
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=STEPS, pct_start=0.1)
    for step in range(STEPS):
        pictures, wanted = scenes(BATCH, int(torch.randint(2**60, (), generator=draw)))
        with torch.autocast("cpu", torch.bfloat16):
            logits = net(pictures)
        loss = F.cross_entropy(logits.float(), wanted)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        cycle.step()
        if step % 100 == 99:
            print(f"segmenter {seed}: step {step + 1} of {STEPS}, loss {float(loss.detach()):.3f}", flush=True)


@torch.no_grad()
def mean_iou(net: nn.Module, image: Tensor, label: Tensor, batch: int = 25) -> float:
    """Mean over the classes of intersection over union, over all pictures together, in percent."""
    confusion = torch.zeros(CLASSES, CLASSES, dtype=torch.long)
    for x, y in zip(image.split(batch), label.split(batch)):
        pairs = torch.bincount((y * CLASSES + net(x).argmax(1)).flatten(), minlength=CLASSES**2)
        confusion += pairs.view(CLASSES, CLASSES)
    both = confusion.diag().double()
    return float(100 * (both / (confusion.sum(0) + confusion.sum(1) - both).clamp(min=1)).mean())
