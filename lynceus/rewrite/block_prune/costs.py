"""What a layer costs at a sparsity: block multiplications, by either of two counts, or milliseconds on this machine."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import lru_cache
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from lynceus.core.rng import generator
from lynceus.rewrite.block_prune.scores import Curve
from lynceus.rewrite.block_prune.sparse import BlockSparseLinear

CostModel = Literal["weights", "tokens", "measured"]
TILE = 16  # side of an accelerator's tile
AT = (0.0, 0.25, 0.5, 0.75, 0.95)  # sparsities that are timed
TOKENS = 512  # that are multiplied at least while timing


def units(curve: Curve, model: CostModel) -> np.ndarray:
    """Block multiplications per image of one layer over the grid.

    weights: (1 - s) blocks floor(in / 16), the model of the released code. tokens: (1 - s) blocks ceil(places / 16)."""
    left = 1 - np.linspace(0, 1, len(curve.count))
    per = curve.shape[1] // TILE if model == "weights" else -(-curve.positions // TILE)
    return left * curve.blocks * per


def costs(curves: Sequence[Curve], model: CostModel, block: tuple[int, int]) -> np.ndarray:
    """The cost of every layer over the grid, (layers, grid): block multiplications, or measured milliseconds."""
    if model != "measured":
        return np.stack([units(c, model) for c in curves])
    grid = np.linspace(0, 1, len(curves[0].count))
    return np.stack([np.interp(grid, AT, milliseconds(c.shape, c.positions, block)) for c in curves])


@lru_cache(maxsize=256)
def milliseconds(shape: tuple[int, int], positions: int, block: tuple[int, int], threads: int = 0) -> tuple[float, ...]:
    """Measured milliseconds per image of a layer (out, in) at the sparsities `AT`, random blocks, inference on the CPU.

    positions: places per image; images are taken together until there are `TOKENS` places. The first value is the dense
    layer's. Kept for the life of the process, so that one process measures once.
    """
    out, inn = shape
    images = max(1, -(-TOKENS // positions))
    draw = generator(0, "block cost", out, inn)
    x = torch.randn(images * positions, inn, generator=draw)
    dense = nn.Linear(inn, out)
    grid = (-(-out // block[0]), -(-inn // block[1]))
    layers: list[nn.Module] = []
    for s in AT[1:]:
        kept = torch.zeros(grid[0] * grid[1], dtype=torch.bool)
        kept[torch.randperm(len(kept), generator=draw)[: max(1, int((1 - s) * len(kept)))]] = True
        layers.append(BlockSparseLinear.of(dense, block, kept.view(grid)).eval())
    least = [float("inf")] * len(AT)
    with torch.inference_mode():
        for turn in range(6):
            for i in range(len(AT)):
                start = time.perf_counter()
                F.linear(x, dense.weight, dense.bias) if i == 0 else layers[i - 1](x)
                if turn:
                    least[i] = min(least[i], time.perf_counter() - start)
    return tuple(1e3 * t / images for t in least)
