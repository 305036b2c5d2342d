"""MILAN's parity records (evandez/neuron-descriptions): exemplars, pyramid encoder, decoder with language model.

Three kinds of record, told by their configuration: `network` (a text), `backbone`, or `vocabulary`.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lynceus.backbones import create_model
from lynceus.backbones.resnet import VARIANTS
from lynceus.core.errors import AdviceError
from lynceus.core.rules import Rule
from lynceus.core.subject import Subject
from lynceus.core.types import Sample
from lynceus.explain.describe.captioner import Captioner, CaptionerConfig
from lynceus.explain.describe.exemplars import exemplars
from lynceus.explain.describe.pyramid import PyramidEncoder

SOURCES: dict[str, tuple[Rule, ...]] = {
    "authors": (
        Rule(pattern=r"^init_h\.0\.", name="init_hidden."),
        Rule(pattern=r"^init_c\.0\.", name="init_cell."),
        Rule(pattern=r"^feature_gate\.0\.", name="gate."),
        Rule(pattern=r"^attend\.query_to_hidden\.", name="attend.query."),
        Rule(pattern=r"^attend\.key_to_hidden\.", name="attend.key."),
        Rule(pattern=r"^attend\.output\.0\.", name="attend.score."),
        Rule(pattern=r"^(lm\.)?output\.\d+\.", name=r"\1output."),
    ),
    "authors, encoder": (Rule(pattern=r"^(encoder\.model\.)?", name="network."),),
}
ORDINALS = ("first", "second", "third", "fourth", "fifth")
SIMPLE: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "gelu": nn.GELU,
    "identity": nn.Identity,
}


def build(config: Mapping[str, Any], record: Mapping[str, Any]) -> nn.Module:
    """A small network from its text, a PyramidEncoder, or a Captioner."""
    state = record["state"]
    if "network" in config:
        return network(str(config["network"]), int(config.get("channels", 0)), state)
    if "backbone" in config:
        encoder: nn.Module = PyramidEncoder(_backbone(str(config["backbone"])), tuple(config["layers"]))
        return encoder
    model: nn.Module = Captioner(
        CaptionerConfig(
            vocabulary=int(config["vocabulary"]),
            feature_size=int(config["feature_size"]),
            embedding=int(config["embedding"]),
            hidden=int(config["hidden"]),
            attention=int(state["attend.query_to_hidden.weight"][0]),
            lm_layers=int(config.get("lm_layers", 2)),
            length=int(config["length"]),
            weight=float(config.get("lambda_", config.get("lambda", 0.2))),
        )
    )
    return model


def network(text: str, channels: int, state: Mapping[str, Any]) -> nn.Sequential:
    """The network of "conv1 3->8 k3 s2 p1, relu, conv2 8->c k3 s2 p1; ...": layers in order, under their names."""
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for item in text.split(";")[0].split(","):
        name, *words = item.split()
        numbers = {w[0]: int(w[1:]) for w in words if re.fullmatch(r"[kspdg]\d+", w)}
        kernel, padding = numbers.get("k", 1), numbers.get("p", 0)
        kind = name.rstrip("0123456789_").lower()
        if f"{name}.weight" in state and len(state[f"{name}.weight"]) == 4:
            outside, inside, height, width = state[f"{name}.weight"]
            layers[name] = nn.Conv2d(
                inside * numbers.get("g", 1),
                outside,
                (height, width),
                stride=numbers.get("s", 1),
                padding=padding,
                dilation=numbers.get("d", 1),
                groups=numbers.get("g", 1),
                bias=f"{name}.bias" in state,
            )
        elif f"{name}.running_var" in state:
            layers[name] = nn.BatchNorm2d(int(state[f"{name}.running_var"][0]))
        elif kind in SIMPLE:
            layers[name if name not in layers else f"{name}_{len(layers)}"] = SIMPLE[kind]()
        elif "pool" in kind:
            pool: type[Any] = nn.AvgPool2d if "av" in kind else nn.MaxPool2d
            layers[name if name not in layers else f"{name}_{len(layers)}"] = pool(
                kernel, numbers.get("s", kernel), padding
            )
        else:
            raise AdviceError(
                f"The record's network has a part {item.strip()!r} that is unknown here; known are convolutions, batch "
                f"norm, pooling and {', '.join(SIMPLE)}."
            )
    return nn.Sequential(layers)


def _backbone(text: str) -> nn.Module:
    name = text.split()[-1]
    if name in VARIANTS:
        return create_model(name)
    import torchvision.models

    try:
        return torchvision.models.get_model(name, weights=None)
    except ValueError:
        raise AdviceError(f"The record's backbone {text!r} is neither ours nor torchvision's.") from None


def compare(model: nn.Module, inputs: Mapping[str, Tensor], record: Mapping[str, Any]) -> dict[str, Tensor]:
    """The recorded outputs, by their names."""
    config = record["config"]
    if "network" in config:
        return _exemplars(model, inputs, config)
    if "backbone" in config:
        return _pyramid(model, inputs, record)
    return _decoder(model, inputs, config)


def _blocks(cells: Tensor, size: int) -> Tensor:
    times = (size // cells.shape[-2], size // cells.shape[-1])
    return cells.repeat_interleave(times[0], -2).repeat_interleave(times[1], -1)


class _Pixels(nn.Module):
    """The recorded layer and what comes before it, as a model that owns its pixels: one number per channel."""

    owns_pixels = True

    def __init__(self, layers: nn.Module):
        super().__init__()
        self.layers = layers

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x).flatten(2).mean(-1)


def _exemplars(model: nn.Module, inputs: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    size = int(config["size"])
    pictures = _blocks(inputs["images"].sigmoid(), size)
    named = re.search(r"recorded layer is (\w+)", str(config["network"]))
    names = [n for n, _ in model.named_children()]
    layer = named.group(1) if named and named.group(1) in names else names[-1]
    found = exemplars(
        Subject(_Pixels(model)),
        f"layers.{layer}",
        [Sample(image=x) for x in pictures],
        k=int(config["k"]),
        quantile=float(config["quantile"]),
        size=int(config["output_size"]),
        exact=10**9,  # the records keep every sample
    )
    masks = found.masks.double()
    return {
        "levels": found.levels,
        "top_activations": found.activations,
        "top_ids": found.ids,
        "masks": masks,
        "mask_area": masks.mean((-3, -2, -1)),
    }


def _pyramid(model: Any, inputs: Mapping[str, Tensor], record: Mapping[str, Any]) -> dict[str, Tensor]:
    text = str(record["config"].get("mask", ""))
    images = inputs["images"].sigmoid()
    level = re.search(r">\s*(-?[\d.]+)", text)
    masks = (inputs["masks"] > float(level.group(1)) if level else inputs["masks"] > 0).double()
    empty = re.search(rf"the ({'|'.join((*ORDINALS, 'last'))}) sample's mask is all zero", text)
    if empty:
        masks[-1 if empty.group(1) == "last" else ORDINALS.index(empty.group(1))] = 0
    masks = _blocks(masks, images.shape[-1])
    out: dict[str, Tensor] = {}
    for kind, given in (("masked", masks), ("unmasked", None)):
        levels = model.levels(images, given)
        out[kind] = torch.cat([levels[name] for name in model.layers], 1)
        out |= {f"{kind}_{name}": value for name, value in levels.items()}
    return out


def _decoder(model: Any, inputs: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    features = inputs["features"]
    tokens = torch.tensor(config["tokens"])
    plain = model(features, tokens)
    out = {
        "log_likelihood": plain.scores,
        "attention": plain.attention,
        "sequence_log_likelihood": plain.total,
        "greedy_tokens_likelihood": model.greedy(features, weight=0.0).tokens,
    }
    if model.lm is not None:
        out |= {
            "lm_sequence_log_probability": model.lm.log_probability(tokens),
            "mutual_information": model.steps(features, tokens).scores,
            "sequence_mutual_information": model.objective(features, tokens),
            "greedy_tokens_mi": model.greedy(features).tokens,
        }
    return out
