"""ST-GCN, and CoST-GCN as its stream: graph convolution over a skeleton's joints, convolution over time.

Yan, Xiong, Lin, Spatial Temporal Graph Convolutional Networks for Skeleton-Based Action Recognition, AAAI 2018,
arXiv 1801.07455; in continual form: Hedegaard, Heidari, Iosifidis, Continual Spatio-Temporal Graph Convolutional
Networks, Pattern Recognition 2023, arXiv 2203.11009. Reference code: LukasHedegaard/continual-skeletons (Apache-2.0).

The paper's starred variant (here `padded=False`) has neither padding nor stride in time: a stream of it gives an output
per frame, equal to that of the clip.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lynceus.core.errors import AdviceError
from lynceus.rewrite.streaming.branches import Parallel, Residual, joined
from lynceus.rewrite.streaming.graph import GraphConv, JointsIn, JointsOut
from lynceus.rewrite.streaming.pointwise import ChannelLinear

# (joint, its neighbour towards the centre of the body)
NTU = (
    (0, 1), (1, 20), (2, 20), (3, 2), (4, 20), (5, 4), (6, 5), (7, 6), (8, 20), (9, 8), (10, 9), (11, 10), (12, 0),
    (13, 12), (14, 13), (15, 14), (16, 0), (17, 16), (18, 17), (19, 18), (21, 22), (22, 7), (23, 24), (24, 11),
)  # fmt: skip
KINETICS = (
    (4, 3), (3, 2), (7, 6), (6, 5), (13, 12), (12, 11), (10, 9), (9, 8), (11, 5), (8, 2), (5, 1), (2, 1), (0, 1),
    (15, 0), (14, 0), (17, 15), (16, 14),
)  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class STGCNConfig:
    """frames: of a clip. edges: (joint, neighbour towards the centre). padded: kernels of 9 padded with 4 and strides
    of 2 in the blocks where the width grows, as in ST-GCN; else neither. pool, pool_padding: window of the average over
    time, in steps of the last block; None: what makes a stream see `frames` frames."""

    num_classes: int = 60
    in_chans: int = 3
    frames: int = 300
    joints: int = 25
    skeletons: int = 2
    edges: tuple[tuple[int, int], ...] = NTU
    padded: bool = False
    widths: tuple[int, ...] = (64, 64, 64, 64, 128, 128, 128, 256, 256, 256)
    kernel: int = 9
    pool: int | None = None
    pool_padding: int | None = None

    def __post_init__(self) -> None:
        if self.kernel % 2 == 0 or self.kernel < 1:
            raise AdviceError(f"kernel is odd, so that a residual has a middle; not {self.kernel}.")
        top = max((max(e) for e in self.edges), default=0)
        if top >= self.joints:
            raise AdviceError(f"The edges name joint {top}; there are joints 0 to {self.joints - 1}.")
        if not self.widths:
            raise AdviceError("widths names the channels of at least one block.")

    @property
    def strides(self) -> tuple[int, ...]:
        before = (self.widths[0], *self.widths[:-1])
        return tuple(2 if self.padded and w != b else 1 for b, w in zip(before, self.widths))

    def pooling(self) -> tuple[int, int]:
        """(window, padding) of the average over time."""
        reach, padding, stride = 1, 0, 1
        for s in self.strides:
            reach += stride * (self.kernel - 1)
            padding += stride * (self.kernel // 2 if self.padded else 0)
            stride *= s
        size = self.pool or math.ceil((self.frames - reach + 2 * padding + 1) / stride)
        if size < 1:
            raise AdviceError(
                f"{self.frames} frames are fewer than the {reach} that the blocks look at; take at least so many."
            )
        seen = math.ceil((self.frames - reach + padding + 1) / stride)
        return size, max(0, size - seen) if self.pool_padding is None else self.pool_padding


class TemporalConv(nn.Sequential):
    """Convolution over time and its batch norm, on (b, c, t, v)."""

    def __init__(self, inputs: int, outputs: int, kernel: int, *, stride: int = 1, padding: int = 0):
        conv = nn.Conv2d(inputs, outputs, (kernel, 1), stride=(stride, 1), padding=(padding, 0))
        super().__init__(OrderedDict(t_conv=conv, bn=nn.BatchNorm2d(outputs)))
        nn.init.kaiming_normal_(conv.weight, mode="fan_out")
        nn.init.zeros_(conv.bias)  # type: ignore[arg-type]


class STBlock(nn.Module):
    """Graph convolution, temporal convolution, residual, ReLU, on (b, c, t, v)."""

    def __init__(
        self, inputs: int, outputs: int, graph: Tensor, *, kernel: int, stride: int, padding: int, residual: bool
    ):
        super().__init__()
        self.gcn = GraphConv(inputs, outputs, graph)
        self.tcn = TemporalConv(outputs, outputs, kernel, stride=stride, padding=padding)
        self.relu = nn.ReLU()
        self.has_residual = residual
        self.shrink = None if 2 * padding == kernel - 1 else "centred"
        self.residual: nn.Module | None = None
        if residual and (inputs != outputs or stride != 1):
            self.residual = TemporalConv(inputs, outputs, 1, stride=stride)

    def forward(self, x: Float[Tensor, "b c t v"]) -> Float[Tensor, "b d u v"]:
        y = self.tcn(self.gcn(x))
        if self.has_residual:
            y = joined([x if self.residual is None else self.residual(x), y], "sum", self.shrink)
        out: Tensor = self.relu(y)
        return out

    def as_containers(self) -> nn.Module:
        """The same, for a converter."""
        body = nn.Sequential(OrderedDict(gcn=self.gcn, tcn=self.tcn))
        if not self.has_residual:
            return nn.Sequential(body, self.relu)
        if self.residual is None:
            return nn.Sequential(Residual(body, shrink=self.shrink), self.relu)  # type: ignore[arg-type]
        return nn.Sequential(Parallel(self.residual, body, shrink=self.shrink), self.relu)  # type: ignore[arg-type]


class STGCN(nn.Module):
    """Joints (b, c, t, v, s) of s skeletons to scores (b, classes, u)."""

    time_axis = 2
    clip_rank = 5
    builder = "lynceus.rewrite.streaming.st_gcn:build"
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()

    def __init__(self, config: STGCNConfig, name: str = "st_gcn"):
        super().__init__()
        self.config, self.name = config, name
        graph = partitions(config.edges, config.joints)
        self.joints_in = JointsIn(config.skeletons * config.in_chans * config.joints, config.skeletons)
        width = config.in_chans
        blocks: OrderedDict[str, nn.Module] = OrderedDict()
        for i, (outputs, stride) in enumerate(zip(config.widths, config.strides)):
            padding = config.kernel // 2 if config.padded else 0
            blocks[f"layer{i + 1}"] = STBlock(
                width, outputs, graph, kernel=config.kernel, stride=stride, padding=padding, residual=i > 0
            )
            width = outputs
        self.layers = nn.Sequential(blocks)
        self.joints_out = JointsOut(config.skeletons)
        window, padding = config.pooling()
        self.pool = nn.AvgPool1d(window, stride=1, padding=padding)
        self.fc = ChannelLinear(width, config.num_classes)
        nn.init.normal_(self.fc.weight, 0, math.sqrt(2 / config.num_classes))

    def as_containers(self) -> nn.Module:
        """The same, for a converter."""
        names = ("joints_in", "layers", "joints_out", "pool", "fc")
        return nn.Sequential(OrderedDict((n, getattr(self, n)) for n in names))

    def forward_stages(self, x: Float[Tensor, "b c t v s"]) -> list[Float[Tensor, "n d u v"]]:
        """The normalised joints and every block, with the skeletons in the batch."""
        x = self.joints_in(x)
        maps = [x]
        for block in self.layers:
            x = block(x)
            maps.append(x)
        return maps

    def forward(self, x: Float[Tensor, "b c t v s"]) -> Float[Tensor, "b classes u"]:
        y: Tensor = self.fc(self.pool(self.joints_out(self.forward_stages(x)[-1])))
        return y


def partitions(edges: Sequence[tuple[int, int]], joints: int) -> Float[Tensor, "3 v v"]:
    """The joint itself, its inward and its outward neighbours, each column summing to 1 (or 0)."""
    parts = torch.zeros(3, joints, joints, dtype=torch.float64)
    parts[0] = torch.eye(joints)
    for a, b in edges:
        parts[1, b, a] = parts[2, a, b] = 1
    total = parts.sum(1, keepdim=True)
    return (parts / total.clamp(min=1)).float()


VARIANTS: dict[str, STGCNConfig] = {
    "st_gcn_nano": STGCNConfig(num_classes=10, frames=32, widths=(8, 16), kernel=5),
    "st_gcn_ntu": STGCNConfig(padded=True),
    "st_gcn_star_ntu": STGCNConfig(),
    "st_gcn_kinetics": STGCNConfig(padded=True, num_classes=400, joints=18, edges=KINETICS),
    "st_gcn_star_kinetics": STGCNConfig(num_classes=400, joints=18, edges=KINETICS),
}


def build(config: STGCNConfig, name: str = "st_gcn") -> STGCN:
    return STGCN(config, name)


def frame_shape(config: STGCNConfig) -> tuple[int, ...]:
    """(c, v, s) of a frame."""
    return config.in_chans, config.joints, config.skeletons
