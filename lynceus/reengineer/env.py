"""What a result was made with, and which differences are likely to matter, likeliest first."""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from lynceus.core.files import write_atomic
from lynceus.core.report import Report

PACKAGES = (
    "torch",
    "torchvision",
    "timm",
    "numpy",
    "pillow",
    "accelerate",
    "scikit-learn",
    "scipy",
    "torchmetrics",
    "safetensors",
)

# how likely a difference is to change numbers, and why; the first match of the name's beginning counts
WEIGHTS: tuple[tuple[str, int, str], ...] = (
    ("lynceus", 95, "the library itself"),
    ("torch", 90, "operators, initialisation and random streams may change between versions"),
    ("torchvision", 80, "decoding, resizing and their antialiasing"),
    ("pillow", 75, "decoding and resizing of pictures"),
    ("timm", 70, "optimisers, schedules, augmentation"),
    ("device", 65, "other kernels, other order of summation"),
    ("matmul precision", 60, "TF32 keeps 10 bits of the mantissa"),
    ("cudnn", 55, "other kernels; benchmark mode chooses by timing"),
    ("deterministic", 55, "order of summation"),
    ("default dtype", 50, "precision of everything"),
    ("cuda", 45, "other kernels"),
    ("cpu", 35, "vector width changes the order of summation"),
    ("threads", 30, "order of summation"),
    ("numpy", 25, "random streams of the new generators"),
    ("accelerate", 25, "training loop"),
    ("variable", 20, "settings read at start"),
    ("python", 10, "order of files and hashes"),
    ("machine", 5, ""),
)


def snapshot() -> dict[str, str]:
    """Versions, processor and GPU, threads, deterministic settings, environment variables that torch reads."""
    import lynceus

    out = {"lynceus": lynceus.__version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            out[package] = version(package)
        except PackageNotFoundError:
            out[package] = "not installed"
    out |= {
        "machine": f"{platform.system()} {platform.machine()}",
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "cuda": str(torch.version.cuda),
        "cudnn": str(torch.backends.cudnn.version()),
        "cudnn benchmark": str(torch.backends.cudnn.benchmark),
        "cudnn deterministic": str(torch.backends.cudnn.deterministic),
        "deterministic algorithms": str(torch.are_deterministic_algorithms_enabled()),
        "matmul precision": torch.get_float32_matmul_precision(),
        "default dtype": str(torch.get_default_dtype()),
        "threads": str(torch.get_num_threads()),
        "byte order": sys.byteorder,
    }
    for name in (
        "OMP_NUM_THREADS",
        "MKL_NUM_THREADS",
        "CUBLAS_WORKSPACE_CONFIG",
        "PYTHONHASHSEED",
        "NVIDIA_TF32_OVERRIDE",
    ):
        out[f"variable {name}"] = os.environ.get(name, "not set")
    return out


def compare(first: Mapping[str, str] | str | Path, second: Mapping[str, str] | str | Path | None = None) -> Report:
    """What differs between two snapshots (or files of them; None: here and now), sorted by likelihood of mattering."""
    a, b = _read(first), _read(second)
    report = Report(name="environment")
    for name in dict.fromkeys([*a, *b]):
        if a.get(name) != b.get(name):
            weight, why = _weight(name, str(a.get(name)), str(b.get(name)))
            row: dict[str, Any] = {
                "what": name,
                "first": a.get(name),
                "second": b.get(name),
                "likelihood": weight,
                "why": why,
            }
            report.rows.append(row)
    report.rows.sort(key=lambda r: -r["likelihood"])
    report.summary = {"differences": float(len(report.rows)), "same": float(len({*a, *b}) - len(report.rows))}
    return report


def save(path: str | Path) -> Path:
    """Writes a snapshot as JSON."""
    return write_atomic(Path(path), json.dumps(snapshot(), indent=1))


def _read(given: Mapping[str, str] | str | Path | None) -> dict[str, str]:
    if given is None:
        return snapshot()
    if isinstance(given, Mapping):
        return dict(given)
    return dict(json.loads(Path(given).read_text(encoding="utf-8")))


def _weight(name: str, first: str, second: str) -> tuple[int, str]:
    weight, why = next(((w, y) for start, w, y in WEIGHTS if name == start or name.startswith(f"{start} ")), (15, ""))
    if name in (*PACKAGES, "lynceus", "python") and first.split(".")[:2] == second.split(".")[:2]:
        return weight // 2, f"only the patch version differs; {why}"
    return weight, why
