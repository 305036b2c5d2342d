"""Masked regions as vectors: the mean of every level of a network over the mask, one after the other.

MILAN's encoder (Hernandez et al., ICLR 2022, arXiv 2201.11114; reference evandez/neuron-descriptions, MIT).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from lynceus.core.errors import unknown
from lynceus.core.subject import IMAGENET_MEAN, IMAGENET_STD, Normalise

RESNET_LAYERS = ("conv1", "layer1", "layer2", "layer3", "layer4")


class PyramidEncoder(nn.Module):
    """Images (b, 3, h, w) in [0, 1] and masks (b, 1, h, w) -> vectors (b, f), f the channels of all `layers` together.

    network: any module on normalised images. layers: names of its modules; the output of each is read as it leaves it.
    Raises AdviceError for a layer that the network does not have.
    """

    def __init__(
        self,
        network: nn.Module,
        layers: Sequence[str] = RESNET_LAYERS,
        *,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
    ):
        super().__init__()
        names = [n for n, _ in network.named_modules() if n]
        for layer in layers:
            if layer not in names:
                raise unknown("layer", layer, names)
        self.network = network.eval().requires_grad_(False)
        self.layers = tuple(layers)
        self.normalise = Normalise(mean, std)

    def train(self, mode: bool = True) -> PyramidEncoder:
        super().train(mode)
        self.network.eval()  # frozen, whatever stands around it
        return self

    def forward(
        self, images: Float[Tensor, "b c h w"], masks: Float[Tensor, "b 1 h w"] | None = None
    ) -> Float[Tensor, "b f"]:
        """masks: weights, 0 outside; None takes the whole image. A mask of zeros gives zeros."""
        levels = self.levels(images, masks)
        return torch.cat([levels[name] for name in self.layers], 1)

    def levels(
        self, images: Float[Tensor, "b c h w"], masks: Float[Tensor, "b 1 h w"] | None = None
    ) -> dict[str, Float[Tensor, "b _"]]:
        """The part of each layer by its name."""
        if masks is None:
            masks = images.new_ones(len(images), 1, *images.shape[-2:])
        maps: dict[str, Tensor] = {}

        def listen(name: str) -> Any:
            def hear(_module: nn.Module, _args: Any, out: Tensor) -> None:
                maps[name] = out.clone()  # what follows may work in place

            return hear

        modules = dict(self.network.named_modules())
        handles = [modules[n].register_forward_hook(listen(n)) for n in self.layers]
        try:
            self.network(self.normalise(images))
        finally:
            for handle in handles:
                handle.remove()
        return {name: masked_mean(maps[name], masks) for name in self.layers}


def masked_mean(maps: Float[Tensor, "b c h w"], masks: Float[Tensor, "b 1 _ _"]) -> Float[Tensor, "b c"]:
    """The mean over the map, weighted by the mask at the map's size; zeros where the mask is empty."""
    weight = F.interpolate(masks, maps.shape[-2:], mode="bilinear", align_corners=False)
    total = weight.sum((-2, -1), keepdim=True)
    weight = torch.where(total > 0, weight / total.clamp_min(torch.finfo(weight.dtype).tiny), weight)
    return (maps * weight).sum((-2, -1))
