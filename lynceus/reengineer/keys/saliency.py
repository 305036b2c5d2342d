"""Records of the family feature_guided: the saliency of given keypoints, and whose each pixel is.

Reference code: VeriDeep/DLV-experimental-package. A record's config holds height, width and keypoints as dicts of row,
col, size and response. Owners are counted from 1, -1 where every density underflows to zero.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from lynceus.core.errors import AdviceError
from lynceus.reengineer.filling import fingerprint
from lynceus.reengineer.parity import Row, compare_outputs
from lynceus.trust import keypoints as points

NAMES = ("row", "col", "size", "response")
EQUAL = (0.0, "equal")
CLOSE = 1e-12  # of 1, the sum of a saliency


def check(record: Mapping[str, Any]) -> list[Row]:
    """saliency (h, w), owner (h, w), pixels_per_feature (keypoints + 1: the last counts pixels of nobody)."""
    config = record["config"]
    try:
        size = (int(config["height"]), int(config["width"]))
        rows = np.array([[float(k[name]) for name in NAMES] for k in config["keypoints"]], dtype=np.float64)
    except (KeyError, TypeError, ValueError) as error:
        raise AdviceError(
            f"A feature_guided record gives height, width and keypoints of {', '.join(NAMES)}; "
            f"this one does not ({error!r})."
        ) from None
    form = config.get("form", "code")
    owner = points.owners(rows, size, form=form, underflow=True)
    ours = {
        "saliency": points.saliency(rows, size, form=form),
        "owner": np.where(owner < 0, -1, owner + 1).astype(float),
        "pixels_per_feature": np.array(
            [*np.bincount(owner[owner >= 0], minlength=len(rows)), (owner < 0).sum()], dtype=float
        ),
    }
    name = str(record.get("model") or record["family"])
    tolerances = dict.fromkeys(record["outputs"], EQUAL)
    rows_of = compare_outputs(name, ours, record["outputs"], tolerances=tolerances)
    return [
        _absolute(row, ours["saliency"], record["outputs"]["saliency"]) if row.output == "saliency" else row
        for row in rows_of
    ]


def _absolute(row: Row, ours: np.ndarray, want: Mapping[str, Any]) -> Row:
    """The difference itself, less what the record's 9 digits cannot hold (mean and deviation are written in full)."""
    got = fingerprint(ours, len(want["values"]), exact=True)
    if got["shape"] != list(want["shape"]):
        return row
    theirs = np.array(want["values"])
    half = 0.5 * 10.0 ** (np.floor(np.log10(np.where(theirs > 0, theirs, 1e-300))) - 8)
    values = np.maximum(np.abs(np.array(got["values"]) - theirs) - half, 0).max(initial=0.0)
    gap = max(float(values), abs(got["mean"] - want["mean"]), abs(got["std"] - want["std"]))
    note = "absolute, beyond the record's 9 digits"
    return Row(record=row.record, output=row.output, gap=gap, tolerance=CLOSE, note=note)
