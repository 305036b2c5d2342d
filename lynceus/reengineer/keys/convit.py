"""ConViT's parity records: facebookresearch/convit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lynceus.backbones.convit import ConViT, ConViTConfig
from lynceus.backbones.keys.convit import SOURCES as SOURCES
from lynceus.core.errors import AdviceError, unknown
from lynceus.layers.gated_position import GatedPositionAttention

# the authors' constructor names -> ours
_NAMES = {
    "patch_size": "patch_size",
    "in_chans": "in_chans",
    "num_classes": "num_classes",
    "embed_dim": "dim",
    "depth": "depth",
    "num_heads": "heads",
    "mlp_ratio": "mlp_ratio",
    "qkv_bias": "qkv_bias",
    "qk_scale": "qk_scale",
    "drop_rate": "proj_drop",
    "attn_drop_rate": "attn_drop",
    "drop_path_rate": "drop_path_rate",
    "local_up_to_layer": "local_layers",
    "locality_strength": "locality",
    "use_pos_embed": "position",
    "layer_norm_eps": "norm_eps",
    "norm_eps": "norm_eps",
}
_UNUSED = {"norm_layer", "global_pool"}  # the authors' code does not read the second


def build(config: Mapping[str, Any], record: Mapping[str, Any] | None = None) -> nn.Module:
    """The model of a record, from the authors' constructor names; a record of the attention alone gives that."""
    if config.get("hybrid_backbone") is not None:
        raise AdviceError("ConViT on the map of another network (hybrid_backbone) is not rebuilt here.")
    if "dim" in config:
        return _layer(config, record)
    fields: dict[str, Any] = {}
    for name, value in config.items():
        if name in _UNUSED or name == "hybrid_backbone":
            continue
        if name == "img_size":
            fields["image_size"] = (value, value) if isinstance(value, int) else tuple(value)
        elif name in _NAMES:
            fields[_NAMES[name]] = value[0] if name == "patch_size" and isinstance(value, (list, tuple)) else value
        else:
            raise unknown("ConViT constructor argument", name, {*_NAMES, *_UNUSED, "img_size", "hybrid_backbone"})
    return ConViT(ConViTConfig(**fields))


def _layer(config: Mapping[str, Any], record: Mapping[str, Any] | None) -> nn.Module:
    """GPSA alone, by its own constructor names."""
    names = {
        "dim": "dim",
        "num_heads": "heads",
        "qkv_bias": "qkv_bias",
        "qk_scale": "scale",
        "locality_strength": "locality",
        "attn_drop": "attn_drop",
        "proj_drop": "proj_drop",
    }
    odd = set(config) - {*names, "use_local_init"}
    if odd:
        raise unknown("GPSA constructor argument", min(odd), {*names, "use_local_init"})
    return GatedPositionAttention(**{"heads": 8, **{names[k]: v for k, v in config.items() if k in names}})


def compare(model: nn.Module, inputs: Mapping[str, Tensor], record: Mapping[str, Any]) -> dict[str, Tensor]:
    """block{i}: all tokens after block i, counted from 1; attn{i}: attention of block i (gated positional ones);
    features: what the classifier reads, after the final norm; logits."""
    with torch.no_grad():
        if isinstance(model, GatedPositionAttention):
            return _compare_layer(model, next(iter(inputs.values())), record)
        assert isinstance(model, ConViT)
        image = inputs["image"]
        wanted = sorted(int(n.removeprefix("block")) for n in record["outputs"] if n.startswith("block"))
        heard: dict[str, Tensor] = {}
        handles = []
        for i, block in enumerate(model.blocks, 1):
            mixer: Any = block.attn
            if f"attn{i}" in record["outputs"]:
                hear = _listener(heard, f"attn{i}")
                handles.append(mixer.register_forward_pre_hook(hear))
        last, found = model.run(image, [i - 1 for i in wanted])
        for handle in handles:
            handle.remove()
        tokens = model.norm(_flat(last))
        out = {f"block{i}": _flat(x) for i, x in zip(wanted, found)} | heard
        return out | {"tokens": tokens, "features": model.pool(tokens), "logits": model.forward_head(tokens)}


def _listener(heard: dict[str, Tensor], name: str) -> Any:
    def hear(mixer: Any, args: tuple[Any, ...]) -> None:
        heard[name] = mixer.attention(args[0])

    return hear


def _flat(x: Tensor) -> Tensor:
    return x.flatten(1, 2) if x.ndim == 4 else x


def _compare_layer(model: GatedPositionAttention, x: Tensor, record: Mapping[str, Any]) -> dict[str, Tensor]:
    """The input is tokens of a square map, as the authors' code takes them, or a map; attn...: the attention."""
    side = round(x.shape[1] ** 0.5)
    x = x if x.ndim == 4 else x.reshape(x.shape[0], side, side, x.shape[-1])
    out, attention = _flat(model(x)), model.attention(x)
    return {name: attention if name.startswith("attn") else out for name in record["outputs"]}
