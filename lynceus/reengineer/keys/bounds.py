"""Parity of certified bounds with auto_LiRPA: sequential networks given as text, IBP, CROWN-IBP and CROWN."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lynceus.core.errors import AdviceError, unknown
from lynceus.trust import bounds
from lynceus.trust.bounds_graph import trace

SOURCES: dict[str, tuple[Any, ...]] = {"authors": ()}
METHODS: dict[str, bounds.Method] = {"IBP": "ibp", "CROWN-IBP": "crown-ibp", "CROWN": "crown"}
_PLAIN = {"relu": nn.ReLU, "flatten": nn.Flatten, "identity": nn.Identity}
_TOKEN = re.compile(r"([A-Za-z_]\w*)\s*(?:\(([^()]*)\))?")
_LETTERS = {"k": "kernel_size", "s": "stride", "p": "padding", "d": "dilation", "g": "groups"}


def network(text: str) -> nn.Sequential:
    """The layers of "Conv(1,6,k3,p1) relu MaxPool(k2) flatten Linear(128,24) leaky(0.1) Linear(24,5)"."""
    layers = [_layer(name, inside) for name, inside in _TOKEN.findall(text)]
    if not layers:
        raise AdviceError(f"The record's network {text!r} names no layer, such as Linear(2,20) or relu.")
    return nn.Sequential(*layers)


def _layer(name: str, inside: str) -> nn.Module:
    numbers: list[float] = []
    named: dict[str, Any] = {}
    for part in filter(None, (p.strip() for p in inside.split(","))):
        found = re.fullmatch(r"(?:([a-z_]+)\s*=?\s*)?(-?[\d.]+(?:e-?\d+)?)", part, re.IGNORECASE)
        if not found:
            raise AdviceError(f"In the record's network, {name}({inside}) has {part!r}, which is no number.")
        key, value = found.group(1), float(found.group(2))
        if key:
            named[_LETTERS.get(key.lower(), key.lower())] = int(value) if value.is_integer() else value
        else:
            numbers.append(value)
    sizes = [int(n) for n in numbers]
    kind = name.lower().replace("_", "").removesuffix("2d")
    if kind in _PLAIN:
        return _PLAIN[kind]()
    if kind in ("linear", "fc", "dense"):
        return nn.Linear(sizes[0], sizes[1])
    if kind == "conv":
        positional = dict(zip(("kernel_size", "stride", "padding"), sizes[2:]))
        return nn.Conv2d(sizes[0], sizes[1], **{**positional, **named})
    if kind in ("leaky", "leakyrelu", "lrelu"):
        return nn.LeakyReLU(numbers[0] if numbers else next(iter(named.values()), 0.01))
    if kind in ("maxpool", "avgpool"):
        options = {**dict(zip(("kernel_size", "stride", "padding"), sizes)), **named}
        return (nn.MaxPool2d if kind == "maxpool" else nn.AvgPool2d)(**options)
    if kind in ("bn", "batchnorm"):
        return nn.BatchNorm2d(sizes[0])
    known = (*_PLAIN, "Linear", "Conv", "leaky", "MaxPool", "AvgPool", "BatchNorm")
    raise unknown("layer of a bounds record", name, known)


def build(config: Mapping[str, Any]) -> nn.Module:
    """The sequential network of a record's text."""
    return network(str(config["network"]))


def compare(model: nn.Module, inputs: Mapping[str, Tensor], record: Mapping[str, Any]) -> dict[str, Tensor]:
    """Logits, and for each method the bounds of every logit and of the margins of the predicted class."""
    config = record["config"]
    (x,) = inputs.values()
    norm = (
        math.inf
        if str(config.get("norm", "inf")) in ("inf", "Linf", "L_inf")
        else float(str(config["norm"]).strip("L"))
    )
    clip = config.get("clip")
    clip = None if clip is None or norm != math.inf else (float(clip[0]), float(clip[1]))
    region = bounds.Ball(x, config["eps"], norm=norm, clip=clip)
    logits = model(x)
    out = {"logits": logits}
    traced = trace(model, x.shape[1:])
    rows = bounds.margin_rows(logits.argmax(1), len(x), logits.shape[1])
    for name, method in METHODS.items():
        propagation = bounds.Propagation(traced, region, method=method, intersect=False, kernel_rows=True)
        low, high = propagation.logits(torch.eye(logits.shape[1], dtype=torch.float64))
        out |= {f"{name}_lower": low, f"{name}_upper": high, f"{name}_margin_lower": propagation.margins(rows)}
    return out
