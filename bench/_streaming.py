"""The networks of `bench.streaming` as the package continual-inference has them, with the same weights."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn

from lynceus.rewrite.streaming import EachFrame, Parallel, Residual
from lynceus.rewrite.streaming.gate import SqueezeExcite3d
from lynceus.rewrite.streaming.graph import GraphConv, JointsIn, JointsOut
from lynceus.rewrite.streaming.pointwise import ChannelLinear
from lynceus.rewrite.streaming.pooling import WindowPool

BATCH_NORM = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def peer_of(module: Any, co: Any, space: int = 1) -> Any:
    """The continual module of a clip module; co: the package. space: side of the maps that a head pools over."""
    if isinstance(module, GraphConv):
        return co.forward_stepping(module)
    if isinstance(module, JointsIn):
        return co.Lambda(lambda x: _joints_in(module, x))
    if isinstance(module, JointsOut):
        return co.Lambda(lambda x: x.unflatten(0, (-1, module.skeletons)).mean(-1).mean(1))
    if isinstance(module, SqueezeExcite3d):
        pool = co.AdaptiveAvgPool3d((1, 1, 1), kernel_size=1)
        layers = OrderedDict(avg_pool=pool, fc1=co.Conv3d.build_from(module.fc1), fc1_act=nn.ReLU())
        layers |= OrderedDict(fc2=co.Conv3d.build_from(module.fc2), fc2_sig=nn.Sigmoid())
        return co.Residual(co.Sequential(layers), reduce="mul")
    if callable(getattr(module, "as_containers", None)):
        return peer_of(module.as_containers(), co, space)
    if isinstance(module, Residual):
        return co.Residual(peer_of(module.fn, co, space), residual_shrink=module.shrink is not None)
    if isinstance(module, Parallel):
        parts = [peer_of(m, co, space) for m in module.branches]
        longest = max(m.delay for m in parts)
        if module.shrink is None:
            return co.BroadcastReduce(*parts)
        aligned = [
            m if m.delay == longest else co.Sequential(m, co.Delay((longest - m.delay) // 2, auto_shrink=True))
            for m in parts
        ]
        return co.BroadcastReduce(*aligned, auto_delay=False)
    if isinstance(module, WindowPool):
        return co.AvgPool3d((module.window, space, space), stride=1)
    if isinstance(module, ChannelLinear):
        made = co.Linear(module.in_features, module.out_features, channel_dim=1)
        made.load_state_dict(module.state_dict())
        return made
    if isinstance(module, EachFrame):
        return co.Lambda(module.fn)
    if isinstance(module, nn.Sequential):
        return co.Sequential(OrderedDict((n, peer_of(m, co, space)) for n, m in module.named_children()))
    if isinstance(module, (nn.ReLU, nn.SiLU, nn.Dropout)):
        return module
    if isinstance(module, BATCH_NORM):
        return co.forward_stepping(module)
    return co.continual(module)


def _joints_in(module: JointsIn, x: Tensor) -> Tensor:
    """A frame (b, c, v, s), as the authors reshape it."""
    b, c, v, s = x.shape
    y = module.norm(x.permute(0, 3, 2, 1).contiguous().view(b, -1))
    return y.view(b, s, v, c).permute(0, 1, 3, 2).contiguous().view(-1, c, v)


def peer_encoder(encoder: nn.TransformerEncoder, window: int, co: Any) -> Any:
    return co.TransformerEncoder.build_from(encoder, window)


def warmed(peer: Any, frames: list[Tensor]) -> Any:
    """Steps through the frames; the last output."""
    y = None
    with torch.no_grad():
        for frame in frames:
            y = peer.forward_step(frame)
    return y
