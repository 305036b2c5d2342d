"""Attacks with gradients: FGSM, PGD, APGD and FMN, in the L-inf and L2 balls around images in [0, 1].

FGSM: Explaining and Harnessing Adversarial Examples, ICLR 2015, arXiv 1412.6572. PGD: Towards Deep Learning Models
Resistant to Adversarial Attacks, ICLR 2018, arXiv 1706.06083. APGD and the DLR loss: Reliable Evaluation of Adversarial
Robustness with an Ensemble of Diverse Parameter-free Attacks, ICML 2020, arXiv 2003.01690. FMN: Fast Minimum-norm
Adversarial Attacks through Adaptive Norm Constraints, NeurIPS 2021, arXiv 2102.12827.
Reference code: fra31/auto-attack (MIT), bethgelab/foolbox (MIT), pralab/Fast-Minimum-Norm-FMN-Attack (MIT).

Whatever half precision surrounds them, attacks run in float32 (float64 images in float64): gradients that underflow
would hide adversarial images. Results never leave [0, 1] nor the ball, not by one unit in the last place.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from lynceus.core.errors import AdviceError, unknown
from lynceus.core.rng import generator as make_generator
from lynceus.core.types import as_float
from lynceus.trust.balls import Norm, ball_start, norms, project, steepest

Loss = Literal["ce", "margin", "dlr"]
Model = Callable[[Tensor], Tensor]  # a Subject, or any function of pixels that gives logits
RHO = 0.75  # APGD: a step size stays while at least this share of steps raised the loss
MOMENTUM = 0.75  # APGD: weight of the new step against the last one


@dataclass(frozen=True, slots=True, kw_only=True)
class Adversarial:
    """What an attack found. Where `success` is False, `image` is the best attempt, and still inside the ball."""

    image: Float[Tensor, "b c h w"]
    success: Bool[Tensor, " b"]  # the model's answer on `image` is not the label (or is the target)
    distance: Float[Tensor, " b"]  # of `image` from the original, in the attack's norm, float64
    margin: Float[Tensor, " b"]  # logit of the strongest other class minus the label's; above 0 is a success


def fgsm(
    subject: Model,
    images: Float[Tensor, "b c h w"] | UInt8[Tensor, "b c h w"],
    labels: Int[Tensor, " b"],
    *,
    epsilon: float,
    norm: Norm = "linf",
    loss: Loss = "ce",
    targeted: bool = False,
    grid: bool = False,
) -> Adversarial:
    """One step of length `epsilon` along the steepest direction. Arguments as for `pgd`."""
    return pgd(
        subject,
        images,
        labels,
        epsilon=epsilon,
        norm=norm,
        steps=1,
        step_size=epsilon,
        random_start=False,
        loss=loss,
        targeted=targeted,
        grid=grid,
    )


def pgd(
    subject: Model,
    images: Float[Tensor, "b c h w"] | UInt8[Tensor, "b c h w"],
    labels: Int[Tensor, " b"],
    *,
    epsilon: float,
    norm: Norm = "linf",
    steps: int = 40,
    step_size: float | None = None,
    restarts: int = 1,
    random_start: bool = True,
    loss: Loss = "ce",
    targeted: bool = False,
    grid: bool = False,
    early_stop: bool = True,
    seed: int = 0,
    until: float | None = None,
) -> Adversarial:
    """Projected gradient ascent; of all points visited, the one with the highest margin is kept for each image.

    subject: a Subject or any function of pixels in [0, 1] that gives logits (b, k), differentiable, in eval mode.
    images: in [0, 1]. labels: (b,) true classes, or with `targeted` the classes to reach.
    epsilon: radius of the ball, in units of [0, 1] pixels. step_size: None is 2.5 epsilon / steps.
    restarts: independent starts; images already broken are left alone. random_start: False starts at the image.
    grid: results lie on the 8-bit grid k / 255 (the images must too); distances then count whole levels.
    early_stop: an image is done once its answer is wrong. False goes on raising its loss, which training wants.
    until: `time.monotonic()` at which to stop with what there is.
    """
    run = _Run(subject, images, labels, epsilon, norm, loss, targeted, grid)
    step = 2.5 * epsilon / steps if step_size is None else step_size
    for restart in range(restarts):
        active = run.left(early_stop)
        if len(active) == 0:
            break
        x = run.start(active, random_start or restart > 0, make_generator(seed, "pgd", restart))
        for _ in range(steps):
            if _over(until):
                break
            logits, _value, gradient = run.look(x, active)
            run.keep(x, logits, active)
            if early_stop:
                going = ~run.success[active]
                if not bool(going.all()):
                    active, x, gradient = active[going], x[going], gradient[going]
                if len(active) == 0:
                    break
            x = run.project(x + step * steepest(gradient, norm), active)
        if len(active):
            run.keep(x, run.logits(x), active)
    return run.result()


def apgd(
    subject: Model,
    images: Float[Tensor, "b c h w"] | UInt8[Tensor, "b c h w"],
    labels: Int[Tensor, " b"],
    *,
    epsilon: float,
    norm: Norm = "linf",
    steps: int = 100,
    restarts: int = 1,
    loss: Loss = "ce",
    targeted: bool = False,
    grid: bool = False,
    early_stop: bool = True,
    seed: int = 0,
    until: float | None = None,
) -> Adversarial:
    """PGD without a step size to choose: momentum, and a step that is halved when the loss stalls, from the best point.

    loss: "ce", or "dlr", the difference of logits ratio, which neither shift nor scale of the logits can hide (three
    classes at least). Other arguments as for `pgd`.
    """
    run = _Run(subject, images, labels, epsilon, norm, loss, targeted, grid)
    checkpoints = apgd_checkpoints(steps)
    for restart in range(restarts):
        active = run.left(early_stop)
        if len(active) == 0:
            break
        x = run.start(active, True, make_generator(seed, "apgd", loss, restart))
        logits, value, gradient = run.look(x, active)
        run.keep(x, logits, active)
        state = {
            "x": x,
            "last": x,
            "gradient": gradient,
            "value": value,
            "best": x,
            "best_value": value,
            "best_gradient": gradient,
            "step": torch.full_like(value, 2 * epsilon),
            "rises": torch.zeros_like(value),
            "then_step": torch.full_like(value, math.nan),  # at the last checkpoint: none yet, so nothing is equal
            "then_best": torch.full_like(value, math.nan),
        }
        since = 0
        for k in range(steps):
            if _over(until):
                break
            if early_stop:
                going = ~run.success[active]
                if not bool(going.all()):
                    active, state = active[going], {name: v[going] for name, v in state.items()}
                if len(active) == 0:
                    break
            s = state
            ahead = run.project(s["x"] + _column(s["step"]) * steepest(s["gradient"], norm), active)
            if k > 0:  # the first step has no step before it
                ahead = run.project(
                    s["x"] + MOMENTUM * (ahead - s["x"]) + (1 - MOMENTUM) * (s["x"] - s["last"]), active
                )
            logits, value, gradient = run.look(ahead, active)
            run.keep(ahead, logits, active)
            s["rises"] = s["rises"] + (value > s["value"])
            s["last"], s["x"], s["value"], s["gradient"] = s["x"], ahead, value, gradient
            better = value > s["best_value"]
            for name, new in (("best", ahead), ("best_value", value), ("best_gradient", gradient)):
                s[name] = _where(better, new, s[name])
            since += 1
            if k + 1 in checkpoints:
                stalled = s["rises"] < RHO * since
                stuck = (s["then_step"] == s["step"]) & (s["then_best"] == s["best_value"])
                halve = stalled | stuck
                s["then_step"], s["then_best"] = s["step"], s["best_value"]
                s["step"] = torch.where(halve, s["step"] / 2, s["step"])
                for name, best in (("x", "best"), ("gradient", "best_gradient"), ("value", "best_value")):
                    s[name] = _where(halve, s[best], s[name])
                s["rises"], since = torch.zeros_like(value), 0
    return run.result()


def apgd_checkpoints(steps: int) -> set[int]:
    """The iterations at which APGD may halve its step: ceil(p_j steps), p = 0, 0.22, and ever shorter intervals."""
    p = [0.0, 0.22]
    while p[-1] < 1:
        p.append(p[-1] + max(p[-1] - p[-2] - 0.03, 0.06))
    return {math.ceil(round(q * steps, 9)) for q in p[1:] if q <= 1}


def fmn(
    subject: Model,
    images: Float[Tensor, "b c h w"] | UInt8[Tensor, "b c h w"],
    labels: Int[Tensor, " b"],
    *,
    norm: Norm = "l2",
    steps: int = 100,
    step_size: float = 1.0,
    gamma: float = 0.05,
    targeted: bool = False,
    until: float | None = None,
) -> Adversarial:
    """The smallest change that flips the answer: the ball shrinks while it does and grows while it does not.

    step_size and gamma (share by which the radius changes per step) fall with a cosine to a hundredth and to 1e-4.
    Where nothing was found, `success` is False and `image` the last attempt. Other arguments as for `pgd`.
    """
    run = _Run(subject, images, labels, math.inf, norm, "margin", targeted, False)
    x, everything = run.images, torch.arange(len(run.images), device=run.images.device)
    radius = torch.full((len(x),), math.inf, dtype=x.dtype, device=x.device)
    found, best, distance = run.success.clone(), run.images.clone(), radius.clone()
    distance[found] = 0.0
    margins = run.margin.clone()
    for k in range(steps):
        if _over(until):
            break
        logits, value, gradient = run.look(x, everything)
        wrong = run.wrong(logits, everything)
        moved = norms(x - run.images, norm)
        closer = wrong & (moved < distance)
        best, distance = _where(closer, x, best), torch.where(closer, moved, distance)
        margins = torch.where(closer, value, margins)
        found = found | wrong
        cosine = (1 + math.cos(math.pi * k / steps)) / 2
        g = 1e-4 + (gamma - 1e-4) * cosine
        slope = norms(gradient, "l1" if norm == "linf" else "l2").clamp(min=1e-12)
        # to first order the boundary lies this far; used until an adversarial image is known
        outward = torch.where(found, radius * (1 + g), moved + value.neg().clamp(min=0) / slope)
        radius = torch.where(wrong, torch.minimum(radius * (1 - g), distance), outward)
        step = step_size * (0.01 + 0.99 * cosine)
        x = project(run.images, x + step * steepest(gradient, "l2"), radius, norm)
    logits = run.logits(x)
    moved = norms(x - run.images, norm)
    wrong = run.wrong(logits, everything)
    closer = wrong & (moved < distance)
    found = found | wrong
    image = _where(closer | ~found, x, best)
    margins = torch.where(closer | ~found, run.margins(logits, everything), margins)
    return Adversarial(
        image=image, success=found, distance=norms((image - run.images).double(), norm), margin=margins.double()
    )


class _Run:
    """One attack on one batch: the checked inputs, the loss, and the best image so far of each."""

    def __init__(
        self,
        subject: Model,
        images: Tensor,
        labels: Tensor,
        epsilon: float,
        norm: Norm,
        loss: Loss,
        targeted: bool,
        grid: bool,
    ):
        if norm not in ("linf", "l2"):
            raise unknown("norm", str(norm), ("linf", "l2"))
        if loss not in ("ce", "margin", "dlr"):
            raise unknown("loss", str(loss), ("ce", "margin", "dlr"))
        if not epsilon >= 0:
            raise AdviceError(f"epsilon is a radius, 0 or more in units of [0, 1] pixels, not {epsilon}.")
        images = as_float(images.detach())
        images = images if images.dtype == torch.float64 else images.float()
        if len(images) != len(labels):
            raise AdviceError(f"An attack needs one label per image: {len(images)} images, {len(labels)} labels.")
        check_pixels(images)
        if grid and not bool(((images * 255).round() / 255 == images).all()):
            raise AdviceError("grid=True needs images on the 8-bit grid k / 255: (image * 255).round() / 255.")
        self.subject, self.images, self.labels = subject, images, labels.to(images.device)
        self.epsilon, self.norm, self.loss, self.targeted, self.grid = epsilon, norm, loss, targeted, grid
        with torch.no_grad():
            logits = self.logits(images)
        if logits.ndim != 2:
            raise AdviceError(f"An attack needs logits (b, k); the model gave {tuple(logits.shape)}.")
        classes = logits.shape[1]
        if bool((self.labels < 0).any()) or bool((self.labels >= classes).any()):
            bad = int(((self.labels < 0) | (self.labels >= classes)).nonzero()[0, 0])
            raise AdviceError(
                f"Label {int(self.labels[bad])} of image {bad} is outside the model's {classes} classes "
                f"(0 to {classes - 1}); attack with the labels that the model was trained on."
            )
        if loss == "dlr" and classes < 3:
            raise AdviceError(f"The DLR loss compares three classes and the model has {classes}; use loss='margin'.")
        self.best = images.clone()
        everything = torch.arange(len(images), device=images.device)
        self.margin = self.margins(logits, everything)
        self.success = self.wrong(logits, everything)

    def left(self, early_stop: bool) -> Tensor:
        """Indices of the images that are still to be attacked."""
        going = ~self.success if early_stop else torch.ones_like(self.success)
        return going.nonzero()[:, 0]

    def start(self, active: Tensor, random: bool, generator: torch.Generator) -> Tensor:
        images = self.images[active]
        if not random:
            return images
        noise = ball_start(images, self.epsilon, self.norm, generator)
        return self.project(images + noise, active)

    def project(self, x: Tensor, active: Tensor) -> Tensor:
        return project(self.images[active], x, self.epsilon, self.norm, grid=self.grid)

    def logits(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            out = self.subject(x).to(x.device)
        if not bool(torch.isfinite(out).all()):
            bad = int((~torch.isfinite(out)).flatten(1).any(1).nonzero()[0, 0])
            raise AdviceError(
                f"The model gives NaN or infinity on image {bad} of the batch; look for its source with "
                "torch.autograd.detect_anomaly(), or check the weights."
            )
        return out

    def look(self, x: Tensor, active: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits, loss per image (higher is more adversarial) and its gradient, in one forward and one backward."""
        with torch.enable_grad(), torch.autocast(x.device.type, enabled=False):
            x = x.detach().requires_grad_(True)
            logits = self.logits(x)
            value = self.losses(logits, active)
            if not value.requires_grad:
                raise AdviceError(
                    "The model's answer has no gradient with respect to the pixels; attack a torch module."
                )
            (gradient,) = torch.autograd.grad(value.sum(), x)
        return logits.detach(), value.detach(), gradient

    def losses(self, logits: Tensor, active: Tensor) -> Tensor:
        if self.loss == "margin":
            return self.margins(logits, active)
        labels = self.labels[active]
        if self.loss == "ce":
            value = F.cross_entropy(logits, labels, reduction="none")
            return -value if self.targeted else value
        top = logits.sort(dim=1, descending=True).values
        if not self.targeted:
            return self.margins(logits, active) / (top[:, 0] - top[:, 2] + 1e-12)
        fourth = top[:, 3] if logits.shape[1] > 3 else top[:, 2]
        return self.margins(logits, active) / (top[:, 0] - (top[:, 2] + fourth) / 2 + 1e-12)

    def margins(self, logits: Tensor, active: Tensor) -> Tensor:
        labels = self.labels[active][:, None]
        own = logits.gather(1, labels)[:, 0]
        other = logits.scatter(1, labels, -math.inf).amax(1)
        return own - other if self.targeted else other - own

    def wrong(self, logits: Tensor, active: Tensor) -> Tensor:
        hit = logits.argmax(1) == self.labels[active]
        return hit if self.targeted else ~hit

    def keep(self, x: Tensor, logits: Tensor, active: Tensor) -> None:
        """Remembers x where it is better than all before; a success beats every failure."""
        margin, wrong = self.margins(logits.detach(), active), self.wrong(logits, active)
        before = self.success[active]
        better = (wrong & ~before) | ((wrong == before) & (margin > self.margin[active]))
        at = active[better]
        self.best[at], self.margin[at] = x.detach()[better], margin[better]
        self.success[active] = before | wrong

    def result(self) -> Adversarial:
        change = (self.best.double() - self.images.double()) if not self.grid else _levels(self.best, self.images)
        return Adversarial(
            image=self.best, success=self.success, distance=norms(change, self.norm), margin=self.margin.double()
        )


def check_pixels(images: Tensor) -> None:
    """Raises unless every pixel lies in [0, 1]: a model behind wrong bounds looks robust, or weak, for no reason."""
    low, high = (float(v) for v in images.aminmax())
    if not (low >= 0 and high <= 1):
        outside = ~((images >= 0) & (images <= 1)).flatten(1).all(1)
        raise AdviceError(
            f"Image {int(outside.nonzero()[0, 0])} has pixels in {low:g} to {high:g}; attacks take pixels in [0, 1]. "
            "Divide uint8 values by 255, and leave normalisation to Subject(model, mean=..., std=...)."
        )


def _levels(a: Tensor, b: Tensor) -> Tensor:
    """Difference in whole 8-bit levels, as multiples of 1 / 255."""
    return ((a.double() * 255).round() - (b.double() * 255).round()) / 255


def _over(until: float | None) -> bool:
    return until is not None and time.monotonic() >= until


def _column(value: Tensor) -> Tensor:
    return value[:, None, None, None]


def _where(which: Tensor, new: Tensor, old: Tensor) -> Tensor:
    return torch.where(which.view(-1, *(1,) * (new.ndim - 1)), new, old)
