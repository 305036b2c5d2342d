"""The reference's own way to recompose: denoise the ground from a noised start, pasting the noised object at each step.

ImageNet-E, CVPR 2023, arXiv 2303.17096; reference code alibaba/easyrobust, benchmarks/imagenet-e (Apache-2.0), which
uses an unconditional 256 px guided-diffusion network. Here any object that can noise and denoise serves.
DDPM: Ho et al., NeurIPS 2020, arXiv 2006.11239. Guidance: Dhariwal and Nichol, NeurIPS 2021, arXiv 2105.05233.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lynceus.core.errors import AdviceError

RANGE = 50.0  # weight of the loss that keeps pixels in their range
PER_SHARE = 40.0  # guidance weight for complexity + 1: the published 20 asks for about half as much again


@runtime_checkable
class Denoiser(Protocol):
    """What a diffusion backend must do, on images (b, 3, h, w) in [-1, 1]. `steps`: how many noise levels it knows.

    q_sample(x, t, noise) = sqrt(a_t) x + sqrt(1 - a_t) noise, for t = 0 (nearly clean) .. steps - 1 (noise).
    denoise(x_t, t) predicts the clean image; t is (b,) int64.
    """

    steps: int

    def q_sample(self, x: Tensor, t: Tensor, noise: Tensor) -> Tensor: ...
    def denoise(self, x_t: Tensor, t: Tensor) -> Tensor: ...


def recompose(
    model: Denoiser,
    ground: Float[Tensor, "b 3 h w"],
    layer: Float[Tensor, "b 3 h w"],
    mask: Bool[Tensor, "b 1 h w"],
    *,
    start: int = 10,
    guidance: float = 0.0,
    adversary: Callable[[Tensor], Tensor] | None = None,
    generator: torch.Generator,
) -> Float[Tensor, "b 3 h w"]:
    """The object (layer inside mask) on a ground that was noised to step `start` and denoised again; pixels in [0, 1].

    start: of the model's steps; the smaller, the closer to the ground given. guidance: weight of the complexity, the
    mean modulus of the Fourier transform; > 0 asks for more. adversary: images in [0, 1] -> a loss that is raised.
    Inside the mask the result is the layer, bit by bit. Raises AdviceError when the model does not know the step.
    """
    if not 1 <= start <= model.steps:
        raise AdviceError(f"start is a step of the diffusion model, 1 to {model.steps}; got {start}.")
    object_, x = layer * 2 - 1, ground * 2 - 1

    def times(t: int) -> Tensor:
        return torch.full((len(x),), t, dtype=torch.long, device=x.device)

    def noise() -> Tensor:
        return torch.randn(x.shape, generator=generator, dtype=x.dtype).to(x.device)

    guided = guidance != 0 or adversary is not None
    x = model.q_sample(x, times(start - 1), noise())
    for t in range(start - 1, -1, -1):
        kept = _kept(model, x, times(t))
        before = _kept(model, x, times(t - 1)) if t else torch.ones_like(kept)
        step = 1 - kept / before  # the variance that this step of the forward process adds
        with torch.set_grad_enabled(guided):
            current = x.detach().requires_grad_(guided)
            clean = model.denoise(current, times(t))
            slope = torch.autograd.grad(_loss(clean, guidance, adversary), current)[0] if guided else None
        clean = clean.detach().clamp(-1, 1)
        mean = (before.sqrt() * step * clean + (kept / before).sqrt() * (1 - before) * x) / (1 - kept)
        variance = step * (1 - before) / (1 - kept)
        if slope is not None:
            mean = mean - torch.maximum(variance, step * 0.1) * slope
        x = mean
        if t:
            x = mean + variance.sqrt() * noise()
            x = torch.where(mask, model.q_sample(object_, times(t - 1), noise()), x)
    return torch.where(mask, layer, ((x + 1) / 2).clamp(0, 1))


def _kept(model: Denoiser, like: Tensor, t: Tensor) -> Tensor:
    """The share of the variance that is still the image's at step t, read off the model's own q_sample."""
    one = torch.ones_like(like[:1, :1, :1, :1]).expand(1, 3, 1, 1)
    kept: Tensor = model.q_sample(one, t[:1], torch.zeros_like(one))[0, 0, 0, 0] ** 2
    return kept


def _loss(clean: Tensor, guidance: float, adversary: Callable[[Tensor], Tensor] | None) -> Tensor:
    pixels = (clean + 1) / 2
    loss = RANGE * (clean - clean.clamp(-1, 1)).square().mean((1, 2, 3)).sum()
    if guidance:
        loss = loss - guidance * torch.fft.fft2(pixels).abs().mean((1, 2, 3)).sum()
    if adversary is not None:
        loss = loss - adversary(pixels.clamp(0, 1)).sum()
    return loss
