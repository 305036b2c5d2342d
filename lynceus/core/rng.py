"""Randomness is passed, not hidden: seeds are derived by name, generators explicit, global state is only borrowed."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


def derive(seed: int, *keys: Any) -> int:
    """A seed for a named purpose: the same on every machine, process and worker. In 0 .. 2^63 - 1."""
    text = repr((int(seed), *keys)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 1


def generator(seed: int, *keys: Any, device: torch.device | str = "cpu") -> torch.Generator:
    """A torch generator seeded with `derive(seed, *keys)`."""
    return torch.Generator(device=device).manual_seed(derive(seed, *keys))


def numpy_generator(seed: int, *keys: Any) -> np.random.Generator:
    return np.random.default_rng(derive(seed, *keys))


@contextmanager
def borrowed(seed: int, *keys: Any) -> Iterator[None]:
    """Seeds Python, numpy and torch inside the block, for code that only knows global state; gives it back after."""
    state = capture()
    value = derive(seed, *keys)
    random.seed(value)
    np.random.seed(value % 2**32)
    torch.manual_seed(value)
    try:
        yield
    finally:
        restore(state)


def capture() -> dict[str, Any]:
    """The global random state as plain values and tensors (safe to write with torch.save, weights_only)."""
    kind, keys, position, has_gauss, gauss = np.random.get_state()
    version, internal, gauss_next = random.getstate()
    state: dict[str, Any] = {
        "python": [version, list(internal), gauss_next],
        "numpy": [str(kind), [int(k) for k in keys], int(position), int(has_gauss), float(gauss)],
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def restore(state: dict[str, Any]) -> None:
    """Sets the global random state to what `capture` gave."""
    version, internal, gauss_next = state["python"]
    random.setstate((version, tuple(internal), gauss_next))
    kind, keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), position, has_gauss, gauss))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])
