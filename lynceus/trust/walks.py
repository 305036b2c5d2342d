"""Walks on a level set of confidence: from one image towards another, while the model stays sure of the first's class.

Exploring Geometry of Blind Spots in Vision Models, NeurIPS 2023, arXiv 2310.19889 (level set traversal).
Reference code: SriramB-98/blindspots-neurips-sub (no licence file; nothing of it is used).

A step goes towards the target along what is orthogonal to the gradient, and adds a small push that raises confidence;
it is kept only while confidence has dropped by less than `drop` from the clean source's.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lynceus.core.errors import AdviceError

Model = Callable[[Tensor], Tensor]  # a Subject, or any differentiable function from pixels in [0, 1] to logits


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    """A walk at one moment: after `step` iterations, (n,) confidences and root mean square distances to the target."""

    step: int
    confidence: Float[Tensor, " n"]
    distance: Float[Tensor, " n"]
    image: Float[Tensor, "n c h w"]
    direction: Float[Tensor, "n c h w"]  # where the walk goes next: towards the target, orthogonal to the gradient


@dataclass(frozen=True, slots=True, kw_only=True)
class Walk:
    """Where walks ended. `steps` is fewer than asked for when time ran out."""

    image: Float[Tensor, "n c h w"]
    confidence: Float[Tensor, " n"]  # of the source's class, at the end
    clean: Float[Tensor, " n"]  # at the source, before anything moved
    accepted: Float[Tensor, " n"]  # share of the steps that were kept
    steps: int
    traces: list[Trace]


def walk(
    subject: Model,
    sources: Float[Tensor, "n c h w"],
    targets: Float[Tensor, "n c h w"],
    labels: Int[Tensor, " n"],
    *,
    step_size: float = 0.01,
    steps: int = 400,
    drop: float = 0.2,
    adversarial: bool = True,
    adversarial_step: float = 2e-3,
    jitter: float = 4 / 255,
    backtrack: bool = False,
    record: Sequence[int] = (),
    generator: torch.Generator | None = None,
    until: float | None = None,
) -> Walk:
    """Walks every source towards its target. One forward and one backward pass per iteration.

    sources, targets: pixels in [0, 1]; float32 or float64. labels: the class whose confidence is held, in general the
      answer on the source.
    step_size: share of the way to the target that one step asks for. drop: confidence that may be lost in all.
    adversarial: adds what keeps confidence up: `adversarial_step` bounds its sum, per pixel.
    jitter: the start is moved by a uniform draw from +- jitter / 2 (from `generator`; 0 starts at the source).
    backtrack: a walk whose step is refused asks for half as much next time, and for twice as much after success.
    record: iterations after which a Trace is kept. until: `time.monotonic()` at which to stop.
    """
    check_pairs(sources, targets, labels)
    sources, targets = (x.detach() if x.dtype == torch.float64 else x.detach().float() for x in (sources, targets))
    view = (-1, 1, 1, 1)
    x = sources
    if jitter:
        noise = torch.rand(x.shape, generator=generator, dtype=torch.float64).to(x) - 0.5
        x = (x + jitter * noise).clamp(0, 1)
    clean = confidence(subject, sources, labels)
    p, slope, g = _look(subject, x, labels)
    push = torch.zeros_like(x)
    size = torch.full_like(clean, step_size)
    kept = torch.zeros_like(clean)
    wanted, traces = set(record), []
    done = 0
    if 0 in wanted:
        traces.append(_trace(0, x, targets, p, slope))
    for k in range(1, steps + 1):
        candidate = x + size.view(view) * across(targets - x, slope)
        if adversarial:
            push = (push + (adversarial_step / 2) * g).clamp(-adversarial_step, adversarial_step)
            candidate = candidate - push
        candidate = candidate.clamp(0, 1)
        there, new_slope, new_g = _look(subject, candidate, labels)
        keep = clean - there < drop
        # where the step is refused the walk stands still, and so does its gradient: no second pass is needed
        x, slope, g = (torch.where(keep.view(view), a, b) for a, b in ((candidate, x), (new_slope, slope), (new_g, g)))
        p = torch.where(keep, there, p)
        kept = kept + keep
        if backtrack:
            size = torch.where(keep, (size * 2).clamp(max=step_size), size / 2)
        done = k
        if k in wanted:
            traces.append(_trace(k, x, targets, p, slope))
        if until is not None and time.monotonic() >= until:
            break
    return Walk(image=x, confidence=p, clean=clean, accepted=kept / max(done, 1), steps=done, traces=traces)


def across(way: Float[Tensor, "n c h w"], slope: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
    """What of `way` is orthogonal to `slope`, per image; all of it where the slope is zero."""
    flat, s = way.flatten(1), slope.flatten(1)
    peak = s.abs().amax(1, keepdim=True)
    s = s / torch.where(peak > 0, peak, torch.ones_like(peak))  # squares of tiny gradients would underflow
    square = (s * s).sum(1, keepdim=True)
    share = (s * flat).sum(1, keepdim=True) / torch.where(square > 0, square, torch.ones_like(square))
    return (flat - share * s).view_as(way)


def confidence(subject: Model, images: Tensor, labels: Tensor, *, batch_size: int = 512) -> Float[Tensor, " n"]:
    """The probability of each image's label."""
    with torch.no_grad():
        parts = [
            _checked(subject(x), y).softmax(1).gather(1, y[:, None])[:, 0]
            for x, y in zip(images.split(batch_size), labels.split(batch_size))
        ]
    return torch.cat(parts)


def check_pairs(sources: Tensor, targets: Tensor, labels: Tensor) -> None:
    """Raises where sources, targets and labels do not belong together, or pixels leave [0, 1]."""
    if sources.shape != targets.shape or sources.ndim != 4 or len(sources) == 0:
        raise AdviceError(
            f"A walk needs sources and targets (n, c, h, w) of one shape, not {tuple(sources.shape)} and "
            f"{tuple(targets.shape)}; resize the targets to the sources' size."
        )
    if labels.shape != (len(sources),):
        raise AdviceError(f"A walk needs one label per source: {len(sources)} sources, labels {tuple(labels.shape)}.")
    for name, images in (("source", sources), ("target", targets)):
        inside = ((images >= 0) & (images <= 1)).flatten(1).all(1)
        if not bool(inside.all()):
            bad = int((~inside).nonzero()[0, 0])
            low, high = (float(v) for v in images[bad].aminmax())
            raise AdviceError(
                f"{name.capitalize()} {bad} has pixels in {low:g} to {high:g}; walks take pixels in [0, 1]. Divide "
                "uint8 values by 255, and leave normalisation to Subject(model, mean=..., std=...)."
            )


def _checked(logits: Tensor, labels: Tensor) -> Tensor:
    if logits.ndim != 2:
        raise AdviceError(f"A walk needs logits (n, k); the model gave {tuple(logits.shape)}.")
    if bool((labels < 0).any()) or bool((labels >= logits.shape[1]).any()):
        raise AdviceError(
            f"Labels go from {int(labels.min())} to {int(labels.max())} and the model has {logits.shape[1]} classes; "
            "hold the confidence of a class that the model knows."
        )
    if not bool(torch.isfinite(logits).all()):
        bad = int((~torch.isfinite(logits)).any(1).nonzero()[0, 0])
        raise AdviceError(f"The model gives NaN or infinity on image {bad} of the batch; check its weights.")
    return logits


def _odds(logits: Tensor, labels: Tensor) -> Tensor:
    """log((1 - p) / p) of the label: keeps its gradient where p rounds to 1 and that of the cross-entropy is lost."""
    own = logits.gather(1, labels[:, None])[:, 0]
    return logits.scatter(1, labels[:, None], -math.inf).logsumexp(1) - own


def _look(subject: Model, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Confidence, the gradient of the log odds, and that of the cross-entropy: the same direction, times 1 - p."""
    with torch.enable_grad(), torch.autocast(x.device.type, enabled=False):
        x = x.detach().requires_grad_(True)
        odds = _odds(_checked(subject(x), labels), labels)
        if not odds.requires_grad:
            raise AdviceError("The answer has no gradient with respect to the pixels; walk on a torch module.")
        (slope,) = torch.autograd.grad(odds.sum(), x)
    odds = odds.detach()
    return torch.sigmoid(-odds), slope, torch.sigmoid(odds).view(-1, 1, 1, 1) * slope


def _trace(step: int, x: Tensor, targets: Tensor, p: Tensor, slope: Tensor) -> Trace:
    way = targets - x
    distance = way.flatten(1).square().mean(1).sqrt()
    return Trace(step=step, confidence=p, distance=distance, image=x, direction=across(way, slope))
