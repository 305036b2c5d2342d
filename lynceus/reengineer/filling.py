"""The filling rule of parity and golden records: weights and inputs from names, shapes, seeds; outputs as fingerprints.

Two implementations that are filled by this rule under the same names must give the same fingerprints. All values are
float64 and the same on every machine: numpy's legacy generator is frozen by its own compatibility policy.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np

COUNT = 48  # values kept per output


def filled(name: str, shape: Sequence[int]) -> np.ndarray:
    """The float64 value of the parameter or running statistic `name`: a function of its name and shape alone.

    Kernels (two axes or more) have standard deviation 1/sqrt(fan-in), tables with a leading 1 (tokens, positions) 0.2;
    gains are 1 + 0.1 z, running variances 1 + 0.1 |z|, and every other vector 0.1 z.
    """
    shape = tuple(int(n) for n in shape)
    noise = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)
    last = name.split(".")[-1]
    if last == "running_var":
        return 1 + 0.1 * np.abs(noise)
    if len(shape) > 1:
        spread = 0.2 if shape[0] == 1 else 1 / math.sqrt(math.prod(shape[1:]))
        return noise * spread
    if not shape or last == "weight":
        return np.asarray(1 + 0.1 * noise)
    return 0.1 * noise


def image(shape: Sequence[int], seed: int = 0) -> np.ndarray:
    """A standard-normal float64 input."""
    return np.random.RandomState(seed).standard_normal(tuple(int(n) for n in shape))


def fingerprint(array: Any, count: int = COUNT, *, exact: bool = False) -> dict[str, Any]:
    """{"shape", "mean", "std", "values"}: `values` are `count` evenly spaced entries.

    They are rounded to 9 significant digits, as records hold them, unless `exact`.
    """
    array = np.asarray(array, dtype=np.float64)
    flat = array.reshape(-1)
    at = picks(flat.size, count)
    return {
        "shape": [int(n) for n in array.shape],
        "mean": float(flat.mean()) if flat.size else 0.0,
        "std": float(flat.std()) if flat.size else 0.0,
        "values": [float(v) if exact else float(f"{v:.9g}") for v in flat[at]],
    }


def picks(size: int, count: int = COUNT) -> np.ndarray:
    """The flat positions of the entries that a fingerprint keeps."""
    return np.linspace(0, size - 1, min(count, size)).round().astype(int) if size else np.zeros(0, dtype=int)


def gap(ours: dict[str, Any], theirs: dict[str, Any]) -> float:
    """The largest difference between two fingerprints (values, mean, std), in units of `theirs`' standard deviation.

    Infinite when the shapes differ or a number is not finite. Where the 9 digits of `theirs` are
    coarser than 1e-7 of that unit, what was lost by rounding them is not counted.
    """
    if list(ours["shape"]) != list(theirs["shape"]) or len(ours["values"]) != len(theirs["values"]):
        return math.inf
    a = np.array([*ours["values"], ours["mean"], ours["std"]], dtype=np.float64)
    b = np.array([*theirs["values"], theirs["mean"], theirs["std"]], dtype=np.float64)
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        return 0.0 if np.array_equal(a, b) else math.inf
    size = np.abs(b)
    unit = float(theirs["std"]) or float(size.max(initial=0.0)) or 1.0
    rounding = np.where(size > 0, 0.5 * 10.0 ** (np.floor(np.log10(np.where(size > 0, size, 1.0))) - 8), 0.0)
    rounding[-2:] = 0  # mean and std are written in full
    rounding[rounding < 1e-7 * unit] = 0  # it matters only where the mean is far above the standard deviation
    return float(np.maximum(np.abs(a - b) - rounding, 0).max(initial=0.0)) / unit
