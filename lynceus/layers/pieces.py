"""A batch in pieces: inference on a CPU works on few images at a time, so that what lies between stays in the cache.

Fresh memory for large intermediate results costs more than writing them; small ones are reused. Results are the same,
since in eval mode no image depends on another.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from lynceus.layers.fused import fusable, hooked

PIECE = 2**23  # bytes, per thread, of the widest intermediate result of a piece


def images_at_once(owner: nn.Module, x: Tensor, width: int) -> int:
    """How many images of the batch `x` a module should take at a time; all, where pieces would be noticed.

    width: features per element of the map in the widest intermediate result.
    """
    batch = x.shape[0]
    if batch < 2 or owner.training or not fusable(x) or hooked(*owner.modules()):
        return batch
    each = x.numel() // (batch * x.shape[-1]) * width * x.element_size()
    return max(PIECE * torch.get_num_threads() // each, 1)


def in_pieces(owner: nn.Module, run: Callable[[Tensor], Tensor], x: Tensor, *, width: int) -> Tensor:
    """run(x), some images at a time where that is faster; `run` gives a map b h w c, or tokens b n c, of x's shape.

    owner, width: see `images_at_once`.
    """
    batch = x.shape[0]
    if torch.compiler.is_compiling() or (count := images_at_once(owner, x, width)) >= batch:
        return run(x)
    count = -(-batch // -(-batch // count))  # pieces of equal size
    out = torch.empty_like(x)
    for piece, place in zip(x.split(count), out.split(count)):
        place.copy_(run(piece))
    return out
