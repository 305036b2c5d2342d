"""ViT parity: records of timm's VisionTransformer and of DeiT's distilled form."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lynceus.backbones.keys.vit import SOURCES as SOURCES
from lynceus.backbones.vit import VARIANTS, ViT, ViTConfig
from lynceus.core.errors import AdviceError, unknown

# timm's constructor names -> ours
FIELDS = {
    "embed_dim": "dim",
    "depth": "depth",
    "num_heads": "heads",
    "mlp_ratio": "mlp_ratio",
    "qkv_bias": "qkv_bias",
    "proj_bias": "proj_bias",
    "qk_norm": "qk_norm",
    "scale_attn_norm": "attn_norm",
    "scale_mlp_norm": "mlp_norm",
    "init_values": "init_values",
    "class_token": "class_token",
    "distilled": "distilled",
    "reg_tokens": "registers",
    "pool_include_prefix": "pool_prefix",
    "pre_norm": "pre_norm",
    "final_norm": "final_norm",
    "fc_norm": "fc_norm",
    "layer_norm_eps": "norm_eps",
    "norm_eps": "norm_eps",
    "global_pool": "pool",
    "num_classes": "num_classes",
    "in_chans": "in_chans",
    "patch_size": "patch_size",
    "drop_rate": "drop_rate",
    "drop_path_rate": "drop_path_rate",
    "pos_drop_rate": "position_drop",
    "patch_drop_rate": "patch_drop",
    "proj_drop_rate": "proj_drop",
    "attn_drop_rate": "attn_drop",
}
# what changes nothing for us: any size is taken and padded, weights come from the filling
IGNORED = {"arch", "dynamic_img_size", "dynamic_img_pad", "weight_init", "fix_init", "pretrained", "strict_img_size"}


def translate(config: Mapping[str, Any]) -> ViTConfig:
    """Our config for timm's names. `arch` gives the start where we know it; everything said explicitly wins."""
    arch = str(config.get("arch", "")).split(".")[0]
    known = VARIANTS.get(arch)
    start = known or ViTConfig()
    changes: dict[str, Any] = {}
    if known is None and "_distilled_" in arch:
        changes["distilled"] = True
    for name, value in config.items():
        if name in IGNORED:
            continue
        if name in ("build_img_size", "img_size"):
            changes["image_size"] = (value, value) if isinstance(value, int) else tuple(value)
        elif name == "no_embed_class":
            changes["position_prefix"] = not value
        elif name == "pos_embed":
            changes["position"] = "learned" if value == "learn" else "none"
        elif name in FIELDS:
            if name == "patch_size" and not isinstance(value, int):
                if len(set(value)) > 1:
                    raise AdviceError(f"Patches are square here; the record has {value}.")
                value = value[0]
            changes[FIELDS[name]] = value
        else:
            raise unknown("option of VisionTransformer", name, [*FIELDS, *IGNORED, "no_embed_class", "pos_embed"])
    if "pool" in changes and "fc_norm" not in changes and known is not None and changes["pool"] != known.pool:
        changes["fc_norm"] = None
    return replace(start, **changes)


def build(config: Mapping[str, Any], record: Mapping[str, Any] | None = None) -> ViT:
    """The model of a record. What its `state` (if at hand) tells of the structure wins over names and defaults."""
    start = translate(config)
    return ViT(replace(start, **told(start, (record or {}).get("state") or {})))


def told(start: ViTConfig, state: Mapping[str, Any]) -> dict[str, Any]:
    """What the authors' parameter names and shapes say of the structure: archs that we do not list need no table."""
    if "patch_embed.proj.weight" not in state or "blocks.0.mlp.fc1.weight" not in state:
        return {}
    dim, in_chans, patch, _ = state["patch_embed.proj.weight"]
    hidden = state["blocks.0.mlp.fc1.weight"][0]
    head = state.get("head.weight")
    registers = state["reg_token"][1] if "reg_token" in state else 0
    facts: dict[str, Any] = {
        "dim": dim,
        "in_chans": in_chans,
        "patch_size": patch,
        "depth": 1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks.")),
        "num_classes": head[0] if head else 0,
        "class_token": "cls_token" in state,
        "distilled": "dist_token" in state,
        "registers": registers,
        "position": "learned" if "pos_embed" in state else "none",
        "pre_norm": "norm_pre.weight" in state,
        "final_norm": "norm.weight" in state or "fc_norm.weight" in state,
        "fc_norm": "fc_norm.weight" in state,
        "qkv_bias": "blocks.0.attn.qkv.bias" in state,
        "proj_bias": "blocks.0.attn.proj.bias" in state,
        "qk_norm": "blocks.0.attn.q_norm.weight" in state,
        "attn_norm": "blocks.0.attn.norm.weight" in state,
        "mlp_norm": "blocks.0.mlp.norm.weight" in state,
        "init_values": (start.init_values or 1e-5) if "blocks.0.ls1.gamma" in state else None,
    }
    if int(dim * start.mlp_ratio) != hidden:
        facts["mlp_ratio"] = hidden / dim
    if "pos_embed" in state:
        height, width = start.image_size
        facts["position_prefix"] = state["pos_embed"][1] != -(-height // patch) * -(-width // patch)
    if start.pool == "token" and not facts["class_token"]:
        facts["pool"] = "avg"
    return facts


def compare(model: ViT, inputs: Mapping[str, Tensor], record: Mapping[str, Any]) -> dict[str, Tensor]:
    """block{i}: all tokens after block i, counted from 1; tokens: after the final norm; features: pooled; logits."""
    image = inputs["image"]
    wanted = sorted(int(name.removeprefix("block")) for name in record["outputs"] if name.startswith("block"))
    with torch.no_grad():
        last, found = model.run(image, [i - 1 for i in wanted])
        tokens = model.norm(last)
        out = {f"block{i}": x for i, x in zip(wanted, found)}
        return out | {"tokens": tokens, "features": model.pool(tokens), "logits": model.forward_head(tokens)}
