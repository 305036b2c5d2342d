"""Image -> tokens."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn

from lynceus.core.shapes import pad_image


class PatchEmbed(nn.Module):
    """Non-overlapping patches through one convolution `proj`, as a map of tokens (b, H, W, c).

    Any image size: zero-padded right and bottom to a multiple of the patch.
    norm_eps: given, a LayerNorm `norm` of that eps follows.
    """

    def __init__(self, in_chans: int, dim: int, patch: int, *, bias: bool = True, norm_eps: float | None = None):
        super().__init__()
        self.patch = patch
        self.proj = nn.Conv2d(in_chans, dim, patch, patch, bias=bias)
        self.norm = nn.Identity() if norm_eps is None else nn.LayerNorm(dim, eps=norm_eps)

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of patches of an image of that size."""
        return -(-height // self.patch), -(-width // self.patch)

    def forward(self, image: Float[Tensor, "b c h w"]) -> Float[Tensor, "b H W d"]:
        return self.norm(self.proj(pad_image(image, self.patch)).permute(0, 2, 3, 1))
