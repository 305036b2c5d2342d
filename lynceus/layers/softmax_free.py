"""Softmax-free attention: a Gaussian kernel of tied queries and keys, from a few landmarks, in linear time.

Lu et al., SOFT, NeurIPS 2021, arXiv 2110.11945; Softmax-free Linear Transformers, IJCV 2024, arXiv 2207.03341

With K the kernel of tokens and landmarks and A that of the landmarks, attention is K (A^+ (K' V)); the inverse comes
from Newton's iteration. The normalised form puts D^-1/2 A^+ D^-1/2 in the middle, D being the row sums of A.
Kernels and iteration are computed in float32 at least, also under autocast. The normalised form has no ridge: where
landmarks are nearly equal its inverse is large, and float32 and float64 give different outputs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from lynceus.core.errors import AdviceError
from lynceus.layers.fused import linear, without_autocast
from lynceus.layers.mixers import Place

RIDGE = 0.01  # of the plain form, whose first step is 0.9 of the largest that is safe
HALVINGS = 10  # of the normalised form's first step
LANDMARKS = 49  # that a mixer aims at, as the networks of the paper have


def gaussian_kernel(a: Float[Tensor, "*batch n d"], b: Float[Tensor, "*batch m d"]) -> Float[Tensor, "*batch n m"]:
    """exp(-|a_i - b_j|^2 / 2), by one product of vectors that carry their squares with them; never above 1."""
    one = a.new_ones(())
    left = torch.cat([a, a.square().sum(-1, keepdim=True) * -0.5, one.expand(*a.shape[:-1], 1)], -1)
    right = torch.cat([b, one.expand(*b.shape[:-1], 1), b.square().sum(-1, keepdim=True) * -0.5], -1)
    return (left @ right.transpose(-1, -2)).clamp(max=0.0).exp()


def newton(start: Float[Tensor, "*batch m m"], matrix: Float[Tensor, "*batch m m"], iterations: int) -> Tensor:
    """V <- 2 V - (V P) V from a `start` V towards the inverse of `matrix` P: (*batch, m, m)."""
    shape, m = matrix.shape, matrix.shape[-1]
    v, p = start.reshape(-1, m, m), matrix.reshape(-1, m, m)
    for _ in range(iterations):
        v = torch.baddbmm(v, torch.bmm(v, p), v, beta=2.0, alpha=-1.0)
    return v.reshape(shape)


def newton_inverse(
    kernel: Float[Tensor, "*batch m m"], *, iterations: int = 20, ridge: float = RIDGE
) -> Float[Tensor, "*batch m m"]:
    """Newton's iterate towards (kernel + ridge I)^-1, per matrix; kernel: symmetric, with entries of at least 0.

    The gradient is that of an inverse, -V' G V', taken at the iterate V, whether it has converged or not.
    """
    with torch.no_grad():
        step = 1.8 / kernel.sum(-1).amax(-1).square()
        regular = kernel + ridge * torch.eye(kernel.shape[-1], dtype=kernel.dtype, device=kernel.device)
        inverse = newton(step[..., None, None] * regular, regular, iterations)
    return _as_inverse_of(kernel, inverse)


def newton_inverse_halved(
    kernel: Float[Tensor, "*batch m m"],
    *,
    iterations: int = 20,
    step: Literal["matrix", "batch"] = "matrix",
    closed_gradient: bool = False,
) -> Float[Tensor, "*batch m m"]:
    """Newton's iterate towards kernel^-1 without a ridge; kernel: symmetric, with entries of at least 0.

    The first step is 2 / (largest row sum)^2, halved while the largest column sum of |I - step kernel^2| is above 1.01,
    at most ten times. step: "matrix", each matrix has its own, or "batch", one for all of them (the authors' rule, by
    which an unconverged result depends on the batch). The gradient goes through the iterations and the first step;
    closed_gradient: that of an inverse instead, which needs no memory for the iterates.
    """
    if closed_gradient and torch.is_grad_enabled():
        with torch.no_grad():
            inverse = newton_inverse_halved(kernel, iterations=iterations, step=step)
        return _as_inverse_of(kernel, inverse)
    sums = kernel.sum(-1)
    rows = tuple(range(-sums.ndim, 0)) if step == "batch" else (-1,)
    first = 2.0 / sums.amax(rows, keepdim=True).square()
    with torch.no_grad():
        halves = 0.5 ** torch.arange(HALVINGS + 1, dtype=kernel.dtype, device=kernel.device)
        steps = first[..., None] * halves
        # of kernel^2, whose entries are at least 0: diagonal, and column sums
        diagonal, total = kernel.square().sum(-1)[..., None], kernel @ sums[..., None]
        far = (1.0 - steps * diagonal).abs() + steps * (total - diagonal)
        good = far.amax(tuple(r - 1 for r in rows), keepdim=True) <= 1.01
        good = torch.cat([good[..., :-1], torch.ones_like(good[..., :1])], -1)
        halved = halves[good.to(torch.uint8).argmax(-1)]
    return newton((first * halved)[..., None] * kernel, kernel, iterations)


def _as_inverse_of(kernel: Tensor, inverse: Tensor) -> Tensor:
    """`inverse`, with the gradient of an inverse towards `kernel`: the term added is 0 and its derivative is not."""
    if not (torch.is_grad_enabled() and kernel.requires_grad):
        return inverse
    return inverse - inverse @ (kernel - kernel.detach()) @ inverse


def normaliser(kernel: Float[Tensor, "*batch m m"]) -> Float[Tensor, "*batch m 1"]:
    """D^-1/2 as a column, D being the row sums."""
    return kernel.sum(-1, keepdim=True).rsqrt()


class SoftmaxFreeAttention(nn.Module):
    """Gaussian-kernel attention on a map b h w c through floor(h / ratio) * floor(w / ratio) landmarks.

    ratio: stride and side of the convolution, shared by the heads, that makes landmarks of the queries; a map smaller
    than that is padded with zeros to one landmark. conv: side of a depthwise convolution of the values, one kernel per
    head, that is added; odd, 0 for none. normalised: the normalised form. step, closed_gradient: of its inverse, see
    `newton_inverse_halved`. iterations: of Newton's method.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        ratio: int,
        *,
        conv: int = 3,
        normalised: bool = False,
        iterations: int = 20,
        step: Literal["matrix", "batch"] = "matrix",
        closed_gradient: bool = False,
    ):
        if dim % heads:
            good = heads * max(dim // heads, 1)
            raise AdviceError(f"dim {dim} cannot be shared by {heads} heads; take a multiple, e.g. dim={good}.")
        if conv and conv % 2 == 0:
            raise AdviceError(f"A convolution of the values of {conv} has no centre; take an odd one, e.g. {conv + 1}.")
        if ratio < 1:
            raise AdviceError(f"ratio is the side of a landmark's patch, at least 1, not {ratio}.")
        super().__init__()
        self.heads, self.ratio, self.normalised, self.iterations = heads, ratio, normalised, iterations
        self.step: Literal["matrix", "batch"] = step
        self.closed_gradient = closed_gradient
        width = dim // heads
        self.q = nn.Linear(dim, dim)
        self.v = nn.Linear(dim, dim)
        self.landmark = nn.Conv2d(width, width, ratio, ratio, bias=False)
        self.landmark_norm = nn.LayerNorm(width, eps=1e-5)
        self.landmark_act = nn.GELU()
        self.conv = nn.Conv2d(heads, heads, conv, padding=conv // 2, groups=heads, bias=False) if conv else None
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Float[Tensor, "b h w c"], residual: Tensor | None = None) -> Float[Tensor, "b h w c"]:
        """residual: added to the result, inside the last kernel where that is possible."""
        b, h, w, c = x.shape
        width = c // self.heads
        values = linear(self.v, x)
        q = linear(self.q, x).view(b, h * w, self.heads, width).transpose(1, 2) * width**-0.25
        v = values.view(b, h * w, self.heads, width).transpose(1, 2)
        y = self.mix(q, self.landmarks(q, h, w), v).transpose(1, 2).reshape(b, h, w, c)
        if self.conv is not None:
            y = y + self.local(values)
        return linear(self.proj, y, residual=residual)

    def landmarks(self, q: Float[Tensor, "b g n d"], h: int, w: int) -> Float[Tensor, "b g m d"]:
        """Landmarks of the queries of a map h x w, row by row."""
        b, g, _, d = q.shape
        # in two steps: one reshape of a single head asks export whether a free height is 1
        x = q.flatten(0, 1).view(b * g, h, w, d).permute(0, 3, 1, 2)
        short = max(self.ratio - h, 0), max(self.ratio - w, 0)
        if any(short):
            x = F.pad(x, (0, short[1], 0, short[0]))
        z = self.landmark(x).permute(0, 2, 3, 1)
        return self.landmark_act(self.landmark_norm(z.reshape(b, g, -1, d)))

    def mix(
        self, q: Float[Tensor, "b g n d"], z: Float[Tensor, "b g m d"], v: Float[Tensor, "b g n d"]
    ) -> Float[Tensor, "b g n d"]:
        """K (A^+ (K' V)) of queries, landmarks and values."""
        with without_autocast(q):
            return self._mix(q, z, v)

    def _mix(self, q: Tensor, z: Tensor, v: Tensor) -> Tensor:
        given, least = v.dtype, torch.promote_types(q.dtype, torch.float32)
        q, z, v = q.to(least), z.to(least), v.to(least)
        kernel, middle = gaussian_kernel(q, z), gaussian_kernel(z, z)
        y = kernel.transpose(-1, -2) @ v
        if self.normalised:
            inverse = newton_inverse_halved(
                middle, iterations=self.iterations, step=self.step, closed_gradient=self.closed_gradient
            )
            scale = normaliser(middle)
            y = scale * (inverse @ (scale * y))
        else:
            y = newton_inverse(middle, iterations=self.iterations) @ y
        return (kernel @ y).to(given)

    def local(self, values: Float[Tensor, "b h w c"]) -> Float[Tensor, "b h w c"]:
        """The depthwise convolution of the values; channels of a head share its kernel."""
        assert self.conv is not None
        c = values.shape[-1]
        kernels = self.conv.weight.repeat_interleave(c // self.heads, 0)
        y = F.conv2d(values.permute(0, 3, 1, 2), kernels, padding=self.conv.padding, groups=c)
        return y.permute(0, 2, 3, 1)


@dataclass(frozen=True, kw_only=True, slots=True)
class SoftmaxFreeMixer:
    """Softmax-free attention as a token mixer.

    ratio: of the landmarks; None: what makes about 49 of them on the place's grid. heads: None: those of the place.
    conv, normalised, iterations, closed_gradient: as in SoftmaxFreeAttention.
    """

    ratio: int | None = None
    heads: int | None = None
    conv: int = 3
    normalised: bool = True
    iterations: int = 20
    closed_gradient: bool = False

    def build(self, place: Place) -> SoftmaxFreeAttention:
        h, w = place.grid
        return SoftmaxFreeAttention(
            place.dim,
            self.heads or place.heads,
            self.ratio or max(round(math.sqrt(h * w / LANDMARKS)), 1),
            conv=self.conv,
            normalised=self.normalised,
            iterations=self.iterations,
            closed_gradient=self.closed_gradient,
        )
