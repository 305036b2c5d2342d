"""Padding, and the one place where maps become tokens and back. Image `b c h w`, map `b h w c`, tokens `b n c`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def pad_image(image: Float[Tensor, "b c h w"], multiple: int) -> Float[Tensor, "b c H W"]:
    """Zero-pads right and bottom to multiples of `multiple`. Works under export (free sizes)."""
    bottom = -image.shape[-2] % multiple
    right = -image.shape[-1] % multiple
    return _pad(image, (0, right, 0, bottom))


def pad_to(image: Float[Tensor, "b c h w"], least: int) -> Float[Tensor, "b c H W"]:
    """Zero-pads right and bottom so that height and width are at least `least`. Works under export (free sizes)."""
    height, width = image.shape[-2:]
    return _pad(image, (0, torch.sym_max(width, least) - width, 0, torch.sym_max(height, least) - height))


def pad_map(x: Float[Tensor, "b h w c"], multiple: int) -> Float[Tensor, "b H W c"]:
    """The same for a channels-last map."""
    bottom = -x.shape[1] % multiple
    right = -x.shape[2] % multiple
    return _pad(x, (0, 0, 0, right, 0, bottom))


def _pad(x: Tensor, pads: tuple[int, ...]) -> Tensor:
    """F.pad, which copies even when there is nothing to pad; under export the sizes are free, so nothing is asked."""
    if not torch.compiler.is_compiling() and not any(pads):
        return x
    return F.pad(x, pads)


def to_tokens(x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b n c"]:
    """Row-major tokens of a map."""
    return x.flatten(2).transpose(1, 2)


def to_map(x: Float[Tensor, "b n c"], height: int, width: int) -> Float[Tensor, "b c h w"]:
    """The reverse of `to_tokens`; the grid is given, never guessed from n."""
    return x.transpose(1, 2).reshape(x.shape[0], x.shape[2], height, width)
