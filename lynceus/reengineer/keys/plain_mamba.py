"""PlainMamba's parity records: ChenhongyiYang/PlainMamba's networks and its mixer alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lynceus.backbones.keys.plain_mamba import SOURCES as SOURCES
from lynceus.backbones.plain_mamba import VARIANTS, PlainMamba, PlainMambaConfig
from lynceus.core.errors import AdviceError, unknown
from lynceus.layers.plain_scan import PlainMamba2d
from lynceus.reengineer.keys.vim import STEPS, step_init

# the authors' constructor names -> ours
_NAMES = {
    "in_channels": "in_chans",
    "patch_size": "patch_size",
    "embed_dims": "dim",
    "num_layers": "depth",
    "num_convs_patch_embed": "stem_convs",
    "with_pos_embed": "position",
    "drop_rate": "position_drop",
    "drop_path_rate": "drop_path_rate",
    "final_norm": "final_norm",
    "interpolate_mode": "position_mode",
    "layers_with_dwconv": "dwconv",
    "num_classes": "num_classes",
    "freeze_patch_embed": "freeze_patch_embed",
    "use_rms_norm": "rms_norm",
}
_MIXER = {
    "d_state": "states",
    "expand": "expand",
    "dt_rank": "rank",
    "conv_size": "conv",
    "conv_bias": "conv_bias",
    "bias": "mixer_bias",
    "init_layer_scale": "layer_scale",
    "reorder_all": "reorder_all",
}
_UNUSED = {"init_cfg", "test_cfg", "convert_syncbn", "default_hw_shape", "hw", "scan_orders", "directions", "type"}
_OWN = {"arch", "img_size", "out_indices", "layer_cfgs", "norm_cfg", "mamba_cfg", "d_model"}
_ZOO = ("patch_size", "dim", "depth", "stem_convs", "dwconv")  # an arch settles these


def build(config: Mapping[str, Any], record: Mapping[str, Any] | None = None) -> nn.Module:
    """The model of a record, from the authors' constructor names: a network, or a mixer (`d_model`)."""
    flat = dict(config)
    for inner in ("layer_cfgs", "mamba_cfg"):
        flat |= dict(flat.pop(inner, None) or {})
    fields: dict[str, Any] = {"steps": step_init(flat)}
    for name, value in flat.items():
        value = tuple(value) if isinstance(value, list) else value
        if name in _NAMES or name in _MIXER:
            fields[_NAMES.get(name) or _MIXER[name]] = value
        elif name not in _UNUSED | _OWN:
            raise unknown("PlainMamba constructor argument", name, {*_NAMES, *_MIXER, *STEPS, *_UNUSED, *_OWN})
    if fields.get("rank") == "auto":
        fields["rank"] = None
    if "d_model" in flat and "embed_dims" not in flat:
        fields["bias"] = fields.pop("mixer_bias", False)  # the mixer's own default
        return PlainMamba2d(flat["d_model"], **fields)
    arch = flat.get("arch")
    if arch is not None:
        name = f"plain_mamba_{str(arch).lower()}"
        if name not in VARIANTS:
            raise unknown("PlainMamba architecture", str(arch), ["L1", "L2", "L3"])
        fields |= {field: getattr(VARIANTS[name], field) for field in _ZOO}
    else:
        fields.setdefault("depth", 20)
        mixer = dict(dict(config.get("layer_cfgs") or {}).get("mamba_cfg") or {})
        if mixer and "bias" not in mixer:
            fields["mixer_bias"] = False
    size = flat.get("img_size", 224)
    fields["image_size"] = (size, size) if isinstance(size, int) else tuple(size)
    norm = dict(flat.get("norm_cfg") or {"type": "LN", "eps": 1e-6})
    if norm.get("type", "LN") != "LN":
        raise AdviceError(f"norm_cfg asks for {norm['type']!r}; the final norms are LayerNorm ('LN') here.")
    fields["norm_eps"] = norm.get("eps", 1e-5)
    given = flat.get("out_indices", -1)
    depth = fields.get("depth", 24)
    given = [given] if isinstance(given, int) else given
    fields["out_indices"] = tuple(i + depth if i < 0 else i for i in given)
    return PlainMamba(PlainMambaConfig(**fields))


def compare(model: nn.Module, inputs: Mapping[str, Tensor], record: Mapping[str, Any]) -> dict[str, Tensor]:
    """mapK: layer K's map through its own norm; tokens: after the final norm; logits. y: the mixer's tokens."""
    with torch.no_grad():
        if isinstance(model, PlainMamba2d):
            x = inputs["x"]
            high, wide = record["config"]["hw"] if "hw" in record["config"] else record["config"]["default_hw_shape"]
            return {"y": model(x.view(x.shape[0], high, wide, -1)).flatten(1, 2)}
        assert isinstance(model, PlainMamba)
        last, maps = model.features_and_stages(inputs["image"])
        out = {f"map{i}": m for i, m in zip(model.levels, maps)}
        out["tokens"] = last.flatten(2).transpose(1, 2)
        out["features"] = out["pooled"] = model.pool(last)
        out["logits"] = model.forward_head(last)
    return {name: out[name] for name in record["outputs"] if name in out}
