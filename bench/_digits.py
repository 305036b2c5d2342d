"""scikit-learn's digits at some side, and the short training of the digits experiments."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from lynceus.core.rng import generator

HELD = 450  # test images; the other 1347 train


def digits(side: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Enlarged bilinearly to `side`, normalised, always shuffled alike: (train x, train y, test x, test y)."""
    data = load_digits()
    x = torch.from_numpy(data.images).float()[:, None] / 16
    x = F.interpolate((x - x.mean()) / x.std(), (side, side), mode="bilinear").repeat(1, 3, 1, 1)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    x, y = x[order], torch.from_numpy(data.target)[order]
    return x[HELD:], y[HELD:], x[:HELD], y[:HELD]


def train(make: Callable[[], nn.Module], side: int, *, seed: int, epochs: int = 30, batch: int = 64) -> nn.Module:
    """AdamW of 2e-3 (one cycle), weight decay 0.05, clipped at 5."""
    torch.manual_seed(seed)
    model = make().train()
    x, y, _, _ = digits(side)
    order = generator(seed, "order of digits")
    steps = len(x) // batch
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3, weight_decay=0.05)
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=epochs * steps)
    for _ in range(epochs):
        for part in torch.randperm(len(x), generator=order)[: steps * batch].split(batch):
            loss = F.cross_entropy(model(x[part]), y[part])
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 5.0)
            optimizer.step()
            cycle.step()
    return model.eval()


def accuracy(model: nn.Module, side: int) -> float:
    """Share of the held-out digits that are named rightly, in per cent."""
    _, _, x, y = digits(side)
    with torch.no_grad():
        return 100 * float((model(x).argmax(1) == y).float().mean())
