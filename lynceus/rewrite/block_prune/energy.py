"""Joules, where the machine counts them: RAPL (processor packages, Linux), NVML (NVIDIA GPUs); else clearly absent."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from lynceus.core.cost import evaluating

RAPL = Path("/sys/class/powercap")


def package_counters(root: Path = RAPL) -> list[Path]:
    """The readable energy counters of whole processor packages (intel-rapl:0 and so on; AMD too)."""
    found = []
    for folder in sorted(root.glob("intel-rapl:*")) if root.is_dir() else ():
        try:
            if folder.name.count(":") == 1 and int((folder / "energy_uj").read_text()) >= 0:
                found.append(folder)
        except (OSError, ValueError):
            continue
    return found


def _rapl(folders: list[Path]) -> Callable[[], list[tuple[int, int]]]:
    def read() -> list[tuple[int, int]]:
        values = []
        for folder in folders:
            limit = folder / "max_energy_range_uj"
            values.append((int((folder / "energy_uj").read_text()), int(limit.read_text()) if limit.is_file() else 0))
        return values

    return read


def _nvml(index: int) -> Callable[[], list[tuple[int, int]]] | None:
    """Reads the GPU's counter (millijoules since the driver was loaded); None where the driver has none."""
    try:
        library = ctypes.CDLL("libnvidia-ml.so.1")
        handle, value = ctypes.c_void_p(), ctypes.c_ulonglong()
        if library.nvmlInit_v2() or library.nvmlDeviceGetHandleByIndex_v2(index, ctypes.byref(handle)):
            return None
        if library.nvmlDeviceGetTotalEnergyConsumption(handle, ctypes.byref(value)):
            return None
    except (OSError, AttributeError):
        return None

    def read() -> list[tuple[int, int]]:
        library.nvmlDeviceGetTotalEnergyConsumption(handle, ctypes.byref(value))
        return [(int(value.value) * 1000, 0)]

    return read


def joules_per_image(
    model: nn.Module, example: Tensor, *, repeats: int = 20, root: Path = RAPL
) -> tuple[float | None, str]:
    """Energy of one image and where the number comes from; (None, why) where no counter can be read.

    The counter is that of the whole processor package or GPU: whatever else runs on it is in the number.
    """
    if example.is_cuda:
        read, source = _nvml(example.device.index or 0), "NVML"
        if read is None:
            return None, "The energy of this GPU cannot be read (NVML has no counter for it)."
    else:
        folders, source = package_counters(root), "RAPL"
        if not folders:
            return None, f"No energy counter is readable here ({root}/intel-rapl:*/energy_uj)."
        read = _rapl(folders)
    with evaluating(model), torch.inference_mode():
        model(example)
        before = read()
        for _ in range(repeats):
            model(example)
        if example.is_cuda:
            torch.cuda.synchronize(example.device)
        after = read()
    used = sum(b - a if b >= a else b - a + limit for (a, limit), (b, _) in zip(before, after))  # counters wrap
    return used / 1e6 / (repeats * len(example)), f"{source}, the whole package, {repeats} passes."
