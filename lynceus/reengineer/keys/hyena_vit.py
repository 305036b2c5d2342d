"""Hyena N-D parity: records of the layer alone, in any form, and of the DeiT body around it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lynceus.backbones.hyena_vit import HyenaViT, HyenaViTConfig
from lynceus.backbones.keys.hyena_vit import SOURCES as SOURCES
from lynceus.core.errors import AdviceError, unknown
from lynceus.layers.hyena import Hyena
from lynceus.layers.long_conv import causal_conv

# the authors' constructor names -> ours; of the network, then of the layer
_NETWORK = {
    "img_size": "image_size",
    "embed_dim": "dim",
    "depth": "depth",
    "num_heads": "heads",
    "num_classes": "num_classes",
    "in_chans": "in_chans",
    "patch_size": "patch_size",
    "mlp_ratio": "mlp_ratio",
    "qkv_bias": "qkv_bias",
    "drop_rate": "proj_drop",
    "attn_drop_rate": "attn_drop",
    "drop_path_rate": "drop_path_rate",
    "method": "method",
    "hyena_order": "order",
    "hyena_filter_order": "width",
    "hyena2d_sqrt_decay": "sqrt_decay",
}
_LAYER = {
    "order": "order",
    "filter_order": "width",
    "dropout": "drop",
    "sqrt_decay": "sqrt_decay",
    "emb_dim": "features",
    "num_inner_mlps": "hidden",
    "w": "freq",
    "fast_decay_pct": "fast",
    "slow_decay_pct": "slow",
    "shift": "shift",
}
_SHARED = {"directional_mode", "hyena2d_filter", "direct_paramtrization", "window_mode"}
# how it is trained or computed, or read by nobody
_UNUSED = {"grad_cp", "use_cls_token", "filter_dropout", "lr", "wd", "lr_pos_emb", "bias", "normalized"}
_UNUSED |= {"fused_fft_conv", "distilled", "representation_size", "norm_layer", "weight_init"}


def build(config: Mapping[str, Any], record: Mapping[str, Any] | None = None) -> nn.Module:
    """The network of a record, or the layer where the config says `d_model`."""
    state = (record or {}).get("state") or {}
    if "d_model" in config:
        return _layer(config, state)
    if config.get("use_cls_token") or config.get("distilled") or config.get("representation_size"):
        raise AdviceError("Hyena mixes full grids: use_cls_token, distilled and representation_size do not go with it.")
    fields = _shared(config)
    for name, value in config.items():
        if name in _NETWORK:
            fields[_NETWORK[name]] = value
        elif name not in _SHARED | _UNUSED:
            raise unknown("argument of HyenaND's VisionTransformer", name, {*_NETWORK, *_SHARED, *_UNUSED})
    size = fields.get("image_size", 224)
    fields["image_size"] = (size, size) if isinstance(size, int) else tuple(size)
    method = fields.get("method", "attention")
    fields["axes"] = 1 if method == "hyena" else 2
    fields["method"] = "hyena" if method == "hyena2d" else method
    return HyenaViT(HyenaViTConfig(pool="token", **fields))


def _layer(config: Mapping[str, Any], state: Mapping[str, Any]) -> Hyena:
    fields = _shared(config)
    for name, value in config.items():
        if name in _LAYER:
            fields[_LAYER[name]] = value
        elif name == "modulation_lr":
            fields["train_rates"] = value != 0
        elif name == "modulate":
            fields["decay"] = fields["decay"] if value else "no"
        elif name not in _SHARED | _UNUSED | {"d_model", "l_max"}:
            raise unknown("argument of HyenaOperator2d", name, {*_LAYER, *_SHARED, *_UNUSED, "d_model", "l_max"})
    short = state.get("short_filter.weight", [0, 0, 3, 3])
    if len(short) == 3:  # HyenaOperator: one axis, looking back, with an ordinary normalisation
        return Hyena(config["d_model"], (config["l_max"],), causal_short=True, scaled=False, **fields)
    return Hyena(config["d_model"], (config["l_max"],) * 2, **fields)


def _shared(config: Mapping[str, Any]) -> dict[str, Any]:
    form = "joint" if config.get("hyena2d_filter") else "product"
    window = config.get("window_mode", "standard")
    return {
        "form": "direct" if config.get("direct_paramtrization") else form,
        "decay": "symmetric" if window == "symettric" else window,
        "direction": config.get("directional_mode", "standard"),
    }


def compare(model: nn.Module, inputs: Mapping[str, Tensor], record: Mapping[str, Any]) -> dict[str, Tensor]:
    """Network: tokens{i} after block i, counted from 1; pooled; logits. Layer: y, filter, long_conv(_no_skip)."""
    with torch.no_grad():
        out = _network_outputs(model, inputs, record) if isinstance(model, HyenaViT) else _layer_outputs(model, inputs)
    return {name: value for name, value in out.items() if name in record["outputs"]}


def _network_outputs(model: HyenaViT, inputs: Mapping[str, Tensor], record: Mapping[str, Any]) -> dict[str, Tensor]:
    x = model.embed(inputs["image"])
    out = {}
    for i, block in enumerate(model.blocks):
        x = block(x)
        out[f"tokens{i + 1}"] = x.flatten(1, 2)
    last = x.permute(0, 3, 1, 2)
    return out | {"pooled": model.pool(last), "logits": model.forward_head(last)}


def _layer_outputs(layer: nn.Module, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    assert isinstance(layer, Hyena)
    x = inputs["x"]
    grid = layer.grid
    out = {"y": layer(x.reshape(x.shape[0], *grid, layer.dim)).reshape(x.shape)}
    if layer.form != "direct":
        out["filter"] = layer.filter_fn(grid)[None]
    if "v" in inputs:
        v = inputs["v"].movedim(1, -1)
        k = layer.kernels(grid)[0] / (2 * grid[0] if layer.scaled else 1)
        bare = causal_conv(v, k)
        skipped = bare + layer.biases()[0] * v
        out |= {"long_conv": skipped.movedim(-1, 1), "long_conv_no_skip": bare.movedim(-1, 1)}
    return out
