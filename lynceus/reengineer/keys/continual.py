"""Continual inference's parity records: video, skeleton and token networks, on clips and frame by frame."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lynceus.core.errors import AdviceError, unknown
from lynceus.core.rules import Rule
from lynceus.rewrite.streaming import Residual, Streaming, WindowAttention
from lynceus.rewrite.streaming.names import AUTHORS
from lynceus.rewrite.streaming.st_gcn import NTU, STGCN, STGCNConfig
from lynceus.rewrite.streaming.x3d import X3D, X3DConfig

SOURCES: dict[str, tuple[Rule, ...]] = {"authors": AUTHORS}


def build(config: Mapping[str, Any], record: Mapping[str, Any]) -> nn.Module:
    """The clip model of a record, told by config.model."""
    kind = str(config.get("model"))
    found = next((f for name, f in _KINDS.items() if kind == name), None)
    if found is None:
        raise unknown("continual model", kind, _KINDS)
    return found(config, record)


def _x3d(c: Mapping[str, Any], record: Mapping[str, Any]) -> nn.Module:
    return X3D(
        X3DConfig(
            num_classes=c["classes"],
            in_chans=next(iter(record["inputs"].values()))["shape"][1],
            frames=c["temporal_window"],
            image_size=c["image_size"],
            stem=c.get("conv1_dim", 12),
            head=c.get("conv5_dim", 2048),
            width=c.get("width_factor", 2.0),
            depth=c.get("depth_factor", 2.2),
            bottleneck=c.get("bottleneck_factor", 2.25),
            se_ratio=c.get("se_ratio", 1 / 16),
            squeeze="clip",  # what their clips do whatever se_scope says
            depthwise=bool(c.get("channelwise", True)),
            head_norm=bool(c.get("head_batchnorm", False)),
            activation=c.get("head", "softmax"),
        )
    )


def _st_gcn(c: Mapping[str, Any], record: Mapping[str, Any]) -> nn.Module:
    edges = c.get("edges_inward")
    widths = [record["state"][f"layers.layer{i}.{n}gcn.bn.weight"][0] for i in range(1, 99) for n in ("", "0.1.")
              if f"layers.layer{i}.{n}gcn.bn.weight" in record["state"]]  # fmt: skip
    return STGCN(
        STGCNConfig(
            num_classes=c["classes"],
            in_chans=c.get("channels_in", 3),
            frames=c["frames"],
            joints=c["joints"],
            skeletons=c["skeletons"],
            edges=NTU if edges is None and c["joints"] == 25 else tuple((int(a), int(b)) for a, b in edges or ()),
            padded=_padded(c),
            widths=tuple(widths),
            kernel=c.get("temporal_kernel", 9),
            pool=c.get("pool_size"),
            pool_padding=c.get("pool_padding"),
        )
    )


def _padded(c: Mapping[str, Any]) -> bool:
    if "layers_padding" in c:
        return bool(c["layers_padding"] > 0)
    return not str(c["model"]).endswith("_mod")


def _stack(c: Mapping[str, Any], record: Mapping[str, Any]) -> nn.Module:
    n, k = c["channels"], c["kernel_time"]
    body = OrderedDict(dw=nn.Conv3d(n, n, 3, padding=1, groups=n, bias=False), bn=nn.BatchNorm3d(n), act=nn.SiLU())
    classes = record["state"]["head.weight"][0]
    layers: dict[str, nn.Module] = {
        "conv1": nn.Conv3d(c["in_channels"], n, (k, 3, 3), stride=(1, 2, 2), padding=(0, 1, 1)),
        "bn1": nn.BatchNorm3d(n),
        "relu": nn.ReLU(),
        "res": Residual(nn.Sequential(body)),
        "res2": Residual(nn.Conv3d(n, n, (5, 1, 1)), shrink="centred"),
        "down": nn.Conv3d(n, 2 * n, (3, 1, 1), stride=(c["stride_time"], 1, 1), padding=(1, 0, 0)),
        "avg": nn.AvgPool3d((c["pool_time"], 2, 2), stride=(1, 2, 2)),
        "max": nn.MaxPool3d((2, 1, 1), stride=1),
        "head": nn.Conv3d(2 * n, classes, 1),
    }
    return nn.Sequential(OrderedDict(layers))


def _encoder(c: Mapping[str, Any], record: Mapping[str, Any]) -> nn.Module:
    layer = nn.TransformerEncoderLayer(
        c["d_model"], c["heads"], c["feedforward"], activation=c.get("activation", "relu"), batch_first=True,
        layer_norm_eps=c.get("eps", 1e-5), norm_first=c.get("norm_order", "post") == "pre",
    )  # fmt: skip
    norm = nn.LayerNorm(c["d_model"], eps=c.get("final_norm_eps", 1e-5)) if c.get("final_norm") else None
    return nn.TransformerEncoder(layer, c["layers"], norm, enable_nested_tensor=False)


def _attention(c: Mapping[str, Any], record: Mapping[str, Any]) -> nn.Module:
    query = None if str(c["model"]).startswith("retro") else c.get("query_index", -1)
    bias = "mha.in_proj_bias" in record["state"]
    return WindowAttention(c["embed"], c["heads"], window=c["sequence_len"], query=query, bias=bias)


_KINDS = {
    "CoX3D": _x3d,
    "cost_gcn": _st_gcn,
    "cost_gcn_mod": _st_gcn,
    "conv stack": _stack,
    "continual transformer encoder": _encoder,
    "retro continual attention": _attention,
    "single continual attention": _attention,
}


def compare(model: nn.Module, inputs: Mapping[str, Tensor], record: Mapping[str, Any]) -> dict[str, Tensor]:
    """Clips through the model, streams through its conversion; each under the names that the record gives."""
    config, wanted = record["config"], record["outputs"]
    window = config.get("sequence_len")
    tokens = window is not None
    out: dict[str, Tensor] = {}
    clip = inputs.get("clip")
    if clip is not None:
        out |= _clip(model, clip)
    elif tokens:
        x = inputs["stream"].transpose(1, 2)
        y = model(x[:, :window]).transpose(1, 2)
        one = wanted.get("window_forward", {}).get("shape", [0])[-1] == 1 and window > 1
        at = getattr(model, "query", None)
        out["window_forward"] = y[:, :, [window - 1 if at is None else at]] if one else y
    else:
        out["forward"] = model(inputs["stream"])
    if "stream" in inputs:
        out |= _stream(model, inputs["stream"], record, window)
    return {name: out[name] for name in wanted if name in out}


def _clip(model: nn.Module, clip: Tensor) -> dict[str, Tensor]:
    if isinstance(model, X3D):
        maps = model.forward_stages(clip)
        out = dict(zip(("stem", "stage1", "stage2", "stage3", "stage4"), maps))
        out["head_features"] = model.head[:3](maps[-1])
        out["probabilities"] = model.head(maps[-1])
        return out
    assert isinstance(model, STGCN)
    maps = model.forward_stages(clip)
    out = {"nodes": maps[0]} | {f"layer{i}": m for i, m in enumerate(maps[1:], 1)}
    out["logits"] = model(clip)
    return out


def _stream(model: nn.Module, stream: Tensor, record: Mapping[str, Any], window: int | None) -> dict[str, Tensor]:
    config = record["config"]
    if isinstance(model, X3D) and config.get("se_scope", "frame") == "frame":
        for m in model.modules():
            if hasattr(m, "window") and hasattr(m, "fc1"):
                m.window = None  # type: ignore[assignment]
    converted = Streaming(window=window, fill=config.get("temporal_fill", "zeros"))(model)
    axis = 1 if window is not None else 2
    frames = stream.transpose(1, 2) if window is not None else stream
    outputs, at, state = [], [], converted.start(frames.select(axis, 0))
    for t, frame in enumerate(frames.unbind(axis)):
        y, state = converted.step(frame, state)
        if y is not None:
            outputs.append(y.transpose(1, 2) if y.ndim == 3 and window is not None else y)
            at.append(t)
    if not outputs:
        raise AdviceError(f"{stream.shape[2]} frames give no output; the first comes at frame {converted.delay}.")
    said = config.get("output_steps")
    first = config.get("first_output_step", config.get("delay"))
    if (said is not None and at != list(said)) or (first is not None and at[0] != first):
        raise AdviceError(f"Our outputs come at the frames {at}, the record's at {said or first}.")
    stacked = torch.stack(outputs, 2 if "forward" in record["outputs"] else 0)
    return dict.fromkeys(("stream", "stream_logits", "stream_probabilities"), stacked)
