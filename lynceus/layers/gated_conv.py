"""Recursive gated convolution g^nConv: products of order + 1 terms of the input for little more than one convolution.

HorNet, NeurIPS 2022, arXiv 2207.14284. Written from the paper.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from jaxtyping import Float
from torch import Tensor, nn

from lynceus.core.errors import AdviceError
from lynceus.layers.depthwise import DepthwiseConv
from lynceus.layers.fused import affine, fusable, linear, plain_linear
from lynceus.layers.global_filter import GlobalFilter
from lynceus.layers.mixers import Place


class GatedConv(nn.Module):
    """proj_in -> p, q;  g = scale * filter(q);  p * g_0, then x -> pws_k(x) * g_{k+1};  proj_out. On a map b h w c.

    The widths of the gates double up to `width` (`widths`: smallest first). dim, width, out: channels that come in,
    that the operator works on, and that leave. kernel: side of the depthwise filter; table: given, rows and columns of
    a global filter's half spectrum, which takes the filter's place. scale: of the gates. project: with `proj_out`;
    without it `width` channels leave.
    """

    def __init__(
        self,
        dim: int,
        *,
        order: int = 5,
        kernel: int = 7,
        table: tuple[int, int] | None = None,
        scale: float = 1.0,
        width: int | None = None,
        out: int | None = None,
        project: bool = True,
    ):
        super().__init__()
        width = dim if width is None else width
        out = width if out is None else out
        self.order, self.scale = order, scale
        self.widths = widths(width, order)
        if not project and out != width:
            raise AdviceError(f"Without its last projection a gated convolution of width {width} cannot give {out}.")
        self.proj_in = nn.Linear(dim, 2 * width)
        self.dwconv: DepthwiseConv | GlobalFilter = (
            DepthwiseConv(sum(self.widths), kernel) if table is None else GlobalFilter(sum(self.widths), table)
        )
        self.proj_out = nn.Linear(width, out) if project else nn.Identity()
        self.pws = nn.ModuleList(nn.Linear(a, b) for a, b in zip(self.widths, self.widths[1:]))

    def forward(self, x: Float[Tensor, "b h w c"]) -> Float[Tensor, "b h w d"]:
        first = self.widths[0]
        lean = fusable(x) and type(self.proj_in) is nn.Linear and plain_linear(self.proj_in, x)
        if lean:
            weight, bias = self.proj_in.weight, self.proj_in.bias  # two products leave q in one piece for the filter
            p, q = (affine(x, weight[rows], bias[rows]) for rows in (slice(first), slice(first, None)))
        else:
            p, q = self.proj_in(x).split((first, sum(self.widths)), dim=-1)
        gates = self.dwconv(q, self.scale).split(self.widths, dim=-1)
        x = p.mul_(gates[0]) if lean else p * gates[0]
        for layer, gate in zip(self.pws, gates[1:]):
            x = linear(layer, x)
            x = x.mul_(gate) if lean and plain_linear(layer, x) else x * gate
        return linear(self.proj_out, x) if isinstance(self.proj_out, nn.Linear) else self.proj_out(x)


def widths(width: int, order: int) -> list[int]:
    """Channels of the gates, smallest first: width / 2^(order - 1) .. width."""
    if order < 1 or width % 2 ** (order - 1):
        fits = [n for n in range(1, 9) if width % 2 ** (n - 1) == 0]
        raise AdviceError(
            f"A gated convolution of order {order} needs a width that {2 ** max(order - 1, 0)} divides, not {width}; "
            f"orders that fit {width}: {', '.join(map(str, fits))}."
        )
    return [width // 2 ** (order - 1 - k) for k in range(order)]


class GatedConv2d(GatedConv):
    """The operator where a k x k convolution stood in a decoder: maps b c h w in and out, batch norm and ReLU after it.

    norm: with a BatchNorm2d; act: with a ReLU.
    """

    def __init__(
        self,
        dim: int,
        out: int,
        *,
        order: int = 2,
        kernel: int = 7,
        table: tuple[int, int] | None = None,
        ratio: int = 1,
        project: bool = True,
        norm: bool = False,
        act: bool = False,
    ):
        super().__init__(dim, order=order, kernel=kernel, table=table, width=out * ratio, out=out, project=project)
        self.norm = nn.BatchNorm2d(out) if norm else nn.Identity()
        self.act = nn.ReLU() if act else nn.Identity()

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d h w"]:
        x = super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        out: Tensor = self.act(self.norm(x))
        return out


@dataclass(frozen=True, kw_only=True, slots=True)
class GatedConvMixer:
    """g^nConv at a place. order: of the products; filter: a depthwise `kernel`, or a global one made for the grid."""

    order: int = 3
    filter: Literal["local", "global"] = "local"
    kernel: int = 7
    scale: float = 1 / 3

    def build(self, place: Place) -> nn.Module:
        rows, columns = place.grid
        table = (rows, columns // 2 + 1) if self.filter == "global" else None
        return GatedConv(place.dim, order=self.order, kernel=self.kernel, table=table, scale=self.scale)
