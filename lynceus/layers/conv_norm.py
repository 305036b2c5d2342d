"""Convolution without bias and batch norm, and depthwise ones added up, on channels-last maps."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn

from lynceus.layers.folded import Folds, conv_bn, conv_bn_sum, fold, fold_sum


class ConvNorm(nn.Module):
    """A k x k "same" convolution `c` and its batch norm `bn`, on a map b h w c.

    norm_weight: start of the norm's weight. fused: the deployment form, one convolution with bias and no norm.
    Inference runs both as one kernel (see `lynceus.layers.folded`).
    """

    def __init__(
        self,
        in_chans: int,
        out_chans: int,
        kernel: int = 1,
        *,
        stride: int = 1,
        groups: int = 1,
        norm_weight: float = 1.0,
        fused: bool = False,
    ):
        super().__init__()
        self.c = nn.Conv2d(in_chans, out_chans, kernel, stride, kernel // 2, groups=groups, bias=fused)
        self.bn: nn.Module = nn.Identity()
        if not fused:
            self.bn = nn.BatchNorm2d(out_chans)
            nn.init.constant_(self.bn.weight, norm_weight)
        self.folds = Folds()

    def train(self, mode: bool = True) -> ConvNorm:
        self.folds.forget()
        return super().train(mode)

    def forward(
        self,
        x: Float[Tensor, "b h w i"],
        *,
        relu: nn.Module | None = None,
        residual: Float[Tensor, "b H W o"] | None = None,
    ) -> Float[Tensor, "b H W o"]:
        """relu(bn(c(x)) + residual), each of the two optional."""
        if residual is not None:
            residual = residual.permute(0, 3, 1, 2)
        x = x.permute(0, 3, 1, 2)
        return conv_bn(x, self.c, self.bn, folds=self.folds, name="c", relu=relu, residual=residual).permute(0, 2, 3, 1)

    def folded_state(self) -> dict[str, Tensor]:
        """The state of the same module with fused=True."""
        kernel, bias = fold(self.c, self.bn)
        return {"c.weight": kernel, "c.bias": bias}


class DepthwiseBranches(nn.Module):
    """A depthwise 3x3 and a depthwise 1x1 convolution, each with batch norm, added up (RepVGG's idea); map b h w c.

    With `residual` the input is added as well; inference then runs all three as one 3x3 kernel. fused: the deployment
    form, in which `conv` alone holds the sum *with* the input.
    """

    def __init__(self, dim: int, *, fused: bool = False):
        super().__init__()
        self.conv = ConvNorm(dim, dim, 3, groups=dim, fused=fused)
        if not fused:
            self.conv1 = ConvNorm(dim, dim, 1, groups=dim)
        self.fused = fused
        self.folds = Folds()

    def train(self, mode: bool = True) -> DepthwiseBranches:
        self.folds.forget()
        return super().train(mode)

    def forward(
        self, x: Float[Tensor, "b h w c"], residual: Float[Tensor, "b h w c"] | None = None
    ) -> Float[Tensor, "b h w c"]:
        """residual: the input itself, to be added; None leaves it out."""
        if self.fused:
            y = self.conv(x)
            return y if residual is not None else y - x
        pairs = [(self.conv.c, self.conv.bn), (self.conv1.c, self.conv1.bn)]
        y = conv_bn_sum(x.permute(0, 3, 1, 2), pairs, folds=self.folds, name="sum", identity=residual is not None)
        return y.permute(0, 2, 3, 1)

    def folded_state(self) -> dict[str, Tensor]:
        """The state of the same module with fused=True."""
        pairs = [(self.conv.c, self.conv.bn), (self.conv1.c, self.conv1.bn)]
        kernel, bias = fold_sum(pairs, identity=True)
        return {"conv.c.weight": kernel, "conv.c.bias": bias}
