"""The shape of a level set around blind spots: triangles, straight lines, tube widths, and distances between images.

Exploring Geometry of Blind Spots in Vision Models, NeurIPS 2023, arXiv 2310.19889. SSIM: Image Quality Assessment: From
Error Visibility to Structural Similarity, IEEE TIP 2004 (Wang et al.).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from lynceus.core.errors import AdviceError, unknown
from lynceus.trust.walks import Model, confidence

Lattice = Literal["exact", "reference"]
DROPS = (0.0, 0.1, 0.2, 0.3)


@dataclass(frozen=True, slots=True, kw_only=True)
class Triangle:
    """Confidence of the source's class on a lattice over the triangle source, first, second."""

    points: Float[Tensor, "m 2"]  # weights of the first and the second corner; the source has what is left
    values: Float[Tensor, "n m"]
    source: Float[Tensor, " n"]

    @property
    def mean(self) -> Float[Tensor, " n"]:
        """Mean confidence over the lattice."""
        return self.values.mean(1)

    def fraction(self, drop: float) -> Float[Tensor, " n"]:
        """Share of the lattice where confidence is above the source's less `drop`."""
        return (self.values > self.source[:, None] - drop).to(self.values.dtype).mean(1)

    @property
    def edges(self) -> Float[Tensor, "n m"]:
        """Confidence along source to first, then source to second; the source stands in both."""
        return torch.cat([self.values[:, self.points[:, 1] == 0], self.values[:, self.points[:, 0] == 0]], 1)

    @property
    def edge_mean(self) -> Float[Tensor, " n"]:
        return self.edges.mean(1)

    @property
    def edge_drop(self) -> Float[Tensor, " n"]:
        """The lowest confidence on the two edges, less the source's: 0 or a little below on a star-shaped set."""
        return self.edges.amin(1) - self.source


def lattice(kind: Lattice = "exact", steps: int = 10) -> Float[Tensor, "m 2"]:
    """Points of the triangle t1, t2 >= 0, t1 + t2 <= 1 at multiples of 1 / steps (float64); the source stands first.

    "exact" has all of them (66 for ten steps); "reference" drops those where 1 - t1 - t2 is negative by rounding, as
    the authors' code does (64).
    """
    if kind not in ("exact", "reference"):
        raise unknown("lattice", str(kind), ("exact", "reference"))
    pairs = [(i, j) for i in range(steps + 1) for j in range(steps + 1)]
    if kind == "exact":
        kept = [(i, j) for i, j in pairs if i + j <= steps]
    else:
        kept = [(i, j) for i, j in pairs if not 1 - i / steps - j / steps < 0]
    return torch.tensor([(i / steps, j / steps) for i, j in kept], dtype=torch.float64)


def triangle(
    subject: Model,
    sources: Float[Tensor, "n c h w"],
    first: Float[Tensor, "n c h w"],
    second: Float[Tensor, "n c h w"],
    labels: Int[Tensor, " n"],
    *,
    kind: Lattice = "exact",
    steps: int = 10,
    batch_size: int = 512,
) -> Triangle:
    """Confidence on the triangle between each source and two of its blind spots. Forward passes only."""
    points = lattice(kind, steps)
    w = (1 - points[:, 0] - points[:, 1]).clamp(min=0), points[:, 0], points[:, 1]
    at_source, at_first, at_second = (v.to(sources).view(1, -1, 1, 1, 1) for v in w)
    # the reference looks at one triangle at a time and breaks ties by rounding, which depends on the batch
    together = 1 if kind == "reference" else max(1, batch_size // len(points))
    values = []
    for start in range(0, len(sources), together):
        s, a, b = (corner[start : start + together, None] for corner in (sources, first, second))
        probes = at_source * s + at_first * a + at_second * b
        if kind == "exact":
            probes = probes.clamp(0, 1)
        wanted = labels[start : start + together].repeat_interleave(len(points))
        values.append(confidence(subject, probes.flatten(0, 1), wanted, batch_size=batch_size).view(-1, len(points)))
    found = torch.cat(values)
    return Triangle(points=points, values=found, source=found[:, 0])


def line(
    subject: Model,
    start: Float[Tensor, "n c h w"],
    end: Float[Tensor, "n c h w"],
    labels: Int[Tensor, " n"],
    *,
    points: int = 11,
    batch_size: int = 512,
) -> Float[Tensor, "n m"]:
    """Confidence at evenly spaced points of the straight line from `start` to `end`, both included."""
    t = torch.linspace(0, 1, points, dtype=start.dtype, device=start.device)
    columns = [
        confidence(subject, torch.lerp(start, end, w).clamp(0, 1), labels, batch_size=batch_size) for w in t.unbind()
    ]
    return torch.stack(columns, 1)


def widths(
    subject: Model,
    images: Float[Tensor, "n c h w"],
    directions: Float[Tensor, "n c h w"],
    labels: Int[Tensor, " n"],
    *,
    distances: Sequence[float] = (0.5, 1.0, 1.5, 2.0),
    samples: int = 256,
    least: float = 0.0,
    generator: torch.Generator | None = None,
    batch_size: int = 512,
) -> Float[Tensor, "n d 2"]:
    """How wide the tube around a walk is: 5% and 95% quantiles of confidence at L2 `distances` from it.

    Each image is moved in `samples` random directions orthogonal to `directions`, where the walk goes. An image whose
    own confidence is below `least`, or whose walk goes nowhere, gets zeros.
    """
    if samples < 2:
        raise AdviceError(f"Widths are quantiles of at least 2 samples, not {samples}.")
    own = confidence(subject, images, labels, batch_size=batch_size)
    out = images.new_zeros((len(images), len(distances), 2))
    quantiles = torch.tensor([0.05, 0.95], dtype=images.dtype, device=images.device)
    for i, (x, way, label) in enumerate(zip(images, directions, labels)):
        noise = torch.randn(samples, x.numel(), generator=generator, dtype=torch.float64).to(x)
        if float(own[i]) < least or not bool(way.any()):
            continue
        unit = way.flatten() / way.norm()
        noise = noise - (noise @ unit)[:, None] * unit
        noise = noise / noise.norm(dim=1, keepdim=True).clamp(min=1e-12)
        for j, distance in enumerate(distances):
            moved = (x.flatten() + distance * noise).clamp(0, 1).view(samples, *x.shape)
            p = confidence(subject, moved, label.expand(samples), batch_size=batch_size)
            out[i, j] = p.quantile(quantiles)
    return out


def rmse(a: Float[Tensor, "n c h w"], b: Float[Tensor, "n c h w"]) -> Float[Tensor, " n"]:
    """Root mean square difference per image, in units of [0, 1] pixels."""
    return (a - b).flatten(1).square().mean(1).sqrt()


def linf(a: Float[Tensor, "n c h w"], b: Float[Tensor, "n c h w"]) -> Float[Tensor, " n"]:
    """The largest difference of any pixel."""
    return (a - b).flatten(1).abs().amax(1)


def ssim(a: Float[Tensor, "n c h w"], b: Float[Tensor, "n c h w"], *, window: int = 11) -> Float[Tensor, " n"]:
    """Structural similarity per image (1 is equal): Gaussian windows of sigma 1.5 that lie wholly inside, data range 1.

    The window shrinks to the largest odd side that the images have room for.
    """
    side = min(window, *a.shape[-2:])
    side -= 1 - side % 2
    at = torch.arange(side, dtype=torch.float64) - side // 2
    g = torch.exp(-at.square() / (2 * 1.5**2))
    g = (g / g.sum()).to(a)
    c = a.shape[1]

    def blur(x: Tensor) -> Tensor:
        x = F.conv2d(x, g.view(1, 1, 1, -1).expand(c, 1, 1, side), groups=c)
        return F.conv2d(x, g.view(1, 1, -1, 1).expand(c, 1, side, 1), groups=c)

    mean_a, mean_b = blur(a), blur(b)
    var_a, var_b = blur(a * a) - mean_a**2, blur(b * b) - mean_b**2
    cov = blur(a * b) - mean_a * mean_b
    c1, c2 = 0.01**2, 0.03**2
    score = ((2 * mean_a * mean_b + c1) * (2 * cov + c2)) / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))
    return score.flatten(1).mean(1)


def bootstrap(
    values: Float[Tensor, " n"], *, draws: int = 2000, level: float = 0.95, seed: int = 0
) -> tuple[float, float]:
    """An interval for the mean of `values`: quantiles of the means of `draws` resamplings."""
    from lynceus.core.rng import generator

    v = values.detach().double().cpu()
    pick = torch.randint(len(v), (draws, len(v)), generator=generator(seed, "bootstrap"))
    low, high = v[pick].mean(1).quantile(torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)).tolist()
    return (low, high) if math.isfinite(low) else (math.nan, math.nan)
