"""Parity records of level set traversal (SriramB-98/blindspots-neurips-sub): walks, distances, confidences, triangles.

The records' small network is given in words; its layers, sizes and scale are read from the record, so that records of
other sizes, class counts and step sizes are rebuilt too.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lynceus.core.errors import AdviceError
from lynceus.trust import level_shape as shape
from lynceus.trust import walks

ACTIVATIONS: dict[str, Any] = {
    "relu": F.relu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "gelu": F.gelu,
    "elu": F.elu,
}
SOURCES: dict[str, tuple[Any, ...]] = {"authors": ()}

_CONV = re.compile(r"(?:(?P<input>\d+)\s*->\s*)?(?P<out>\d+)\s+k(?P<k>\d+)(?:\s+s(?P<s>\d+))?(?:\s+p(?P<p>\d+))?$")
_NORMALISE = re.compile(r"\(\s*x\s*-\s*([\d.]+)\s*\)\s*/\s*([\d.]+)")


class Described(nn.Module):
    """A network from its description: convolutions, linear layers, relu and flatten, in order."""

    def __init__(self, config: Mapping[str, Any], state: Mapping[str, Any]):
        super().__init__()
        self.order: list[str] = []
        self.scale = float(config.get("logit_scale", 1.0))
        self.mean, self.std = _normalise(config.get("normalise"))
        for part in (p.strip() for p in str(config["network"]).split(",")):
            word, _, rest = part.partition(" ")
            if word == "flatten" or word in ACTIVATIONS:
                self.order.append(word)
                continue
            if f"{word}.weight" not in state:
                if part.startswith("logits"):
                    continue
                raise AdviceError(f"The record's network says {part!r}, which is no layer of its state.")
            shape = list(state[f"{word}.weight"])
            self.add_module(word, _layer(word, rest, shape, f"{word}.bias" in state))
            self.order.append(word)

    def forward(self, x: Tensor) -> Tensor:
        x = (x - self.mean) / self.std
        for word in self.order:
            if word in ACTIVATIONS:
                x = ACTIVATIONS[word](x)
            else:
                x = x.flatten(1) if word == "flatten" else self.get_submodule(word)(x)
        return x * self.scale


def _layer(word: str, rest: str, shape: list[int], bias: bool) -> nn.Module:
    if len(shape) == 2:
        return nn.Linear(shape[1], shape[0], bias=bias)
    told = _CONV.match(rest.strip())
    if told is None:
        raise AdviceError(f"The record's layer {word!r} is described as {rest!r}, not as 'IN->OUT kK sS pP'.")
    groups = (int(told["input"]) // shape[1]) if told["input"] else 1
    return nn.Conv2d(
        shape[1] * groups,
        shape[0],
        (shape[2], shape[3]),
        stride=int(told["s"] or 1),
        padding=int(told["p"] or 0),
        groups=groups,
        bias=bias,
    )


def _normalise(text: Any) -> tuple[float, float]:
    if text is None or str(text).strip().lower() in ("", "none", "x"):
        return 0.0, 1.0
    told = _NORMALISE.search(str(text))
    if told is None:
        raise AdviceError(f"The record normalises by {text!r}; known is '(x-MEAN)/STD'.")
    return float(told[1]), float(told[2])


def build(config: Mapping[str, Any], record: Mapping[str, Any]) -> nn.Module:
    """The described network."""
    return Described(config, record["state"])


def compare(model: nn.Module, inputs: Mapping[str, Tensor], record: Mapping[str, Any]) -> dict[str, Tensor]:
    """Images, distances and confidences after the recorded iterations, and the triangle's columns."""
    config = record["config"]
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    size = int(config["size"])
    sources, targets = (_blocks(inputs[name], size) for name in ("source", "target"))
    labels = model(sources).argmax(1)
    recorded = [int(k) for k in config["recorded_iterations"]]

    def go(to: Tensor, record_at: list[int]) -> Any:
        return walks.walk(
            model,
            sources,
            to,
            labels,
            step_size=float(config["step_size"]),
            steps=max(recorded),
            drop=float(config["confidence_drop"]),
            adversarial=bool(config["adversarial"]),
            adversarial_step=float(config.get("adversarial_step", 0.0)),
            jitter=float(config.get("start_jitter", 0.0)),
            record=record_at,
        )

    first = go(targets, recorded)
    out: dict[str, Tensor] = {}
    for trace in first.traces:
        way = (targets - trace.image).flatten(1)
        out[f"image_after_{trace.step}"] = trace.image
        out[f"l2_linf_to_target_after_{trace.step}"] = torch.stack([way.norm(dim=1), way.abs().amax(1)], 1)
    out["confidence"] = torch.stack([first.clean, *(t.confidence for t in first.traces)])
    if "triangle" in record["outputs"]:
        steps = int(config.get("triangle_steps", 10))
        second = go(targets.roll(1, 0), [])
        out["triangle"] = _columns(
            shape.triangle(model, sources, first.image, second.image, labels, kind="reference", steps=steps),
            config["triangle_columns"],
        )
    return out


def _blocks(z: Tensor, size: int) -> Tensor:
    """sigmoid(2 z), every cell repeated to a block of pixels."""
    x = torch.sigmoid(2 * z)
    return x.repeat_interleave(size // z.shape[-2], -2).repeat_interleave(size // z.shape[-1], -1)


def _columns(found: Any, names: list[str]) -> Tensor:
    columns = {
        "source_p": found.source,
        "triangle_mean": found.mean,
        "edge_min_minus_source": found.edge_drop,
        "edge_mean": found.edge_mean,
    }
    for name in names:
        if name.startswith("frac_"):
            columns[name] = found.fraction(float(name.removeprefix("frac_")))
    return torch.stack([columns[name] for name in names], 1)
