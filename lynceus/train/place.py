"""Where a run happens: Hugging Face Accelerate's device, precision and processes, without what it leaves behind."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from lynceus.core.errors import AdviceError


@contextmanager
def accelerator_of(device: str, precision: str) -> Iterator[Any]:
    """An Accelerator of this run's own; Accelerate keeps its settings in a singleton, which is cleared around it."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    if device not in ("auto", "cpu"):
        kind = torch.device(device).type
        known = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
        there = known.get(kind, True)
        if not there:
            raise AdviceError(f"There is no {device} device here; use device='auto' (takes what there is) or 'cpu'.")
    before = {k: v for k, v in os.environ.items() if k.startswith("ACCELERATE")}
    alone = int(os.environ.get("WORLD_SIZE") or 1) == 1
    AcceleratorState._reset_state(reset_partial_state=alone)
    if precision == "fp16" and (
        device == "cpu" or not (torch.cuda.is_available() or torch.backends.mps.is_available())
    ):
        raise AdviceError("precision='fp16' needs a GPU; on a CPU use precision='bf16' or 'no'.")
    try:
        on_cpu = device == "cpu" or (device == "auto" and not alone and not torch.cuda.is_available())
        accelerator = Accelerator(cpu=on_cpu, mixed_precision=precision)
        yield accelerator
    finally:
        AcceleratorState._reset_state(reset_partial_state=alone)
        for key in [k for k in os.environ if k.startswith("ACCELERATE") and k not in before]:
            del os.environ[key]
        os.environ.update(before)
