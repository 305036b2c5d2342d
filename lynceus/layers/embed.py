"""Image -> tokens."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn

from lynceus.core.shapes import pad_image, pad_strided


class PatchEmbed(nn.Module):
    """Patches through one convolution `proj`, as a map of tokens (b, H, W, c).

    Any image size: zero-padded right and bottom until the last patch is whole.
    stride: distance of the patches, at most their side; None: the side, so that they do not overlap.
    norm_eps: given, a LayerNorm `norm` of that eps follows.
    """

    def __init__(
        self,
        in_chans: int,
        dim: int,
        patch: int,
        *,
        stride: int | None = None,
        bias: bool = True,
        norm_eps: float | None = None,
    ):
        super().__init__()
        self.patch, self.stride = patch, stride or patch
        self.proj = nn.Conv2d(in_chans, dim, patch, self.stride, bias=bias)
        self.norm = nn.Identity() if norm_eps is None else nn.LayerNorm(dim, eps=norm_eps)

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of patches of an image of that size."""
        if self.stride == self.patch:
            return -(-height // self.patch), -(-width // self.patch)
        high, wide = (-(-max(side - self.patch, 0) // self.stride) + 1 for side in (height, width))
        return high, wide

    def forward(self, image: Float[Tensor, "b c h w"]) -> Float[Tensor, "b H W d"]:
        if self.stride == self.patch:
            image = pad_image(image, self.patch)
        else:
            image = pad_strided(image, self.patch, self.stride)
        return self.norm(self.proj(image).permute(0, 2, 3, 1))
