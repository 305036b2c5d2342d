"""Padding, and the one place where maps become tokens and back. Image `b c h w`, map `b h w c`, tokens `b n c`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def pad_image(image: Float[Tensor, "b c h w"], multiple: int) -> Float[Tensor, "b c H W"]:
    """Zero-pads right and bottom to multiples of `multiple`. Works under export (free sizes)."""
    height, width = image.shape[-2:]
    return _pad(image, (0, rounded_up(width, multiple) - width, 0, rounded_up(height, multiple) - height))


def pad_to(image: Float[Tensor, "b c h w"], least: int) -> Float[Tensor, "b c H W"]:
    """Zero-pads right and bottom to at least `least`. Free sizes of an exported program must be that large already."""
    height, width = (least if isinstance(n, torch.SymInt) else n for n in image.shape[-2:])
    return _pad(image, (0, max(least - width, 0), 0, max(least - height, 0)))


def pad_strided(image: Float[Tensor, "b c h w"], side: int, stride: int) -> Float[Tensor, "b c H W"]:
    """Zero-pads right and bottom until patches of `side`, `stride` apart, cover all."""
    image = pad_to(image, side)
    height, width = (n - side for n in image.shape[-2:])
    return _pad(image, (0, rounded_up(width, stride) - width, 0, rounded_up(height, stride) - height))


def pad_map(x: Float[Tensor, "b h w c"], multiple: int) -> Float[Tensor, "b H W c"]:
    """The same for a channels-last map."""
    height, width = x.shape[1:3]
    return _pad(x, (0, 0, 0, rounded_up(width, multiple) - width, 0, rounded_up(height, multiple) - height))


def rounded_up(size: int, multiple: int) -> int:
    """The next multiple, written so that a free size stays a simple expression."""
    return (size + multiple - 1) // multiple * multiple


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


def pooling_matrix(size: int, count: int, like: Tensor) -> Float[Tensor, "m n"]:
    """Adaptive average pooling of a line of `size` places to `count` cells, as a matrix of the type of `like`."""
    place = torch.arange(size, device=like.device)
    cell = torch.arange(count, device=like.device)[:, None]
    inside = (place >= cell * size // count) & (place < ((cell + 1) * size + count - 1) // count)
    return inside.to(like.dtype) / inside.sum(1, keepdim=True)
