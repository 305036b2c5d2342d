"""Gated convolutions as the fusion of a pyramid: GN-FPN for detection, GN-UPer for segmentation.

HorNet, NeurIPS 2022, arXiv 2207.14284; FPN, CVPR 2017, arXiv 1612.03144; UPerNet, ECCV 2018, arXiv 1807.10221.
Written from the papers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from lynceus.core.errors import AdviceError
from lynceus.layers.conv_norm_act import ConvNormAct
from lynceus.layers.gated_conv import GatedConv2d

Map = Float[Tensor, "b _ _ _"]


class GatedFPN(nn.Module):
    """Feature pyramid whose output convolutions are gated: 1x1 laterals, nearest top-down sums, a g^nConv per level.

    dims: channels of the maps that come in, fine -> coarse; out: channels of every map that leaves. count: maps that
    leave (None: one per map used); levels beyond them come from sampling the last one with stride 2. start, end: first
    and last map used. norm, act: batch norm and ReLU after laterals and gated convolutions; lateral_norm=False leaves
    the laterals without the norm. order, kernel, table, ratio, project: of the gated convolutions (`GatedConv2d`).
    """

    def __init__(
        self,
        dims: Sequence[int],
        out: int = 256,
        *,
        count: int | None = None,
        start: int = 0,
        end: int | None = None,
        order: int = 2,
        kernel: int = 7,
        table: tuple[int, int] | None = None,
        ratio: int = 1,
        project: bool = True,
        norm: bool = False,
        act: bool = False,
        lateral_norm: bool = True,
    ):
        super().__init__()
        self.start, self.end = start, len(dims) - 1 if end is None else end
        used = list(dims)[self.start : self.end + 1]
        if not 0 <= self.start <= self.end < len(dims):
            raise AdviceError(f"start {start} and end {end} must name maps in order, from 0 to {len(dims) - 1}.")
        self.dims, self.count = tuple(dims), len(used) if count is None else count
        if self.count < len(used) or (self.count > len(used) and self.end < len(dims) - 1):
            more = " or more" if self.end == len(dims) - 1 else ""
            raise AdviceError(f"{len(used)} maps are used, so count cannot be {count}: take {len(used)}{more}.")
        self.laterals = nn.ModuleList(_brick(c, out, 1, norm and lateral_norm, act) for c in used)
        self.outputs = nn.ModuleList(
            GatedConv2d(
                out, out, order=order, kernel=kernel, table=table, ratio=ratio, project=project, norm=norm, act=act
            )
            for _ in used
        )
        self.apply(_xavier)

    def forward(self, maps: Sequence[Map]) -> list[Map]:
        """maps: of every level in `dims`, fine -> coarse, of any sizes. Gives `count` maps of `out` channels."""
        if len(maps) != len(self.dims):
            raise AdviceError(f"This pyramid takes {len(self.dims)} maps (channels {self.dims}), not {len(maps)}.")
        inner = [lateral(maps[self.start + i]) for i, lateral in enumerate(self.laterals)]
        for i in range(len(inner) - 1, 0, -1):
            inner[i - 1] = inner[i - 1] + F.interpolate(inner[i], size=inner[i - 1].shape[2:], mode="nearest")
        out = [output(x) for output, x in zip(self.outputs, inner)]
        while len(out) < self.count:
            out.append(out[-1][:, :, ::2, ::2])
        return out


class PyramidPooling(nn.Module):
    """The map beside its means over scale x scale cells, each through a 1x1 ConvNormAct and resized back."""

    def __init__(self, dim: int, out: int, scales: Sequence[int], *, norm: bool, act: bool, align_corners: bool):
        super().__init__()
        self.scales, self.align_corners = tuple(scales), align_corners
        self.convs = nn.ModuleList(_brick(dim, out, 1, norm, act) for _ in scales)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d h w"]:
        cells = [conv(F.adaptive_avg_pool2d(x, s)) for s, conv in zip(self.scales, self.convs)]
        return torch.cat([x, *(_resized(c, x, self.align_corners) for c in cells)], dim=1)


class GatedUPer(nn.Module):
    """UPerNet's decoder whose last fusion, over all levels at the finest size, is a g^nConv; with a 1x1 classifier.

    dims: channels of the maps that come in, fine -> coarse; width: channels inside. num_classes: 0 leaves the
    classifier out. pool_scales: cells of the pyramid pooling on the coarsest map. norm, act: batch norm and ReLU after
    every convolution. order, kernel, table, ratio, project: of the gated one (`GatedConv2d`). drop_rate: of whole
    channels before the classifier.
    """

    def __init__(
        self,
        dims: Sequence[int],
        width: int = 512,
        *,
        num_classes: int = 150,
        pool_scales: Sequence[int] = (1, 2, 3, 6),
        order: int = 2,
        kernel: int = 3,
        table: tuple[int, int] | None = None,
        ratio: int = 1,
        project: bool = False,
        norm: bool = True,
        act: bool = True,
        align_corners: bool = False,
        drop_rate: float = 0.1,
    ):
        super().__init__()
        self.dims, self.align_corners = tuple(dims), align_corners
        self.pooling = PyramidPooling(dims[-1], width, pool_scales, norm=norm, act=act, align_corners=align_corners)
        self.bottleneck = _brick(dims[-1] + len(pool_scales) * width, width, 3, norm, act)
        self.laterals = nn.ModuleList(_brick(c, width, 1, norm, act) for c in dims[:-1])
        self.outputs = nn.ModuleList(_brick(width, width, 3, norm, act) for _ in dims[:-1])
        self.fusion = GatedConv2d(
            len(dims) * width,
            width,
            order=order,
            kernel=kernel,
            table=table,
            ratio=ratio,
            project=project,
            norm=norm,
            act=act,
        )
        self.drop = nn.Dropout2d(drop_rate)
        self.head: nn.Module = nn.Identity()
        if num_classes:
            self.head = nn.Conv2d(width, num_classes, 1)
            nn.init.normal_(self.head.weight, std=0.01)

    def fused(self, maps: Sequence[Map]) -> Float[Tensor, "b d h w"]:
        """The fused map at the size of the finest one."""
        if len(maps) != len(self.dims):
            raise AdviceError(f"This decoder takes {len(self.dims)} maps (channels {self.dims}), not {len(maps)}.")
        inner = [lateral(x) for lateral, x in zip(self.laterals, maps)]
        inner.append(self.bottleneck(self.pooling(maps[-1])))
        for i in range(len(inner) - 1, 0, -1):
            inner[i - 1] = inner[i - 1] + _resized(inner[i], inner[i - 1], self.align_corners)
        out = [conv(x) for conv, x in zip(self.outputs, inner)] + [inner[-1]]
        joined = torch.cat([out[0], *(_resized(x, out[0], self.align_corners) for x in out[1:])], dim=1)
        fused: Tensor = self.fusion(joined)
        return fused

    def forward(self, maps: Sequence[Map]) -> Float[Tensor, "b n h w"]:
        """Class scores at the size of the finest map."""
        scores: Tensor = self.head(self.drop(self.fused(maps)))
        return scores


def _brick(inside: int, outside: int, kernel: int, norm: bool, act: bool) -> ConvNormAct:
    return ConvNormAct(inside, outside, kernel, norm_eps=1e-5 if norm else None, act=nn.ReLU() if act else None)


def _resized(x: Tensor, like: Tensor, align_corners: bool) -> Tensor:
    return F.interpolate(x, size=like.shape[2:], mode="bilinear", align_corners=align_corners)


def _xavier(module: nn.Module) -> None:
    if isinstance(module, (nn.Conv2d, nn.Linear)):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
