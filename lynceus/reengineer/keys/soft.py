"""SOFT's parity records: fudan-zvg/SOFT's networks (plain and normalised), a single layer, and the Newton inverses."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lynceus.backbones.keys.soft import SOURCES as SOURCES
from lynceus.backbones.soft import Soft, SoftConfig
from lynceus.core.errors import AdviceError, unknown
from lynceus.layers.softmax_free import (
    SoftmaxFreeAttention,
    gaussian_kernel,
    newton_inverse,
    newton_inverse_halved,
)

# the authors' constructor names -> ours
_NAMES = {
    "in_chans": "in_chans",
    "num_classes": "num_classes",
    "embed_dims": "dims",
    "num_heads": "heads",
    "depths": "depths",
    "sr_ratios": "ratios",
    "conv_sizes": "value_kernels",
    "qkv_bias": "qkv_bias",
    "qk_scale": "qk_scale",
    "mlp_ratio": "mlp_ratio",
    "mlp_ratios": "mlp_ratio",
    "drop_rate": "proj_drop",
    "attn_drop_rate": "attn_drop",
    "drop_path_rate": "drop_path_rate",
    "newton_iters": "newton_iterations",
    "newton_max_iter": "newton_iterations",
    "normalised": "normalised",
}
# of no effect on the numbers: tables are always made for 224 pixels, and the first embedding always has stride 4
_UNUSED = {"img_size", "build_img_size", "patch_size", "norm_layer", "kernel_method", "layer_norm_eps"}


class Inverses(nn.Module):
    """Stands for a record without weights: the two Newton inverses of a kernel of points."""

    def __init__(self, iterations: int, scale: float):
        super().__init__()
        self.iterations, self.scale = iterations, scale


def build(config: Mapping[str, Any], record: Mapping[str, Any] | None = None) -> nn.Module:
    """A network (`embed_dims` or no size at all), a layer (`dim`) or the inverses (`points_scale`)."""
    if "points_scale" in config:
        return Inverses(config.get("newton_iters", 20), config["points_scale"])
    if "dim" in config:
        return _layer(config)
    fields: dict[str, Any] = {"heads": (1, 2, 4, 8), "dims": (64, 128, 256, 512), "depths": (3, 4, 6, 3)}
    fields["qkv_bias"] = False
    fields["normalised"] = "norm" in str((record or {}).get("model", ""))
    for name, value in config.items():
        if name in _UNUSED:
            continue
        if name not in _NAMES:
            raise unknown("SOFT constructor argument", name, {*_NAMES, *_UNUSED})
        if name == "mlp_ratios":
            value = value[-1]
        elif name == "sr_ratios":
            if value[-1] != 1:
                raise AdviceError(f"The last of sr_ratios is 1 with a class token, not {value[-1]}.")
            value = value[:-1]
        fields[_NAMES[name]] = tuple(value) if isinstance(value, (list, tuple)) else value
    fields["position_drop"] = fields.get("proj_drop", 0.0)
    return Soft(SoftConfig(newton_step="batch", **fields))


def _layer(config: Mapping[str, Any]) -> SoftmaxFreeAttention:
    known = {"dim", "num_heads", "ratio", "conv_size", "normalised", "newton_iters", "max_iter", "H", "W"}
    for name in config:
        if name not in {*known, *_UNUSED}:
            raise unknown("option of SOFT's layer", name, {*known, *_UNUSED})
    return SoftmaxFreeAttention(
        config["dim"],
        config["num_heads"],
        config["ratio"],
        conv=config.get("conv_size") or 0,
        normalised=config.get("normalised", False),
        iterations=config.get("newton_iters", config.get("max_iter", 20)),
        step="batch",
    )


def compare(model: nn.Module, inputs: Mapping[str, Tensor], record: Mapping[str, Any]) -> dict[str, Tensor]:
    """Networks: stage1 to stage3 (maps), stage4 (tokens before the final norm), features (class token), logits."""
    if isinstance(model, Inverses):
        return _inverses(model, inputs["points"], inputs["g"])
    if isinstance(model, SoftmaxFreeAttention):
        return _gradients(model, inputs, record["config"])
    assert isinstance(model, Soft)
    with torch.no_grad():
        maps, tokens = model.run(inputs["image"], len(model.stages) - 1)
        assert tokens is not None
        features = model.norm(tokens)
        out = {f"stage{i + 1}": m for i, m in enumerate(maps[:-1])}
        pooled = model.pool(features)
        out |= {f"stage{len(maps)}": tokens, "features": pooled, "pooled": pooled}
        return out | {"logits": model.forward_head(features)}


def _gradients(model: SoftmaxFreeAttention, inputs: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Any]:
    x = inputs["x"].clone().requires_grad_()
    with torch.enable_grad():
        y = model(x.unflatten(1, (config["H"], config["W"]))).flatten(1, 2)
        out: dict[str, Any] = {"out": y.detach()}
        if "g" not in inputs:
            return out
        conv = model.conv.weight if model.conv is not None else None
        names = {
            "x": x,
            "landmark_conv": model.landmark.weight,
            "landmark_norm": model.landmark_norm.weight,
            "W_q": model.q.weight,
            "W_v": model.v.weight,
            "conv": conv,
            "ff": model.proj.weight,
        }
        wanted = {n: t for n, t in names.items() if t is not None}
        found = torch.autograd.grad((y * inputs["g"]).sum(), list(wanted.values()))
    return out | {f"grad_{n}": g for n, g in zip(wanted, found)}


def _inverses(model: Inverses, points: Tensor, g: Tensor) -> dict[str, Tensor]:
    p = points * model.scale
    kernel = gaussian_kernel(p, p)
    out = {"kernel": kernel}
    kinds: dict[str, Callable[[Tensor], Tensor]] = {
        "inverse": lambda k: newton_inverse(k, iterations=model.iterations),
        "norm_inverse": lambda k: newton_inverse_halved(k, iterations=model.iterations, step="batch"),
    }
    for name, inverse in kinds.items():
        with torch.enable_grad():
            k = kernel.clone().requires_grad_()
            found = inverse(k)
            (gradient,) = torch.autograd.grad((found * g).sum(), [k])
        out |= {name: found.detach(), f"{name}_grad": gradient}
    return out
