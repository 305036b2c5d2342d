"""ImageNet-E's parity records: boxes, rates, resized scenes and masks, complexity values (alibaba/easyrobust)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from lynceus.reengineer.filling import fingerprint, image, picks
from lynceus.reengineer.parity import Row
from lynceus.trust.edits.geometry import box_and_rate, largest_scene, rescale_scene
from lynceus.trust.edits.spectrum import complexity, lowpass

LEVELS, PIXELS, RATE, RELATIVE = 2.0, 1.0, 0.002, 1e-6
CUTOFFS = (0.05, 0.1, 0.25)  # cycles per pixel
DECLINED = (-1.0,) * 5


def rows(record: Mapping[str, Any]) -> list[Row]:
    """Images and masks within 2 grey levels, boxes within a pixel, rates within .002, complexity to 1e-6."""
    name = str(record.get("model", "imagenet_e"))
    config = record["config"]
    picture = scene(record)
    side = picture.shape[:2]
    mask = ellipse(
        side, config["ellipse_centre_xy"], config["ellipse_axes"], float(config.get("ellipse_angle_degrees", 0))
    )
    ours: dict[str, np.ndarray] = {}
    table = [(0.0, *_described(mask))]
    for scale in config["scales"]:
        made = rescale_scene(picture, mask, float(scale))
        table.append((float(scale), *(DECLINED if made is None else _described(made[1]))))
        if made is not None:
            ours[f"image_{scale}"], ours[f"mask_{scale}"] = made
    full = largest_scene(picture, mask)
    table.append((9.0, *(DECLINED if full is None else _described(full[1]))))
    ours["box_and_rate"] = np.array(table)
    cutoffs = config.get("cutoffs", CUTOFFS)
    planes = picture.transpose(2, 0, 1) / 255
    ours["complexity"] = np.array([complexity(planes), *(complexity(lowpass(planes, c)) for c in cutoffs)])
    out: list[Row] = []
    for output, want in record["outputs"].items():
        out += _compared(name, output, ours.get(output), want)
    return out


def scene(record: Mapping[str, Any]) -> np.ndarray:
    """(h, w, 3) uint8: each cell of the standard normal input as a block of grey level round(255 sigmoid(1.5 z))."""
    spec, size = record["inputs"]["image"], record["config"]["size"]
    z = image(spec["shape"], int(spec.get("seed", 0)))[0]
    height, width = (size, size) if isinstance(size, int) else size
    levels = np.round(255 / (1 + np.exp(-1.5 * z)))
    blocks = levels.repeat(height // z.shape[1], axis=1).repeat(width // z.shape[2], axis=2)
    return np.ascontiguousarray(blocks.transpose(1, 2, 0).astype(np.uint8))


def ellipse(
    size: tuple[int, ...], centre: tuple[float, float], axes: tuple[float, float], degrees: float
) -> np.ndarray:
    """(h, w) uint8, 255 where a pixel (whole coordinates) lies in the turned ellipse."""
    y, x = np.mgrid[: size[0], : size[1]].astype(np.float64)
    y, x, angle = y - centre[1], x - centre[0], math.radians(degrees)
    along = (x * math.cos(angle) + y * math.sin(angle)) / axes[0]
    across = (-x * math.sin(angle) + y * math.cos(angle)) / axes[1]
    return ((along**2 + across**2 <= 1) * 255).astype(np.uint8)


def _described(mask: np.ndarray) -> tuple[float, ...]:
    box, rate = box_and_rate(mask)
    return DECLINED if box is None else (*map(float, box), rate)


def _compared(name: str, output: str, have: np.ndarray | None, want: Mapping[str, Any]) -> list[Row]:
    if have is None:
        return [Row(record=name, output=output, gap=math.inf, tolerance=0.0, note="our edit declines")]
    got = fingerprint(have, len(want["values"]), exact=True)
    if list(got["shape"]) != list(want["shape"]):
        note = f"shape {got['shape']} instead of {want['shape']}"
        return [Row(record=name, output=output, gap=math.inf, tolerance=0.0, note=note)]
    a, b = np.array(got["values"]), np.array(want["values"])
    if output == "box_and_rate":
        rates = picks(have.size) % 6 == 5  # long tables are recorded in part
        box, rate = float(np.abs(a - b)[~rates].max(initial=0)), float(np.abs(a - b)[rates].max(initial=0))
        return [
            Row(record=name, output="boxes", gap=box, tolerance=PIXELS, note="in pixels"),
            Row(record=name, output="rates", gap=rate, tolerance=RATE, note="share of the image"),
        ]
    if output == "complexity":
        gap = float((np.abs(a - b) / np.maximum(np.abs(b), 1e-12)).max())
        return [Row(record=name, output=output, gap=gap, tolerance=RELATIVE, note="relative difference")]
    gap = max(float(np.abs(a - b).max()), abs(got["mean"] - want["mean"]), abs(got["std"] - want["std"]))
    return [Row(record=name, output=output, gap=gap, tolerance=LEVELS, note="in grey levels of 255")]
