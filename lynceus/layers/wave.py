"""SpaRTAN's two mixers: convolutions of two receptive fields over the map, and channels rotated as waves.

SpaRTAN, IJCNN 2025, arXiv 2507.10999. Written from the paper.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lynceus.core.errors import AdviceError
from lynceus.layers.conv_norm_act import ConvNormAct
from lynceus.layers.fused import fusable, hooked, linear
from lynceus.layers.mixers import Place
from lynceus.layers.squeeze_excite import SqueezeExcite

EPS = 1e-6


class TwoFieldMixer(nn.Module):
    """Half of the channels through a 3x3 and through two dilated 3x3 in a row, both re-weighted, joined by 1x1.

    u = proj_in(x), u + gamma * (u - mean of u over the map); high: 3x3; low: two 3x3 of dilation 2, the first without
    norm and activation. Map b h w c. depthwise: whether the 3x3 are per channel or dense. dim is a multiple of 8.
    """

    def __init__(self, dim: int, *, depthwise: bool = True):
        super().__init__()
        if dim % 8:
            raise AdviceError(f"The two-field mixer takes a multiple of 8 channels, not {dim}; try {-(-dim // 8) * 8}.")
        half = dim // 2
        groups = half if depthwise else 1
        self.gamma = nn.Parameter(torch.full((1, half, 1, 1), 1e-5))
        self.proj_in = nn.Linear(dim, half)
        self.h_conv = ConvNormAct(half, half, 3, groups=groups, norm_eps=EPS, act=nn.GELU())
        self.l_conv = nn.Sequential(
            ConvNormAct(half, half, 3, dilation=2, groups=groups, norm_eps=None, bias=False),
            ConvNormAct(half, half, 3, dilation=2, groups=groups, norm_eps=EPS, act=nn.GELU()),
        )
        self.h_attn = SqueezeExcite(half, hidden=half // 4)
        self.l_attn = SqueezeExcite(half, hidden=half // 4)
        self.proj_out = nn.Linear(dim, dim)

    def forward(self, x: Float[Tensor, "b h w c"]) -> Float[Tensor, "b h w c"]:
        u = linear(self.proj_in, x)
        u = torch.lerp(u, u.mean((1, 2), keepdim=True), -self.gamma.view(-1).to(u.dtype))
        u = u.permute(0, 3, 1, 2)
        high, low = self.h_conv(u).permute(0, 2, 3, 1), self.l_conv(u).permute(0, 2, 3, 1)
        if not fusable(x) or hooked(self.h_attn, self.l_attn):
            return linear(self.proj_out, torch.cat([self.h_attn(high), self.l_attn(low)], dim=-1))
        both = x.new_empty(x.shape)  # weighted straight into their places
        for part, attn, y in zip(both.chunk(2, dim=-1), (self.h_attn, self.l_attn), (high, low)):
            torch.mul(y, attn.factors(y)[:, None, None, :], out=part)
        return linear(self.proj_out, both)


class WaveMixer(nn.Module):
    """Mixes channels: amplitude times phase, reinforced by the strongest channel of each cell, rotated in pairs.

    t = GELU(theta(x)), a = proj(x), both of m = ratio * dim channels; i: the strongest channel of x in each cell;
    f = a * t + a[i] * t[i]; channels (2j, 2j + 1) of f times the complex number `complex[j]`; then a 3x3, depthwise or
    in `dim` groups, squeeze-and-excitation, and a product back to dim. Map b h w c. No gradient passes through i.
    """

    def __init__(self, dim: int, *, ratio: int = 4, depthwise: bool = True):
        super().__init__()
        if ratio < 2:
            raise AdviceError(f"The wave mixer widens its channels by at least 2, not {ratio}.")
        wide = dim * ratio
        self.theta = nn.Linear(dim, wide)
        self.act = nn.GELU()
        self.proj = nn.Linear(dim, wide)
        self.complex = nn.Parameter(torch.randn(wide // 2, 2))
        self.conv = ConvNormAct(wide, wide, 3, groups=wide if depthwise else dim, norm_eps=EPS, act=nn.GELU())
        self.attn = SqueezeExcite(wide, hidden=dim // 4)
        self.proj_out = nn.Linear(wide, dim)

    def aggregate(self, x: Float[Tensor, "b h w c"]) -> Float[Tensor, "b h w m"]:
        """f: amplitude times phase, plus that of the cell's strongest channel (the first one on a tie)."""
        strongest = x.argmax(-1, keepdim=True)
        phase = linear(self.theta, x, activation="gelu")
        amplitude = linear(self.proj, x)
        peak = phase.gather(-1, strongest) * amplitude.gather(-1, strongest)
        if fusable(x) and not hooked(self.theta, self.proj):
            return torch.addcmul(peak, amplitude, phase, out=phase)
        return torch.addcmul(peak, amplitude, phase)

    def forward(self, x: Float[Tensor, "b h w c"]) -> Float[Tensor, "b h w c"]:
        f = rotated(self.aggregate(x), self.complex)
        f = self.conv(f.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        if fusable(x) and not hooked(self.conv, self.conv.act, self.attn):
            f.mul_(self.attn.factors(f)[:, None, None, :])
        else:
            f = self.attn(f)
        return linear(self.proj_out, f)


def rotated(x: Float[Tensor, "*b m"], factors: Float[Tensor, "m//2 2"]) -> Float[Tensor, "*b m"]:
    """Channels (2j, 2j + 1) as real and imaginary part, times factors[j] (real, imaginary); float32 at least."""
    wide = x if x.dtype in (torch.float32, torch.float64) else x.float()
    pairs, factors = wide.unflatten(-1, (-1, 2)), factors.to(wide.dtype)
    if torch.compiler.is_compiling():  # compilers have no code for complex numbers
        return rotated_by_reals(pairs, factors).flatten(-2).to(x.dtype)
    product = torch.view_as_complex(pairs.contiguous()) * torch.view_as_complex(factors)
    return torch.view_as_real(product).flatten(-2).to(x.dtype)


def rotated_by_reals(pairs: Float[Tensor, "*b n 2"], factors: Float[Tensor, "n 2"]) -> Float[Tensor, "*b n 2"]:
    """The complex product as real multiply-adds."""
    (re, im), (c, s) = pairs.unbind(-1), factors.unbind(-1)
    return torch.stack([re * c - im * s, re * s + im * c], dim=-1)


@dataclass(frozen=True, kw_only=True, slots=True)
class TwoFieldConfig:
    """SpaRTAN's spatial mixer. depthwise: its 3x3 per channel or dense."""

    depthwise: bool = True

    def build(self, place: Place) -> nn.Module:
        return TwoFieldMixer(place.dim, depthwise=self.depthwise)
