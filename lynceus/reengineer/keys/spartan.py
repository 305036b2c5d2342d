"""SpaRTAN's parity records: the network, and its spatial and channel mixer by themselves."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lynceus.backbones.keys.spartan import SOURCES as SOURCES
from lynceus.backbones.spartan import SpaRTAN, SpaRTANConfig
from lynceus.core.errors import AdviceError, unknown
from lynceus.layers.wave import TwoFieldMixer, WaveMixer

_NETWORK = {"num_classes", "num_layer", "layer_depths", "expand_ratios", "dims", "init_dim", "dropout"}
_MIXER = {"in_dim", "expand_ratio", "groups", "conv_groups_argument", "conv_groups_used"}


def build(config: Mapping[str, Any]) -> nn.Module:
    """The model of a record: the network, or a mixer (`in_dim`; with `expand_ratio` the channel mixer)."""
    if "in_dim" in config:
        return _mixer(config)
    for name in config:
        if name not in _NETWORK:
            raise unknown("SpaRTAN constructor argument", name, _NETWORK)
    depths, dims, first = config["layer_depths"], config.get("dims") or [], config.get("init_dim", 32)
    if len(depths) != config.get("num_layer", len(depths)) or len(dims) != len(depths) - 1:
        raise AdviceError(f"num_layer is the length of layer_depths {depths} and one more than that of dims {dims}.")
    return SpaRTAN(
        SpaRTANConfig(
            num_classes=config["num_classes"],
            depths=tuple(depths),
            dims=(first, *dims),
            ratios=tuple(config.get("expand_ratios") or [1] * len(depths)),
            drop_path_rate=config.get("dropout", 0.0),
        )
    )


def _mixer(config: Mapping[str, Any]) -> nn.Module:
    for name in config:
        if name not in _MIXER:
            raise unknown("SpaRTAN mixer argument", name, _MIXER)
    dim, ratio = config["in_dim"], config.get("expand_ratio")
    groups = config.get("groups", config.get("conv_groups_argument", 1))
    if ratio is None:
        return TwoFieldMixer(dim, depthwise=groups > 1)
    return WaveMixer(dim, ratio=ratio, depthwise=config.get("conv_groups_used", 0) == ratio * dim or groups == 1)


def compare(model: nn.Module, inputs: Mapping[str, Tensor], record: Mapping[str, Any]) -> dict[str, Tensor]:
    """Network: stem, stage1.. (maps before each down-sampling), pooled, logits. Mixers: y."""
    x = next(iter(inputs.values()))
    with torch.no_grad():
        if not isinstance(model, SpaRTAN):
            y = model(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
            return dict.fromkeys(record["outputs"], y)
        maps = model.forward_stages(x)
        out = {f"stage{i}": m for i, m in enumerate(maps, 1)}
        out["stem"] = model.conv(x)
        out["pooled"] = out["features"] = model.pool(maps[-1])
        out["logits"] = model.forward_head(maps[-1])
    return {name: out[name] for name in record["outputs"] if name in out}
