"""PlainMamba's mixer: four sweeps over a map that add a learned direction to the scan's input weights.

Paper: Yang et al., PlainMamba, BMVC 2024, arXiv 2403.17695
Code: ChenhongyiYang/PlainMamba, whose parameter names are kept
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from lynceus.core.errors import AdviceError
from lynceus.layers.depthwise import DepthwiseConv
from lynceus.layers.fused import linear
from lynceus.layers.mamba import StepInit, decays
from lynceus.layers.mixers import Place
from lynceus.layers.scan import scan
from lynceus.layers.scan_order import Order, sweeps


class PlainMamba2d(nn.Module):
    """in_proj -> (x, z); x through a depthwise convolution, SiLU and four scans; times silu(z); out_proj.

    order: of the four sweeps. directions: `direction_Bs`, a vector for the move that led to each place, is added to B.
    reorder_all: steps, B and C follow the sweep like x does; the released networks leave them row by row, so that step
    t of every sweep takes those of place t. double_bias: the bias of the steps counts twice, as in the released
    networks. layer_scale: start of a factor per channel behind it, None for none. The rest as in `Mamba`.
    """

    def __init__(
        self,
        dim: int,
        *,
        states: int = 16,
        conv: int = 7,
        expand: float = 2,
        rank: int | None = None,
        order: Order = "snake",
        directions: bool = True,
        reorder_all: bool = False,
        double_bias: bool = True,
        layer_scale: float | None = None,
        conv_bias: bool = True,
        bias: bool = True,
        steps: StepInit | None = None,
    ):
        super().__init__()
        if order not in ("snake", "raster"):
            raise AdviceError(f"order is 'snake' or 'raster', not {order!r}.")
        inner = int(expand * dim)
        self.states, self.rank = states, rank or math.ceil(dim / 16)
        self.order: Order = order
        self.reorder_all, self.double_bias = reorder_all, double_bias
        self.gamma = None if layer_scale is None else nn.Parameter(torch.full((dim,), float(layer_scale)))
        self.in_proj = nn.Linear(dim, 2 * inner, bias=bias)
        self.conv2d = DepthwiseConv(inner, conv, bias=conv_bias)
        self.x_proj = nn.Linear(inner, self.rank + 2 * states, bias=False)
        self.dt_proj = nn.Linear(self.rank, inner)
        self.steps = steps or StepInit()
        self.A_log = decays(inner, states)
        self.D = nn.Parameter(torch.ones(inner))
        self.out_proj = nn.Linear(inner, dim, bias=bias)
        self.direction_Bs = nn.Parameter(torch.zeros(5, states)) if directions else None
        self.init_weights()

    def init_weights(self) -> None:
        """Truncated normals of 0.02, biases 0; the steps as in Mamba."""
        for layer in (self.in_proj, self.x_proj, self.out_proj):
            nn.init.trunc_normal_(layer.weight, std=0.02)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
        self.steps(self.dt_proj)
        if self.direction_Bs is not None:
            nn.init.trunc_normal_(self.direction_Bs, std=0.02)

    def forward(self, x: Float[Tensor, "b h w c"]) -> Float[Tensor, "b h w c"]:
        batch, height, width, _ = x.shape
        n = height * width
        x, z = linear(self.in_proj, x).chunk(2, dim=-1)
        x = F.silu(self.conv2d(x.contiguous())).reshape(batch, n, -1)
        small = linear(self.x_proj, x)
        steps, b, c = small.split([self.rank, self.states, self.states], dim=-1)
        delta = linear(self.dt_proj, steps)
        kind = torch.float32 if x.dtype in (torch.bfloat16, torch.float16) else x.dtype
        u, delta, b, c = (v.to(kind).transpose(0, 1)[:, None].contiguous() for v in (x, delta, b, c))  # tokens first
        if self.double_bias:
            delta = delta + self.dt_proj.bias.to(kind)
        path = sweeps(height, width, self.order, device=x.device)
        steps_first = path.order.t()
        swept = u[:, 0][steps_first]  # n 4 b d
        delta = F.softplus(delta)
        if self.reorder_all:
            delta, b, c = (v[:, 0][steps_first] for v in (delta, b, c))
        if self.direction_Bs is not None:
            b = b + self.direction_Bs.to(kind)[path.codes.t()][:, :, None]
        a = -self.A_log.to(kind).exp().t()[None]
        y, _ = scan(swept, delta, a, b[..., None], c[..., None])
        # each place takes what the four sweeps found there
        at = path.inverse.t() * 4 + torch.arange(4, device=x.device)
        y = y.flatten(0, 1)[at].sum(1).transpose(0, 1) + 4 * self.D * u[:, 0].transpose(0, 1)
        y = y.to(z.dtype).view(z.shape) * F.silu(z)
        y = linear(self.out_proj, y)
        return y if self.gamma is None else y * self.gamma

    def no_weight_decay(self) -> set[str]:
        return {"A_log", "D"} | ({"direction_Bs"} if self.direction_Bs is not None else set())


@dataclass(frozen=True, kw_only=True, slots=True)
class PlainMambaMixer:
    """PlainMamba's mixer: see `PlainMamba2d`."""

    states: int = 16
    conv: int = 7
    expand: float = 2.0
    order: Order = "snake"
    directions: bool = True
    reorder_all: bool = False
    double_bias: bool = True

    def build(self, place: Place) -> PlainMamba2d:
        return PlainMamba2d(
            place.dim,
            states=self.states,
            conv=self.conv,
            expand=self.expand,
            order=self.order,
            directions=self.directions,
            reorder_all=self.reorder_all,
            double_bias=self.double_bias,
        )
