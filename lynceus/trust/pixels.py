"""Direct encoding: one gene per pixel value. Colour is written as hue, lightness and saturation in 8 bits.

Nguyen, Yosinski & Clune, Deep Neural Networks are Easily Fooled, CVPR 2015, arXiv 1412.1897. Reference code:
Evolving-AI-Lab/fooling (no licence stated); written from the paper and from what its operators do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from torch import Tensor

from lynceus.core import rng
from lynceus.core.errors import AdviceError, unknown
from lynceus.trust.evolution import polynomial_mutation, simulated_binary

Hue = Literal["wrapped", "whole"]


@dataclass(frozen=True, kw_only=True, slots=True)
class PixelConfig:
    """How pixel genomes vary.

    rate: share of genes that mutate, halved every `halve_every` generations (0: never); eta_mutation: of the polynomial
    steps. crossover: chance that a pair mates; eta_crossover: of simulated binary crossover.
    hue: "wrapped" is the authors' (8-bit hue reaches 255 where the circle ends at 180), "whole" is one circle.
    """

    rate: float = 0.1
    halve_every: int = 1000
    eta_mutation: float = 15.0
    crossover: float = 0.5
    eta_crossover: float = 10.0
    hue: Hue = "wrapped"

    def __post_init__(self) -> None:
        check_shares(self, ("rate", "crossover"))
        check_hue(self.hue)


def check_shares(config: object, names: Sequence[str]) -> None:
    for name in names:
        if not 0 <= getattr(config, name) <= 1:
            raise AdviceError(f"{name} is a chance in [0, 1], not {getattr(config, name)}.")


def check_hue(hue: str) -> None:
    if hue not in ("wrapped", "whole"):
        raise unknown("kind of hue", str(hue), ("wrapped", "whole"))


def check_shape(shape: tuple[int, int, int]) -> tuple[int, int, int]:
    if len(shape) != 3 or shape[0] not in (1, 3) or min(shape) < 1:
        raise AdviceError(f"The shape of an image is (1 or 3 channels, height, width), not {tuple(shape)}.")
    return (int(shape[0]), int(shape[1]), int(shape[2]))


class Pixels:
    """Populations are (members, channels * height * width) float32 genes in [0, 1].

    grey: genes of one channel, shown in all."""

    def __init__(self, shape: tuple[int, int, int], config: PixelConfig | None = None, *, grey: bool = False):
        self.shape = check_shape(shape)
        self.config = config or PixelConfig()
        self.grey = grey or shape[0] == 1
        self.genes = (1 if self.grey else 3) * shape[1] * shape[2]

    def describe(self) -> str:
        return f"pixels {self.shape} grey={self.grey} {self.config}"

    def initial(self, count: int, seed: int) -> Tensor:
        return torch.rand(count, self.genes, generator=rng.generator(seed, "genes"))

    def offspring(self, parents: Tensor, pairs: Int64[Tensor, "n 2"], generation: int, seed: int) -> Tensor:
        config, draw = self.config, rng.generator(seed, "children")
        mate = torch.rand(len(pairs), generator=draw) < config.crossover
        swap = torch.rand(len(pairs), generator=draw) < 0.5
        mothers, fathers = parents[pairs[:, 0]], parents[pairs[:, 1]]
        children = torch.empty(len(pairs), 2, self.genes)
        children[:, 0] = torch.where(swap[:, None], fathers, mothers)
        children[:, 1] = torch.where(swap[:, None], mothers, fathers)
        if bool(mate.any()):
            some = (int(mate.sum()), self.genes)
            low, high = simulated_binary(
                mothers[mate], fathers[mate], torch.rand(some, generator=draw), eta=config.eta_crossover
            )
            fair = torch.rand(some, generator=draw) < 0.5
            children[mate] = torch.stack([torch.where(fair, high, low), torch.where(fair, low, high)], 1)
        flat = children.view(-1)
        halvings = generation // config.halve_every if config.halve_every else 0
        chosen = (torch.rand(flat.shape, generator=draw) < config.rate * 0.5**halvings).nonzero().flatten()
        draws = torch.rand(len(chosen), generator=draw)
        flat[chosen] = polynomial_mutation(flat[chosen], draws, eta=config.eta_mutation)
        return children.view(-1, self.genes)

    def render(self, population: Tensor) -> UInt8[Tensor, "b c h w"]:
        channels, h, w = self.shape
        values = (population * 255).to(torch.uint8).view(len(population), -1, h, w)  # cut off, not rounded
        return values.expand(-1, channels, -1, -1) if self.grey else hls_to_rgb(values, hue=self.config.hue)

    def select(self, populations: Sequence[Tensor], index: Int64[Tensor, " n"]) -> Tensor:
        return torch.cat(list(populations))[index]

    def pack(self, population: Tensor) -> dict[str, np.ndarray]:
        return {"genes": population.numpy()}

    def unpack(self, packed: dict[str, np.ndarray]) -> Tensor:
        genes = torch.from_numpy(packed["genes"])
        if genes.ndim != 2 or genes.shape[1] != self.genes:
            raise ValueError(f"genes {tuple(genes.shape)} of other images")
        return genes


def hls_to_rgb(image: UInt8[Tensor, "b 3 h w"], *, hue: Hue = "wrapped") -> UInt8[Tensor, "b 3 h w"]:
    """Hue, lightness, saturation in 8 bits -> red, green, blue. "wrapped": hue counts two degrees, and goes round
    after 180, as in 8-bit OpenCV; "whole": 0 to 255 is one circle."""
    h, light, saturation = image.unbind(1)
    sixth = (h.float() / 30) % 6 if hue == "wrapped" else h.float() * (6 / 256)
    light, saturation = light.float() / 255, saturation.float() / 255
    chroma = (1 - (2 * light - 1).abs()) * saturation
    low = light - chroma / 2

    def channel(shift: float) -> Tensor:
        place = (sixth + shift) % 6
        return low + chroma * ((place - 3).abs() - 1).clamp(0, 1)

    rgb = torch.stack([channel(0.0), channel(4.0), channel(2.0)], 1)
    return (rgb * 255).round().clamp(0, 255).to(torch.uint8)
