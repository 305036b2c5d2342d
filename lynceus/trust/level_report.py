"""What walks on level sets say: their arrays joined, the numbers that matter, one row per walk."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lynceus.core.report import Report
from lynceus.trust.level_shape import DROPS, bootstrap, linf, rmse, ssim

LISTED = 100  # walks that get a row of their own


def say_time(report: Report, done: list[dict[str, Any]], steps: int, count: int, total: int) -> None:
    """Notes on what a budget left out."""
    if count < total:
        report.notes.append(
            f"Time ran out after {count} of {total} walks; all figures are of those. Give more seconds, or a keep "
            "folder and run again to go on."
        )
    short = min(p["walked"] for p in done)
    if short < steps:
        report.notes.append(
            f"Time ran out after {short} of {steps} steps: the images lie on the level set, but not as far as a whole "
            "walk goes."
        )


def gather(
    report: Report,
    done: list[dict[str, Any]],
    kept: Tensor,
    sources: Tensor,
    targets: Tensor,
    perceptual: Callable[[Tensor, Tensor], Tensor] | None,
) -> None:
    """Joins the pieces into the report's arrays, and measures distances."""
    for key in done[0]:
        if key in ("steps", "lattice", "walked"):
            continue
        report.arrays[key] = np.concatenate([np.asarray(p[key]) for p in done])
    report.arrays["steps"] = np.asarray(done[0]["steps"])
    if "lattice" in done[0]:
        report.arrays["lattice"] = np.asarray(done[0]["lattice"])
    report.arrays["kept"] = kept.cpu().numpy()
    blind = torch.from_numpy(report.arrays["images"])
    n, k = blind.shape[:2]
    s, t = sources[kept.cpu()].to(blind), targets[kept.cpu()].to(blind)
    flat, to = blind.flatten(0, 1), t.flatten(0, 1)
    measured = torch.stack([rmse(flat, to), linf(flat, to), ssim(flat, to)], 1)
    report.arrays["distances"] = measured.view(n, k, 3).numpy()
    start = s.repeat_interleave(k, 0)
    report.arrays["start"] = rmse(start, to).view(n, k).numpy()
    report.arrays["moved"] = rmse(start, flat).view(n, k).numpy()
    if perceptual is not None:
        with torch.no_grad():
            report.arrays["perceptual"] = perceptual(2 * flat - 1, 2 * to - 1).reshape(n, k).cpu().numpy()


def summarise(report: Report, drop: float, seed: int) -> None:
    """The numbers that matter, and the answer."""
    a = report.arrays
    lost = a["clean"][:, None] - a["confidence"]
    ratio = a["distances"][..., 0] / np.maximum(a["start"], 1e-12)
    low = a["line"].min(-1)
    inside = a["clean"][:, None] - low < drop
    report.summary = {
        "sources": float(len(a["clean"])),
        "walks": float(a["confidence"].size),
        "confidence at the source": float(a["clean"].mean()),
        "confidence, median": float(np.median(a["confidence"])),
        "confidence, least": float(a["confidence"].min()),
        "largest drop": float(lost.max()),
        "RMSE from source": float(a["moved"].mean()),
        "RMSE to target, before": float(a["start"].mean()),
        "RMSE to target": float(a["distances"][..., 0].mean()),
        "share of the way left": float(ratio.mean()),
        "L-inf to target": float(a["distances"][..., 1].mean()),
        "SSIM to target": float(a["distances"][..., 2].mean()),
        "steps accepted": float(a["accepted"].mean()),
        "walks that never moved": float((a["accepted"] == 0).mean()),
        "lines within drop": float(inside.mean()),
    }
    if "perceptual" in a:
        report.summary["perceptual distance to target"] = float(a["perceptual"].mean())
    if "triangle" in a:
        values, source, points = a["triangle"], a["clean"][:, None, None], a["lattice"]
        edges = np.concatenate([values[..., points[:, 1] == 0], values[..., points[:, 0] == 0]], -1)
        report.summary["triangle mean"] = float(values.mean())
        for d in DROPS:
            per_source = (values > values[..., :1] - d).mean((1, 2))
            report.summary[f"triangle within {d:g}"] = float(per_source.mean())
            if d == 0.1:
                interval = bootstrap(torch.from_numpy(per_source), seed=seed)
                report.summary |= {f"triangle within 0.1, {name}": v for name, v in zip(("low", "high"), interval)}
        report.summary["edge mean"] = float(edges.mean())
        report.summary["edge drop"] = float((edges - source).min((1, 2)).mean())
    report.answer = (
        f"Pictures that are {100 * (1 - ratio.mean()):.0f}% of the way to another image keep a median confidence of "
        f"{np.median(a['confidence']):.3f} in the old class"
    )
    if "contrast rmse" in a and np.isfinite(a["contrast rmse"]).any():
        flip = report.summary["RMSE of the smallest flip"] = float(np.nanmedian(a["contrast rmse"]))
        times = float(np.median(a["moved"])) / max(flip, 1e-12)
        report.answer += (
            f"; they lie {times:.1f} times as far from the source as the smallest change that flips the answer"
        )
    report.answer += "."
    stuck = report.summary["walks that never moved"]
    if stuck:
        report.notes.append(
            f"{100 * stuck:.0f}% of the walks never moved: their first step already loses more than {drop:g}. A "
            "smaller step_size, or backtrack, lets them start."
        )


def list_walks(
    report: Report,
    labels: Tensor,
    target_labels: Tensor | None,
    names: Sequence[str] | None,
    ids: Sequence[str] | None,
    k: int,
) -> None:
    """One row per walk."""
    a = report.arrays

    def name(label: int) -> str:
        return names[label] if names is not None and 0 <= label < len(names) else str(label)

    to = None if target_labels is None else target_labels.reshape(len(labels), k)
    for row, i in enumerate(a["kept"].tolist()):
        for j in range(k):
            if len(report.rows) == LISTED:
                report.notes.append(f"The table lists the first {LISTED} of {a['confidence'].size} walks.")
                return
            entry: dict[str, Any] = {
                "source": ids[i] if ids is not None else str(i),
                "class": name(int(labels[i])),
                "target": name(int(to[i, j])) if to is not None else str(j),
                "p, source": float(a["clean"][row]),
                "p, end": float(a["confidence"][row, j]),
                "RMSE, before": float(a["start"][row, j]),
                "RMSE, after": float(a["distances"][row, j, 0]),
                "SSIM": float(a["distances"][row, j, 2]),
                "accepted": float(a["accepted"][row, j]),
                "lowest on the line": float(a["line"][row, j].min()),
            }
            report.rows.append(entry)
