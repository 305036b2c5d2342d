"""HorNet's parity records: the networks, the gated convolution by itself, and the pyramids fused by it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lynceus.backbones.hornet import VARIANTS, HorNet, HorNetConfig
from lynceus.backbones.keys.hornet import SOURCES as SOURCES
from lynceus.core.errors import AdviceError, unknown
from lynceus.layers.gated_conv import GatedConv, GatedConv2d
from lynceus.layers.gated_pyramid import GatedFPN, GatedUPer

# the authors' constructor names -> ours
_NAMES = {
    "in_chans": "in_chans",
    "num_classes": "num_classes",
    "depths": "depths",
    "drop_path_rate": "drop_path_rate",
    "layer_scale_init_value": "layer_scale",
    "head_init_scale": "head_init_scale",
    "uniform_init": "uniform_init",
    "out_indices": "out_indices",
    "kernel_size": "kernel_size",
    "s": "scale",
}
_READ = {"factory", "base_dim", "dims", "orders", "gf_filter_hw", "gnconv"}  # translated one by one below
_UNUSED = {"block", "pretrained", "in_22k", "use_checkpoint", "type"}  # how it is made or loaded, not what it computes


def build(config: Mapping[str, Any], record: Mapping[str, Any] | None = None) -> nn.Module:
    """The model of a record: a network, an operator (`order`), a decoder module or a pyramid (`in_channels`)."""
    state = (record or {}).get("state", {})
    if "in_channels" in config and ("pool_scales" in config or any(n.startswith("psp_modules.") for n in state)):
        return _uper(config, state)
    if isinstance(config.get("in_channels"), (list, tuple)):
        return _fpn(config, state)
    if "in_channels" in config:
        return _module(config, state)
    if "order" in config and "dim" in config:
        return _operator(config)
    return _network(config, state)


def _operator(config: Mapping[str, Any]) -> GatedConv:
    known = {"dim", "order", "gf", "gf_filter_hw", "s", "dims", "gflayer", "h", "w", "kernel_size"}
    _only(config, known, "gnconv")
    table = config.get("gf_filter_hw")
    if table is None and (config.get("gf") or config.get("gflayer")):
        table = (config.get("h", 14), config.get("w", 8))
    return GatedConv(
        config["dim"],
        order=config.get("order", 5),
        kernel=config.get("kernel_size", 7),
        table=None if table is None else tuple(table),
        scale=config.get("s", 1.0),
    )


def _gated(config: Mapping[str, Any], state: Mapping[str, Any], *, kernel: int, project: bool) -> dict[str, Any]:
    """Options of a decoder's gated convolution: from `gn_conv_cfg` (or `conv_cfg`), or beside the others."""
    inner = {**config, **(config.get("gn_conv_cfg") or config.get("conv_cfg") or {})}
    h = next((inner[n] for n in ("h", "gf_h") if inner.get(n) is not None), 32)
    w = next((inner[n] for n in ("w", "gf_w") if inner.get(n) is not None), h // 2 + 1)
    if state:  # what it says is certain
        project = any(re.search(r"(^|\.)proj_out\.weight$", name) for name in state)
        table = next((v for n, v in state.items() if n.endswith("complex_weight")), None)
        hw = None if table is None else tuple((table["shape"] if isinstance(table, dict) else table)[1:3])
    else:
        project = inner.get("proj_out", project)
        hw = (h, w) if inner.get("type") == "gngf" else None
    return {
        "order": inner.get("order", 2),
        "kernel": inner.get("kernel_size", kernel),
        "table": hw,
        "ratio": inner.get("dim_ratio", 1),
        "project": project,
    }


def _module(config: Mapping[str, Any], state: Mapping[str, Any]) -> GatedConv2d:
    act = config.get("act_cfg", {"type": "ReLU"}) is not None
    return GatedConv2d(
        config["in_channels"],
        config["out_channels"],
        norm=config.get("norm_cfg") is not None or any(n.startswith("bn.") for n in state),
        act=act,
        **_gated(config, state, kernel=7, project=False),
    )


def _fpn(config: Mapping[str, Any], state: Mapping[str, Any]) -> GatedFPN:
    if config.get("add_extra_convs"):
        raise AdviceError("Extra levels by convolution cannot run in the authors' code; only sampled ones are made.")
    end = config.get("end_level", -1)
    return GatedFPN(
        config["in_channels"],
        config.get("out_channels", 256),
        count=config.get("num_outs"),
        start=config.get("start_level", 0),
        end=None if end == -1 else end,
        norm=config.get("norm_cfg") is not None or any(".bn." in n for n in state),
        act=config.get("act_cfg") is not None,
        lateral_norm=not config.get("no_norm_on_lateral", False),
        **_gated(config, state, kernel=7, project=True),
    )


def _uper(config: Mapping[str, Any], state: Mapping[str, Any]) -> GatedUPer:
    return GatedUPer(
        config["in_channels"],
        config.get("channels", config.get("out_channels", 512)),
        num_classes=config.get("num_classes", 150) if not state or "conv_seg.weight" in state else 0,
        pool_scales=tuple(config.get("pool_scales", (1, 2, 3, 6))),
        norm=any(".bn." in n for n in state) if state else config.get("norm_cfg", True) is not None,
        act=config.get("act_cfg", True) is not None,
        align_corners=config.get("align_corners", False),
        **_gated(config, state, kernel=3, project=False),
    )


def _network(config: Mapping[str, Any], state: Mapping[str, Any]) -> HorNet:
    _only(config, {*_NAMES, *_READ, *_UNUSED}, "HorNet constructor")
    fields: dict[str, Any] = {}
    if "factory" in config:
        if config["factory"] not in VARIANTS:
            raise unknown("HorNet factory", config["factory"], VARIANTS)
        base = VARIANTS[config["factory"]]
    else:
        base = HorNetConfig(depths=(3, 3, 9, 3), dims=(96, 192, 384, 768), orders=(5, 5, 5, 5), scale=1.0)
    base = replace(base, drop_path_rate=0.0)
    for name, value in config.items():
        if name in _NAMES and value is not None:
            fields[_NAMES[name]] = tuple(value) if isinstance(value, (list, tuple)) else value
    if "base_dim" in config:
        fields["dims"] = tuple(config["base_dim"] * 2**i for i in range(4))
    elif "dims" in config:
        fields["dims"] = tuple(config["dims"])
    if "orders" in config:
        fields["orders"] = tuple(config["orders"])
    tables = config.get("gf_filter_hw")
    if tables is not None:
        fields["tables"] = tuple(None if t is None else (int(t[0]), int(t[1])) for t in tables)
    elif "orders" in config and "factory" not in config:
        fields["tables"] = (None,) * len(config["orders"])
    if isinstance(config.get("gnconv"), (list, tuple)):
        fields |= _mixers(config["gnconv"])
    fields["dense"] = "out_indices" in config or any(name.startswith("norm0.") for name in state)
    return HorNet(replace(base, **fields))


def _mixers(texts: Any) -> dict[str, Any]:
    """Orders, tables and scale from the authors' texts, "partial(gnconv, order=4, s=1/3, h=14, w=8, gflayer=...)"."""
    orders, tables, scales = [], [], []
    for text in texts:
        told = dict(re.findall(r"(\w+)\s*=\s*([\w./]+)", str(text)))
        orders.append(int(told.get("order", 5)))
        tables.append((int(told.get("h", 14)), int(told.get("w", 8))) if "gflayer" in told else None)
        over, _, under = told.get("s", "1").partition("/")
        scales.append(float(over) / float(under or 1))
    if len(set(scales)) > 1:
        raise AdviceError(f"The stages scale their gates by different factors, {scales}; one for all is supported.")
    return {"orders": tuple(orders), "tables": tuple(tables), "scale": scales[0]}


def _only(config: Mapping[str, Any], known: set[str], what: str) -> None:
    for name in config:
        if name not in known:
            raise unknown(f"{what} argument", name, known)


def compare(model: nn.Module, inputs: Mapping[str, Tensor], record: Mapping[str, Any]) -> dict[str, Tensor]:
    """Networks: stage1.. (un-normed; dense: feature1.., normed), pooled, logits. Operators: y. Pyramids: p2.. ."""
    with torch.no_grad():
        if isinstance(model, HorNet):
            return _of_network(model, next(iter(inputs.values())), record)
        if isinstance(model, GatedConv2d):
            y = model(next(iter(inputs.values())))
            return dict.fromkeys(record["outputs"], y)
        if isinstance(model, GatedConv):
            y = model(next(iter(inputs.values())).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
            return dict.fromkeys(record["outputs"], y)
        maps = [inputs[name] for name in sorted(inputs, key=_number)]
        if isinstance(model, GatedUPer):
            fused = model.fused(maps)
            scores = model.head(fused)
            return {n: scores if n in ("logits", "scores", "output") else fused for n in record["outputs"]}
        assert isinstance(model, GatedFPN)
        return dict(zip(sorted(record["outputs"], key=_number), model(maps)))


def _number(name: str) -> int:
    return int("".join(ch for ch in name if ch.isdigit()) or 0)


def _of_network(model: HorNet, image: Tensor, record: Mapping[str, Any]) -> dict[str, Tensor]:
    maps = model.forward_stages(image)
    out = {f"stage{i + 1}": m for i, m in zip(model.config.levels, maps)}
    wanted = {f"feature{i + 1}" for i in range(len(maps))}
    by_level = not wanted >= {n for n in record["outputs"] if n.startswith("feature")}
    out |= {f"feature{i + 1}": m for i, m in zip(model.config.levels if by_level else range(len(maps)), maps)}
    if not model.config.dense:
        out["pooled"] = out["features"] = model.forward_head(maps[-1], pre_logits=True)
        out["logits"] = model.forward_head(maps[-1])
    return {name: out[name] for name in record["outputs"] if name in out}
