"""Conversion of ordinary modules: a walk through the clip model that gives each layer its node, or names what has none.

Only containers are walked into (nn.Sequential, Residual, Parallel); a class with a forward of its own says nothing
about time, so it has to be built from these, or be wrapped in `EachFrame`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import nn

from lynceus.core.errors import AdviceError
from lynceus.rewrite.streaming import pooling
from lynceus.rewrite.streaming.attention import RetroactiveNode, SingleOutputNode, WindowAttention
from lynceus.rewrite.streaming.branches import Branches, Identity, Parallel, Residual
from lynceus.rewrite.streaming.clock import Rate
from lynceus.rewrite.streaming.conv import ConvNode
from lynceus.rewrite.streaming.encoder_nodes import EncoderNode, Layer, PositionsNode, RecyclingPositions
from lynceus.rewrite.streaming.node import Applied, Chain, Fill, Node
from lynceus.rewrite.streaming.pointwise import (
    AlongAxis,
    BatchNormNode,
    EachFrame,
    FlattenNode,
    LinearNode,
    axis_in_frame,
)

CONV = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
BATCH_NORM = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
ALONG = (nn.Softmax, nn.LogSoftmax, nn.Softmin, nn.GLU)
ELEMENTWISE = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish, nn.Sigmoid, nn.Tanh,
    nn.Hardtanh, nn.Hardsigmoid, nn.Hardswish, nn.Hardshrink, nn.Softplus, nn.Softshrink, nn.Softsign, nn.LogSigmoid,
    nn.Tanhshrink, nn.Threshold, nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout,
    nn.FeatureAlphaDropout,
)  # fmt: skip
POOLS = (*pooling.AVERAGE, *pooling.MAXIMUM)
GLOBAL_POOLS = (*pooling.GLOBAL_AVERAGE, *pooling.GLOBAL_MAXIMUM)
ACROSS_TIME = {
    "BatchNorm without running statistics": "its statistics are taken over the clip; set track_running_stats=True",
    nn.GroupNorm: "its statistics are taken over all time steps of a clip; take a batch norm, or EachFrame(GroupNorm)",
    nn.InstanceNorm1d: "its statistics are taken over all time steps of a clip; take a batch norm",
    nn.InstanceNorm2d: "its statistics are taken over all time steps of a clip; take a batch norm, or EachFrame(...)",
    nn.InstanceNorm3d: "its statistics are taken over all time steps of a clip; take a batch norm",
    nn.LocalResponseNorm: "it is not known per time step; wrap it in EachFrame",
    nn.RNNBase: "it gives a pair and carries a state of its own; step it with its own hidden state",
    nn.modules.conv._ConvTransposeNd: "it answers several times per frame",
    nn.Upsample: "it makes time steps of its own",
    nn.TransformerDecoderLayer: "it looks at a second sequence",
    nn.TransformerDecoder: "it looks at a second sequence",
    nn.MultiheadAttention: "it takes three inputs; take streaming.WindowAttention, or nn.TransformerEncoderLayer",
}


@dataclass
class Walk:
    """Where the walk is: the rate of arrivals, the axis of time in clips (None once flattened away), the rank of clips,
    and whether a clip has one time step left."""

    window: int | None
    fill: Fill
    time: int | None
    rank: int | None
    rate: Rate = field(default_factory=Rate)
    pooled: bool = False


def node_of(module: nn.Module, walk: Walk) -> Node:
    """The node of a clip model, placed; an AdviceError names the first module that cannot be streamed."""
    return _node(module, type(module).__name__, walk)


def axes_of(module: nn.Module) -> tuple[int, int | None]:
    """(axis of time, rank) of the clips that a model takes, told by its first layer that knows."""
    for m in module.modules():
        declared = getattr(m, "time_axis", None)
        if declared is not None:
            return int(declared), getattr(m, "clip_rank", 3 if declared == 1 else None)
        if isinstance(m, (nn.TransformerEncoderLayer, nn.MultiheadAttention)):
            first = m.self_attn if isinstance(m, nn.TransformerEncoderLayer) else m
            return (1 if first.batch_first else 0), 3
        if isinstance(m, (*CONV, *POOLS, *GLOBAL_POOLS)):
            return 2, 2 + int(type(m).__name__[-2])
        if isinstance(m, (nn.BatchNorm2d, nn.BatchNorm3d)):
            return 2, 2 + int(type(m).__name__[-2])
    return 2, None


def _node(module: nn.Module, name: str, walk: Walk) -> Node:
    start = walk.rate
    node = _built(module, name, walk)
    walk.rate = node.place(start)  # containers place what is inside again, from where they stand
    return node


def _built(module: Any, name: str, walk: Walk) -> Node:
    where = f"{type(module).__name__} ({name})" if name != type(module).__name__ else name
    if callable(getattr(module, "as_containers", None)) and (inner := module.as_containers()) is not None:
        return _built(inner, name, walk)
    if callable(getattr(module, "stream_node", None)):
        walk.rank = getattr(module, "rank_after", walk.rank)
        own: Node = module.stream_node(where)
        return own
    if isinstance(module, nn.Sequential):
        return _chain(module, name, walk)
    if isinstance(module, Residual):
        return _branches([None, module.fn], ["", "fn"], module, name, walk)
    if isinstance(module, Parallel):
        names = [f"branches.{i}" for i in range(len(module.branches))]
        return _branches(list(module.branches), names, module, name, walk)
    if isinstance(module, CONV):
        _fits(module, where, walk)
        return ConvNode(where, module, walk.fill)
    if isinstance(module, BATCH_NORM):
        _fits(module, where, walk)
        if module.running_mean is None:
            raise AdviceError(f"{where} takes its statistics over the clip; set track_running_stats=True.")
        return BatchNormNode(where, module)
    if isinstance(module, POOLS):
        _fits(module, where, walk)
        return pooling.windowed_pool(where, module, walk.fill)
    if isinstance(module, GLOBAL_POOLS):
        return _global_pool(module, where, walk)
    if isinstance(module, ELEMENTWISE) or (isinstance(module, nn.PReLU) and module.num_parameters == 1):
        return Applied(where, module)
    if isinstance(module, nn.PReLU):
        return Applied(where, module)
    if isinstance(module, nn.Softmax2d):
        return AlongAxis(where, nn.Softmax(dim=1), 1)
    if isinstance(module, ALONG):
        return AlongAxis(where, module, axis_in_frame(module.dim, time=walk.time, rank=walk.rank, what=where))
    if isinstance(module, nn.LayerNorm):
        _last_axes(len(module.normalized_shape), where, walk)
        return Applied(where, module)
    if isinstance(module, nn.Linear):
        _last_axes(1, where, walk)
        return LinearNode(where, module)
    if isinstance(module, nn.Flatten):
        return _flatten(module, where, walk)
    if isinstance(module, EachFrame):
        walk.rank = None
        return Applied(where, module.fn)
    if isinstance(module, RecyclingPositions):
        return PositionsNode(where, module)
    if isinstance(module, WindowAttention):
        if module.query is None:
            return RetroactiveNode(where, module.mha, module.window)
        return SingleOutputNode(where, module.mha, module.window, module.query)
    if isinstance(module, (nn.TransformerEncoder, nn.TransformerEncoderLayer)):
        return _encoder(module, name, walk)
    for kind, why in ACROSS_TIME.items():
        if isinstance(kind, type) and isinstance(module, kind):
            raise AdviceError(f"{where} cannot be streamed: {why}.")
    raise AdviceError(
        f"{where} cannot be converted: its forward is its own, and may look across time. Build it from nn.Sequential, "
        "streaming.Residual and streaming.Parallel, or wrap what treats every frame alike: streaming.EachFrame(module)."
    )


def _chain(module: nn.Sequential, name: str, walk: Walk) -> Chain:
    """Its layers; a batch norm and an activation right behind a convolution go into the convolution's node."""
    own = type(module).__name__
    prefix = "" if name == own else f"{name}."
    nodes: list[Node] = []
    for child, layer in module.named_children():
        node = _node(layer, f"{prefix}{child}", walk)
        last = nodes[-1] if nodes else None
        if isinstance(last, ConvNode) and last.act is None:
            if isinstance(node, BatchNormNode) and last.norm is None:
                last.norm = node
                continue
            if type(layer) in (nn.ReLU, nn.SiLU, nn.Sigmoid, nn.GELU):
                last.act = layer
                continue
        if isinstance(layer, nn.Dropout | nn.Dropout1d | nn.Dropout2d | nn.Dropout3d | nn.Identity):
            continue  # nothing in eval mode
        nodes.append(node)
    return Chain(name, nodes)


def _branches(parts: list[Any], names: list[str], module: Any, name: str, walk: Walk) -> Node:
    start, nodes = walk.rate, []
    time, rank, pooled = walk.time, walk.rank, walk.pooled
    for part, own in zip(parts, names):
        walk.rate, walk.time, walk.rank, walk.pooled = start, time, rank, pooled
        nodes.append(Identity(name) if part is None else _node(part, f"{name}.{own}", walk))
        if part is None:
            nodes[-1].place(start)
    walk.rate, walk.time, walk.pooled = start, time, pooled
    return Branches(f"{type(module).__name__} ({name})", nodes, reduce=module.reduce, shrink=module.shrink)


def _global_pool(module: nn.Module, where: str, walk: Walk) -> Node:
    _fits(module, where, walk)
    pooling.pools_all_time(module)
    window = getattr(module, "window", None)
    if window is None:
        if walk.window is None:
            raise AdviceError(
                f"{where} averages over the whole clip; say how many frames a clip has: convert(model, window=16)."
            )
        window = walk.rate.arrivals(walk.window)
        if window < 1:
            raise AdviceError(
                f"A clip of window={walk.window} frames leaves nothing for {where}, which stands behind layers that "
                f"take {walk.rate.lost} away; give a longer window."
            )
    walk.pooled = True
    return pooling.global_pool(where, module, window, walk.fill)


def _encoder(module: Any, name: str, walk: Walk) -> Node:
    if walk.window is None:
        raise AdviceError(
            f"{type(module).__name__} ({name}) attends to a whole window; say how many tokens it has: "
            "convert(model, window=64)."
        )
    layers, norm = [module], None
    if isinstance(module, nn.TransformerEncoder):
        layers, norm = list(module.layers), module.norm
        if norm is not None and not isinstance(norm, nn.LayerNorm):
            raise AdviceError(f"{name}.norm is a {type(norm).__name__}; a stream takes nn.LayerNorm there.")
        if not layers:
            raise AdviceError(f"{name} has no layers.")
    window = walk.rate.arrivals(walk.window)
    named = [Layer(f"{name}.layers.{i}" if norm or len(layers) > 1 else name, m) for i, m in enumerate(layers)]
    return EncoderNode(f"{type(module).__name__} ({name})", named, norm, window)


def _fits(module: Any, where: str, walk: Walk) -> None:
    """Layers whose first axis behind the channels is time must stand where that is so."""
    if walk.time != 2:
        raise AdviceError(
            f"{where} takes (batch, channels, ...), but here "
            + ("time was pooled away." if walk.time is None else f"time is axis {walk.time}.")
        )
    if isinstance(module, nn.BatchNorm1d):
        return
    if walk.pooled and _along_time(module) > 1:
        raise AdviceError(
            f"{where} looks at several time steps, but the pooling before it leaves one of a whole clip; put it before "
            "the pooling."
        )
    rank = 2 + int(type(module).__name__[-2])
    if walk.rank is not None and walk.rank != rank:
        raise AdviceError(f"{where} takes {rank} axes with time; the layers before it give {walk.rank}.")


def _along_time(module: Any) -> int:
    """The kernel along time of a convolution or pooling."""
    kernel = getattr(module, "kernel_size", 1)
    return int(kernel if isinstance(kernel, int) else kernel[0])


def _last_axes(count: int, where: str, walk: Walk) -> None:
    if walk.time is None:
        return
    if walk.rank is None or walk.time >= walk.rank - count:
        raise AdviceError(
            f"{where} works along time, which is the last axis here, so it needs the whole clip; a convolution with a "
            "kernel of 1 does it per time step, and behind a global pooling it is fine as it is."
        )


def _flatten(module: nn.Flatten, where: str, walk: Walk) -> Node:
    rank, time = walk.rank, walk.time
    if rank is None:
        raise AdviceError(f"{where} stands before anything that tells how many axes there are; put it further back.")
    start, end = module.start_dim % rank, module.end_dim % rank
    if time is None:
        shift = 0
    elif start <= time <= end:
        if not walk.pooled:
            raise AdviceError(
                f"{where} flattens time into the channels, so it needs the whole clip; pool over time before it "
                "(nn.AdaptiveAvgPool), or flatten space alone with start_dim=3."
            )
        walk.time, shift = None, 0
        end -= 1
    else:
        shift = 1 if start > time else 0
        walk.time = time - (end - start) if time > end else time
    walk.rank = rank - (end - start) - (1 if time is not None and walk.time is None else 0)
    return FlattenNode(where, start - shift, end - shift)
