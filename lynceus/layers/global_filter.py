"""Global-local filter: half of the channels through a 3x3 kernel, half through a learned filter as large as the map.

HorNet, NeurIPS 2022, arXiv 2207.14284, after GFNet, NeurIPS 2021, arXiv 2107.00645. Written from the papers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from lynceus.core.errors import AdviceError
from lynceus.core.positions import resize_spectrum
from lynceus.layers.depthwise import DepthwiseConv
from lynceus.layers.fused import hooked
from lynceus.layers.mixers import Place

EPS = 1e-6


class GlobalFilter(nn.Module):
    """pre_norm -> first half: 3x3 depthwise, second half: product with a table in the Fourier domain -> post_norm.

    The halves come back interleaved: x1[0], x2[0], x1[1], x2[1], ... `complex_weight` is (dim / 2, *table, 2) with real
    and imaginary part last; table: rows and columns of the half spectrum of a map h x w, (h, w // 2 + 1). Maps of
    another size resize the table (`core.positions.resize_spectrum`).
    """

    def __init__(self, dim: int, table: tuple[int, int]):
        super().__init__()
        if dim % 2:
            raise AdviceError(f"A global-local filter halves its channels, and {dim} is odd; take an even number.")
        self.dw = DepthwiseConv(dim // 2, 3, bias=False)
        self.complex_weight = nn.Parameter(torch.empty(dim // 2, *table, 2))
        nn.init.trunc_normal_(self.complex_weight, std=0.02)
        self.pre_norm = nn.LayerNorm(dim, eps=EPS)
        self.post_norm = nn.LayerNorm(dim, eps=EPS)

    def factors(self, height: int, width: int) -> Float[Tensor, "h v c 2"]:
        """What the spectrum of such a map is multiplied by, real and imaginary part last; v = width // 2 + 1."""
        table: Tensor = self.complex_weight
        size = (height, width // 2 + 1)
        if torch.compiler.is_compiling() or tuple(table.shape[1:3]) != size:
            table = resize_spectrum(table, size)
        if table.dtype not in (torch.float32, torch.float64):
            table = table.float()
        return table.permute(1, 2, 0, 3).contiguous()

    def circular(self, x: Float[Tensor, "b h w c"]) -> Float[Tensor, "b h w c"]:
        """The second half's filter: a circular convolution with the kernel irfft2(table)."""
        h, w = x.shape[1:3]
        wide = x if x.dtype in (torch.float32, torch.float64) else x.float()  # there is no complex half everywhere
        factors = self.factors(h, w)
        if torch.compiler.is_compiling():  # compilers have no code for complex numbers, and ONNX runtimes odd ones
            return filtered_by_products(wide, factors).to(x.dtype)
        spectrum = torch.fft.rfft2(wide, dim=(1, 2), norm="ortho")
        wide = torch.fft.irfft2(spectrum * torch.view_as_complex(factors), s=(h, w), dim=(1, 2), norm="ortho")
        return wide.to(x.dtype)

    def forward(self, x: Float[Tensor, "b h w c"], scale: float = 1.0) -> Float[Tensor, "b h w c"]:
        """scale: a factor on the result."""
        near, far = self.pre_norm(x).chunk(2, dim=-1)
        x = torch.stack([self.dw(near), self.circular(far)], dim=-1).flatten(-2)
        norm = self.post_norm
        if scale == 1.0 or hooked(norm):
            x = norm(x)
            return x if scale == 1.0 else x * scale
        return F.layer_norm(x, norm.normalized_shape, norm.weight * scale, norm.bias * scale, norm.eps)


def filtered_by_products(x: Float[Tensor, "b h w c"], factors: Float[Tensor, "h v c 2"]) -> Float[Tensor, "b h w c"]:
    """irfft2(rfft2(x) * factors) over h and w with real matrix products alone.

    Sizes may be free: sums never see a transposed map, whose layout torch.export would ask about.
    """
    h, w = x.shape[1:3]
    v = w // 2 + 1
    a, b = (f.permute(2, 1, 0).clone(memory_format=torch.contiguous_format) for f in factors.unbind(-1))  # c v h
    cos, sin = _waves(v, w, w, x)
    x = x.permute(0, 3, 1, 2).clone(memory_format=torch.contiguous_format)
    re, im = F.linear(x, cos).transpose(2, 3), F.linear(x, -sin).transpose(2, 3)  # b c v h
    cos, sin = _waves(h, h, h, x)
    re, im = F.linear(re, cos) + F.linear(im, sin), F.linear(im, cos) - F.linear(re, sin)
    re, im = re * a - im * b, re * b + im * a
    re, im = F.linear(re, cos) - F.linear(im, sin), F.linear(im, cos) + F.linear(re, sin)
    cos, sin = _waves(w, v, w, x)
    twice = 2 * torch.arange(v, device=x.device) % torch.full((), w, dtype=torch.int64, device=x.device)
    weight = torch.where(twice == 0, 1.0, 2.0).to(x.dtype)  # all but the ends stand for their mirror image too
    x = F.linear(re.transpose(2, 3), cos * weight) - F.linear(im.transpose(2, 3), sin * weight)
    return x.permute(0, 2, 3, 1)


def _waves(rows: int, columns: int, period: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin of 2 pi i j / period, over sqrt(period), for i < rows and j < columns."""
    i, j = torch.arange(rows, device=like.device), torch.arange(columns, device=like.device)
    size = torch.full((), period, dtype=torch.int64, device=like.device)  # as a tensor: free sizes export
    angle = (i[:, None] * j % size).to(like.dtype) * (2 * math.pi / size.to(like.dtype))
    root = size.to(like.dtype).sqrt()
    return angle.cos() / root, angle.sin() / root


@dataclass(frozen=True, kw_only=True, slots=True)
class GlobalFilterMixer:
    """The global-local filter by itself, with a table for the place's map."""

    def build(self, place: Place) -> nn.Module:
        rows, columns = place.grid
        return GlobalFilter(place.dim, (rows, columns // 2 + 1))
