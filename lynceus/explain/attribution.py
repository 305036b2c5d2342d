"""Which pixels an answer rests on: saliency, Integrated Gradients, occlusion; and captum's methods where installed.

Saliency: Simonyan et al., ICLR workshop 2014, arXiv 1312.6034. Integrated Gradients: Sundararajan et al., ICML 2017,
arXiv 1703.01365. Occlusion: Zeiler and Fergus, ECCV 2014, arXiv 1311.2901. Same rules as pytorch/captum (BSD-3-Clause),
written from the papers. Everything is batched over images and steps (or windows) in passes of bounded size; gradients
are taken to the pixels by autograd, without hooks, so that in-place activations and modules used twice cannot disturb.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from lynceus.core.errors import AdviceError, missing_extra, unknown
from lynceus.core.subject import Subject

Rule = Literal["gausslegendre", "left", "right", "middle", "trapezoid"]
RULES = ("gausslegendre", "left", "right", "middle", "trapezoid")


def saliency(
    subject: Subject, images: Float[Tensor, "b c h w"], targets: Int[Tensor, " b"] | None = None, *, batch: int = 64
) -> Float[Tensor, "b c h w"]:
    """The gradient of the target's logit by each pixel. targets: None takes the answers of the subject."""
    targets = _targets(subject, images, targets, batch)
    parts = [_gradient(subject, x, t)[0] for x, t in zip(images.split(batch), targets.to(images.device).split(batch))]
    return torch.cat(parts)


def integrated_gradients(
    subject: Subject,
    images: Float[Tensor, "b c h w"],
    targets: Int[Tensor, " b"] | None = None,
    *,
    baseline: float | Float[Tensor, "b c h w"] = 0.0,
    steps: int = 50,
    rule: Rule = "gausslegendre",
    batch: int = 64,
) -> tuple[Float[Tensor, "b c h w"], Float[Tensor, " b"]]:
    """(maps, delta): the pixel's share of the change of the target's logit from `baseline` to the image.

    The integral of the gradient along the straight path, times the way that the pixel went. Shares sum to the change,
    up to `delta` (sum of the map less the change), which falls with more `steps`. batch: points of the path that stand
    in memory at once, whatever the number of images and steps.
    """
    if rule not in RULES:
        raise unknown("rule of integration", str(rule), RULES)
    if steps < 1 or (rule == "trapezoid" and steps < 2):
        raise AdviceError(f"Integrated Gradients takes at least one step (trapezoid: two), not {steps}.")
    targets = _targets(subject, images, targets, batch).to(images.device)
    start = torch.full_like(images, baseline) if isinstance(baseline, (int, float)) else baseline.to(images)
    if start.shape != images.shape:
        raise AdviceError(f"The baseline is {tuple(start.shape)}; give a number or one like the images.")
    weights, places = (v.to(images) for v in nodes(rule, steps))
    total = torch.zeros_like(images, dtype=torch.float64)
    count = len(images)
    for part in torch.arange(count * steps, device=images.device).split(batch):
        step, image = part // count, part % count  # the images of one step stand together
        place = places[step].view(-1, 1, 1, 1)
        points = start[image] + place * (images[image] - start[image])
        gradient, _ = _gradient(subject, points, targets[image])
        total.index_add_(0, image, gradient.double() * weights[step].double().view(-1, 1, 1, 1))
    maps = total * (images - start).double()
    change = _scores(subject, images, targets, batch) - _scores(subject, start, targets, batch)
    delta = maps.flatten(1).sum(1) - change.double()
    return maps.to(images.dtype), delta.to(images.dtype)


def nodes(rule: Rule, steps: int) -> tuple[Float[Tensor, " steps"], Float[Tensor, " steps"]]:
    """Weights (they sum to 1) and places in [0, 1] of a rule of integration, float64."""
    if rule == "gausslegendre":
        places, weights = np.polynomial.legendre.leggauss(steps)
        return torch.from_numpy(weights / 2), torch.from_numpy((places + 1) / 2)
    even = torch.arange(steps, dtype=torch.float64)
    weight = torch.full((steps,), 1 / steps, dtype=torch.float64)
    if rule == "trapezoid":
        weight = torch.full((steps,), 1 / (steps - 1), dtype=torch.float64)
        weight[0] = weight[-1] = 0.5 / (steps - 1)
        return weight, even / (steps - 1)
    return weight, (even + {"left": 0.0, "middle": 0.5, "right": 1.0}[rule]) / steps


def occlusion(
    subject: Subject,
    images: Float[Tensor, "b c h w"],
    targets: Int[Tensor, " b"] | None = None,
    *,
    window: int | None = None,
    stride: int | None = None,
    fill: float | Float[Tensor, "b c h w"] = 0.5,
    batch: int = 64,
) -> Float[Tensor, "b h w"]:
    """How far the target's logit falls when a square is covered with `fill`; the mean over the squares at a pixel.

    Logits are all it needs, so that any function can be asked. window: side in pixels (None: an eighth of the shorter
    side, at least 1). stride: pixels between squares (None: half a window). batch: images per pass.
    """
    height, width = images.shape[-2:]
    window = max(1, min(height, width) // 8) if window is None else window
    stride = max(1, window // 2) if stride is None else stride
    if not 1 <= window <= min(height, width) or not 1 <= stride <= window:
        raise AdviceError(
            f"A window of {window} every {stride} pixels does not cover images of {height} x {width}; take a window of "
            f"1 to {min(height, width)} pixels and a stride of at most a window."
        )
    targets = _targets(subject, images, targets, batch).to(images.device)
    cover = torch.full_like(images, fill) if isinstance(fill, (int, float)) else fill.to(images)
    down, across = _covered(height, window, stride), _covered(width, window, stride)
    down, across = down.to(images.device), across.to(images.device)
    count, places = len(images), len(down) * len(across)
    before = _scores(subject, images, targets, batch)
    total = torch.zeros(count, height, width, dtype=torch.float64, device=images.device)
    with torch.no_grad():
        for part in torch.arange(count * places, device=images.device).split(batch):
            image, place = part // places, part % places
            mask = down[place // len(across)][:, :, None] & across[place % len(across)][:, None, :]
            x = torch.where(mask[:, None], cover[image], images[image])
            fall = before[image] - _chosen(subject(x), targets[image])
            total.index_add_(0, image, fall.double()[:, None, None] * mask)
    times = down.double().sum(0)[:, None] * across.double().sum(0)[None]
    return (total / times).to(images.dtype)


def _covered(length: int, window: int, stride: int) -> Tensor:
    """(windows, length) bool; the last window may reach over the edge."""
    count = -(-(length - window) // stride) + 1
    start = torch.arange(count)[:, None] * stride
    at = torch.arange(length)[None]
    return (at >= start) & (at < start + window)


def flat(maps: Float[Tensor, "b c h w"], *, signed: bool = True) -> Float[Tensor, "b h w"]:
    """One number per pixel: the sum over channels (shares add up), or the largest size of any channel."""
    return maps.sum(1) if signed else maps.abs().amax(1)


CAPTUM = ("IntegratedGradients", "Saliency", "InputXGradient", "DeepLift", "GradientShap", "GuidedBackprop", "LRP")


def captum_attribution(
    subject: Subject, images: Float[Tensor, "b c h w"], targets: Int[Tensor, " b"] | None = None, *, method: str
) -> Float[Tensor, "b c h w"]:
    """The map of one of captum's gradient methods by name, with captum's own defaults and a black baseline.

    captum's hooks see the module itself: its limits with in-place or shared modules hold here, not in the functions
    above. Raises MissingError without captum (extra "trust").
    """
    try:
        import captum.attr
    except ImportError:
        raise missing_extra("captum", "trust", use=f"{method} from captum") from None
    if method not in CAPTUM:
        raise unknown("method of captum", method, CAPTUM)
    targets = _targets(subject, images, targets, 64)
    explainer = getattr(captum.attr, method)(as_module(subject))
    x = images.detach().clone().requires_grad_()
    if method == "Saliency":
        out = explainer.attribute(x, target=targets, abs=False)
    elif method in ("IntegratedGradients", "DeepLift", "GradientShap"):
        out = explainer.attribute(x, baselines=torch.zeros_like(x), target=targets)
    else:
        out = explainer.attribute(x, target=targets)
    return out.detach()


class SubjectModule(nn.Module):
    """A subject as a module of pixels in [0, 1]: what captum, foolbox and ART take as a model."""

    def __init__(self, subject: Subject):
        super().__init__()
        self.subject = subject
        if isinstance(subject.model, nn.Module):
            self.model = subject.model  # registered, so that hooks and parameters are found

    def forward(self, image: Tensor) -> Tensor:
        return self.subject(image)


def as_module(subject: Subject) -> nn.Module:
    """The subject as an `nn.Module` in eval mode."""
    return SubjectModule(subject).eval()


def _targets(subject: Subject, images: Tensor, targets: Tensor | None, batch: int) -> Tensor:
    if images.ndim != 4 or not len(images) or not images.dtype.is_floating_point:
        raise AdviceError(f"Attribution takes float images (b, c, h, w) in [0, 1], not {tuple(images.shape)}.")
    if targets is not None:
        if len(targets) != len(images):
            raise AdviceError(f"{len(images)} images come with {len(targets)} targets; give one class for each.")
        return targets.long()
    with torch.no_grad():
        return torch.cat([subject(x).argmax(1) for x in images.split(batch)])


def _chosen(outputs: Float[Tensor, "b k"], targets: Int[Tensor, " b"]) -> Float[Tensor, " b"]:
    if int(targets.max()) >= outputs.shape[1] or int(targets.min()) < 0:
        raise AdviceError(f"The targets reach {int(targets.max())}; the subject has {outputs.shape[1]} classes.")
    return outputs.gather(1, targets.to(outputs.device)[:, None])[:, 0]


def _scores(subject: Subject, images: Tensor, targets: Tensor, batch: int) -> Tensor:
    with torch.no_grad():
        parts = zip(images.split(batch), targets.split(batch))
        return torch.cat([_chosen(subject(x), t) for x, t in parts]).to(images.device)


def _gradient(subject: Subject, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    subject.require(frozenset({"gradients"}))
    with torch.enable_grad():
        x = images.detach().clone().requires_grad_()
        score = _chosen(subject(x.clone()), targets)  # a model whose first layer works in place may write on the copy
        (gradient,) = torch.autograd.grad(score.sum(), x)
    return gradient.detach(), score.detach()
