"""Signs that gradients mislead an attack, so that a model looks more robust than it is.

Obfuscated Gradients Give a False Sense of Security, ICML 2018, arXiv 1802.00420; the flags of AutoAttack, ICML 2020,
arXiv 2003.01690 (fra31/auto-attack, MIT).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from lynceus.core.rng import generator
from lynceus.trust.attacks import Model, pgd

TINY = 2e-6  # a change of every pixel that any continuous network answers to, in float32
ASIDE = 0.01  # images often lie on thresholds, such as 1 / 2; a point beside them does not
WIDE = 0.5  # radius of an L-inf ball that holds grey for every image: no honest model survives in it


@dataclass(frozen=True, slots=True, kw_only=True)
class Sign:
    """One test: `share` of the images that show the sign, whether that is too many, and what it means."""

    name: str
    share: float
    flagged: bool
    meaning: str


def masking(
    subject: Model,
    images: Float[Tensor, "b c h w"],
    labels: Int[Tensor, " b"],
    *,
    seed: int = 0,
) -> list[Sign]:
    """Five tests on a few images (32 are enough), most of them answered rightly.

    randomness: the same image gets two answers. zero gradient: that of the cross-entropy is zero everywhere; lost
    gradient: that of the logits too. quantisation: the logits do not answer to a tiny change at all. wide ball: an
    attack that may change pixels by a half does not get through.
    """
    images, labels = images.float(), labels.to(images.device)
    with torch.no_grad():
        first, again = subject(images), subject(images)
        draw = generator(seed, "masking")
        still = torch.zeros(len(images), dtype=torch.bool, device=images.device)
        for aside in (0.0, ASIDE):
            base = (images + _noise(images, aside, draw)).clamp(0, 1)
            moved = (base + _noise(images, TINY, draw)).clamp(0, 1)
            still |= (subject(base) == subject(moved)).all(1)
    scale = first.abs().amax().clamp(min=1.0)
    random = (first - again).abs().amax(1) > 1e-4 * scale
    still &= ~random
    with torch.enable_grad():
        x = images.detach().requires_grad_(True)
        logits = subject(x)
        if logits.requires_grad:
            (g,) = torch.autograd.grad(F.cross_entropy(logits, labels, reduction="sum"), x)
            x = images.detach().requires_grad_(True)
            own = subject(x).gather(1, labels[:, None])[:, 0]
            (of_logit,) = torch.autograd.grad(own.sum(), x)
        else:
            g = of_logit = torch.zeros_like(images)
    zero = ~g.flatten(1).any(1)
    lost = ~of_logit.flatten(1).any(1)
    signs = [
        _sign("randomness", random, 0.0, "the same image gets different answers; average the gradient over many runs"),
        _sign(
            "zero gradient",
            zero & ~lost,
            0.0,
            "the cross-entropy saturates in float32 and its gradient is zero; trust the attacks on margin and DLR only",
        ),
        _sign(
            "lost gradient",
            lost,
            0.0,
            "something inside has no gradient (rounding, a threshold, dead units); only black-box attacks say anything",
        ),
        _sign(
            "quantisation",
            still,
            0.25,
            "the answer does not change with a tiny change of the pixels: input or features are rounded inside",
        ),
    ]
    right = first.argmax(1) == labels
    if bool(right.any()) and logits.requires_grad:
        wide = pgd(
            subject, images[right], labels[right], epsilon=WIDE, steps=20, step_size=0.1, loss="margin", seed=seed
        )
        signs.append(
            _sign(
                "wide ball",
                ~wide.success,
                0.05,
                f"an attack that may change every pixel by {WIDE:g} fails, which only misleading gradients explain",
            )
        )
    return signs


def _noise(images: Tensor, size: float, draw: torch.Generator) -> Tensor:
    return ((torch.rand(images.shape, generator=draw) * 2 - 1) * size).to(images)


def _sign(name: str, which: Tensor, allowed: float, meaning: str) -> Sign:
    share = float(which.double().mean())
    return Sign(name=name, share=share, flagged=share > allowed, meaning=meaning)
