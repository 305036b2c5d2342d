"""Expedite's parity records: the operators of Expedit-Segmenter, and the SAM encoders of Expedit-SAM."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lynceus.backbones.keys.sam_vit import SOURCES
from lynceus.backbones.sam_vit import SamViT, SamViTConfig
from lynceus.core.errors import AdviceError, unknown
from lynceus.core.rules import best_table
from lynceus.reengineer.filling import image
from lynceus.reengineer.parity import Row, authors_state, compare_outputs, make_input
from lynceus.rewrite.expedite import Expedite, cluster
from lynceus.rewrite.expedite.operators import means
from lynceus.rewrite.expedite.rewrite import SAM_SETTINGS

_NAMES = {
    "patch_size": "patch_size",
    "in_chans": "in_chans",
    "embed_dim": "dim",
    "depth": "depth",
    "num_heads": "heads",
    "mlp_ratio": "mlp_ratio",
    "out_chans": "out",
    "qkv_bias": "qkv_bias",
    "use_abs_pos": "absolute",
    "use_rel_pos": "relative",
    "window_size": "window",
    "norm_eps": "norm_eps",
}
_AUTHORS = {"use_rel_pos": False, "window_size": 0}  # their constructor's defaults; norms as `build_sam` sets them
_UNUSED = {"rel_pos_zero_init", "norm_layer", "act_layer", "use_hourglass"}
_OWN = {"img_size", "global_attn_indexes", *SAM_SETTINGS}


def check(record: Mapping[str, Any]) -> list[Row]:
    """Rows of one record: cases of the operators, or an encoder with and without clustering."""
    name = str(record.get("model", "expedite"))
    if "cases" in record:
        rows = []
        for i, case in enumerate(record["cases"]):
            wanted = {k: v for k, v in case.items() if k != "config"}
            rows += compare_outputs(f"{name} case {i}", operators(case["config"]), wanted)
        return rows
    lacking = [k for k in ("config", "state", "inputs", "outputs") if not isinstance(record.get(k), dict)]
    if lacking:
        raise AdviceError(f"{name} has neither cases nor {', '.join(lacking)}; it cannot be rebuilt.")
    model = build(record["config"])
    matching = best_table(authors_state(record), model, SOURCES, resize=False)
    if not matching.account.complete:
        raise AdviceError("The record's names do not all find their place.\n" + matching.account.text(expand=True))
    model.load_state_dict(matching.values, strict=False, assign=True)
    model.double().eval()
    count, rows = sum(p.numel() for p in model.parameters()), []
    if isinstance(record.get("parameters"), int):
        claimed = record["parameters"]
        rows.append(Row(record=name, output="parameter count", gap=abs(count - claimed) / claimed, tolerance=0.0))
    given = {k: make_input(v) for k, v in record["inputs"].items()}
    with torch.no_grad():
        outputs = encoded(model, record["config"], given["image"], record["outputs"])
    return [*rows, *compare_outputs(name, outputs, record["outputs"])]


def operators(config: Mapping[str, Any]) -> dict[str, Tensor]:
    """What the operators make of the features that a case describes."""
    odd = set(config) - {"s", "B", "C", "H", "W", "scale", "clusters", "iters", "temperature", "window", "k"}
    if odd:
        raise AdviceError(f"A case of the operators says {', '.join(sorted(odd))}, which nobody knows here.")
    seed, b, c, h, w = (int(config[k]) for k in ("s", "B", "C", "H", "W"))
    coarse = torch.from_numpy(image((b, c, h // 4 + 1, w // 4 + 1), seed))
    x = F.interpolate(coarse, (h, w), mode="bilinear", align_corners=False)
    x = config.get("scale", 1.0) * (x + 0.3 * torch.from_numpy(image((b, c, h, w), seed + 1)))
    given = config["clusters"]
    grid = (round(given**0.5),) * 2 if isinstance(given, int) else (int(given[0]), int(given[1]))
    tokens = x.flatten(2).transpose(1, 2)
    found = cluster(
        tokens,
        (h, w),
        grid,
        iterations=config.get("iters", 5),
        temperature=config.get("temperature", 0.02),
        window=config.get("window", 5),
    )
    refined = found.centres + 0.5 * torch.from_numpy(image(tuple(found.centres.shape), seed + 2))
    weights = found.weights(config.get("k", 20), "l2")
    return {
        "initial_centres": means(tokens, (h, w), grid),
        "cluster_tokens": found.centres,
        "hard_labels": found.labels(),
        "reconstructed": weights @ refined,
        "row_sum_of_weights": weights.sum(-1),
    }


def build(config: Mapping[str, Any]) -> SamViT:
    """The plain encoder of a record, from the authors' constructor names."""
    for name in config:
        if name not in {*_NAMES, *_UNUSED, *_OWN}:
            raise unknown("constructor argument of the encoder", name, {*_NAMES, *_UNUSED, *_OWN})
    fields = {_NAMES[k]: v for k, v in {**_AUTHORS, **config}.items() if k in _NAMES}
    size = config.get("img_size", 1024)
    fields["image_size"] = (size, size) if isinstance(size, int) else tuple(size)
    fields["global_blocks"] = tuple(i for i in config.get("global_attn_indexes", ()) if i < fields.get("depth", 12))
    return SamViT(SamViTConfig(**fields))


def hourglass(model: nn.Module, config: Mapping[str, Any]) -> Any:
    """The model with the clustering that a record's configuration asks for."""
    made: Any = Expedite.from_settings({k: v for k, v in config.items() if k in SAM_SETTINGS})(model)
    made.as_released = True
    return made


def encoded(model: SamViT, config: Mapping[str, Any], pixels: Tensor, wanted: Mapping[str, Any]) -> dict[str, Tensor]:
    """blockK: what leaves block K (clusters, where it runs on those); output, output_without_clustering: the neck's."""
    side = model.config.patch_size  # their convolution leaves out what fills no patch
    pixels = pixels[..., : pixels.shape[-2] // side * side, : pixels.shape[-1] // side * side]
    fast: Any = hourglass(model, config)
    blocks = [int(k[5:]) for k in wanted if k.startswith("block") and k[5:].isdigit()]
    x, kept = fast.through(fast.embed(pixels), blocks, whole=False)
    return {
        **{f"block{i}": kept[i] for i in blocks},
        "output": fast.neck(x.permute(0, 3, 1, 2)),
        "output_without_clustering": model.forward_stages(pixels)[-1],
    }
