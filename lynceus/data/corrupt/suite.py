"""The nineteen common corruptions at five severities, on batches of any size: `corrupt(images, name, severity)`.

Benchmarking Neural Network Robustness to Common Corruptions and Perturbations (Hendrycks, Dietterich), ICLR 2019,
arXiv 1903.12261. Written from the paper and hendrycks/robustness (Apache-2.0).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from lynceus.core import rng
from lynceus.core.errors import AdviceError, unknown
from lynceus.data.corrupt import blur, digital, noise, weather
from lynceus.data.corrupt.draws import Draws, OfficialDraws
from lynceus.data.corrupt.filters import SLACK
from lynceus.data.corrupt.spatter import spatter
from lynceus.data.corrupt.tables import BENCHMARK, CORRUPTIONS, DETERMINISTIC, GROUPS, PLASMA, SEVERITIES, SHRUNK, Scale

# one generator for the batch, one per picture, numpy's legacy one for the authors' order of draws, or nothing: seed 0
Randomness = torch.Generator | Sequence[torch.Generator] | np.random.RandomState | None


def corrupt(
    images: UInt8[Tensor, "*b 3 h w"] | Float[Tensor, "*b 3 h w"],
    name: str,
    severity: int,
    *,
    generator: Randomness = None,
    scale: Scale = "imagenet",
    swap: bool = False,
) -> UInt8[Tensor, "*b 3 h w"] | Float[Tensor, "*b 3 h w"]:
    """The images (b, 3, h, w) or (3, h, w) with one corruption. What comes in as uint8 comes out as uint8; floats in
    [0, 1] come out as floats on the same 256 levels, which is what a file would hold.

    name: one of CORRUPTIONS. severity: 1 to 5; 0 returns the input. scale: constants made for pictures of a few
      hundred pixels ("imagenet") or for 32 ("cifar").
    generator: every picture gets a generator of its own seeded from it, so a picture does not depend on its batch. A
      list has one per picture. numpy.random.RandomState draws in the order of the authors' code, picture by picture.
      None stands for seed 0: the same picture each time.
    swap: glass blur really exchanges pixels; the authors' code copies them.
    """
    constants = _constants(name, severity, scale)
    _check(images, name)
    if severity == 0 or images.numel() == 0:
        return images
    batch = images if images.ndim == 4 else images.unsqueeze(0)
    byte = batch.dtype == torch.uint8
    if isinstance(generator, np.random.RandomState):
        parts = [_apply(x[None], name, constants, OfficialDraws(generator, x.device), scale, swap) for x in batch]
        out = torch.cat(parts)
    else:
        drawn = name not in DETERMINISTIC or isinstance(generator, (list, tuple))
        own = _generators(generator, len(batch)) if drawn else []
        out = _apply(batch, name, constants, Draws(own, batch.device), scale, swap)
    if not byte:
        out = (out.float() / 255).to(images.dtype)
    return out if images.ndim == 4 else out.squeeze(0)


def chosen(names: str | Sequence[str]) -> tuple[str, ...]:
    """Corruptions by name, by group (noise, blur, weather, digital, validation), "benchmark" (the 15) or "all" (19), in
    the order of the benchmark. Raises AdviceError for an unknown name."""
    sets = {**GROUPS, "benchmark": BENCHMARK, "all": CORRUPTIONS} | {n: (n,) for n in CORRUPTIONS}
    wanted: set[str] = set()
    for name in (names,) if isinstance(names, str) else names:
        if name not in sets:
            raise unknown("corruption", str(name), sets)
        wanted |= set(sets[name])
    if not wanted:
        raise AdviceError("Name at least one corruption, a group of them, 'benchmark' or 'all'.")
    return tuple(n for n in CORRUPTIONS if n in wanted)


def picture_generators(seed: int, name: str, severity: int, indices: Iterable[int]) -> list[torch.Generator]:
    """A generator per picture of a data set, from (seed, corruption, severity, index)."""
    return [rng.generator(seed, "corrupted", name, severity, int(i)) for i in indices]


def natural_scale(height: int, width: int) -> Scale:
    """The constants made for pictures of about this size: "cifar" up to 48 pixels on the shorter side."""
    return "cifar" if min(height, width) <= 48 else "imagenet"


def _apply(batch: Tensor, name: str, constants: Any, draws: Draws, scale: Scale, swap: bool) -> Tensor:
    """(b, 3, h, w) uint8."""
    batch = _bytes(batch)
    if name in _FILED:
        return _FILED[name](batch, constants)
    x = batch.float() / 255
    if name in _PLAIN:
        out = _PLAIN[name](x, constants)
    elif name == "glass_blur":
        out = blur.glass_blur(x, constants, draws, swap=swap)
    elif name == "fog":
        out = weather.fog(x, constants, draws, least=PLASMA[scale])
    elif name == "frost":
        out = weather.frost(x, constants, draws, size=SHRUNK[scale])
    else:
        out = _DRAWN[name](x, constants, draws)
    out = out.clamp(0, 1).mul_(255)
    if out.dtype != torch.float64:
        out = out.add_(SLACK)
    return out.to(torch.int16).to(torch.uint8)  # two quick steps; from float to bytes is a slow one


_FILED: dict[str, Callable[[Tensor, Any], Tensor]] = {
    "jpeg_compression": digital.jpeg_compression,
    "pixelate": digital.pixelate,
}
_PLAIN: dict[str, Callable[[Tensor, Any], Tensor]] = {
    "defocus_blur": blur.defocus_blur,
    "zoom_blur": blur.zoom_blur,
    "gaussian_blur": blur.gaussian_blur,
    "brightness": digital.brightness,
    "contrast": digital.contrast,
    "saturate": digital.saturate,
}
_DRAWN: dict[str, Callable[[Tensor, Any, Draws], Tensor]] = {
    "gaussian_noise": noise.gaussian_noise,
    "shot_noise": noise.shot_noise,
    "impulse_noise": noise.impulse_noise,
    "speckle_noise": noise.speckle_noise,
    "motion_blur": blur.motion_blur,
    "snow": weather.snow,
    "elastic_transform": digital.elastic_transform,
    "spatter": spatter,
}


def _bytes(batch: Tensor) -> Tensor:
    return batch if batch.dtype == torch.uint8 else (batch.float() * 255).round().clamp(0, 255).to(torch.uint8)


def _generators(given: Randomness, count: int) -> list[torch.Generator]:
    if isinstance(given, (list, tuple)):
        if len(given) != count:
            raise AdviceError(f"corrupt got {len(given)} generators for {count} pictures; give one each, or one alone.")
        return list(given)
    source = rng.generator(0, "corrupt") if given is None else given
    assert isinstance(source, torch.Generator)
    seeds = torch.randint(1 << 62, (count,), generator=source, device=source.device).tolist()
    return [torch.Generator(source.device).manual_seed(s) for s in seeds]


def _constants(name: str, severity: int, scale: str) -> Any:
    if scale not in SEVERITIES:
        raise unknown("scale of corruptions", str(scale), tuple(SEVERITIES))
    if name not in SEVERITIES[scale]:
        raise unknown("corruption", str(name), CORRUPTIONS)
    if isinstance(severity, bool) or not isinstance(severity, (int, np.integer)) or severity not in range(6):
        raise AdviceError(f"A severity is a whole number from 1 to 5 (0: untouched), not {severity!r}.")
    return SEVERITIES[scale][name][severity - 1]


def _check(images: Tensor, name: str) -> None:
    if images.ndim not in (3, 4) or images.shape[-3] != 3:
        raise AdviceError(
            f"corrupt takes RGB images (b, 3, h, w) or (3, h, w), not {tuple(images.shape)}; grey ones with "
            "images.expand(-1, 3, -1, -1), channels-last ones with images.movedim(-1, -3)."
        )
    if images.dtype == torch.uint8:
        return
    if not images.is_floating_point():
        raise AdviceError(f"corrupt takes uint8 images or floats in [0, 1], not {images.dtype}.")
    if images.numel():
        low, high = (float(v) for v in images.aminmax())
        if not (low >= 0 and high <= 1):  # also when nan
            raise AdviceError(
                f"{name} takes floats in [0, 1]; these run from {low:.4g} to {high:.4g}. Undo the normalisation, or "
                "divide by 255."
            )
