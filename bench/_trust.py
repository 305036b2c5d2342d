"""Small nets and pictures of the trust wing: digits of 8x8, a 2-D curve, CIFAR-10 at 32 pixels."""

from __future__ import annotations

import hashlib
import inspect
import os
import tempfile
import time
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from bench._data import CIFAR10
from bench._nets import ConvNet
from lynceus.core.rng import borrowed, generator

KEPT = Path(tempfile.gettempdir()) / f"lynceus-bench-{os.getuid()}"


@cache
def digits8() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """scikit-learn's digits as pixels: (train x (1437, 1, 8, 8) in [0, 1], train y, test x (360, 1, 8, 8), test y)."""
    from sklearn.datasets import load_digits

    data = load_digits()
    x = torch.from_numpy(data.images).float()[:, None] / 16
    y = torch.from_numpy(data.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    x, y = x[order], y[order]
    return x[360:], y[360:], x[:360], y[:360]


def trained(
    net: nn.Module, x: Tensor, y: Tensor, *, seed: int, epochs: int, lr: float = 3e-3, batch: int = 64
) -> nn.Module:
    """Adam on one cycle; the order of the pictures is drawn from `seed`."""
    draw = generator(seed, "order")
    optimizer = torch.optim.Adam(net.parameters(), lr)
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=epochs * (len(x) // batch))
    net.train()
    for _ in range(epochs):
        for part in torch.randperm(len(x), generator=draw)[: len(x) // batch * batch].split(batch):
            loss = F.cross_entropy(net(x[part]), y[part])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            cycle.step()
    return net.eval()


def small_cnn(classes: int = 10) -> nn.Sequential:
    """Two 3x3 convolutions, pooling, two linear layers on grey digits (b, 1, 8, 8)."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(512, 64),
        nn.ReLU(),
        nn.Linear(64, classes),
    )


@cache
def digits_cnn(seed: int = 0, epochs: int = 15) -> nn.Module:
    """`small_cnn` trained on digits: 98 to 99% of the test digits; after 40 epochs it is as sure as the cards' nets
    (median probability .999)."""
    x, y, _, _ = digits8()
    with borrowed(seed, "digits cnn"):
        return trained(small_cnn(), x, y, seed=seed, epochs=epochs)


@cache
def digits_mlp(seed: int = 0) -> nn.Module:
    """64-32-32-10 with ReLU on grey digits (b, 1, 8, 8)."""
    x, y, _, _ = digits8()
    with borrowed(seed, "digits mlp"):
        net = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 10))
        return trained(net, x, y, seed=seed, epochs=40)


def curve_points(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Points (n, 2) of [0, 2 pi]^2 and their class: 1 above y = 1 + sqrt(10 |x - 3|), 0 below."""
    x = 2 * torch.pi * torch.rand(count, 2, generator=generator(seed, "curve"))
    return x, (x[:, 1] > 1 + (10 * (x[:, 0] - 3).abs()).sqrt()).long()


@cache
def curve_net(seed: int = 0) -> nn.Module:
    """2-20-20-2 with ReLU on points (b, 2) of the curve, trained on 5,000 of them."""
    x, y = curve_points(5000, seed)
    with borrowed(seed, "curve net"):
        net = nn.Sequential(nn.Linear(2, 20), nn.ReLU(), nn.Linear(20, 20), nn.ReLU(), nn.Linear(20, 2))
        return trained(net, x, y, seed=seed, epochs=60, lr=1e-2)


@cache
def cifar(count: int = 10_000, start: int = 0) -> tuple[Tensor, Tensor]:
    """CIFAR-10 training pictures start .. start + count: uint8 (n, 3, 32, 32) and labels. The last 5,000 are never
    trained on here: cifar(5000, 45_000) is the test set of the measurements."""
    import lynceus.data

    data = lynceus.data.open(CIFAR10)
    picked = [data[i] for i in range(start, start + count)]
    return torch.stack([s.image for s in picked]), torch.tensor([s.label for s in picked])


def cifar_cnn(*, width: int = 32, seconds: float = 240.0, seed: int = 0) -> nn.Module:
    """A plain CNN (four 3x3 convolutions) on pixels in [0, 1], trained on 40,000 pictures for some processor seconds.

    Kept in a folder of the temporary files; a change of this function, the net or the options trains it anew."""
    net = Centred(width)
    recipe = inspect.getsource(cifar_cnn) + inspect.getsource(ConvNet) + repr((width, seconds, seed))
    key = hashlib.blake2b(recipe.encode(), digest_size=6).hexdigest()
    path = KEPT / f"cifar-cnn-{key}.safetensors"
    if path.is_file():
        net.load_state_dict(load_file(path))
        return net.eval()
    x, y = cifar(40_000)
    draw = generator(seed, "cifar cnn")
    with borrowed(seed, "cifar cnn"):
        net = Centred(width)
    optimizer = torch.optim.AdamW(net.parameters(), 2e-3, weight_decay=0.02)
    start = time.process_time()
    while (done := (time.process_time() - start) / seconds) < 1:
        part = torch.randint(len(x), (128,), generator=draw)
        image = x[part].float() / 255
        if torch.rand((), generator=draw) < 0.5:
            image = image.flip(-1)
        down, right = torch.randint(0, 5, (2,), generator=draw).tolist()
        image = F.pad(image, (2, 2, 2, 2), mode="reflect")[..., down : down + 32, right : right + 32]
        optimizer.param_groups[0]["lr"] = 2e-3 * min(1.0, 10 * done, 1.02 - done)
        loss = F.cross_entropy(net(image), y[part])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    KEPT.mkdir(parents=True, exist_ok=True)
    part_file = path.with_suffix(f".{os.getpid()}.part")
    save_file(net.state_dict(), part_file)
    os.replace(part_file, path)
    return net.eval()


class Centred(nn.Sequential):
    """The CNN of CIFAR-10 on pixels in [0, 1], which it brings to about zero mean and unit variance itself."""

    owns_pixels = True

    def __init__(self, width: int):
        super().__init__(Centre(), ConvNet(width, 10, pooled=True))


class Centre(nn.Module):
    """Pixels in [0, 1] to about zero mean and unit variance, inside the model."""

    def forward(self, image: Tensor) -> Tensor:
        return (image - 0.47) / 0.25
