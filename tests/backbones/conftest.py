"""Handwritten digits and a short training loop, for the families' learning tests."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn


def _digits(side, held):
    """scikit-learn's digits enlarged to `side`, normalised, shuffled: (train x, train y, test x, test y)."""
    from sklearn.datasets import load_digits

    data = load_digits()
    x = torch.from_numpy(data.images).float()[:, None] / 16
    x = F.interpolate((x - x.mean()) / x.std(), (side, side), mode="bilinear").repeat(1, 3, 1, 1)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    x, y = x[order], torch.from_numpy(data.target)[order]
    return x[held:], y[held:], x[:held], y[:held]


def _fit(model, batches, steps, *, lr=2e-3, weight_decay=0.05, clip=5.0):
    """AdamW with one cycle; `batches` yields (x, y) without end."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=weight_decay)
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)
    for _, (x, y) in zip(range(steps), batches):
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        cycle.step()
    return model.eval()


def _accuracy(model, x, y):
    with torch.no_grad():
        return float((model(x).argmax(1) == y).float().mean())


@pytest.fixture
def learn_digits():
    """Trains on digits and gives the held-out accuracy."""

    def learn(model, *, side, held, epochs, seed=0, batch=64):
        x, y, test_x, test_y = _digits(side, held)
        generator = torch.Generator().manual_seed(seed)
        per_epoch = len(x) // batch

        def batches():
            while True:
                for part in torch.randperm(len(x), generator=generator)[: per_epoch * batch].split(batch):
                    yield x[part], y[part]

        return _accuracy(_fit(model, batches(), epochs * per_epoch), test_x, test_y)

    return learn


def _same_colour(generator):
    """Two marks in one row either side of the border between windows, of two colours each; label: the same colour."""
    while True:
        x = torch.zeros(64, 3, 8, 8)
        row = torch.randint(8, (64,), generator=generator)
        colour = torch.randint(2, (64, 2), generator=generator)
        n = torch.arange(64)
        for i, column in enumerate((3, 4)):
            x[n, colour[:, i], row, column] = 1.0
        yield x, (colour[:, 0] == colour[:, 1]).long()


@pytest.fixture
def learn_same_colour():
    """Trains on the task that only shifted windows can solve, and gives the held-out accuracy. shifted=False takes the
    shift out of every attention of the given kind."""

    def learn(model, attention, *, shifted):
        for m in model.modules():
            if isinstance(m, attention) and not shifted:
                m.shift = 0
        _fit(model, _same_colour(torch.Generator().manual_seed(1)), 300)
        held = _same_colour(torch.Generator().manual_seed(2))
        tests = [next(held) for _ in range(16)]
        return _accuracy(model, torch.cat([x for x, _ in tests]), torch.cat([y for _, y in tests]))

    return learn
