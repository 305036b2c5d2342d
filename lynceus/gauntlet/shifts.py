"""Light shifts of style for the gauntlet's out-of-distribution cells: blur, noise, contrast, edge rendering.

One severity each, a function of the pixels (and, for noise, of a seed and the image's place), on whole batches. The
published suite of corruptions with its severities is another thing and is not this.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from lynceus.core.errors import unknown
from lynceus.core.rng import generator
from lynceus.core.types import as_float


def blur(image: Float[Tensor, "b c h w"], seed: int = 0) -> Float[Tensor, "b c h w"]:
    """Gaussian blur with a deviation of 3% of the side, at least 0.6 pixels."""
    sigma = max(0.6, 0.03 * min(image.shape[-2:]))
    reach = min(max(1, round(2.5 * sigma)), min(image.shape[-2:]) - 1)
    x = torch.arange(-reach, reach + 1, dtype=torch.float32)
    weight = torch.exp(-(x * x) / (2 * sigma * sigma))
    weight = (weight / weight.sum()).expand(image.shape[1], 1, -1)
    out = F.pad(image, (reach, reach, reach, reach), mode="reflect")
    out = F.conv2d(out, weight[:, :, None, :], groups=image.shape[1])
    return F.conv2d(out, weight[:, :, :, None], groups=image.shape[1])


def noise(image: Float[Tensor, "b c h w"], seed: int = 0) -> Float[Tensor, "b c h w"]:
    """Gaussian noise of deviation 0.12."""
    drawn = torch.randn(image.shape, generator=generator(seed, "noise"))
    return (image + 0.12 * drawn).clamp(0, 1)


def contrast(image: Float[Tensor, "b c h w"], seed: int = 0) -> Float[Tensor, "b c h w"]:
    """Contrast reduced to 30% around the image's own mean."""
    mean = image.mean((1, 2, 3), keepdim=True)
    return mean + 0.3 * (image - mean)


def edges(image: Float[Tensor, "b c h w"], seed: int = 0) -> Float[Tensor, "b c h w"]:
    """A drawing: dark lines on white where the grey image is steep (Sobel), scaled by its 98th percentile."""
    grey = image.mean(1, keepdim=True)
    sobel = torch.tensor([[-1.0, 0, 1], [-2, 0, 2], [-1, 0, 1]])
    padded = F.pad(grey, (1, 1, 1, 1), mode="reflect")
    steep = F.conv2d(padded, torch.stack([sobel, sobel.T])[:, None]).norm(dim=1, keepdim=True)
    top = steep.flatten(1).quantile(0.98, dim=1).clamp(min=1e-3).view(-1, 1, 1, 1)
    return (1 - (steep / top).clamp(0, 1)).expand_as(image).contiguous()


SHIFTS: dict[str, Callable[..., Tensor]] = {"blur": blur, "noise": noise, "contrast": contrast, "edges": edges}


def shifted(images: Tensor, name: str, *, seed: int = 0, batch: int = 256) -> Tensor:
    """uint8 images (n, 3, h, w) of `images` (uint8 or [0, 1]) under the named shift. The same whatever `batch` is."""
    if name not in SHIFTS:
        raise unknown("shift", name, SHIFTS)
    parts = []
    for i in range(0, len(images), batch):
        x = as_float(images[i : i + batch])
        if name == "noise":  # seeded by the place of each image, so that neither batches nor order of work matter
            x = torch.cat([noise(one[None], seed + 7919 * (i + k)) for k, one in enumerate(x)])
        else:
            x = SHIFTS[name](x, seed)
        parts.append((x * 255).round().clamp(0, 255).to(torch.uint8))
    return torch.cat(parts)
