"""VOLO's parity records: sail-sg/volo, its network and its training by token labels."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lynceus.backbones.keys.volo import SOURCES as SOURCES
from lynceus.backbones.volo import VOLO, VOLOConfig
from lynceus.core.errors import AdviceError, unknown
from lynceus.layers.outlook import OutlookAttention
from lynceus.layers.token_mix import cut_box

# the authors' constructor names -> ours
_NAMES = {
    "layers": "layers",
    "in_chans": "in_chans",
    "num_classes": "num_classes",
    "patch_size": "patch_size",
    "stem_hidden_dim": "stem_width",
    "embed_dims": "embed_dims",
    "num_heads": "num_heads",
    "downsamples": "downsamples",
    "outlook_attention": "outlook",
    "mlp_ratios": "mlp_ratios",
    "qkv_bias": "qkv_bias",
    "qk_scale": "qk_scale",
    "drop_rate": "pos_drop",
    "attn_drop_rate": "attn_drop",
    "drop_path_rate": "drop_path_rate",
    "return_dense": "dense",
    "pooling_scale": "token_step",
    "out_kernel": "kernel",
    "out_stride": "stride",
    "out_padding": "padding",
    "layer_norm_eps": "norm_eps",
    "norm_eps": "norm_eps",
}
_UNUSED = {"norm_layer", "mix_token"}  # mixing is asked for by its box


def build(config: Mapping[str, Any], record: Mapping[str, Any] | None = None) -> nn.Module:
    """The model of a record, from the authors' constructor names; a record of outlook attention alone gives that."""
    if "dim" in config:
        return _layer(config)
    fields: dict[str, Any] = {}
    for name, value in config.items():
        if name in _UNUSED:
            continue
        if name == "img_size":
            fields["image_size"] = (value, value) if isinstance(value, int) else tuple(value)
        elif name == "post_layers":
            if any(layer != "ca" for layer in value or ()):
                raise AdviceError(f"The only layers after the groups are 'ca' (class attention), not {value}.")
            fields["class_layers"] = len(value or ())
        elif name == "return_mean":
            fields["pool"] = "avg" if value else "token"
        elif name in _NAMES:
            fields[_NAMES[name]] = tuple(value) if isinstance(value, (list, tuple)) else value
        else:
            raise unknown(
                "VOLO constructor argument", name, {*_NAMES, *_UNUSED, "img_size", "post_layers", "return_mean"}
            )
    fields.setdefault("class_layers", 0)
    first = (True, *[False] * (len(fields.get("layers", (0,) * 4)) - 1))
    for name in ("downsamples", "outlook"):
        fields.setdefault(name, first)
    fields.setdefault("mlp_ratios", (3.0,) * len(first))
    return VOLO(VOLOConfig(**fields))


def _layer(config: Mapping[str, Any]) -> nn.Module:
    """Outlook attention alone, by its own constructor names."""
    names = {
        "dim": "dim",
        "num_heads": "heads",
        "kernel_size": "kernel",
        "padding": "padding",
        "stride": "stride",
        "qkv_bias": "qkv_bias",
        "qk_scale": "scale",
        "attn_drop": "attn_drop",
        "proj_drop": "proj_drop",
    }
    odd = set(config) - set(names)
    if odd:
        raise unknown("OutlookAttention constructor argument", min(odd), names)
    return OutlookAttention(**{"padding": 1, **{names[k]: v for k, v in config.items()}})


def compare(model: nn.Module, inputs: Mapping[str, Tensor], record: Mapping[str, Any]) -> dict[str, Tensor]:
    """outlook, stage2 ..: maps b h w c leaving the groups; cls_tokens: after class attention and the final norm;
    logits. With `target_noise`: the training path with its mix box, and the three losses."""
    with torch.no_grad():
        if isinstance(model, OutlookAttention):
            out = model(next(iter(inputs.values())))
            return dict.fromkeys(record["outputs"], out)
        assert isinstance(model, VOLO)
        if "target_noise" in inputs:
            return _training(model, inputs, record)
        maps = model.run(model.embed(inputs["image"]))
        tokens = model.finish(maps[-1])
        found = {"outlook": maps[0], **{f"stage{i}": m for i, m in enumerate(maps, 1)}}
        return found | {
            "cls_tokens": tokens, "tokens": tokens, "features": model.pool(tokens), "logits": model.forward_head(tokens)
        }  # fmt: skip


def _training(model: VOLO, inputs: Mapping[str, Tensor], record: Mapping[str, Any]) -> dict[str, Tensor]:
    from lynceus.recipes.token_label import token_label_loss

    image = inputs["image"]
    rows, columns = model.run(model.embed(image[:1]))[-1].shape[1:3]
    box = cut_box(rows, columns, *_draws(record))
    logits, patches = model.token_logits(image, box)
    soft = inputs["target_noise"].softmax(1)
    true = F.one_hot(inputs["target_noise"][:, :, 0].argmax(1), soft.shape[1]).to(soft)
    target = torch.cat([true.unsqueeze(2), soft[:, :, 1:]], 2)
    losses = [
        token_label_loss(logits, patches, box, target)["loss"],
        token_label_loss(logits, patches, box, target, ground_truth=True)["loss"],
        token_label_loss(logits, patches, box, target[:, :, 1], dense_weight=1.0)["loss"],
    ]
    return {"cls": logits, "aux": patches, "box": torch.tensor(box), "losses": torch.stack(losses)}


def _draws(record: Mapping[str, Any]) -> tuple[float, int, int]:
    """The fixed lambda and centre of the mix box, which records tell in their note."""
    note = str(record.get("note", ""))
    keep = re.search(r"lambda\s*=\s*([\d.]*\d)", note)
    centre = re.search(r"centre draws \((\d+), (\d+)\)", note)
    if keep is None or centre is None:
        raise AdviceError("A record of mix-token says 'lambda=...' and 'centre draws (row, column)' in its note.")
    return float(keep[1]), int(centre[1]), int(centre[2])
