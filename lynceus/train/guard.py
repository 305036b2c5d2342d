"""What keeps a run safe: seeds of a step, signals that wait for its end, advice when memory or numbers give out."""

from __future__ import annotations

import random
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lynceus.core.errors import AdviceError


class Interrupted(KeyboardInterrupt):
    """Ctrl-C (or a polite SIGTERM) during fit; the text says where the checkpoint is and how to go on."""


def seed_everything(seed: int) -> None:
    """Sets the global generators of Python, numpy and torch, which dropout and stochastic depth draw from."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)  # torch.manual_seed costs a third of a millisecond
    if torch.cuda.is_available():
        torch.cuda.manual_seed_all(seed)
    if torch.backends.mps.is_available():
        torch.mps.manual_seed(seed)


@contextmanager
def signals(run: Any) -> Iterator[None]:
    """Inside, the first Ctrl-C or SIGTERM asks the loop to stop after its step; a second Ctrl-C stops at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def ask(number: int, frame: Any) -> None:
        if run.stop is not None:
            raise KeyboardInterrupt
        run.stop = "Ctrl-C" if number == signal.SIGINT else "SIGTERM"

    old = {s: signal.signal(s, ask) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for s, handler in old.items():
            signal.signal(s, handler)


@contextmanager
def memory_advice(batch_size: int, accumulate: int) -> Iterator[None]:
    try:
        yield
    except (torch.OutOfMemoryError, RuntimeError, MemoryError) as error:
        text = str(error).lower()
        short = (
            isinstance(error, (torch.OutOfMemoryError, MemoryError))
            or "out of memory" in text
            or "allocate memory" in text
        )
        if not short or isinstance(error, AdviceError):
            raise
        raise AdviceError(
            f"A step of {batch_size} images does not fit into memory. Compute it in parts, with the same result: "
            f"accumulate={accumulate * 2}; or batch_size={max(1, batch_size // 2)}, precision='bf16', smaller images."
        ) from error


def not_finite(module: nn.Module, terms: dict[str, Tensor], batch: Any) -> str:
    """What is not finite, and where that was first seen: images, weights, gradients, or this forward pass."""
    bad = [f"{k} = {v.item():g}" for k, v in terms.items() if v.ndim == 0 and not bool(torch.isfinite(v))]
    named = [(n, p) for n, p in module.named_parameters() if p.requires_grad]
    image = getattr(batch, "image", batch)
    origin = "every image, weight and gradient is still finite, so it arose inside this forward pass"
    if isinstance(image, Tensor) and not bool(torch.isfinite(image.float()).all()):
        which = int((~torch.isfinite(image.float()).flatten(1).all(1)).nonzero()[0])
        ids = getattr(batch, "ids", None) or []
        name = f", {ids[which]}" if len(ids) > which else ""
        origin = f"the images themselves are not finite (first: number {which} of the batch{name})"
    elif weight := next((n for n, p in named if not bool(torch.isfinite(p).all())), None):
        origin = f"the first weight that is not finite is {weight}"
    elif weight := next((n for n, p in named if p.grad is not None and not bool(torch.isfinite(p.grad).all())), None):
        origin = f"the first gradient that is not finite is that of {weight}"
    return f"{', '.join(bad) or 'no term of the loss'} is not finite; {origin}" if bad else origin
