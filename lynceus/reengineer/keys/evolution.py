"""Parity of the genetic operators behind fooling images: Evolving-AI-Lab/fooling (sferes), in single precision."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from lynceus.core.errors import AdviceError
from lynceus.reengineer import parity
from lynceus.trust import evolution as operators

TOLERANCE = 1e-5  # the authors' operators were run in float32


def check(record: Mapping[str, Any]) -> list[parity.Row]:
    """Crossover of the two parents of each row at draws[:, 0], mutation of the first at draws[:, 1]."""
    config = record["config"]
    low, high = (float(v) for v in config.get("range", (0, 1)))
    transform = str(config.get("transform", ""))
    if transform and "sigmoid(" not in transform:
        raise AdviceError(f"The inputs of this record are made by {transform!r}; known is 'sigmoid(FACTOR*z)'.")
    factor = float(transform.split("sigmoid(")[1].split("*")[0]) if transform else None
    inputs = {name: parity.make_input(spec) for name, spec in record["inputs"].items()}
    if factor is not None:
        inputs = {name: torch.sigmoid(factor * value) for name, value in inputs.items()}
    parents, draws = inputs["parents"], inputs["draws"]
    bounds = {"low": low, "high": high}
    children = operators.simulated_binary(
        parents[:, 0], parents[:, 1], draws[:, 0], eta=float(config.get("eta_c", 10)), **bounds
    )
    ours = {
        "child_low": children[0],
        "child_high": children[1],
        "mutated_first_parent": operators.polynomial_mutation(
            parents[:, 0], draws[:, 1], eta=float(config.get("eta_m", 15)), **bounds
        ),
    }
    name = str(record.get("model") or record["family"])
    why = (TOLERANCE, "measured in single precision")
    return parity.compare_outputs(name, ours, record["outputs"], tolerances=dict.fromkeys(record["outputs"], why))
