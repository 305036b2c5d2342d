"""Balls around images, cut with [0, 1], exactly in floating point: what lies inside does so in every later check.

Clamping x to [image - epsilon, image + epsilon] in float32 lets x - image exceed epsilon by rounding. Here the bounds
are found with error-free sums (Knuth's two-sum), and epsilon is first rounded down to the images' precision.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

Norm = Literal["linf", "l2"]


def round_down(value: float, dtype: torch.dtype) -> float:
    """The largest number of `dtype` that is not above `value`."""
    t = torch.tensor(value, dtype=dtype)
    if float(t) > value:
        t = torch.nextafter(t, torch.tensor(-math.inf, dtype=dtype))
    return float(t)


def linf_box(
    images: Float[Tensor, "b c h w"], epsilon: float | Float[Tensor, " b"]
) -> tuple[Float[Tensor, "b c h w"], Float[Tensor, "b c h w"]]:
    """The least and greatest number of every pixel whose exact distance from it is at most `epsilon`, in [0, 1].

    epsilon: a radius, or one per image (in the images' precision).
    """
    if isinstance(epsilon, Tensor):
        e = epsilon.to(images.dtype).view(-1, 1, 1, 1).expand_as(images)
    else:
        e = torch.full_like(images, round_down(epsilon, images.dtype))
    e = e.clamp(max=2.0)  # as far as [0, 1] goes, and finite
    below, above = images - e, images + e
    low = torch.where(_error(images, -e, below) > 0, torch.nextafter(below, images), below)
    high = torch.where(_error(images, e, above) < 0, torch.nextafter(above, images), above)
    return low.clamp(0, 1), high.clamp(0, 1)


def _error(a: Tensor, b: Tensor, total: Tensor) -> Tensor:
    """a + b - total, exactly, where total is the rounded sum."""
    other = total - a
    return (a - (total - other)) + (b - other)


def norms(change: Float[Tensor, "b c h w"], norm: str) -> Float[Tensor, " b"]:
    """The length of every change: linf, l2 or l1."""
    order = {"linf": math.inf, "l2": 2.0, "l1": 1.0}[norm]
    return torch.linalg.vector_norm(change.flatten(1), ord=order, dim=1)


def steepest(gradient: Float[Tensor, "b c h w"], norm: Norm) -> Float[Tensor, "b c h w"]:
    """The change of length 1 that raises a linear function most; zero where the gradient is zero."""
    if norm == "linf":
        return gradient.sign()
    # scaled by its largest entry first, so that squares of tiny gradients do not underflow
    peak = gradient.flatten(1).abs().amax(1).clamp(min=torch.finfo(gradient.dtype).tiny)
    scaled = gradient / peak[:, None, None, None]
    return scaled / norms(scaled, "l2").clamp(min=1e-12)[:, None, None, None]


def ball_start(
    images: Float[Tensor, "b c h w"], epsilon: float, norm: Norm, generator: torch.Generator
) -> Float[Tensor, "b c h w"]:
    """Random changes: uniform in the L-inf ball; in a uniform direction and up to epsilon long in L2."""
    shape = images.shape
    if norm == "linf":
        noise = (torch.rand(shape, generator=generator, dtype=torch.float64) * 2 - 1) * epsilon
    else:
        direction = torch.randn(shape, generator=generator, dtype=torch.float64)
        length = torch.rand(len(images), generator=generator, dtype=torch.float64) * epsilon
        noise = direction * (length / norms(direction, "l2").clamp(min=1e-12))[:, None, None, None]
    return noise.to(images)


def project(
    images: Float[Tensor, "b c h w"],
    x: Float[Tensor, "b c h w"],
    epsilon: float | Float[Tensor, " b"],
    norm: Norm,
    *,
    grid: bool = False,
) -> Float[Tensor, "b c h w"]:
    """The point of the ball around `images` (cut with [0, 1]) that replaces x.

    grid: a multiple of 1 / 255 in every pixel; the images lie on that grid, and the ball holds whole levels.
    """
    if grid:
        return _on_grid(images, x, float(epsilon), norm)
    if norm == "linf":
        low, high = linf_box(images, epsilon)
        return torch.minimum(torch.maximum(x, low), high)
    return _project_l2(images, x, epsilon)


def _project_l2(images: Tensor, x: Tensor, epsilon: float | Tensor) -> Tensor:
    if isinstance(epsilon, Tensor):
        radius = epsilon.to(x)
    else:
        radius = torch.full((len(x),), round_down(epsilon, x.dtype), dtype=x.dtype, device=x.device)
    x = x.clamp(0, 1)
    change = x - images
    length = norms(change, "l2")
    factor = torch.where(length > radius, radius / length.clamp(min=1e-30), torch.ones_like(length))
    slack = torch.finfo(x.dtype).eps
    out = x
    for _ in range(40):  # rounding of image + change can lengthen it by a few units in the last place
        out = torch.where(factor[:, None, None, None] < 1, (images + change * factor[:, None, None, None]), out)
        out = out.clamp(0, 1)
        now = out - images
        over = (norms(now.double(), "l2") > radius.double()) | (norms(now, "l2") > radius)
        if not bool(over.any()):
            return out
        factor = torch.where(over, factor * (1 - slack), factor)
        slack *= 2
    return torch.where(over[:, None, None, None], images, out)


def _on_grid(images: Tensor, x: Tensor, epsilon: float, norm: Norm) -> Tensor:
    """In whole levels: integers have no rounding, so epsilon = 8 / 255 means eight levels."""
    own = (images.double() * 255).round()
    move = x.double().clamp(0, 1) * 255 - own
    if norm == "linf":
        most = math.floor(min(epsilon, 1.0) * 255 + 1e-9)
        move = move.round().clamp(-most, most)
    else:
        length = norms(move, "l2")
        limit = epsilon * 255
        factor = torch.where(length > limit, limit / length.clamp(min=1e-30), torch.ones_like(length))
        scaled = move * factor[:, None, None, None]
        near = scaled.round()
        # rounding may lengthen the change; cutting towards zero never does
        move = torch.where((norms(near, "l2") <= limit)[:, None, None, None], near, scaled.trunc())
    return ((own + move).clamp(0, 255).to(images.dtype)) / 255
