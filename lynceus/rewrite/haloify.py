"""Haloify: halo attention in place of 3x3 convolutions, as HaloNet does it to a residual network.

Vaswani et al., Scaling Local Self-Attention for Parameter Efficient Visual Backbones, CVPR 2021, arXiv 2103.12731
"""

from __future__ import annotations

import copy
import math
import re
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lynceus.core.errors import AdviceError
from lynceus.core.rng import borrowed
from lynceus.layers.halo import HaloAttention
from lynceus.rewrite.swap import signed


class HaloConv(nn.Module):
    """Halo attention `attn` where a convolution stood: maps b c h w."""

    def __init__(self, attn: HaloAttention):
        super().__init__()
        self.attn = attn

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d H W"]:
        return self.attn(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


@dataclass(frozen=True, kw_only=True)
class Haloify:
    """Rewrite: every 3x3 convolution of stride 1 or 2 whose name fits becomes freshly initialised halo attention.

    names: regular expression searched in the convolutions' names, e.g. r"^layer[34]" for the last two stages of a
    ResNet; all by default. block_size, halo_size: sides b and h of the attention. heads: at most so many; where they
    cannot share the channels, their greatest common divisor with those. Dilated convolutions, those on fewer than
    8 channels (the image) and depthwise ones stay. Sizes and channels of all maps stay as they are; the new weights
    have to be trained. seed: of the fresh weights.
    """

    names: str = ""
    block_size: int = 8
    halo_size: int = 3
    heads: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        try:
            re.compile(self.names)
        except re.error as error:
            raise AdviceError(f"names={self.names!r} is no regular expression: {error}.") from None

    def __call__(self, model: nn.Module, example: Tensor | None = None) -> nn.Module:
        """A copy of `model` with the convolutions replaced, in eval mode.

        example: pixels (b, 3, h, w), run once to see it fit. AdviceError when no convolution fits."""
        made = copy.deepcopy(model)
        chosen = {n: m for n, m in made.named_modules() if fits(m) and re.search(self.names, n)}
        if not chosen:
            able = [n for n, m in made.named_modules() if fits(m)]
            tell = (
                f"those that could be replaced are {', '.join(able[:8])}" if able else "it has none of 3x3 to replace"
            )
            raise AdviceError(f"No 3x3 convolution of {type(model).__name__} fits names={self.names!r}; {tell}.")
        with borrowed(self.seed, "haloify"):
            for name, conv in chosen.items():
                assert isinstance(conv, nn.Conv2d)
                attn = HaloAttention(
                    conv.in_channels,
                    out=conv.out_channels,
                    stride=conv.stride[0],
                    heads=math.gcd(conv.out_channels, self.heads),
                    block_size=self.block_size,
                    halo_size=self.halo_size,
                )
                made.set_submodule(name, HaloConv(attn).to(device=conv.weight.device, dtype=conv.weight.dtype))
        signed(made, self)
        made.eval()
        if example is not None:
            with torch.no_grad():
                made(example)
        return made


def fits(module: nn.Module) -> bool:
    """True for a convolution that halo attention can stand in for."""
    return (
        isinstance(module, nn.Conv2d)
        and module.kernel_size == (3, 3)
        and module.stride in ((1, 1), (2, 2))
        and module.padding in ((1, 1), "same")
        and module.dilation == (1, 1)
        and module.in_channels >= 8
        and module.groups < module.in_channels
    )
