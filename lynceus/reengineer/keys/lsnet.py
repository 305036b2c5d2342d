"""LSNet's parity records: the authors' classification and dense networks, single blocks, and the operator alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lynceus.backbones.keys.lsnet import SOURCES as SOURCES
from lynceus.backbones.lsnet import Block, LSNet, LSNetConfig
from lynceus.core.errors import unknown
from lynceus.layers.large_small import LargeSmall, aggregate

_NAMES = {
    "in_chans": "in_chans",
    "num_classes": "num_classes",
    "embed_dim": "embed_dim",
    "depth": "depth",
    "key_dim": "key_dim",
    "num_heads": "num_heads",
    "large_kernel": "large_kernel",
    "small_kernel": "small_kernel",
    "groups": "groups",
    "distillation": "distilled",
    "attention_table_resolution": "table_grid",
}
_UNUSED = {"pretrained", "frozen_stages", "patch_size", "img_size"}  # the last two are read together


def build(config: Mapping[str, Any], record: Mapping[str, Any] | None = None) -> nn.Module:
    """The model of a record: a network, one block (`stage` and `depth` are its place), or the operator alone (`dim`).

    Dense: told by `attention_table_resolution` or, in the record, by the absence of a classifier.
    """
    if "dim" in config or "stage" in config:
        return _part(config, record)
    fields: dict[str, Any] = {}
    for name, value in config.items():
        if name in _NAMES:
            fields[_NAMES[name]] = tuple(value) if isinstance(value, (list, tuple)) else value
        elif name not in _UNUSED:
            raise unknown("LSNet constructor argument", name, {*_NAMES, *_UNUSED})
    # the authors' grid of the table is img_size // patch_size, whatever the stem does
    side = config.get("img_size", 224) // config.get("patch_size", 8) * 8
    fields["image_size"] = (side, side)
    state = (record or {}).get("state") or {}
    headless = bool(state) and not any(name.startswith("head.") for name in state)
    fields["dense"] = "table_grid" in fields or (headless and config.get("num_classes", 1000) != 0)
    return LSNet(LSNetConfig(**fields))


def _part(config: Mapping[str, Any], record: Mapping[str, Any] | None) -> nn.Module:
    kernels = {k: config[k] for k in ("large_kernel", "small_kernel", "groups") if k in config}
    state = (record or {}).get("state") or {}
    dim = config["dim"]
    if "stage" not in config and not any(name.startswith("mixer.") for name in state):
        return LargeSmall(dim, **kernels)
    stage, heads, key_dim = config.get("stage", 0), config.get("num_heads", 4), config.get("key_dim", 16)
    width = dim if "attn_ratio" not in config else int(config["attn_ratio"] * key_dim) * heads
    if width != dim:
        raise unknown("attn_ratio", str(config["attn_ratio"]), [f"{dim / (heads * key_dim):g}"])
    made = LSNetConfig(
        embed_dim=(dim,) * 4,
        num_heads=(heads,) * 4,
        key_dim=(key_dim,) * 4,
        table_grid=config.get("resolution", 14),
        **kernels,
    )
    return Block(made, stage, config.get("depth", 0), drop_path=0.0)


def compare(model: nn.Module, inputs: Mapping[str, Tensor], record: Mapping[str, Any]) -> dict[str, Tensor]:
    """Networks: stage1.. (dense: feature1..), features, logits. Blocks: mixer and se (with their residual), y.
    Operator: kernels (b, k, t, h, w), aggregated, y."""
    with torch.no_grad():
        if isinstance(model, LSNet):
            maps = model.forward_stages(inputs["image"])
            out = {f"{name}{i + 1}": m for i, m in enumerate(maps) for name in ("stage", "feature")}
            out["features"] = out["pooled"] = model.forward_head(maps[-1], pre_logits=True)
            return out | {"logits": model.forward_head(maps[-1])}
        x = inputs["x"].permute(0, 2, 3, 1)
        if isinstance(model, Block):
            mixed = model.mix(x)
            out = {"mixer": mixed, "se": model.se(mixed), "y": model(x)}
            return {name: value.permute(0, 3, 1, 2) for name, value in out.items()}
        assert isinstance(model, LargeSmall)
        kernels = model.lkp(x)
        out = {"aggregated": aggregate(x, kernels), "y": model(x, residual=x)}
        made = {name: value.permute(0, 3, 1, 2) for name, value in out.items()}
        return made | {"kernels": kernels.permute(0, 4, 3, 1, 2)}
