"""Token pruning of state-space models: accuracy on digits for every rule and score, and measured time beside FLOPs.

python -m bench.prune_tokens accuracy            # three Vims of width 24 on 8x8 digits, pruned without fine-tuning
python -m bench.prune_tokens tune                # two epochs of fine-tuning with pruning active
python -m bench.prune_tokens speed --threads 1   # vim_tiny at 224, batch 8, cuts after blocks 5, 10 and 15
"""

from __future__ import annotations

import argparse
import hashlib
import inspect
import json
import os
import platform
import statistics
import time
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from bench._trust import KEPT, digits8
from lynceus.backbones.vim import Vim, VimConfig
from lynceus.core.rng import borrowed, generator

SEEDS = (0, 1, 2)


def new_vim() -> Vim:
    return Vim(
        VimConfig(image_size=(8, 8), patch_size=1, stride=1, in_chans=1, dim=24, depth=4, num_classes=10, states=16)
    )


def vim_on_digits(seed: int) -> Vim:
    """Width 24, depth 4, patch 1, class token in the middle: AdamW at 4e-3, 36 epochs in two cycles; kept."""
    recipe = inspect.getsource(new_vim) + inspect.getsource(vim_on_digits) + repr(seed)
    path = KEPT / f"vim-digits-{hashlib.blake2b(recipe.encode(), digest_size=6).hexdigest()}.safetensors"
    with borrowed(seed, "vim on digits"):
        net = new_vim()
    if path.is_file():
        net.load_state_dict(load_file(path))
        return net.eval()
    x, y, _, _ = digits8()
    net.train()
    for cycle in range(2):
        train(net, (x - 0.5) / 0.4, y, seed=2 * seed + cycle, epochs=18, rate=4e-3)
    KEPT.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}.part")
    save_file(net.state_dict(), part)
    os.replace(part, path)
    return net.eval()


def train(net: nn.Module, x: Tensor, y: Tensor, *, seed: int, epochs: int, rate: float, batch: int = 64) -> None:
    """AdamW on one cycle."""
    draw, steps = generator(seed, "digits order"), epochs * (len(x) // batch)
    optimizer = torch.optim.AdamW(net.parameters(), rate, weight_decay=0.05)
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.2)
    for _ in range(epochs):
        for part in torch.randperm(len(x), generator=draw)[: len(x) // batch * batch].split(batch):
            loss = F.cross_entropy(net(x[part]), y[part])
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimizer.step()
            cycle.step()


@torch.no_grad()
def accuracy(net: nn.Module) -> float:
    """Percent of the 360 held-out digits."""
    _, _, x, y = digits8()
    answers = torch.cat([net((part - 0.5) / 0.4) for part in x.split(90)]).argmax(1)
    return 100 * float((answers == y).float().mean())
