"""Moving digits: which of eight ways a digit moves, for clips to learn from and streams in which it changes.

scikit-learn's digits of 8x8, on a grid of 28x28 that is closed at its edges, one to two pixels a frame.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench._trust import digits8
from lynceus.core.rng import borrowed, generator
from lynceus.rewrite.streaming import convert
from lynceus.rewrite.streaming.pooling import WindowPool

SIDE, FRAMES = 28, 16
WAYS = torch.tensor([(0, 1), (1, 1), (1, 0), (1, -1), (0, -1), (-1, -1), (-1, 0), (-1, 1)])


def network(width: int = 24) -> nn.Sequential:
    """Three causal layers (no padding in time), the mean over space and the rest of the clip, eight scores."""

    def layer(inputs: int, outputs: int, stride: int) -> list[nn.Module]:
        conv = nn.Conv3d(inputs, outputs, (3, 3, 3), stride=(1, stride, stride), padding=(0, 1, 1), bias=False)
        return [conv, nn.BatchNorm3d(outputs), nn.ReLU()]

    body = [*layer(1, width, 2), *layer(width, 2 * width, 2), *layer(2 * width, 2 * width, 2)]
    return nn.Sequential(*body, WindowPool(FRAMES - 6), nn.Conv3d(2 * width, 8, 1))


def painted(digits: Tensor, at: Tensor) -> Tensor:
    """Digits (b, 8, 8) at rows and columns `at` (b, t, 2), closed at the edges: (b, 1, t, side, side)."""
    b, t = at.shape[:2]
    grid = torch.arange(8)
    rows = (at[..., 0, None] + grid) % SIDE
    columns = (at[..., 1, None] + grid) % SIDE
    flat = rows[..., :, None] * SIDE + columns[..., None, :]
    clip = torch.zeros(b, t, SIDE * SIDE)
    clip.scatter_(2, flat.flatten(2), digits[:, None].expand(b, t, 8, 8).flatten(2))
    return clip.view(b, 1, t, SIDE, SIDE)


def clips(count: int, frames: int, draw: torch.Generator, digits: Tensor) -> tuple[Tensor, Tensor]:
    """Clips (b, 1, t, side, side) with noise, and their ways (b,)."""
    way = torch.randint(8, (count,), generator=draw)
    pick = torch.randint(len(digits), (count,), generator=draw)
    speed = torch.randint(1, 3, (count, 1, 1), generator=draw)
    start = torch.randint(SIDE, (count, 1, 2), generator=draw)
    at = start + speed * WAYS[way][:, None] * torch.arange(frames)[None, :, None]
    x = painted(digits[pick], at)
    return x + 0.3 * torch.randn(x.shape, generator=draw), way


def long_stream(frames: int, hold: int, draw: torch.Generator, digits: Tensor) -> tuple[Tensor, Tensor]:
    """One stream (1, 1, t, side, side) whose digit, speed and way change every `hold` frames; the way at each frame."""
    parts, ways = [], []
    place = torch.randint(SIDE, (1, 1, 2), generator=draw)
    for _ in range(frames // hold):
        way = torch.randint(8, (1,), generator=draw)
        speed = torch.randint(1, 3, (1, 1, 1), generator=draw)
        pick = torch.randint(len(digits), (1,), generator=draw)
        at = place + speed * WAYS[way][:, None] * torch.arange(1, hold + 1)[None, :, None]
        parts.append(painted(digits[pick], at))
        ways.append(way.expand(hold))
        place = at[:, -1:]
    x = torch.cat(parts, 2)
    return x + 0.3 * torch.randn(x.shape, generator=draw), torch.cat(ways)


def trained(seconds: float, seed: int = 0, width: int = 24) -> nn.Sequential:
    """The network after so many seconds on fresh clips."""
    train = digits8()[0][:, 0]
    with borrowed(seed, "moving digits"):
        net = network(width)
    draw = generator(seed, "clips")
    optimizer = torch.optim.Adam(net.parameters(), 2e-3)
    begin = time.perf_counter()
    net.train()
    while (spent := time.perf_counter() - begin) < seconds:
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * max(0.02, 1 - spent / seconds)
        x, y = clips(32, FRAMES, draw, train)
        loss = F.cross_entropy(net(x).flatten(1), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return net.eval()


def trial(seed: int = 0, seconds: float = 180.0, frames: int = 3000, hold: int = 60) -> dict[str, Any]:
    """Accuracy on a long stream, of the sliding window and of the frame-wise run, and frames per second of both
    (in turns; the fastest tenth, for on a busy machine the longer runs are interrupted more often)."""
    net = trained(seconds, seed)
    x, way = long_stream(frames, hold, generator(seed, "stream"), digits8()[2][:, 0])
    stream = convert(net)
    state = stream.start(x[:, :, 0])
    ours, window = [], []
    spent: tuple[list[float], list[float]] = ([], [])
    with torch.no_grad():
        for block in torch.arange(frames).split(50):  # in turns, each long enough for its own weights to be in cache
            for t in block.tolist():
                begin = time.perf_counter()
                y, state = stream.step(x[:, :, t], state)
                spent[0].append(time.perf_counter() - begin)
                ours.append(y)
            for t in block[block >= FRAMES - 1].tolist():
                begin = time.perf_counter()
                window.append(net(x[:, :, t - FRAMES + 1 : t + 1]))
                spent[1].append(time.perf_counter() - begin)
    got = torch.stack([y for y in ours if y is not None]).flatten(1)
    want = torch.stack(window).flatten(1)
    truth = way[FRAMES - 1 :]
    accuracy = [100 * (a.argmax(1) == truth).float().mean().item() for a in (got, want)]
    each = [statistics.quantiles(t, n=10)[0] for t in spent]
    return {
        "seed": seed,
        "seconds": seconds,
        "accuracy, frame by frame": accuracy[0],
        "accuracy, sliding window": accuracy[1],
        "largest difference": (got - want).abs().max().item(),
        "frames/s, frame by frame": 1 / each[0],
        "frames/s, sliding window": 1 / each[1],
        "times as fast": each[1] / each[0],
        "delay": stream.delay,
    }
