"""Gradient ascent on the probability of a class, with decay: regular pictures at some cost in confidence.

Nguyen, Yosinski & Clune, Deep Neural Networks are Easily Fooled, CVPR 2015, arXiv 1412.1897; options: Yosinski et al.,
Understanding Neural Networks Through Deep Visualization, ICML workshop 2015, arXiv 1506.06579. Reference code:
Evolving-AI-Lab/fooling (branch ascent); written anew from the papers.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Float64
from torch import Tensor, nn

from lynceus.core import rng
from lynceus.core.environment import environment
from lynceus.core.errors import AdviceError, unknown
from lynceus.core.plots import image_grid, lines
from lynceus.core.progress import progress
from lynceus.core.report import Report
from lynceus.core.subject import Subject
from lynceus.trust.evolution import judge, log_odds, logits_of
from lynceus.trust.pixels import check_shape

LEVELS = (0.99, 0.999, 0.9999)
LARGEST_STEP = 1e12
SHOWN = 40


@dataclass(frozen=True, kw_only=True, slots=True)
class AscentConfig:
    """How an image climbs. Pixels count 0 to 255 here, less the mean image.

    steps: updates. rate: 0 takes steps that promise, to first order, a gain of min(.03, .1 (1 - p)); else constant.
    start: "noise" (standard normal), "uniform" (0 to 255) or "zero" (the mean image). mean: of pixels, in [0, 1].
    blur_every, blur: a Gaussian of this radius every so many steps; 0: none.
    small, small_norm, small_benefit: percentiles; after each step values, pixels by their length, and pixels by their
    part in the class (value times gradient) below it are set to the mean.
    """

    steps: int = 300
    rate: float = 0.0
    start: Literal["noise", "uniform", "zero"] = "noise"
    mean: float = 0.5
    blur_every: int = 0
    blur: float = 0.5
    small: float = 0.0
    small_norm: float = 0.0
    small_benefit: float = 0.0

    def __post_init__(self) -> None:
        if self.start not in ("noise", "uniform", "zero"):
            raise unknown("start", str(self.start), ("noise", "uniform", "zero"))
        if self.steps < 1 or self.rate < 0 or self.blur_every < 0:
            raise AdviceError("An ascent takes at least one step, and rate and blur_every are not below 0.")
        if not 0 <= self.mean <= 1:
            raise AdviceError(f"mean is that of pixels in [0, 1], not {self.mean}.")
        if self.blur_every and self.blur < 0.3:
            raise AdviceError(f"A blur of radius {self.blur} does nothing; take at least 0.3, or blur_every=0.")
        for name in ("small", "small_norm", "small_benefit"):
            if not 0 <= getattr(self, name) <= 100:
                raise AdviceError(f"{name} is a percentile in [0, 100], not {getattr(self, name)}.")


def ascend(
    subject: Subject | nn.Module,
    classes: int | Sequence[int] | None,
    decay: float | Sequence[float] = 0.01,
    *,
    shape: tuple[int, int, int],
    config: AscentConfig | None = None,
    batch_size: int = 64,
    seconds: float | None = None,
    seed: int = 0,
    quiet: bool = False,
) -> Report:
    """Climbs to an image of each class, once for every decay: with decay, values shrink at every step, so that only
    what the class asks for stays. Needs gradients.

    classes: one, several, or None for all. decay: share of the image that each step takes away.
    Returns a Report, a row per decay and class: the first step at which the class was on top, and above each level, the
    best and last confidence, and that of the best image in 8 bits. arrays: "images" (rows, c, h, w) uint8, "curve"
    (rows, steps + 1) log odds.
    """
    began = time.monotonic()
    subject = subject if isinstance(subject, Subject) else Subject(subject)
    subject.require(frozenset({"gradients"}))
    config, shape = config or AscentConfig(), check_shape(shape)
    decays = [float(d) for d in ([decay] if isinstance(decay, (int, float)) else decay)]
    wrong = [d for d in decays if not 0 <= d < 1]
    if wrong or not decays:
        raise AdviceError(f"decay is a share in [0, 1), such as 0.01, not {wrong or 'nothing'}.")
    with torch.no_grad():
        count = logits_of(subject, torch.full((1, *shape), config.mean), 0).shape[1]
    picked = list(range(count)) if classes is None else [classes] if isinstance(classes, int) else list(classes)
    missing = [c for c in picked if not 0 <= c < count]
    if missing or not picked:
        raise AdviceError(f"The model has classes 0 to {count - 1}, not {missing or 'none'}.")
    report = Report(name="fooling images by gradient ascent", environment=environment(seed))
    goals = [(d, c) for d in decays for c in picked]
    climbs: list[_Climb] = []
    with progress("ascent", total=len(goals), unit="images", quiet=quiet) as bar:
        for start in range(0, len(goals), batch_size):
            if climbs and seconds is not None and time.monotonic() - began > seconds:
                report.notes.append(f"The budget of {seconds:g} s ended after {start} of {len(goals)} images.")
                break
            part = goals[start : start + batch_size]
            climbs.append(_climb(subject, part, shape, config, seed))
            bar.advance(len(part))
    _fill(report, subject, goals, climbs, decays, config)
    report.summary["seconds"] = time.monotonic() - began
    return report


@dataclass(frozen=True)
class _Climb:
    curve: Float64[Tensor, "n s"]  # log odds after 0, 1, ... steps
    top: Float[Tensor, " n"]  # first step on top, inf for never
    images: Tensor  # the best, uint8
    eight: Float64[Tensor, " n"]  # their confidence


def _climb(
    subject: Subject,
    goals: Sequence[tuple[float, int]],
    shape: tuple[int, int, int],
    config: AscentConfig,
    seed: int,
) -> _Climb:
    target = torch.tensor([c for _, c in goals])[:, None]
    keep = 1 - torch.tensor([d for d, _ in goals]).view(-1, 1, 1, 1)
    mean = 255 * config.mean
    x = torch.stack([_start(config, shape, rng.generator(seed, "start", c)) for _, c in goals])
    curve = torch.full((len(goals), config.steps + 1), torch.nan, dtype=torch.float64)
    top = torch.full((len(goals),), torch.inf)
    best, images = torch.full((len(goals),), -torch.inf, dtype=torch.float64), x.clone()
    active = torch.ones(len(goals), dtype=torch.bool)
    for step in range(config.steps + 1):
        pixels = (x + mean).clamp(0, 255)
        seen = (pixels / 255).requires_grad_()
        odds_all = log_odds(logits_of(subject, seen, 0).cpu())
        odds = odds_all.gather(1, target)[:, 0]
        (slope,) = torch.autograd.grad(odds.sum(), seen)
        odds = odds.detach()
        curve[:, step] = odds
        first = (odds_all.detach().argmax(1) == target[:, 0]) & top.isinf()
        top[first] = step
        better = odds > best
        best, images[better] = torch.where(better, odds, best), pixels[better]
        if step == config.steps:
            break
        x = pixels - mean
        p, doubt = odds.sigmoid(), (-odds).sigmoid()
        slope = slope.cpu().double() / 255 * (p * doubt).view(-1, 1, 1, 1)  # dp / dx
        length = slope.flatten(1).square().sum(1)
        active &= length > 0
        if not bool(active.any()):
            curve[:, step + 1 :] = odds[:, None]
            break
        promise = (0.1 * doubt).clamp(max=0.03) / length.clamp(min=1e-300)
        rate = promise.clamp(max=LARGEST_STEP) if not config.rate else torch.full_like(promise, config.rate)
        moved = ((x + (rate.view(-1, 1, 1, 1) * slope).float()) * keep).clamp(-1e6, 1e6)
        moved = _tidy(moved, slope.float(), config, step)
        x = torch.where(active.view(-1, 1, 1, 1), moved, x)
    bits = images.to(torch.uint8)
    eight = judge(subject, bits).cpu().gather(1, target)[:, 0].sigmoid()
    return _Climb(curve, top, bits, eight)


def _start(config: AscentConfig, shape: tuple[int, int, int], draw: torch.Generator) -> Tensor:
    if config.start == "noise":
        return torch.randn(shape, generator=draw)
    if config.start == "uniform":
        return 255 * (torch.rand(shape, generator=draw) - config.mean)
    return torch.zeros(shape)


def _tidy(x: Tensor, slope: Tensor, config: AscentConfig, step: int) -> Tensor:
    """Blurs, and sets what is small to the mean."""
    if config.blur_every and (step + 1) % config.blur_every == 0:
        x = blurred(x, config.blur)
    if config.small:
        x = _without(x, x.abs(), config.small)
    if config.small_norm:
        x = _without(x, x.norm(dim=1, keepdim=True), config.small_norm)
    if config.small_benefit:
        x = _without(x, (x * slope).sum(1, keepdim=True).abs(), config.small_benefit)
    return x


def _without(x: Tensor, size: Tensor, percentile: float) -> Tensor:
    limit = size.flatten(1).quantile(percentile / 100, dim=1).view(-1, 1, 1, 1)
    return x * (size >= limit)


def blurred(x: Float[Tensor, "b c h w"], radius: float) -> Float[Tensor, "b c h w"]:
    """A Gaussian of standard deviation `radius` pixels; the border is repeated outwards."""
    reach = max(1, round(4 * radius))
    kernel = torch.exp(-0.5 * (torch.arange(-reach, reach + 1) / radius).square())
    kernel = (kernel / kernel.sum()).to(x)
    flat = F.pad(x.flatten(0, 1)[:, None], (reach,) * 4, mode="replicate")
    flat = F.conv2d(F.conv2d(flat, kernel.view(1, 1, 1, -1)), kernel.view(1, 1, -1, 1))
    return flat.view(x.shape)


def _fill(
    report: Report,
    subject: Subject,
    goals: Sequence[tuple[float, int]],
    climbs: Sequence[_Climb],
    decays: Sequence[float],
    config: AscentConfig,
) -> None:
    curve, top = torch.cat([c.curve for c in climbs]), torch.cat([c.top for c in climbs])
    images, eight = torch.cat([c.images for c in climbs]), torch.cat([c.eight for c in climbs])
    done = goals[: len(curve)]
    names = [subject.classes[c] if subject.classes and c < len(subject.classes) else str(c) for _, c in done]
    p = curve.sigmoid()
    for i, (decay, _) in enumerate(done):
        row: dict[str, object] = {"decay": decay, "class": names[i], "on top at step": _step(float(top[i]))}
        for level in LEVELS:
            above = (p[i] > level).nonzero()
            row[f"> {level} at step"] = int(above[0]) if len(above) else None
        row |= {"best": float(p[i].max()), "last": float(p[i, -1]), "best in 8 bits": float(eight[i])}
        report.rows.append(row)
    which = torch.tensor([d for d, _ in done], dtype=torch.float64)
    across, series = np.arange(curve.shape[1]), {}
    for decay in decays:
        mine = which == decay
        if not bool(mine.any()):
            continue
        report.summary[f"minimum_best, decay {decay:g}"] = float(p[mine].amax(1).min())
        report.summary[f"median_last, decay {decay:g}"] = float(p[mine, -1].quantile(0.5))
        report.summary[f"share_above_{LEVELS[-1]}, decay {decay:g}"] = float(
            (p[mine].amax(1) > LEVELS[-1]).double().mean()
        )
        series[f"decay {decay:g}"] = (across, p[mine].quantile(0.5, dim=0).numpy())
    report.figures["confidence_over_steps.plotly"] = lines(
        series, x_title="step", y_title="confidence, median of the classes"
    )
    for decay in decays:
        chosen = (which == decay).nonzero().flatten()[:SHOWN].tolist()
        if chosen:
            captions = [f"{names[i]} {100 * float(eight[i]):.2f}%" for i in chosen]
            report.figures[f"ascended_images,_decay_{decay:g}.png"] = image_grid(images[chosen], captions)
    report.arrays = {"images": images.numpy(), "curve": curve.numpy(), "confidence": eight.numpy()}
    best = " / ".join(f"{report.summary[f'median_last, decay {d:g}']:.4f}" for d in decays if f"decay {d:g}" in series)
    report.answer = (
        f"Median confidence in the wanted class after {config.steps} steps with decay "
        f"{' / '.join(f'{d:g}' for d in decays if f'decay {d:g}' in series)}: {best}."
    )


def _step(value: float) -> int | None:
    return None if value == float("inf") else int(value)
