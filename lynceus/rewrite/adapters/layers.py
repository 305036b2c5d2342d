"""Layers with structured pruning adapters: a frozen weight, and few learned numbers that fuse into it.

Paper: Hedegaard et al., Structured Pruning Adapters, Pattern Recognition 2024, arXiv 2211.10155
Code: LukasHedegaard/structured-pruning-adapters (Apache-2.0), whose state names are kept; written from the paper
SPPaRA: Rebuffi et al., Efficient Parametrization of Multi-Domain Deep Neural Networks, CVPR 2018, arXiv 1803.10082

SPLoRA adds C R (out x rank x in) to a linear weight, and to the central tap of a convolution; SPPaRA a full matrix to
that tap; SPLoPA a sum of Kronecker products of positions and low-rank prototypes. In training the adapters run beside
the frozen weight, so that no gradient of the weight's size is computed; in eval mode the sum runs as one weight, which
is kept until a tensor that it is made of changes, or until `train()`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from lynceus.core.errors import AdviceError

RANK, INIT_RANGE = 16, 1e-4
CONVS: dict[type, int] = {nn.Conv1d: 1, nn.Conv2d: 2, nn.Conv3d: 3}


def resolved_rank(rank: int | float, outside: int) -> int:
    """Rank of an adapter: a whole number, or a share below 1 of the outputs, rounded; at least 1."""
    if not 0 < rank < math.inf or (rank > 1 and rank != round(rank)):
        raise AdviceError(f"rank is a whole number from 1, or a share of the outputs in (0, 1), not {rank}.")
    return max(1, round(outside * rank) if rank < 1 else round(rank))


class LowRank(nn.Module):
    """`count` matrices cols @ rows: rows (count, rank, in) Kaiming uniform, cols (count, out, rank) uniform in
    +-init_range, so that the product starts near 0."""

    def __init__(self, inside: int, outside: int, rank: int, *, count: int = 1, init_range: float, like: Tensor):
        super().__init__()
        self.rows = nn.Parameter(like.new_empty(count, rank, inside))
        self.cols = nn.Parameter(like.new_empty(count, outside, rank))
        nn.init.kaiming_uniform_(self.rows, a=math.sqrt(5))
        nn.init.uniform_(self.cols, -init_range, init_range)

    @property
    def rank(self) -> int:
        return int(self.rows.shape[1])

    def forward(self) -> Float[Tensor, "m o i"]:
        return self.cols @ self.rows


class Kept:
    """A tensor made of others, until one of them is replaced or written to. Never copied or saved with its module."""

    def __init__(self) -> None:
        self.entry: tuple[Any, tuple[Tensor, ...], Tensor] | None = None

    def __deepcopy__(self, memo: Any) -> Kept:
        return Kept()

    def __reduce__(self) -> Any:
        return Kept, ()

    def forget(self) -> None:
        self.entry = None

    def get(self, sources: Sequence[Tensor], make: Callable[[], Tensor]) -> Tensor:
        """`make()`, or what it gave before; without keeping wherever gradients, tracing or inference tensors forbid."""
        if (
            torch.is_grad_enabled()
            or torch.compiler.is_compiling()
            or torch.jit.is_tracing()
            or torch._C._len_torch_dispatch_stack() > 0
            or any(t.is_inference() or type(t) not in (Tensor, nn.Parameter) for t in sources)
        ):
            return make()
        stamp = [(t.data_ptr(), t._version, t.dtype, t.shape) for t in sources]
        if self.entry is None or self.entry[0] != stamp:
            with torch.inference_mode(False), torch.no_grad():
                self.entry = stamp, tuple(t.detach() for t in sources), make()
        return self.entry[2]


class Adapted(nn.Module):
    """What the layers share: a frozen `weight`, an `adapter`, a `bias` that learns, and the way back.

    A layer becomes adapted by a change of its class (`add`) and plain again by another (`fuse_`): whatever else it
    holds, hooks and options included, stays.
    """

    plain: type[nn.Module]
    weight: Tensor
    adapter: Any
    bias: Any
    kept: Kept

    def adapted_weight(self) -> Tensor:
        """The weight with the adapter in it, differentiable."""
        raise NotImplementedError

    def sources(self) -> list[Tensor]:
        adapter = self.adapter
        return [self.weight, *([adapter] if isinstance(adapter, Tensor) else adapter.parameters())]

    def fused_weight(self) -> Tensor:
        """The same, kept while nothing changes and no gradients are asked for."""
        return self.kept.get(self.sources(), self.adapted_weight)

    def train(self, mode: bool = True) -> Adapted:
        self.kept.forget()
        return super().train(mode)

    def fuse_(self) -> nn.Module:
        """Makes this layer the plain one that it equals, in place."""
        with torch.no_grad():
            weight = self.adapted_weight().detach().clone()
        del self.adapter, self.kept
        self.weight = nn.Parameter(weight)
        self.__class__ = self.plain  # type: ignore[assignment]
        return self


def become(module: nn.Module, kind: type[Adapted], plain: type[nn.Module]) -> Any:
    """Changes the class of a layer to an adapted one and freezes its weight; the adapter is still missing."""
    layer: Any = module
    layer.__class__ = kind
    layer.plain = plain
    layer.kept = Kept()
    layer.weight.requires_grad_(False)
    if layer.bias is not None:
        layer.bias.requires_grad_(True)
    return layer


# linear layers ------------------------------------------------------------------------------------
class SPLoRALinear(Adapted, nn.Linear):
    """x (W + C R)^T + b; in training x W^T + b + (x R^T) C^T."""

    adapter: LowRank

    @staticmethod
    def add(layer: nn.Linear, *, rank: int | float = RANK, init_range: float = INIT_RANGE) -> SPLoRALinear:
        """Gives `layer` itself an adapter. rank: whole, or a share of the outputs."""
        made: SPLoRALinear = become(layer, SPLoRALinear, nn.Linear)
        outside, inside = made.weight.shape
        r = resolved_rank(rank, outside)
        made.adapter = LowRank(inside, outside, r, init_range=init_range, like=made.weight)
        return made

    def adapted_weight(self) -> Float[Tensor, "o i"]:
        return self.adapter().squeeze(0) + self.weight

    def forward(self, x: Float[Tensor, "*b i"]) -> Float[Tensor, "*b o"]:
        if not self.training:
            return F.linear(x, self.fused_weight(), self.bias)
        y = F.linear(x, self.weight, self.bias)
        inner = F.linear(x, self.adapter.rows.squeeze(0))
        if y.ndim < 2 or y.dtype != inner.dtype:
            return y + F.linear(inner, self.adapter.cols.squeeze(0))
        flat = torch.addmm(y.flatten(0, -2), inner.flatten(0, -2), self.adapter.cols.squeeze(0).t())
        return flat.view(y.shape)


class SPLoPALinear(Adapted, nn.Linear):
    """x (W + sum over n of kron(P_n, prototype_n))^T + b, for block pruning: P (n, out/p, in/q), prototypes (n, p, q)
    of low rank. A block that is pruned (`prune_blocks`) is 0 in the sum and needs no entry of P."""

    adapter: Prototypes
    block_mask: Tensor | None

    @staticmethod
    def add(
        layer: nn.Linear,
        *,
        prototypes: int = 64,
        block: tuple[int, int] = (32, 32),
        prototype_rank: int = 1,
        init_range: float = INIT_RANGE,
        shared: LowRank | None = None,
    ) -> SPLoPALinear:
        """Gives `layer` itself an adapter. shared: prototypes of another layer with the same blocks."""
        outside, inside = layer.weight.shape
        if outside % block[0] or inside % block[1]:
            raise AdviceError(
                f"A weight of {outside} x {inside} cannot be cut into blocks of {block[0]} x {block[1]}; both sides "
                f"must divide, e.g. {math.gcd(outside, block[0])} x {math.gcd(inside, block[1])}."
            )
        made: SPLoPALinear = become(layer, SPLoPALinear, nn.Linear)
        made.adapter = Prototypes(
            (outside // block[0], inside // block[1]),
            shared
            or LowRank(block[1], block[0], prototype_rank, count=prototypes, init_range=init_range, like=made.weight),
        )
        made.register_buffer("block_mask", None)
        return made

    @property
    def block(self) -> tuple[int, int]:
        """Rows and columns of a block."""
        return int(self.adapter.prototypes.cols.shape[1]), int(self.adapter.prototypes.rows.shape[2])

    def prune_blocks(self, keep: Bool[Tensor, "rows columns"]) -> None:
        """Removes the blocks where `keep` is False, beside those that are gone already."""
        grid = tuple(self.adapter.pos_weights.shape[1:])
        if tuple(keep.shape) != grid:
            raise AdviceError(f"There are {grid[0]} x {grid[1]} blocks; the mask is {tuple(keep.shape)}.")
        before = self.block_mask
        self.block_mask = keep.to(self.weight.device) if before is None else before & keep.to(before.device)
        with torch.no_grad():
            self.adapter.pos_weights.mul_(self.block_mask)
        self.kept.forget()

    def sources(self) -> list[Tensor]:
        return [*super().sources(), *([] if self.block_mask is None else [self.block_mask])]

    def adapted_weight(self) -> Float[Tensor, "o i"]:
        weight = self.weight + self.adapter()
        if self.block_mask is None:
            return weight
        p, q = self.block
        return weight * self.block_mask.repeat_interleave(p, 0).repeat_interleave(q, 1)

    def forward(self, x: Float[Tensor, "*b i"]) -> Float[Tensor, "*b o"]:
        return F.linear(x, self.adapted_weight() if self.training else self.fused_weight(), self.bias)

    def fuse_(self) -> nn.Module:
        super().fuse_()
        del self.block_mask
        return self


class Prototypes(nn.Module):
    """sum over n of kron(pos_weights[n], prototypes[n])."""

    def __init__(self, grid: tuple[int, int], prototypes: LowRank):
        super().__init__()
        self.pos_weights = nn.Parameter(prototypes.rows.new_empty(len(prototypes.rows), *grid))
        nn.init.kaiming_uniform_(self.pos_weights, a=math.sqrt(5))
        self.prototypes = prototypes

    def forward(self) -> Float[Tensor, "o i"]:
        made = torch.einsum("nyx,npq->ypxq", self.pos_weights, self.prototypes())
        return made.flatten(2).flatten(0, 1)


# convolutions -------------------------------------------------------------------------------------
class _Centred(Adapted):
    """A convolution whose adapter acts at the central tap of the kernel."""

    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: Any
    dilation: tuple[int, ...]
    groups: int
    padding_mode: Any
    _reversed_padding_repeated_twice: list[int]

    def matrix(self) -> Float[Tensor, "o i"]:
        """What is added at the tap."""
        raise NotImplementedError

    def beside(self, x: Tensor) -> Tensor:
        """The adapter's 1x1 convolution(s) of what lies under the tap."""
        raise NotImplementedError

    def adapted_weight(self) -> Tensor:
        matrix = self.matrix()
        if all(k == 1 for k in self.kernel_size):
            return self.weight + matrix.view(self.weight.shape)
        weight = self.weight.clone()
        tap = weight
        for k in self.kernel_size:
            tap = tap.select(2, k // 2)
        tap += matrix
        return weight

    def under_tap(self, x: Tensor, size: Sequence[int]) -> Tensor:
        """The places of x that the central tap meets, for an output of that size; zeros (or as `padding_mode` says)
        outside."""
        places, pads = [], []
        for i, (k, step, apart) in enumerate(zip(self.kernel_size, self.stride, self.dilation)):
            pad = self._reversed_padding_repeated_twice[2 * (len(self.kernel_size) - 1 - i)]
            first, last = apart * (k // 2) - pad, apart * (k // 2) - pad + (size[i] - 1) * step
            pads.append((max(0, -first), max(0, last + 1 - x.shape[2 + i])))
            places.append(slice(first + pads[-1][0], last + pads[-1][0] + 1, step))
        if any(a or b for a, b in pads):
            mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
            x = F.pad(x, [side for pair in reversed(pads) for side in pair], mode=mode)
        return x[(slice(None), slice(None), *places)]

    def forward(self, x: Tensor) -> Tensor:
        layer: Any = self
        if not self.training:
            return layer._conv_forward(x, self.fused_weight(), self.bias)
        if x.ndim == len(self.kernel_size) + 1 or all(k == 1 for k in self.kernel_size):
            return layer._conv_forward(x, self.adapted_weight(), self.bias)
        y: Tensor = layer._conv_forward(x, self.weight, self.bias)
        return y + self.beside(self.under_tap(x, y.shape[2:]))

    def pointwise(self, x: Tensor, matrix: Float[Tensor, "o i"], groups: int = 1) -> Tensor:
        run: Any = (F.conv1d, F.conv2d, F.conv3d)[len(self.kernel_size) - 1]
        made: Tensor = run(x, matrix.view(*matrix.shape, *(1 for _ in self.kernel_size)), groups=groups)
        return made


class _SPLoRAConv(_Centred):
    adapter: LowRank

    def matrix(self) -> Float[Tensor, "o i"]:
        return self.adapter().squeeze(0)

    def beside(self, x: Tensor) -> Tensor:
        rows, cols = self.adapter.rows.squeeze(0), self.adapter.cols.squeeze(0)
        inner = self.pointwise(x, rows.repeat(self.groups, 1) if self.groups > 1 else rows, self.groups)
        return self.pointwise(inner, cols, self.groups)


class _SPPaRAConv(_Centred):
    adapter: Tensor

    def matrix(self) -> Float[Tensor, "o i"]:
        return self.adapter

    def beside(self, x: Tensor) -> Tensor:
        return self.pointwise(x, self.adapter, self.groups)


class SPLoRAConv1d(_SPLoRAConv, nn.Conv1d):
    """Conv1d with C R at its central tap."""


class SPLoRAConv2d(_SPLoRAConv, nn.Conv2d):
    """Conv2d with C R at its central tap."""


class SPLoRAConv3d(_SPLoRAConv, nn.Conv3d):
    """Conv3d with C R at its central tap."""


class SPPaRAConv1d(_SPPaRAConv, nn.Conv1d):
    """Conv1d with a parallel residual adapter."""


class SPPaRAConv2d(_SPPaRAConv, nn.Conv2d):
    """Conv2d with a parallel residual adapter."""


class SPPaRAConv3d(_SPPaRAConv, nn.Conv3d):
    """Conv3d with a parallel residual adapter."""


SPLORA_CONVS: dict[type, type[Adapted]] = {nn.Conv1d: SPLoRAConv1d, nn.Conv2d: SPLoRAConv2d, nn.Conv3d: SPLoRAConv3d}
SPPARA_CONVS: dict[type, type[Adapted]] = {nn.Conv1d: SPPaRAConv1d, nn.Conv2d: SPPaRAConv2d, nn.Conv3d: SPPaRAConv3d}


def unfit(layer: nn.Module) -> str | None:
    """Why a convolution has no central tap to adapt; None where it has one."""
    sides = set(getattr(layer, "kernel_size", ()))
    if type(layer) not in CONVS:
        return f"{type(layer).__name__} is no plain convolution"
    if len(sides) != 1 or next(iter(sides)) % 2 == 0:
        kernel = " x ".join(map(str, layer.kernel_size))  # type: ignore[arg-type]
        return f"its kernel of {kernel} has no central tap (odd and equal sides have)"
    return None


def splora_conv(layer: Any, *, rank: int | float = RANK, init_range: float = INIT_RANGE) -> Adapted:
    """Gives the convolution `layer` itself a low-rank adapter: rows (1, r, in/groups), cols (1, out, r)."""
    _check(layer)
    made = become(layer, SPLORA_CONVS[type(layer)], type(layer))
    outside, inside = made.weight.shape[:2]
    r = resolved_rank(rank, outside)
    made.adapter = LowRank(inside, outside, r, init_range=init_range, like=made.weight)
    return made


def sppara_conv(layer: Any, *, init_range: float = INIT_RANGE) -> Adapted:
    """Gives the convolution `layer` itself a full matrix (out, in/groups) at its central tap."""
    _check(layer)
    made = become(layer, SPPARA_CONVS[type(layer)], type(layer))
    made.adapter = nn.Parameter(made.weight.new_empty(made.weight.shape[:2]))
    nn.init.uniform_(made.adapter, -init_range, init_range)
    return made


def _check(layer: nn.Module) -> None:
    reason = unfit(layer)
    if reason is not None:
        raise AdviceError(f"This convolution cannot be adapted: {reason}.")
