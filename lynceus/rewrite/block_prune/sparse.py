"""Layers that keep only some blocks of their weights, and compute with no others.

LPViT: Low-Power Semi-structured Pruning for Vision Transformers, ECCV 2024, arXiv 2407.02068.
Code: Akimoto-Cris/LPViT (no licence; its kernels are not released, these are ours).

On a CPU without gradients the kept blocks are multiplied by `runs`, on a GPU by `kernel`; everywhere else, training
and export included, the weight is put together and multiplied as a dense one. All three give the same numbers.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from lynceus.core.errors import AdviceError
from lynceus.rewrite.block_prune import kernel
from lynceus.rewrite.block_prune.runs import FEW, Program, lean, program, stamp, worth_reordering


class Kept:
    """What was packed from a layer's weights, and from which. Never copied, pickled or saved with it."""

    def __init__(self) -> None:
        self.stamp: Any = None
        self.value: Any = None

    def __deepcopy__(self, memo: Any) -> Kept:
        return Kept()

    def __reduce__(self) -> Any:
        return Kept, ()


class BlockSparseLinear(nn.Module):
    """x W^T + bias, where W (out_features, in_features) has only the blocks that `kept` marks.

    block: (rows, columns) of a block of W; blocks at the lower and right edge may be cut off. kept: (rows of blocks,
    columns of blocks). State: `blocks` (number kept, *block), row by row, and `bias`; `kept` belongs to the plan.
    `weight` is W with its zeros.
    """

    slots: Tensor
    size: tuple[int, int] = (1, 1)  # of the patches of a convolution

    def __init__(
        self,
        in_features: int,
        out_features: int,
        block: tuple[int, int],
        kept: Bool[Tensor, "r c"],
        *,
        bias: bool = True,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ):
        super().__init__()
        grid = (-(-out_features // block[0]), -(-in_features // block[1]))
        if tuple(kept.shape) != grid:
            raise AdviceError(
                f"A layer of {out_features} x {in_features} has {grid[0]} x {grid[1]} blocks of {block[0]} x {block[1]}"
                f", not {' x '.join(map(str, kept.shape))}."
            )
        self.in_features, self.out_features, self.block, self.grid = in_features, out_features, block, grid
        self.kept: np.ndarray = kept.cpu().numpy().copy()
        count = int(self.kept.sum())
        self.blocks = nn.Parameter(torch.zeros(count, *block, dtype=dtype, device=device))
        self.bias = nn.Parameter(torch.zeros(out_features, dtype=dtype, device=device)) if bias else None
        # where each block of W lies among the kept ones; the place after them is a block of zeros
        slots = np.where(self.kept.ravel(), np.cumsum(self.kept.ravel()) - 1, count)
        self.register_buffer("slots", torch.from_numpy(slots).to(device), persistent=False)
        self._packed = Kept()

    @classmethod
    def of(cls, layer: Any, block: tuple[int, int], kept: Bool[Tensor, "r c"]) -> Any:
        """The layer with the kept blocks of `layer` (an nn.Linear; a convolution for BlockSparseConv), in its dtype and
        on its device."""
        matrix = matrix_of(layer)
        if matrix is None:
            raise AdviceError(f"Blocks are taken from linear layers and patches, not from a {type(layer).__name__}.")
        made = cls(
            matrix.shape[1],
            matrix.shape[0],
            block,
            kept,
            bias=layer.bias is not None,
            dtype=matrix.dtype,
            device=matrix.device,
        )
        if isinstance(layer, nn.Conv2d):
            made.size = (int(layer.kernel_size[0]), int(layer.kernel_size[1]))
        made.take(matrix, layer.bias)
        made.blocks.requires_grad_(layer.weight.requires_grad)
        made.train(layer.training)
        return made

    @torch.no_grad()
    def take(self, weight: Tensor, bias: Tensor | None) -> None:
        """Copies the kept blocks of a dense weight (out, in), and the bias."""
        index = torch.from_numpy(np.flatnonzero(self.kept)).to(weight.device)
        self.blocks.copy_(blocks_of(weight, self.block).flatten(0, 1).index_select(0, index))
        if self.bias is not None and bias is not None:
            self.bias.copy_(bias)

    @property
    def density(self) -> float:
        """Share of the blocks that is kept."""
        return float(self.kept.mean())

    @property
    def weights(self) -> int:
        """Kept weights inside W (blocks at the edges count as far as they are inside)."""
        return int((self.kept * areas((self.out_features, self.in_features), self.block)).sum())

    @property
    def weight(self) -> Float[Tensor, "o i"]:
        """W, with zeros where blocks are missing; gradients reach `blocks`."""
        (r, c), (b1, b2) = self.grid, self.block
        padded = torch.cat([self.blocks, self.blocks.new_zeros(1, b1, b2)])
        whole = padded.index_select(0, self.slots).view(r, c, b1, b2).permute(0, 2, 1, 3).reshape(r * b1, c * b2)
        return whole[: self.out_features, : self.in_features]

    def train(self, mode: bool = True) -> BlockSparseLinear:
        """As nn.Module's; also forgets what was packed."""
        self._packed = Kept()
        super().train(mode)
        return self

    def program(self, tokens: int = FEW + 1) -> tuple[Program, Tensor]:
        """The steps for a CPU and the dense weight, packed anew when the weights have changed.

        tokens: that are multiplied at once. For a few the outputs are reordered, which saves steps."""
        now = stamp(self.blocks, self.bias)
        if self._packed.stamp != now:
            order = worth_reordering(self.kept, self.block, self.out_features)
            self._packed.value, self._packed.stamp = (self.weight.detach(), order, {}), now
        whole, order, made = self._packed.value
        chosen = order if tokens <= FEW else None
        if (few := chosen is not None) not in made:
            made[few] = program(whole, self.bias, self.kept, self.block, row_order=chosen)
        return made[few], whole

    def forward(self, x: Float[Tensor, "*batch i"]) -> Float[Tensor, "*batch o"]:
        if kernel.usable(x, self.blocks, self.bias):
            return kernel.multiply(x, self)
        if lean(x, self.blocks, self.bias):
            rows = x.numel() // self.in_features
            steps, whole = self.program(rows)
            if not steps.worth(rows, self.in_features * self.out_features):
                return F.linear(x, whole, self.bias)
            return steps(x.reshape(rows, self.in_features)).view(*x.shape[:-1], self.out_features)
        return F.linear(x, self.weight, self.bias)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, block={self.block}, "
            f"kept={int(self.kept.sum())} of {self.kept.size}, bias={self.bias is not None}"
        )


class BlockSparseConv(BlockSparseLinear):
    """A convolution whose kernels do not overlap (patches, 1x1) as a block-sparse layer on patches (in * k * k)."""

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d H W"]:
        (kh, kw), (b, c, h, w) = self.size, x.shape
        x = x[..., : h // kh * kh, : w // kw * kw]
        patches = x.reshape(b, c, h // kh, kh, w // kw, kw).permute(0, 2, 4, 1, 3, 5)
        return super().forward(patches.reshape(b, h // kh, w // kw, c * kh * kw)).permute(0, 3, 1, 2)


def blocks_of(weight: Float[Tensor, "o i"], block: tuple[int, int]) -> Float[Tensor, "r c p q"]:
    """A matrix as blocks; zeros fill those that reach over its edge."""
    (o, i), (b1, b2) = weight.shape, block
    padded = F.pad(weight, (0, -i % b2, 0, -o % b1))
    return padded.unflatten(1, (-1, b2)).unflatten(0, (-1, b1)).transpose(1, 2)


def areas(shape: tuple[int, int], block: tuple[int, int]) -> np.ndarray:
    """How many weights each block of a matrix has inside it: (rows of blocks, columns of blocks)."""
    (o, i), (b1, b2) = shape, block
    high = np.minimum(b1, o - b1 * np.arange(-(-o // b1)))
    wide = np.minimum(b2, i - b2 * np.arange(-(-i // b2)))
    return high[:, None] * wide[None]


def matrix_of(layer: nn.Module) -> Float[Tensor, "o i"] | None:
    """The weight as a matrix of a layer that blocks can be taken from: nn.Linear, or a convolution whose kernels
    neither overlap nor are padded; None for everything else."""
    if type(layer) is nn.Linear:
        return layer.weight
    if type(layer) is nn.Conv2d and layer.groups == 1 and layer.padding in ((0, 0), "valid"):
        apart = layer.kernel_size == layer.stride and layer.dilation == (1, 1)
        return layer.weight.flatten(1) if apart else None
    return None
