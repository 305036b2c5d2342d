"""ConvNeXt's parity records: facebookresearch/ConvNeXt, its dense form and its isotropic form."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lynceus.backbones.convnext import ConvNeXt, ConvNeXtConfig
from lynceus.backbones.keys.convnext import SOURCES as SOURCES
from lynceus.core.errors import unknown

# the authors' constructor names -> ours
_NAMES = {
    "in_chans": "in_chans",
    "num_classes": "num_classes",
    "depths": "depths",
    "dims": "dims",
    "drop_path_rate": "drop_path_rate",
    "layer_scale_init_value": "layer_scale",
    "head_init_scale": "head_init_scale",
    "kernel_size": "kernel_size",
}
_ISOTROPIC = {"depth": "depths", "dim": "dims", "patch": "patch_size", "patch_size": "patch_size"}
_DENSE = {"out_indices"}


def build(config: Mapping[str, Any], record: Mapping[str, Any] | None = None) -> nn.Module:
    """The model of a record. Dense: `out_indices` is given, or the record (if at hand) holds `norm0` .. and no head.

    Without a record, a pyramid whose config names neither classes nor kernel nor layer scale is taken for dense.
    """
    fields: dict[str, Any] = {}
    isotropic = "dim" in config or "depth" in config
    for name, value in config.items():
        if name in _DENSE:
            continue
        if name in _ISOTROPIC and isotropic:
            fields[_ISOTROPIC[name]] = (value,) if name in ("depth", "dim") else value
        elif name in _NAMES:
            fields[_NAMES[name]] = tuple(value) if isinstance(value, list) else value
        else:
            raise unknown("ConvNeXt constructor argument", name, {**_NAMES, **_ISOTROPIC, "out_indices": ""})
    if isotropic:
        fields = {"patch_size": 16, "layer_scale": 0.0, **fields, "isotropic": True}
    elif record is not None and "state" in record:
        fields["dense"] = any(name.startswith("norm0.") for name in record["state"])
    else:
        fields["dense"] = "out_indices" in config or not {"num_classes", "kernel_size", "layer_scale_init_value"} & set(
            config
        )
    return ConvNeXt(ConvNeXtConfig(**fields))


def compare(model: nn.Module, inputs: Mapping[str, Tensor], record: Mapping[str, Any]) -> dict[str, Tensor]:
    """stage1.. (maps, un-normed), feature1.. (dense maps), tokens (isotropic map), pooled / features, logits."""
    assert isinstance(model, ConvNeXt)
    with torch.no_grad():
        maps = model.forward_stages(inputs["image"])
        out = {f"stage{i}": m for i, m in enumerate(maps, 1)}
        chosen = list(record.get("config", {}).get("out_indices", range(len(maps))))
        counted = {f"feature{i + 1}" for i in range(len(chosen))}
        if counted >= set(record["outputs"]):  # numbered as they come out, not by stage
            out |= {f"feature{i}": maps[k] for i, k in enumerate(chosen, 1)}
        else:
            out |= {f"feature{i}": m for i, m in enumerate(maps, 1)}
        out |= {"tokens": maps[-1]}
        if not model.config.dense:
            out["pooled"] = out["features"] = model.forward_head(maps[-1], pre_logits=True)
            out["logits"] = model.forward_head(maps[-1])
    return {name: out[name] for name in record["outputs"] if name in out}
