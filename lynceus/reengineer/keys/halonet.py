"""HaloNet's parity records: timm's hybrids (its block configurations), the paper's family, and single layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lynceus.backbones.halonet import HaloNet, HaloNetConfig
from lynceus.backbones.keys.halonet import SOURCES as SOURCES
from lynceus.core.errors import AdviceError, unknown
from lynceus.layers.halo import HaloAttention, HaloOptions
from lynceus.layers.width import divisible

# timm's names of the layer -> ours
_LAYER = {
    "block_size": "block_size",
    "halo_size": "halo_size",
    "num_heads": "heads",
    "dim_head": "head_dim",
    "qk_ratio": "qk_ratio",
    "qkv_bias": "qkv_bias",
    "avg_down": "avg_down",
    "scale_pos_embed": "scale_position",
}
# names of the constructor that mean the same in both
_SAME = ("num_classes", "in_chans", "drop_rate", "drop_path_rate")
_UNUSED = {"norm_layer", "head_type", "fixed_input_size", "img_size", "global_pool", "attn_kwargs", "block_kwargs"}
_BYO = {
    "blocks",
    "downsample",
    "stem_type",
    "stem_pool",
    "stem_chs",
    "width_factor",
    "num_features",
    "zero_init_last",
    "act_layer",
    "attn_layer",
    "self_attn_layer",
    "self_attn_kwargs",
}
_PAPER = {"rb", "rv", "depths", "heads", "block_size", "halo_size", "hidden", "out", "act", "final_conv", "stem"}
_PAPER |= {"qkv_bias", "avg_down", "scale_pos_embed", "image_size", "img_size", "qk_ratio", "dim_head"}
_POOLS = {"": "none", None: "none", "max": "max", "maxpool": "max", "avg": "avg", "avgpool": "avg"}
_STEMS = {"": "3x3", "3x3": "3x3", "7x7": "7x7", "tiered": "tiered", "deep": "deep"}
_SHORTCUTS = {"conv1x1": "conv", "avg": "avg", "": "none"}


def build(config: Mapping[str, Any]) -> nn.Module:
    """A layer (`dim`), a timm hybrid (`blocks`) or a network of the paper's family (`depths`)."""
    if "blocks" in config:
        return HaloNet(hybrid(config))
    if "depths" in config:
        return HaloNet(paper(config))
    return layer(config)


def options(config: Mapping[str, Any]) -> HaloOptions:
    """Options of the attention from timm's names; eight heads where none are given."""
    for name in config:
        if name not in _LAYER:
            raise unknown("option of halo attention", name, _LAYER)
    return HaloOptions(**{"heads": 8, **{_LAYER[k]: v for k, v in config.items()}})


def layer(config: Mapping[str, Any]) -> HaloAttention:
    """The layer alone. attn_ratio is an older name of qk_ratio."""
    rest = {k: v for k, v in config.items() if k not in ("dim", "dim_out", "stride", "feat_size")}
    if "attn_ratio" in rest:
        rest["qk_ratio"] = rest.pop("attn_ratio")
    if "dim" not in config:
        raise AdviceError(f"A halo layer's record gives `dim`; this one has {', '.join(config)}.")
    o = options(rest)
    return HaloAttention(
        config["dim"],
        out=config.get("dim_out"),
        stride=config.get("stride", 1),
        heads=o.heads or 8,
        head_dim=o.head_dim,
        block_size=o.block_size,
        halo_size=o.halo_size,
        qk_ratio=o.qk_ratio,
        qkv_bias=o.qkv_bias,
        avg_down=o.avg_down,
        scale_position=o.scale_position,
    )


def paper(config: Mapping[str, Any]) -> HaloNetConfig:
    """H0 to H7 and their like, from the letters of the paper's table."""
    for name in config:
        if name not in {*_PAPER, *_SAME}:
            raise unknown("option of HaloNet", name, {*_PAPER, *_SAME})
    depths = config["depths"]
    hidden = tuple(config.get("hidden", (64, 128, 256, 512)))
    rb = config.get("rb", 1.0)
    heads = config.get("heads", (4, 8, 8, 8))
    names = ("block_size", "halo_size", "qkv_bias", "avg_down", "scale_pos_embed", "qk_ratio", "dim_head")
    shared = {k: config[k] for k in names if config.get(k) is not None}
    return HaloNetConfig(
        layout=tuple("a" * d for d in depths),
        widths=tuple(config.get("out") or (int(rb * h) for h in hidden)),
        hidden=hidden,
        strides=(1, *[2] * (len(depths) - 1)),
        attention=tuple(options({**shared, "num_heads": n}) for n in _each(heads, len(depths))),
        value_ratio=config.get("rv", 1.0),
        final_width=config.get("final_conv") or 0,
        activation=config.get("act", "relu"),
        **{k: config[k] for k in _SAME if k in config},
    )


def hybrid(config: Mapping[str, Any]) -> HaloNetConfig:
    """A network of bottlenecks and attention blocks, from timm's block configurations."""
    for name in config:
        if name not in {*_BYO, *_SAME, *_UNUSED}:
            raise unknown("option of timm's HaloNet", name, {*_BYO, *_SAME, *_UNUSED})
    factor = config.get("width_factor", 1.0)
    stages = [_blocks(stage) for stage in config["blocks"]]
    widths = tuple(divisible(stage[0]["c"] * factor) for stage in stages)
    attention, groups = [], set()
    for stage in stages:
        given = next((b for b in stage if b["type"] == "self_attn"), stage[0])
        own = given.get("self_attn_kwargs")
        attention.append(options(own if own is not None else config.get("self_attn_kwargs") or {}))
        groups |= {b.get("gs") or 0 for b in stage}
    attentive = {
        config.get("attn_layer") or "none",
        *(b["attn_layer"] for s in stages for b in s if b.get("attn_layer")),
    }
    if len(groups) > 1 or len(attentive) > 1:
        raise AdviceError(f"Blocks of one network share group width and channel attention; here {groups}, {attentive}.")
    return HaloNetConfig(
        layout=tuple("".join("a" if b["type"] == "self_attn" else "c" for b in stage) for stage in stages),
        widths=widths,
        hidden=tuple(divisible(width * stage[0].get("br", 1.0)) for width, stage in zip(widths, stages)),
        strides=tuple(stage[0].get("s", 2) for stage in stages),
        attention=tuple(attention),
        stem=_STEMS[config.get("stem_type", "3x3")],  # type: ignore[arg-type]
        stem_width=round(config.get("stem_chs", 32) * factor),
        stem_pool=_POOLS[config.get("stem_pool", "maxpool")],  # type: ignore[arg-type]
        activation=config.get("act_layer", "relu"),
        channel_attention=attentive.pop(),
        group_width=groups.pop(),
        shortcut=_SHORTCUTS[config.get("downsample", "conv1x1")],  # type: ignore[arg-type]
        final_width=round(config.get("num_features", 0) * factor),
        zero_init_residual=config.get("zero_init_last", True),
        **{k: config[k] for k in _SAME if k in config},
    )


def _blocks(stage: Any) -> list[dict[str, Any]]:
    """A stage's blocks one by one; a configuration of depth d stands for d of them."""
    stage = [stage] if isinstance(stage, Mapping) else stage
    return [dict(block) for block in stage for _ in range(block.get("d", 1))]


def _each(value: Any, count: int) -> Sequence[int]:
    return value if isinstance(value, (list, tuple)) else [value] * count


def compare(model: nn.Module, inputs: Mapping[str, Tensor], record: Mapping[str, Any]) -> dict[str, Tensor]:
    """stem, stage1 to stage4, final (after the last convolution), features (pooled) and logits; out of a single layer.

    A layer that pools an odd map leaves its ragged last row and column out in timm; ours keeps them.
    """
    with torch.no_grad():
        if isinstance(model, HaloAttention):
            x = inputs["x"]
            out = model(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
            if model.pooled:
                out = out[..., : x.shape[2] // 2, : x.shape[3] // 2]
            return {"out": out}
        assert isinstance(model, HaloNet)
        image = inputs["image"]
        maps = model.forward_stages(image)
        pooled = model.pool(maps[-1])
        out = {f"stage{i + 1}": m for i, m in enumerate(maps)}
        last = model.final_conv(maps[-1])
        out |= {"stem": model.stem(image), "final": last, "final_conv": last, "features": pooled, "pooled": pooled}
        return out | {"logits": model.forward_head(maps[-1])}
