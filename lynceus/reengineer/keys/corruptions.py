"""Records of the common corruptions: hendrycks/robustness on one made picture, at 224 pixels and (CIFAR) at 32.

The authors draw from numpy's global generator; a record says its seed, and with the same order of draws our pixels must
be theirs within a grey level. Where no seed can be had, and for our own draws, mean, deviation and mean squared
difference from the clean picture are compared.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from lynceus.core.errors import AdviceError
from lynceus.core.rng import generator
from lynceus.data.corrupt import CORRUPTIONS, DETERMINISTIC, Scale, corrupt
from lynceus.reengineer.filling import image, picks
from lynceus.reengineer.parity import Row

_LOOSE = ("fog", "spatter", "elastic_transform", "snow", "frost", "motion_blur")  # one draw moves the whole picture
_UNSEEDED = ("impulse_noise", "snow", "frost", "motion_blur")  # no order of draws to follow: other libraries' own
_SEED = re.compile(r"seed\((\d+) \+ severity\)")


def check(record: Mapping[str, Any]) -> list[Row]:
    """A row per number of the record; gaps are grey levels (pixels, mean, std) or relative (mse)."""
    name = _name(record)
    scale: Scale = "cifar" if "32" in record["family"] or "cifar" in record.get("function", "") else "imagenet"
    clean = picture(record["inputs"]["image"])
    x = torch.from_numpy(clean).permute(2, 0, 1)
    rows = []
    for output, want in record["outputs"].items():
        found = re.fullmatch(r"severity(\d)", output)
        if found is None:
            if not re.fullmatch(r"severity\d_mse", output):
                raise AdviceError(f"A corruption's record holds severityN and severityN_mse, not {output!r}.")
            continue
        severity = int(found[1])
        seeded = _SEED.search(record.get("note", ""))
        mse = record["outputs"].get(f"{output}_mse")
        if name in DETERMINISTIC:
            rows += _same(record, output, corrupt(x, name, severity, scale=scale), want, mse, clean)
            continue
        if seeded and name not in _UNSEEDED:
            state = np.random.RandomState(int(seeded[1]) + severity)
            rows += _same(record, output, corrupt(x, name, severity, generator=state, scale=scale), want, mse, clean)
        rows += _alike(record, output, x, name, severity, scale, want, mse, clean)
    return rows


def picture(spec: Mapping[str, Any]) -> np.ndarray:
    """The record's picture (h, w, 3) uint8: slow waves plus a little noise."""
    if spec.get("as") != "smooth" or len(spec.get("shape", ())) != 3:
        raise AdviceError(f"A corruption's input is a picture (h, w, 3) 'as smooth'; this one says {dict(spec)}.")
    h, w, c = spec["shape"]
    i, j, k = np.arange(h)[:, None, None], np.arange(w)[:, None], np.arange(c)
    waves = 128 + 70 * np.sin(i / (17.0 + k)) * np.cos(j / (23.0 + 2 * k))
    return np.clip(np.round(waves + 8 * image((h, w, c), int(spec.get("seed", 0)))), 0, 255).astype(np.uint8)


def _name(record: Mapping[str, Any]) -> str:
    for text in (record.get("name", ""), str(record.get("function", "")).split(".")[-1]):
        found = [n for n in CORRUPTIONS if re.search(rf"(^|[^a-z]){n}($|[^a-z])", text)]
        if found:
            return found[0]
    raise AdviceError(f"The record {record.get('name')!r} names none of the corruptions {', '.join(CORRUPTIONS)}.")


def _same(
    record: Mapping[str, Any],
    output: str,
    ours: torch.Tensor,
    want: Mapping[str, Any],
    mse: float | None,
    clean: np.ndarray,
) -> list[Row]:
    """Pixel by pixel."""
    have = ours.permute(1, 2, 0).numpy().astype(np.float64)
    title = str(record.get("name"))
    if list(have.shape) != list(want["shape"]):
        shape = f"shape {list(have.shape)} instead of {want['shape']}"
        return [Row(record=title, output=output, gap=float("inf"), tolerance=1.0, note=shape)]
    values = have.reshape(-1)[picks(have.size, len(want["values"]))]
    gaps = [
        (output, float(np.abs(values - np.asarray(want["values"])).max()), 1.0, "grey levels, same draws"),
        (f"{output} mean", abs(float(have.mean()) - want["mean"]), 0.5, "grey levels"),
        (f"{output} std", abs(float(have.std()) - want["std"]), 0.5, "grey levels"),
    ]
    if mse is not None:
        gaps.append((f"{output}_mse", _relative(_mse(have, clean), mse), 0.01, "relative difference"))
    return [Row(record=title, output=o, gap=g, tolerance=t, note=n) for o, g, t, n in gaps]


def _alike(
    record: Mapping[str, Any],
    output: str,
    x: torch.Tensor,
    name: str,
    severity: int,
    scale: Scale,
    want: Mapping[str, Any],
    mse: float | None,
    clean: np.ndarray,
) -> list[Row]:
    """In mean, deviation and mean squared difference, with our own draws. A record is a single draw: ours are many,
    and the record may lie off their mean by four standard deviations of one draw, where that is more than the rule."""
    least = 0.25 if name in _LOOSE else 0.05
    count = 64 if clean.size < 50_000 else 16
    many = x.expand(count, -1, -1, -1).contiguous()
    made = corrupt(many, name, severity, generator=generator(0, "parity", name, severity), scale=scale)
    have = made.permute(0, 2, 3, 1).numpy().astype(np.float64)
    numbers = {
        f"{output} mean, own draws": (have.mean((1, 2, 3)), want["mean"]),
        f"{output} std, own draws": (have.std((1, 2, 3)), want["std"]),
    }
    if mse is not None:
        numbers[f"{output}_mse, own draws"] = (((have - clean) ** 2).mean((1, 2, 3)), mse)
    rows = []
    for title, (ours, theirs) in numbers.items():
        scatter = 4 * float(ours.std(ddof=1)) / max(abs(theirs), 1e-12)
        note = f"relative difference; 4 sd of one draw are {scatter:.3f}"
        gap = _relative(float(ours.mean()), theirs)
        rows.append(
            Row(record=str(record.get("name")), output=title, gap=gap, tolerance=max(least, scatter), note=note)
        )
    return rows


def _mse(have: np.ndarray, clean: np.ndarray) -> float:
    return float(np.mean((have - clean) ** 2))


def _relative(have: float, want: float) -> float:
    return abs(have - want) / max(abs(want), 1e-12)
