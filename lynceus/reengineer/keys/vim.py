"""Vim's parity records: hustvl/Vim's networks, its mixer alone, and the selective scan alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lynceus.backbones.keys.vim import SOURCES as SOURCES
from lynceus.backbones.vim import Vim, VimConfig
from lynceus.core.errors import unknown
from lynceus.layers.mamba import Mamba, StepInit
from lynceus.layers.scan import selective_scan

# the authors' constructor names -> ours
_NAMES = {
    "patch_size": "patch_size",
    "stride": "stride",
    "depth": "depth",
    "embed_dim": "dim",
    "channels": "in_chans",
    "in_chans": "in_chans",
    "num_classes": "num_classes",
    "drop_rate": "position_drop",
    "drop_path_rate": "drop_path_rate",
    "norm_epsilon": "norm_eps",
    "rms_norm": "rms_norm",
    "if_abs_pos_embed": "position",
    "if_rope": "rotary",
    "if_rope_residual": "rotary_residual",
    "pt_hw_seq_len": "rotary_grid",
    "if_bidirectional": "paired",
    "flip_img_sequences_ratio": "flip_ratio",
}
# of the mixer; in a network they stand beside the others or in `ssm_cfg`
_MIXER = {
    "d_state": "states",
    "d_conv": "conv",
    "expand": "expand",
    "dt_rank": "rank",
    "bimamba_type": "direction",
    "if_divide_out": "halve",
    "init_layer_scale": "layer_scale",
    "conv_bias": "conv_bias",
    "bias": "mixer_bias",
}
# of the layer that makes the steps
STEPS = {"dt_init": "kind", "dt_min": "least", "dt_max": "largest", "dt_init_floor": "floor", "dt_scale": "scale"}
_POOLS = {"none": "last", "mean": "mean", "max": "max", "all": "all"}
# how it is computed, or how it starts, not what it computes
_UNUSED = {
    "residual_in_fp32",
    "fused_add_norm",
    "use_fast_path",
    "layer_idx",
    "initializer_cfg",
    "device",
    "dtype",
    "ft_seq_len",
    "pretrained",
    "if_devide_out",  # a slip in the authors' vim_base, which their constructor swallows
}
_OWN = {"img_size", "ssm_cfg", "if_bimamba", "final_pool_type", "if_cls_token", "use_middle_cls_token"}
_OWN |= {"use_double_cls_token", "d_model", "arch"}


class Scan(nn.Module):
    """The operator, as a model without parameters."""

    def forward(self, inputs: Mapping[str, Tensor], *, softplus: bool) -> dict[str, Tensor]:
        given: dict[str, Any] = dict(inputs)
        a = -given.pop("A_log").exp() if "A_log" in given else given.pop("A")
        y, last = selective_scan(
            given.pop("u"),
            given.pop("delta"),
            a,
            given.pop("B"),
            given.pop("C"),
            **given,
            delta_softplus=softplus,
            return_last_state=True,
        )
        return {"y": y, "last_state": last}


def build(config: Mapping[str, Any], record: Mapping[str, Any] | None = None) -> nn.Module:
    """The model of a record, from the authors' constructor names: a network, a mixer (`d_model`), or the scan."""
    if "delta_softplus" in config or {"u", "delta"} <= set((record or {}).get("inputs", {})):
        return Scan()
    given = {**config, **dict(config.get("ssm_cfg") or {})}
    mixer: dict[str, Any] = {"steps": step_init(given)}
    fields: dict[str, Any] = {}
    for name, value in given.items():
        if name in _MIXER:
            mixer[_MIXER[name]] = value
        elif name in _NAMES:
            fields[_NAMES[name]] = value
        elif name not in _UNUSED | _OWN:
            raise unknown("Vim constructor argument", name, {*_NAMES, *_MIXER, *STEPS, *_UNUSED, *_OWN})
    if mixer.get("rank") == "auto":
        mixer["rank"] = None
    if config.get("if_bimamba"):
        mixer["direction"] = "v1"
    if "d_model" in config and "embed_dim" not in config:  # the mixer's own defaults
        mixer = {"direction": "none", "halve": False, **mixer}
        mixer["bias"] = mixer.pop("mixer_bias", False)
        return Mamba(config["d_model"], **mixer)
    size = config.get("img_size", 224)
    fields["image_size"] = (size, size) if isinstance(size, int) else tuple(size)
    if isinstance(fields.get("patch_size"), (list, tuple)):
        fields["patch_size"] = fields["patch_size"][0]
    fields["pool"] = _POOLS[config.get("final_pool_type", "none")]
    if not config.get("if_cls_token", True):
        fields["class_token"] = "none"
    elif config.get("use_double_cls_token", False):
        fields["class_token"] = "ends"
    else:
        fields["class_token"] = "middle" if config.get("use_middle_cls_token", True) else "first"
    return Vim(VimConfig(**fields, **mixer))


def step_init(given: dict[str, Any]) -> StepInit:
    """How the steps start; takes the authors' arguments that say so out of `given`."""
    return StepInit(**{ours: given.pop(name) for name, ours in STEPS.items() if name in given})


def compare(model: nn.Module, inputs: Mapping[str, Tensor], record: Mapping[str, Any]) -> dict[str, Tensor]:
    """tokensK: mixer output plus residual after K blocks; features: what the head reads; logits. y, last_state."""
    with torch.no_grad():
        if isinstance(model, Scan):
            found: dict[str, Tensor] = model(inputs, softplus=record["config"].get("delta_softplus", False))
            return found
        if isinstance(model, Mamba):
            return {"y": model(inputs["x"])}
        assert isinstance(model, Vim)
        names = [name for name in record["outputs"] if name.startswith("tokens") and name[6:].isdigit()]
        hidden, residual, kept, _ = model.run(inputs["image"], [int(name[6:]) - 1 for name in names])
        tokens = model.norm_f(residual + hidden)
        c = model.config
        whole = c.class_token == "none" and c.pool in ("max", "all")
        out = {**dict(zip(names, kept)), "tokens": tokens, "logits": model.forward_head(tokens)}
        out["features"] = tokens if whole else model.pool(tokens)
    return {name: out[name] for name in record["outputs"] if name in out}
