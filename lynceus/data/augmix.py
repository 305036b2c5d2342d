"""AugMix: pictures mixed with chains of harmless changes of themselves, a whole batch at a time.

Paper: Hendrycks et al., AugMix: A Simple Data Processing Method to Improve Robustness and Uncertainty, ICLR 2020,
arXiv 1912.02781
Code: google-research/augmix
Licence: Apache-2.0

The nine changes mean what Pillow's mean, on whole grey levels; brightness, contrast, colour and sharpness are left out,
because they are among the corruptions that robustness is measured with. Chains are sorted by change, so that each
change is one batched operation; all random numbers come from the generator.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int32, UInt8
from torch import Tensor

from lynceus.core.errors import AdviceError

POINTWISE = ("autocontrast", "equalize", "posterize", "solarize")
GEOMETRIC = ("rotate", "shear_x", "shear_y", "translate_x", "translate_y")
CHANGES = POINTWISE + GEOMETRIC
CACHED = 1 << 20  # values of the chains that are worked on together, so that they stay in the processor's cache
SHIFTS = CHANGES.index("translate_x")  # from here on, changes move whole pixels
FEW = 64 * 64  # pictures of fewer pixels are shifted in one interpolation with the other moves
LEVELS = 10  # severity at which a change is as strong as it gets


@dataclass(frozen=True, kw_only=True, slots=True)
class AugMixConfig:
    """severity: largest strength of a change, 1 to 10. width: chains per picture. depth: changes per chain, 0 for one
    to three at random. alpha: of the Dirichlet weights of the chains and of the Beta share of the clean picture.
    """

    severity: float = 3.0
    width: int = 3
    depth: int = 0
    alpha: float = 1.0

    def __post_init__(self) -> None:
        if not 1 <= self.severity <= LEVELS:
            raise AdviceError(f"severity is between 1 and {LEVELS}, not {self.severity}.")
        if self.width < 1:
            raise AdviceError(f"width is the number of chains, at least 1, not {self.width}.")
        if self.depth < 0:
            raise AdviceError(f"depth is at least 1, or 0 for one to three at random, not {self.depth}.")
        if self.alpha <= 0:
            raise AdviceError(f"alpha must be above 0, not {self.alpha}.")


def augmix(
    image: UInt8[Tensor, "b 3 h w"] | Float[Tensor, "b 3 h w"],
    generator: torch.Generator,
    config: AugMixConfig | None = None,
) -> Float[Tensor, "b 3 h w"]:
    """(1 - m) image + m (w_1 chain_1 + w_2 chain_2 + ...), as float in [0, 1].

    image: uint8, or float in [0, 1], which is rounded to 256 levels inside the chains. w ~ Dirichlet(alpha),
    m ~ Beta(alpha, alpha). generator: on any device; the same state gives the same pictures.
    """
    config = config or AugMixConfig()
    b, width = image.shape[0], config.width
    draws = np.random.default_rng(int(torch.randint(0, 2**62, (), generator=generator, device=generator.device)))
    share = draws.beta(config.alpha, config.alpha, b)
    weights = draws.dirichlet(np.full(width, config.alpha), b) * share[:, None]
    depth = np.full(b * width, config.depth) if config.depth else draws.integers(1, 4, b * width)

    steps = int(depth.max(initial=0))
    kind = draws.integers(0, len(CHANGES), (steps, b * width))
    strength = draws.uniform(0.1, config.severity, (steps, b * width)) / LEVELS
    sign = np.where(draws.random((steps, b * width)) > 0.5, -1.0, 1.0)
    kind[depth[None] <= np.arange(steps)[:, None]] = -1

    mixed = torch.empty(image.shape, dtype=torch.float32, device=image.device)
    keep, scale = (torch.from_numpy(v).to(image.device, torch.float32) for v in (1 - share, weights / 255))
    count = max(1, CACHED // max(1, width * image[:1].numel()))
    for at in range(0, b, count):
        part, own = slice(at, at + count), slice(at * width, (at + count) * width)
        some = image[part]
        levels = some if some.dtype == torch.uint8 else (some * 255).round_().clamp_(0, 255).to(torch.uint8)
        chains = levels.repeat_interleave(width, 0)
        for step in range(steps):
            _change(chains, kind[step, own], strength[step, own], sign[step, own])
        out = mixed[part]
        torch.bmm(scale[part, None], chains.view(*scale[part].shape, -1).to(torch.float32), out=out.flatten(1)[:, None])
        share_of_clean = keep[part].view(-1, 1, 1, 1) / (255 if some.dtype == torch.uint8 else 1)
        out.addcmul_(some.to(torch.float32), share_of_clean)
    return mixed if image.dtype == torch.uint8 else mixed.to(image.dtype)


def _change(chains: Tensor, kind: np.ndarray, strength: np.ndarray, sign: np.ndarray) -> None:
    """One change of every chain whose `kind` is not negative, in place."""
    h, w = int(chains.shape[-2]), int(chains.shape[-1])
    for number, name in enumerate(POINTWISE):
        at = np.flatnonzero(kind == number)
        if len(at):
            index = torch.from_numpy(at).to(chains.device)
            amount = torch.from_numpy(strength[at]).to(chains.device)
            _put(chains, index, _pointwise(chains.index_select(0, index), name, amount))
    if h * w >= FEW:
        for i in np.flatnonzero(kind >= SHIFTS):
            across, down = _shift(int(kind[i]) - SHIFTS, float(strength[i]), float(sign[i]), h, w)
            shifted(chains[i], across, down)
        kind = np.where(kind < SHIFTS, kind, -1)
    at = np.flatnonzero(kind >= len(POINTWISE))
    if len(at):
        moves = affine(kind[at] - len(POINTWISE), strength[at], sign[at], h, w)
        index = torch.from_numpy(at).to(chains.device)
        _put(chains, index, moved(chains.index_select(0, index), torch.from_numpy(moves)))


def _put(chains: Tensor, index: Tensor, made: Tensor) -> None:
    """chains[index] = made; eight bytes at a time where they divide a picture."""
    words = torch.int64 if chains[0].numel() % 8 == 0 else torch.uint8
    chains.view(len(chains), -1).view(words).index_copy_(0, index, made.reshape(len(made), -1).view(words))


def _pointwise(image: UInt8[Tensor, "n 3 h w"], name: str, amount: Tensor) -> UInt8[Tensor, "n 3 h w"]:
    """A change of grey levels; amount: strength in [0, 1] per picture."""
    if name == "autocontrast":
        return autocontrast(image)
    if name == "equalize":
        return equalize(image)
    if name == "posterize":
        return posterize(image, 4 - (amount * 4).to(torch.int64))
    return solarize(image, 256 - (amount * 256).to(torch.int64))


def autocontrast(image: UInt8[Tensor, "n c h w"]) -> UInt8[Tensor, "n c h w"]:
    """Each channel stretched to 0..255; a flat one stays."""
    n, c, h, w = image.shape
    values = image.reshape(n * c, h * w)
    low, high = (v.to(torch.float64)[:, None] for v in values.aminmax(dim=1))
    scale = torch.full_like(low, 255).div_((high - low).clamp(min=1))  # 255 / x would multiply by 1 / x
    levels = torch.arange(256, device=image.device, dtype=torch.float64)
    table = torch.where(high > low, (levels * scale - low * scale).clamp_(0, 255), levels).to(torch.uint8)
    return table.view(-1).index_select(0, _entries(values).view(-1)).view(n, c, h, w)


def equalize(image: UInt8[Tensor, "n c h w"]) -> UInt8[Tensor, "n c h w"]:
    """The histogram of each channel made flat."""
    n, c, h, w = image.shape
    rows = n * c
    values = _entries(image.reshape(rows, h * w)).view(-1)
    counts = torch.bincount(values, minlength=rows * 256).view(rows, 256)
    largest = torch.where(counts > 0, torch.arange(256, device=image.device), -1).amax(1, keepdim=True)
    step = (h * w - counts.gather(1, largest)) // 255
    before = counts.cumsum(1) - counts
    table = (before + step // 2).div_(step.clamp(min=1), rounding_mode="floor").clamp_(max=255)
    table = torch.where(step > 0, table, torch.arange(256, device=image.device)).to(torch.uint8)
    return table.view(-1).index_select(0, values).view(n, c, h, w)


def _entries(values: UInt8[Tensor, "r m"]) -> Int32[Tensor, "r m"]:
    """Where the values stand in tables of 256 entries per row."""
    return torch.arange(len(values), device=values.device, dtype=torch.int32)[:, None].mul_(256) + values


def posterize(image: UInt8[Tensor, "n c h w"], bits: Tensor) -> UInt8[Tensor, "n c h w"]:
    """Only the first `bits` (n,) of each value, 0 to 8."""
    mask = (256 - torch.bitwise_left_shift(torch.ones_like(bits), 8 - bits)).to(torch.uint8)
    return image & mask.view(-1, 1, 1, 1)


def solarize(image: UInt8[Tensor, "n c h w"], threshold: Tensor) -> UInt8[Tensor, "n c h w"]:
    """Values from `threshold` (n,) on are inverted; 256 changes nothing."""
    bright = image >= threshold.clamp(max=255).to(torch.uint8).view(-1, 1, 1, 1)
    inverted = ((threshold < 256) * 255).to(torch.uint8).view(-1, 1, 1, 1)
    return image ^ bright.view(torch.uint8).mul_(inverted)


def affine(kind: np.ndarray, strength: np.ndarray, sign: np.ndarray, h: int, w: int) -> np.ndarray:
    """(n, 2, 3): where the pixel at (x, y) comes from, in pixels from the upper left corner of the image.

    kind: number in GEOMETRIC. Rotations are by whole degrees up to 30, shears up to 0.3, shifts by whole pixels up to a
    third of the side, each times the strength.
    """
    made = np.tile(np.eye(2, 3), (len(kind), 1, 1))
    angle = np.radians(-sign * np.floor(strength * 30))
    turn = np.stack([np.cos(angle), np.sin(angle), -np.sin(angle), np.cos(angle)], -1).reshape(-1, 2, 2)
    centre = np.array([w / 2, h / 2])
    rotation = np.concatenate([turn, (centre - turn @ centre)[:, :, None]], -1)
    made = np.where((kind == 0)[:, None, None], rotation, made)
    made[:, 0, 1] = np.where(kind == 1, sign * strength * 0.3, made[:, 0, 1])
    made[:, 1, 0] = np.where(kind == 2, sign * strength * 0.3, made[:, 1, 0])
    made[:, 0, 2] = np.where(kind == 3, sign * np.floor(strength * w / 3), made[:, 0, 2])
    made[:, 1, 2] = np.where(kind == 4, sign * np.floor(strength * h / 3), made[:, 1, 2])
    return made


def _shift(axis: int, strength: float, sign: float, h: int, w: int) -> tuple[int, int]:
    """(across, down): how many pixels from where it comes from a pixel lies, as in `affine`."""
    amount = int(sign) * int(strength * (h if axis else w) / 3)
    return (0, amount) if axis else (amount, 0)


def shifted(image: UInt8[Tensor, "c h w"], across: int, down: int) -> None:
    """The pixel at (x + across, y + down) put at (x, y), in place; black where there is none."""
    _, h, w = image.shape
    before = image.clone()
    image.zero_()
    there = before[:, max(0, down) : h + min(0, down), max(0, across) : w + min(0, across)]
    image[:, max(0, -down) : h + min(0, -down), max(0, -across) : w + min(0, -across)] = there


def moved(image: UInt8[Tensor, "n c h w"], matrix: Tensor) -> UInt8[Tensor, "n c h w"]:
    """Bilinear samples at `matrix` (n, 2, 3) applied to the centres of the pixels; black outside of the image."""
    n, _, h, w = image.shape
    grid_x = torch.arange(w, device=image.device, dtype=torch.float32) + 0.5
    grid_y = torch.arange(h, device=image.device, dtype=torch.float32) + 0.5
    m = matrix.to(image.device, torch.float32).view(n, 6, 1, 1)
    grid = torch.empty((n, h, w, 2), device=image.device)
    inside = torch.ones((n, h, w), device=image.device, dtype=torch.bool)
    for axis, side in ((0, w), (1, h)):
        row = m[:, 3 * axis : 3 * axis + 3]
        at = row[:, 0] * grid_x + (row[:, 1] * grid_y[:, None] + row[:, 2])
        inside.logical_and_(at >= 0).logical_and_(at < side)
        torch.sub(at.mul_(2 / side), 1, out=grid[..., axis])
    out = F.grid_sample(image.to(torch.float32), grid, padding_mode="border", align_corners=False)
    # a five-hundredth of a level keeps whole numbers whole in single precision
    # by way of int16, which is a quicker way to bytes
    return out.add_(0.002).to(torch.int16).to(torch.uint8).mul_(inside.view(torch.uint8)[:, None])
