"""Convolution -> batch norm -> activation, the brick of convolutional mixers and decoders."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn

from lynceus.layers.folded import Folds, conv_bn
from lynceus.layers.fused import hooked


class ConvNormAct(nn.Module):
    """`conv` -> `norm` (BatchNorm2d) -> `act`, on maps b c h w.

    "same" zero padding for odd kernels at stride 1 unless `padding` is given. norm_eps: None for no norm, and then the
    convolution has a bias unless `bias` says no. act: a fresh module, None for none. At inference on a CPU the three
    run as one kernel where that is possible (see `lynceus.layers.folded`).
    """

    def __init__(
        self,
        inside: int,
        outside: int,
        kernel: int,
        *,
        stride: int = 1,
        padding: int | None = None,
        dilation: int = 1,
        groups: int = 1,
        bias: bool | None = None,
        norm_eps: float | None = 1e-5,
        act: nn.Module | None = None,
    ):
        super().__init__()
        padding = dilation * (kernel - 1) // 2 if padding is None else padding
        bias = norm_eps is None if bias is None else bias
        self.conv = nn.Conv2d(inside, outside, kernel, stride, padding, dilation, groups, bias)
        self.norm = nn.Identity() if norm_eps is None else nn.BatchNorm2d(outside, eps=norm_eps)
        self.act = nn.Identity() if act is None else act
        self.folds = Folds()

    def train(self, mode: bool = True) -> ConvNormAct:
        self.folds.forget()
        return super().train(mode)

    def forward(
        self,
        x: Float[Tensor, "b c h w"],
        residual: Float[Tensor, "b d H W"] | None = None,
        act: nn.Module | None = None,
        own: bool = False,
    ) -> Float[Tensor, "b d H W"]:
        """act(norm(conv(x)) + residual). act: in place of the module's own. own: `residual` may be overwritten."""
        act = self.act if act is None else act
        relu = None if type(act) is nn.Identity and not hooked(act) else act
        return conv_bn(x, self.conv, self.norm, folds=self.folds, name="it", relu=relu, residual=residual, own=own)
