"""What pruning gains on one prompt: prefill time beside counted and modelled FLOPs, and pictures of what was kept."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from lynceus.core import plots
from lynceus.core.counter import Counting, named
from lynceus.core.errors import AdviceError
from lynceus.core.report import Report, environment
from lynceus.rewrite.vlm_tokens import VlmTokens, decoder_of, watch
from lynceus.rewrite.vlm_tokens.choose import length
from lynceus.rewrite.vlm_tokens.flops import Shape, prefill
from lynceus.rewrite.vlm_tokens.passes import Kept

SHARE = 0.6  # of the saving in FLOPs; where the measured one is less, the report says where the time goes


def measure(
    model: nn.Module, pruned: nn.Module, inputs: Mapping[str, Any], *, repeats: int = 5, seed: int = 0
) -> Report:
    """Rows "dense" and "pruned": milliseconds of the decoder's prefill and of the whole forward (medians over `repeats`
    turns of both, in turns), counted and modelled multiply-adds of the decoder, share of image tokens.

    inputs: of the model's forward, one prompt or a batch. summary: what is saved of each, the saving of time as a share
    of that of FLOPs, and the model's error. arrays: which of the first row's image tokens were there after each cut."""
    by = getattr(pruned, "rewrite", None)
    if not isinstance(by, VlmTokens) or repeats < 1:
        raise AdviceError(
            "measure takes a model, prune(model, ...) of it, the inputs of its forward, and repeats >= 1."
        )
    nets = {"dense": model.eval(), "pruned": pruned.eval()}
    call = dict(inputs)
    if hasattr(decoder_of(model), "config") and decoder_of(model) is not model:
        call |= {"use_cache": True, "logits_to_keep": 1}
    calls = {"dense": {k: v for k, v in call.items() if k != "image_tokens"}, "pruned": call}
    with torch.no_grad(), watch() as seen:
        counted = {name: _macs(net, calls[name]) for name, net in nets.items()}
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in nets}
        for turn in range(repeats + 1):
            for name, net in nets.items():
                spent = _timed(net, calls[name])
                if turn:  # the first warms up
                    times[name].append(spent)
    kept = seen[0]
    depth, full = len(decoder_of(model).layers), int(kept.image.shape[1])
    tokens = {"dense": [full] * depth, "pruned": _widths(kept, depth)}
    shape, batch = shape_of(model), len(kept.image)
    report = Report(name="Prefill with fewer image tokens", environment=environment(seed))
    for name in nets:
        row: dict[str, Any] = {
            "model": name,
            "decoder ms": 1e3 * statistics.median(t[0] for t in times[name]),
            "whole ms": 1e3 * statistics.median(t[1] for t in times[name]),
            "MACs": counted[name],
        }
        if shape is not None:
            row["MACs by model"] = batch * prefill(shape, tokens[name])
        row["image tokens"] = _share(kept, tokens[name], full) if name == "pruned" else 1.0
        report.rows.append(row)
    dense, short = report.rows
    saved = {k: 1 - short[k] / dense[k] for k in dense if k not in ("model", "image tokens") and dense[k]}
    ratios = [1 - b[0] / a[0] for a, b in zip(times["dense"], times["pruned"])]
    report.summary = {
        "prefill time saved": statistics.median(ratios),
        "FLOPs saved": saved["MACs"],
        "time saved / FLOPs saved": statistics.median(ratios) / saved["MACs"] if saved["MACs"] else float("nan"),
    }
    if shape is not None:
        report.summary |= {
            "FLOPs saved by model": saved["MACs by model"],
            "model error": max(abs(r["MACs by model"] / r["MACs"] - 1) for r in report.rows),
        }
    report.answer = (
        f"{by.method} cuts the decoder's prefill from {dense['decoder ms']:.1f} to {short['decoder ms']:.1f} ms "
        f"({saved['MACs']:.0%} fewer FLOPs)."
    )
    cuts = [f"layer {k}: {tokens['pruned'][k]} of {full} tokens" for k in kept.layers]
    report.notes.append(
        f"Cuts before {'; '.join(cuts)}. FLOPs are those of the decoder's {depth} layers and of scoring."
    )
    if saved["MACs"] > 0 and report.summary["time saved / FLOPs saved"] < SHARE:
        report.notes.append(
            f"Less than {SHARE:.0%} of the FLOPs saved shows in time: layers on {min(tokens['pruned'])} tokens are too "
            "small for this machine to run in proportion; longer prompts, wider models and larger batches gain more."
        )
    for k in kept.layers:
        report.arrays[f"kept_{k}"] = kept.picture(k).cpu().numpy()
    return report


def picture(
    image: Float[Tensor, "3 h w"] | None, kept: Mapping[int, Tensor] | Kept, tile: tuple[int, int]
) -> dict[str, bytes]:
    """One PNG: the image with dropped tokens darkened, for each cut. tile: (rows, columns) of the image's tokens."""
    masks = {k: kept.picture(k) for k in kept.layers} if isinstance(kept, Kept) else dict(kept)
    if image is None:
        image = torch.full((3, 16 * tile[0], 16 * tile[1]), 0.8)
    views, names = [image], ["all tokens"]
    for k, mask in masks.items():
        if mask.numel() != length([tile]):
            raise AdviceError(f"{mask.numel()} image tokens are no grid of {tile[0]} x {tile[1]}.")
        light = torch.where(mask.view(1, 1, *tile), 1.0, 0.15).to(image)
        light = nn.functional.interpolate(light, size=image.shape[-2:], mode="nearest")[0]
        views.append(image * light)
        names.append(f"from layer {k}: {int(mask.sum())}")
    return {"kept.png": plots.image_grid(views, captions=names, side=192)}


def pixels_of(image: Any, size: tuple[int, int] | None) -> Float[Tensor, "3 h w"]:
    """A PIL image as pixels in [0, 1], resized to (height, width)."""
    image = image.convert("RGB")
    if size is not None:
        image = image.resize((size[1], size[0]))
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1).float() / 255


def shape_of(model: nn.Module) -> Shape | None:
    """Widths of the decoder's layers for the cost model; None where they are not those of Llama and its kin."""
    decoder: Any = decoder_of(model)
    config: Any = getattr(decoder, "config", None)
    layer = decoder.layers[0]
    if config is None or not hasattr(config, "intermediate_size"):
        return None
    return Shape(
        width=config.hidden_size,
        hidden=config.intermediate_size,
        gated=hasattr(getattr(layer, "mlp", None), "gate_proj"),
        heads=config.num_attention_heads,
        kv_heads=getattr(config, "num_key_value_heads", None),
        head_dim=getattr(getattr(layer, "self_attn", None), "head_dim", None),
    )


def _widths(kept: Kept, depth: int) -> list[int]:
    """Tokens that each layer computes on: the most of any row."""
    rows = [kept.counts(depth, i) for i in range(len(kept.image))]
    return [max(r[i] for r in rows) for i in range(depth)]


def _share(kept: Kept, tokens: Sequence[int], full: int) -> float:
    """Image tokens of the first row that are there, averaged over layers."""
    image = int(kept.image[0].sum())
    text = full - image
    return sum(max(0, t - text) for t in tokens) / (image * len(tokens))


def _macs(net: nn.Module, call: Mapping[str, Any]) -> int:
    """Of the decoder, scoring included."""
    decoder = decoder_of(net)
    name = next(n for n, m in net.named_modules() if m is decoder)
    counting = Counting()
    with named(net, counting), counting:
        net(**call)
    return counting.flops[name] // 2


def _timed(net: nn.Module, call: Mapping[str, Any]) -> tuple[float, float]:
    """Seconds of the decoder and of the whole forward."""
    decoder = decoder_of(net)
    with _clock(decoder) as marks:
        start = _now(decoder)
        net(**call)
        end = _now(decoder)
    return marks[1] - marks[0], end - start


@contextmanager
def _clock(module: nn.Module) -> Iterator[list[float]]:
    marks: list[float] = []
    handles = [
        module.register_forward_pre_hook(lambda m, args: marks.append(_now(m)), prepend=True),
        module.register_forward_hook(lambda m, args, out: marks.append(_now(m))),
    ]
    try:
        yield marks
    finally:
        for handle in handles:
            handle.remove()


def _now(module: nn.Module) -> float:
    device = next(module.parameters()).device
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
