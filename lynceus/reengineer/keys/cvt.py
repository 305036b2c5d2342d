"""CvT's parity records: leoxiaobin/CvT."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lynceus.backbones.cvt import CvT, CvTConfig
from lynceus.backbones.keys.cvt import SOURCES as SOURCES
from lynceus.core.errors import AdviceError, unknown

# the authors' names, of the constructor and of its specification, in lower case -> ours
_NAMES = {
    "img_size": "image_size",
    "image_size": "image_size",
    "in_chans": "in_chans",
    "num_classes": "num_classes",
    "init": "init",
    "patch_size": "patch_size",
    "patch_stride": "patch_stride",
    "patch_padding": "patch_padding",
    "dim_embed": "dims",
    "num_heads": "heads",
    "depth": "depths",
    "mlp_ratio": "mlp_ratio",
    "attn_drop_rate": "attn_drop",
    "drop_rate": "proj_drop",
    "drop_path_rate": "drop_path_rates",
    "qkv_bias": "qkv_bias",
    "cls_token": "class_token",
    "qkv_proj_method": "projection",
    "kernel_qkv": "kernel",
    "padding_kv": "padding_kv",
    "stride_kv": "stride_kv",
    "padding_q": "padding_q",
}
_UNUSED = {"num_stages", "pos_embed", "act_layer", "norm_layer"}  # the authors' network reads no pos_embed either


def build(config: Mapping[str, Any]) -> nn.Module:
    """The model of a record, from the authors' specification (upper or lower case, nested under `spec` or not)."""
    flat: dict[str, Any] = {}
    for name, value in config.items():
        flat |= {k.lower(): v for k, v in value.items()} if name.lower() == "spec" else {name.lower(): value}
    if any(s != 1 for s in flat.pop("stride_q", ())):
        raise AdviceError("stride_q must be 1 in every stage: the shortcut needs queries of the map's size.")
    count = int(flat.get("num_stages", len(flat.get("dim_embed", (0, 0, 0)))))
    fields: dict[str, Any] = {}
    for name, value in flat.items():
        if name in _UNUSED:
            continue
        if name not in _NAMES:
            raise unknown("CvT constructor argument", name, {*_NAMES, *_UNUSED, "stride_q", "spec"})
        fields[_NAMES[name]] = tuple(value)[:count] if isinstance(value, (list, tuple)) else value
    size = fields.get("image_size")
    if isinstance(size, int):
        fields["image_size"] = (size, size)
    for name, kind in (("mlp_ratio", float), ("attn_drop", float), ("proj_drop", float), ("drop_path_rates", float)):
        if name in fields:
            fields[name] = tuple(kind(v) for v in fields[name])
    return CvT(CvTConfig(**fields))


def compare(model: nn.Module, inputs: Mapping[str, Tensor], record: Mapping[str, Any]) -> dict[str, Tensor]:
    """stage1.. (maps b c h w), cls (the last stage's class token before the norm), features (pooled), logits."""
    assert isinstance(model, CvT)
    with torch.no_grad():
        maps, end = model.run(inputs["image"])
        out = {f"stage{i + 1}": m for i, m in enumerate(maps)}
        if model.config.class_token[-1]:
            out["cls"] = end[:, :1]
        out["features"] = out["pooled"] = model.forward_head(end, pre_logits=True)
        out["logits"] = model.forward_head(end)
    return {name: out[name] for name in record["outputs"] if name in out}
