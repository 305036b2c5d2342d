"""Swin's parity records: microsoft/Swin-Transformer (attention and MLP) and the authors' dense backbone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lynceus.backbones.keys.swin import SOURCES as SOURCES
from lynceus.backbones.swin import Swin, SwinConfig, WindowPyramid
from lynceus.core.errors import unknown
from lynceus.core.shapes import to_tokens

# the authors' constructor names -> ours
NAMES = {
    "img_size": "image_size",
    "pretrain_img_size": "image_size",
    "patch_size": "patch_size",
    "in_chans": "in_chans",
    "num_classes": "num_classes",
    "embed_dim": "embed_dim",
    "depths": "depths",
    "num_heads": "num_heads",
    "window_size": "window_size",
    "mlp_ratio": "mlp_ratio",
    "qkv_bias": "qkv_bias",
    "qk_scale": "qk_scale",
    "drop_rate": "proj_drop",
    "attn_drop_rate": "attn_drop",
    "drop_path_rate": "drop_path_rate",
    "ape": "ape",
    "patch_norm": "patch_norm",
    "out_indices": "out_indices",
    "frozen_stages": "frozen_stages",
}
_UNUSED = {"use_checkpoint", "fused_window_process", "norm_layer"}  # how it is computed, not what
_DENSE = {"pretrain_img_size", "out_indices", "frozen_stages"}


def build(config: Mapping[str, Any], record: Mapping[str, Any] | None = None) -> nn.Module:
    """The model of a record, from the authors' constructor names.

    Swin-MLP: told by `spatial_mlp` in the state, or the model's name.
    """
    fields = fields_of(config, record, NAMES, "Swin")
    state = (record or {}).get("state", {})
    if any(".spatial_mlp." in name for name in state) or "mlp" in str((record or {}).get("model", "")):
        fields["mixer"] = "mlp"
    return Swin(SwinConfig(**fields))


def fields_of(
    config: Mapping[str, Any], record: Mapping[str, Any] | None, names: Mapping[str, str], family: str
) -> dict[str, Any]:
    """Our configuration's fields, from the authors' constructor names.

    Dense: told by its own options or, if the record is at hand, by `norm<i>` in its state; else by the absence of both
    `num_classes` and `img_size`.
    """
    fields: dict[str, Any] = {}
    for name, value in config.items():
        if name in _UNUSED:
            continue
        if name not in names:
            raise unknown(f"{family} constructor argument", name, {*names, *_UNUSED})
        fields[names[name]] = tuple(value) if isinstance(value, (list, tuple)) else value
    size = fields.get("image_size", 224)
    fields["image_size"] = (size, size) if isinstance(size, int) else size
    if isinstance(fields.get("patch_size"), tuple):
        fields["patch_size"] = fields["patch_size"][0]
    fields["pos_drop"] = fields.get("proj_drop", 0.0)
    state = (record or {}).get("state", {})
    dense = bool(_DENSE & set(config))
    fields["dense"] = dense or (
        any(name.startswith(tuple(f"norm{i}." for i in range(9))) for name in state)
        if state
        else not {"num_classes", "img_size"} & set(config)
    )
    return fields


def compare(model: nn.Module, inputs: Mapping[str, Tensor], record: Mapping[str, Any]) -> dict[str, Tensor]:
    """stage1.. (tokens before any norm; dense: normed maps), features (pooled), logits."""
    assert isinstance(model, Swin)
    return outputs_of(model, inputs, record)


def outputs_of(model: WindowPyramid, inputs: Mapping[str, Tensor], record: Mapping[str, Any]) -> dict[str, Tensor]:
    """The recorded outputs of a Swin or Swin V2."""
    with torch.no_grad():
        maps = model.forward_stages(inputs["image"])
        dense = model.config.dense
        out = {f"stage{i + 1}": m if dense else to_tokens(m) for i, m in zip(model.config.levels, maps)}
        if not dense:
            out["features"] = out["pooled"] = model.forward_head(maps[-1], pre_logits=True)
            out["logits"] = model.forward_head(maps[-1])
    return {name: out[name] for name in record["outputs"] if name in out}
