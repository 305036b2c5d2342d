"""Records of losses: no network, only inputs by rule, options, values and gradients.

A loss is one line in `LOSSES`: how its records' names begin, and a function (inputs by name, options) -> outputs by
name, written in differentiable torch. Gradients of the record's "loss" (or of its only output) are compared too, by the
names of the inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lynceus.core.errors import AdviceError
from lynceus.reengineer.filling import image
from lynceus.reengineer.parity import Row, compare_outputs

Loss = Callable[[Mapping[str, Tensor], Mapping[str, Any]], dict[str, Tensor]]


def augmix_jsd(inputs: Mapping[str, Tensor], options: Mapping[str, Any]) -> dict[str, Tensor]:
    """AugMix' consistency of logits clean, aug1, aug2, with its weight."""
    from lynceus.recipes.augmix import WEIGHT, consistency

    apart = consistency(inputs["clean"], inputs["aug1"], inputs["aug2"])
    return {"loss": float(options.get("weight", WEIGHT)) * apart}


LOSSES: dict[str, Loss] = {  # beginning of the record's name -> the loss
    "augmix_jsd": augmix_jsd,
}


def check(record: Mapping[str, Any]) -> list[Row]:
    """Every output and gradient of a loss record. AdviceError when the record is of a loss that is not here."""
    name = str(record.get("name", ""))
    found = [begin for begin in LOSSES if name.startswith(begin)]
    if not found:
        raise AdviceError(f"The record {name!r} is of a loss that is not checked yet; these are: {', '.join(LOSSES)}.")
    inputs = {key: made(spec) for key, spec in record["inputs"].items()}
    wanted = record.get("gradients", {})
    for key in wanted:
        if key in inputs:
            inputs[key].requires_grad_(True)
    outputs = LOSSES[max(found, key=len)](inputs, record.get("options", {}))
    rows = compare_outputs(name, outputs, record["outputs"])
    if wanted:
        outputs["loss" if "loss" in outputs else next(iter(outputs))].backward()
        ours = {f"gradient of {key}": inputs[key].grad for key in wanted if key in inputs}
        rows += compare_outputs(name, ours, {f"gradient of {key}": value for key, value in wanted.items()})
    return rows


def made(spec: Mapping[str, Any]) -> Tensor:
    """An input by the records' rule: standard normal of `shape` from `seed`, then what "as" says."""
    x = image(spec["shape"], int(spec.get("seed", 0)))
    kind = spec.get("as", "normal")
    if kind == "normal":
        x = x * spec.get("scale", 1.0) + spec.get("shift", 0.0)
    elif kind == "normalized":
        x = x / np.linalg.norm(x, axis=-1, keepdims=True)
    elif kind == "softmax":
        raised = np.exp(x - x.max(-1, keepdims=True))
        x = raised / raised.sum(-1, keepdims=True)
    elif kind == "sigmoid":
        x = 1 / (1 + np.exp(-x))
    elif kind == "labels":
        x = x.argmax(-1)
    elif kind == "onehot":
        x = np.eye(x.shape[-1])[x.argmax(-1)]
    elif kind == "mask":
        x = x > spec.get("threshold", 0.0)
    else:
        raise AdviceError(f"A record's input is of the unknown kind {kind!r}: {dict(spec)}.")
    return torch.from_numpy(np.ascontiguousarray(x))
