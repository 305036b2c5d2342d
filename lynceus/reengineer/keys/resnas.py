"""ViT-Res's parity records: networks after a definition, and the super-network with its masks fixed."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lynceus.backbones.keys.resnas import SOURCES as SOURCES
from lynceus.backbones.resnas import ResNAS, ResNASConfig
from lynceus.backbones.resnas_definition import parse
from lynceus.backbones.resnas_supernet import Space, SuperNet, kept
from lynceus.core.errors import unknown

_NAMES = {
    "in_chans": "in_chans",
    "num_classes": "num_classes",
    "patch_size": "patch_size",
    "attn_drop_rate": "attn_drop",
    "drop_path_rate": "drop_path_rate",
    "distill_token": "distilled",
    "patch_output": "patch_output",
    "norm_eps": "norm_eps",
}
# read elsewhere here, or of training only
_OTHER = {"img_size", "network_def", "drop_rate", "norm_layer", "supernet", "num_channels_to_keep", "sub_network_def"}
_OTHER |= {"example_per_arch", "num_warmup_epochs", "single_arch", "hybrid_arch"}


def build(config: Mapping[str, Any], record: Mapping[str, Any] | None = None) -> nn.Module:
    """The model of a record; what its state tells (tokens, heads) wins over what its config leaves unsaid.

    The number of classes is that of the definition's last item, the image's size that of the position table.
    """
    fields: dict[str, Any] = {}
    for name, value in config.items():
        if name in _NAMES:
            fields[_NAMES[name]] = value
        elif name not in _OTHER:
            raise unknown("ViT-Res constructor argument", name, {*_NAMES, *_OTHER})
    items = config["network_def"]
    fields["definition"] = parse(items).text()
    fields["num_classes"] = (ast.literal_eval(items) if isinstance(items, str) else items)[-1][2]
    fields["position_drop"] = fields["proj_drop"] = config.get("drop_rate", 0.0)
    state = (record or {}).get("state") or {}
    fields["patch_size"] = patch = fields.get("patch_size", 14)
    side = config.get("img_size")
    if state:
        fields["distilled"] = state["tokens"][1] == 2
        fields["patch_output"] = "patch_head.weight" in state
        if side is None:
            side = round((state["pos_embed"][1] - state["tokens"][1]) ** 0.5) * patch
    else:
        fields.setdefault("distilled", True)  # the authors' default
    side = 224 if side is None else side
    fields["image_size"] = (side, side) if isinstance(side, int) else tuple(side)
    made = ResNASConfig(**fields)
    if config.get("num_channels_to_keep") is None:
        return ResNAS(made)
    return SuperNet(Space.of(parse(items), config["num_channels_to_keep"]), made)


def compare(model: nn.Module, inputs: Mapping[str, Tensor], record: Mapping[str, Any]) -> dict[str, Tensor]:
    """stage1..: all tokens at the end of each stage; features: normed class token; logits; patch_logits.

    The super-network: the logits with every mask fixed to `sub_network_def`, if the record has one. Distilled: `logits`
    is the class token's where the record has the other's too, else the mean of both.
    """
    assert isinstance(model, ResNAS)
    with torch.no_grad():
        if isinstance(model, SuperNet) and "sub_network_def" in record["config"]:
            image, chosen = inputs["image"], parse(record["config"]["sub_network_def"])
            return {"logits": model(image, kept(model.space, [chosen], image.shape[0]))}
        last, found = model.run(inputs["image"], range(len(model.stages)))
        tokens = model.norm(last)
        out = {f"stage{i + 1}": x for i, (x, _) in enumerate(found)}
        out |= {"tokens": tokens, "features": tokens[:, 0], "logits": model.forward_head(tokens)}
        if model.config.distilled:
            first, second = model.forward_both_heads(tokens)
            names = {"dst_logits", "dist_logits", "logits_dst", "logits_dist", "distill_logits", "logits_distill"}
            out |= dict.fromkeys(names, second) | dict.fromkeys(("cls_logits", "logits_cls"), first)
            if names & set(record["outputs"]):
                out["logits"] = first
        if model.config.patch_output:
            out["patch_logits"] = model.forward_patches(tokens)
        return out
