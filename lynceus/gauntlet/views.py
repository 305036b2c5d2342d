"""Views of pictures for probes and retrieval: the 16 jittered views, random resized crops, overlapping sub-patches."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from lynceus.core.errors import AdviceError

JITTERED = 16


def jittered(images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 16 3 h w"]:
    """The 16 views of a picture: itself, 5 crops (corners and centre, 4/9 of the area), 2 rotations (+-15 degrees), and
    the mirror of each; all at the size of the picture. Corners that a rotation leaves empty are reflected."""
    b, _, h, w = images.shape
    ch, cw = max(round(2 * h / 3), 1), max(round(2 * w / 3), 1)
    corners = [(0, 0), (0, w - cw), (h - ch, 0), (h - ch, w - cw), ((h - ch) // 2, (w - cw) // 2)]
    crops = torch.cat([images[..., y : y + ch, x : x + cw] for y, x in corners])
    views = [images, *resized(crops, (h, w)).split(b)]
    for degrees in (15.0, -15.0):
        views.append(rotated(images, degrees))
    stack = torch.stack(views, 1)
    return torch.cat([stack, stack.flip(-1)], 1)


def rotated(images: Float[Tensor, "b c h w"], degrees: float) -> Float[Tensor, "b c h w"]:
    """The pictures turned about their centre, bilinear, with reflected corners."""
    h, w = images.shape[-2:]
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    matrix = torch.tensor([[cos, -sin * h / w, 0.0], [sin * w / h, cos, 0.0]], dtype=images.dtype, device=images.device)
    grid = F.affine_grid(matrix.expand(len(images), 2, 3), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="reflection", align_corners=False)


def resized(images: Float[Tensor, "b c h w"], size: tuple[int, int]) -> Float[Tensor, "b c H W"]:
    """Bilinear with antialiasing; nothing is done when the size fits."""
    if tuple(images.shape[-2:]) == tuple(size):
        return images
    return F.interpolate(images, size, mode="bilinear", antialias=True, align_corners=False)


def random_crops(
    images: Float[Tensor, "b 3 h w"], generator: torch.Generator, *, scale: tuple[float, float] = (0.2, 1.0)
) -> Float[Tensor, "b 3 h w"]:
    """One random resized crop (area share in `scale`, aspect 3/4 .. 4/3), half of them mirrored, of each picture."""
    b = len(images)
    draw = torch.rand(5, b, generator=generator)
    area = scale[0] + (scale[1] - scale[0]) * draw[0]
    aspect = torch.exp((2 * draw[1] - 1) * math.log(4 / 3))
    high, wide = (area / aspect).sqrt().clamp(max=1), (area * aspect).sqrt().clamp(max=1)
    flip = torch.where(draw[4] < 0.5, -1.0, 1.0)
    matrix = torch.zeros(b, 2, 3)
    matrix[:, 0, 0], matrix[:, 0, 2] = wide * flip, (2 * draw[2] - 1) * (1 - wide)
    matrix[:, 1, 1], matrix[:, 1, 2] = high, (2 * draw[3] - 1) * (1 - high)
    grid = F.affine_grid(matrix.to(images), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="reflection", align_corners=False)


def patch_boxes(height: int, width: int, levels: int) -> list[tuple[int, int, int, int]]:
    """(top, left, bottom, right) of the sub-patches of levels 1 .. `levels`: level i has i^2 overlapping patches, each
    2/(i+1) of either side, evenly spread, so that their union is the picture and the last one ends at its border."""
    if levels < 1:
        raise AdviceError(f"levels must be at least 1, not {levels}.")
    boxes = []
    for level in range(1, levels + 1):
        h, w = (min(max(math.ceil(2 * side / (level + 1)), 1), side) for side in (height, width))
        tops, lefts = _starts(height - h, level), _starts(width - w, level)
        boxes += [(top, left, top + h, left + w) for top in tops for left in lefts]
    return boxes


def _starts(room: int, count: int) -> list[int]:
    return [round(room * i / (count - 1)) for i in range(count)] if count > 1 else [room // 2]


def patches(image: Float[Tensor, "3 h w"], levels: int, size: tuple[int, int]) -> Float[Tensor, "p 3 H W"]:
    """The sub-patches of one picture, each resized to `size`; p = 1 + 4 + 9 + ... over the levels."""
    cut = [image[None, :, t:b, l:r] for t, l, b, r in patch_boxes(image.shape[-2], image.shape[-1], levels)]
    return torch.cat([resized(p, size) for p in cut])


def patch_count(levels: int) -> int:
    return sum(i * i for i in range(1, levels + 1))


def enlarged(box: Sequence[float] | Tensor, size: tuple[int, int], factor: float = 1.5) -> tuple[int, int, int, int]:
    """A box xyxy in pixels, enlarged about its centre and cut to the picture (h, w): (top, left, bottom, right)."""
    x0, y0, x1, y1 = (float(v) for v in box)
    if x1 <= x0 or y1 <= y0:
        raise AdviceError(f"A box is (x0, y0, x1, y1) with x1 > x0 and y1 > y0, not {(x0, y0, x1, y1)}.")
    cx, cy, rx, ry = (x0 + x1) / 2, (y0 + y1) / 2, factor * (x1 - x0) / 2, factor * (y1 - y0) / 2
    top, left = max(math.floor(cy - ry), 0), max(math.floor(cx - rx), 0)
    return top, left, min(math.ceil(cy + ry), size[0]), min(math.ceil(cx + rx), size[1])
