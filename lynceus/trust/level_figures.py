"""Pictures of walks on level sets: the images, the curves along the way, the triangles between blind spots."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lynceus.core import plots
from lynceus.core.report import Report

SHOWN = 8  # sources in the grid, and triangles
LOW, HIGH = (209, 96, 61), (59, 118, 181)  # colours of confidence 0 and 1


def draw(
    report: Report,
    sources: Tensor,
    targets: Tensor,
    labels: Tensor,
    names: Sequence[str] | None,
    drop: float,
    tube: Sequence[float],
) -> None:
    """Adds the figures to a report that holds the arrays of `traverse`."""
    a = report.arrays
    kept = a["kept"].tolist()

    def name(label: int) -> str:
        return names[label] if names is not None and 0 <= label < len(names) else str(label)

    pictures: list[Tensor] = []
    captions: list[str] = []
    for row, i in enumerate(kept[:SHOWN]):
        blind = torch.from_numpy(a["images"][row, 0])
        change = blind - targets[i, 0]
        label = name(int(labels[i]))
        pictures += [sources[i], targets[i, 0], blind, 0.5 + change]
        captions += [
            f"{label}: {a['clean'][row]:.3f}",
            "target",
            f"still {label}: {a['confidence'][row, 0]:.3f}",
            "less the target",
        ]
        if "contrast" in a:
            flipped = np.isfinite(a["contrast rmse"][row])
            pictures.append(torch.from_numpy(a["contrast"][row]))
            captions.append(f"now {name(int(a['contrast answer'][row]))}" if flipped else "no flip found")
    report.figures["blind spots.png"] = plots.image_grid(pictures, captions, columns=5 if "contrast" in a else 4)
    steps, path = a["steps"], a["path"].reshape(-1, len(a["steps"]), 2)
    for column, title in ((0, "confidence"), (1, "distance")):
        low, middle, high = np.quantile(path[..., column], (0.05, 0.5, 0.95), axis=0)
        text = "confidence in the source's class" if column == 0 else "RMSE to the target"
        report.figures[f"{title} along the walk.plotly"] = plots.lines(
            {"median": (steps, middle)}, bands={"median": (low, high)}, x_title="step", y_title=text
        )
    if "widths" in a:
        w = np.median(a["widths"].reshape(-1, *a["widths"].shape[2:]), axis=0)  # (t, distances, 2)
        report.figures["width of the tube.plotly"] = plots.lines(
            {f"at {d:g}": (steps, w[:, j, 1]) for j, d in enumerate(tube)},
            bands={f"at {d:g}": (w[:, j, 0], w[:, j, 1]) for j, d in enumerate(tube)},
            x_title="step",
            y_title="confidence, 5% to 95% of the directions",
        )
    if "triangle" not in a:
        return
    points = a["lattice"]
    side = round(1 / float(points[points > 0].min()))
    mean = np.full((side + 1, side + 1), np.nan)
    mean[np.round(points[:, 1] * side).astype(int), np.round(points[:, 0] * side).astype(int)] = a["triangle"].mean(
        (0, 1)
    )
    ticks = [f"{i / side:g}" for i in range(side + 1)]
    report.figures["mean confidence on the triangles.plotly"] = plots.heatmap(
        mean, x_names=ticks, y_names=ticks, x_title="first blind spot", y_title="second blind spot", low=0.0, high=1.0
    )
    triangles = [
        _triangle(a["triangle"][row, 0], points, [sources[i], *(torch.from_numpy(a["images"][row, j]) for j in (0, 1))])
        for row, i in enumerate(kept[:SHOWN])
    ]
    report.figures["triangles.png"] = _beside(triangles)


def _triangle(values: np.ndarray, points: np.ndarray, corners: list[Tensor], *, side: int = 150) -> Any:
    """One triangle: confidence as colour (blue 1, red 0) from source (top) to two blind spots, with their pictures."""
    from PIL import Image

    thumb = 48
    height = round(side * 0.866)
    y, x = np.mgrid[0:height, 0:side].astype(float)
    away = y / (height - 1)  # t1 + t2
    across = (x / (side - 1) - 0.5 * (1 - away)) / np.maximum(away, 1e-9)  # t2 / (t1 + t2)
    inside = (across >= 0) & (across <= 1)
    t2 = np.clip(across, 0, 1) * away
    t1 = away - t2
    nearest = ((points[None, :, 0] - t1.reshape(-1, 1)) ** 2 + (points[None, :, 1] - t2.reshape(-1, 1)) ** 2).argmin(1)
    p = np.clip(values[nearest].reshape(height, side), 0, 1)[..., None]
    colour = np.round((1 - p) * np.array(LOW) + p * np.array(HIGH)).astype(np.uint8)
    rgba = np.concatenate([colour, np.where(inside, 255, 0)[..., None].astype(np.uint8)], -1)
    sheet = Image.new("RGBA", (side + thumb, height + 2 * thumb), (0, 0, 0, 0))
    sheet.paste(Image.fromarray(rgba), (thumb // 2, thumb))
    for image, place in zip(corners, ((side // 2, 0), (0, height + thumb), (side, height + thumb))):
        picture = plots.to_picture(image).resize((thumb, thumb), Image.Resampling.NEAREST)
        sheet.paste(picture, place)
    return sheet


def _beside(pictures: list[Any], *, columns: int = 4, gap: int = 14) -> bytes:
    from PIL import Image

    columns = min(columns, len(pictures))
    wide, high = pictures[0].size
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGBA", (columns * (wide + gap) - gap, rows * (high + gap) - gap), (0, 0, 0, 0))
    for i, picture in enumerate(pictures):
        sheet.paste(picture, ((i % columns) * (wide + gap), (i // columns) * (high + gap)))
    out = io.BytesIO()
    sheet.save(out, "PNG", optimize=True)
    return out.getvalue()
