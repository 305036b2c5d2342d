"""The block-sparse product on a GPU, in Triton (which comes with torch for CUDA). Inference in half, bfloat16, float32.

One program makes a tile of tokens x one block row of the output: it goes through the kept blocks of that row, so work
and traffic fall with the blocks. Where Triton, a GPU or a block side of a multiple of 16 is lacking, `usable` says no.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import Tensor

TOKENS = 64  # of a tile


def usable(x: Tensor, blocks: Tensor, bias: Tensor | None) -> bool:
    """Whether `multiply` can take it: on a GPU, without gradients, blocks of multiples of 16."""
    if not x.is_cuda or torch.compiler.is_compiling() or torch.is_autocast_enabled("cuda"):
        return False
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, blocks, bias)):
        return False
    fits = blocks.shape[1] % 16 == 0 and blocks.shape[2] % 16 == 0 and max(blocks.shape[1:]) <= 128
    known = x.dtype in (torch.float16, torch.bfloat16, torch.float32) and blocks.dtype == x.dtype
    return fits and known and x.numel() > 0 and len(blocks) > 0 and find_spec("triton") is not None


def multiply(x: Tensor, layer: Any) -> Tensor:
    """x (..., in) times the kept blocks of a BlockSparseLinear, plus its bias: (..., out)."""
    import triton

    first, column = _places(layer)
    flat = x.reshape(-1, layer.in_features).contiguous()
    out = flat.new_empty(len(flat), layer.out_features)
    (b1, b2), rows = layer.block, layer.grid[0]
    bias = layer.bias if layer.bias is not None else layer.blocks
    _kernel()[(triton.cdiv(len(flat), TOKENS), rows)](
        flat, layer.blocks, bias, out, first, column,
        len(flat), layer.in_features, layer.out_features,
        B1=b1, B2=b2, TILE=TOKENS, BIAS=layer.bias is not None,
        PRECISE="ieee" if x.dtype == torch.float32 and not torch.backends.cuda.matmul.allow_tf32 else "tf32",
    )  # fmt: skip
    return out.view(*x.shape[:-1], layer.out_features)


def _places(layer: Any) -> tuple[Tensor, Tensor]:
    """Where each block row begins among the kept blocks, and the block column of each; on the layer's device."""
    held = layer._packed
    key = ("gpu", layer.blocks.device)
    if held.stamp != key:
        first = np.concatenate([[0], layer.kept.sum(1).cumsum()]).astype(np.int32)
        column = np.nonzero(layer.kept)[1].astype(np.int32)
        held.stamp = key
        held.value = tuple(torch.from_numpy(v).to(layer.blocks.device) for v in (first, column))
    out: tuple[Tensor, Tensor] = held.value
    return out


@cache
def _kernel() -> Any:
    import triton
    import triton.language as tl

    @triton.jit
    def block_sparse(
        x, blocks, bias, out, first, column, tokens, inn, outn,
        B1: tl.constexpr, B2: tl.constexpr, TILE: tl.constexpr, BIAS: tl.constexpr, PRECISE: tl.constexpr,
    ):  # fmt: skip
        tile, row = tl.program_id(0), tl.program_id(1)
        token = tile * TILE + tl.arange(0, TILE)
        feature = row * B1 + tl.arange(0, B1)
        inner = tl.arange(0, B2)
        total = tl.zeros((TILE, B1), dtype=tl.float32)
        start, end = tl.load(first + row), tl.load(first + row + 1)
        for i in range(start, end):
            source = tl.load(column + i) * B2 + inner
            held = (token[:, None] < tokens) & (source[None, :] < inn)
            part = tl.load(x + token[:, None].to(tl.int64) * inn + source[None, :], mask=held, other=0.0)
            place = i * (B1 * B2) + tl.arange(0, B1)[None, :] * B2 + inner[:, None]
            total += tl.dot(part, tl.load(blocks + place), input_precision=PRECISE)
        if BIAS:
            total += tl.load(bias + feature, mask=feature < outn, other=0.0)[None, :].to(tl.float32)
        inside = (token[:, None] < tokens) & (feature[None, :] < outn)
        where = token[:, None].to(tl.int64) * outn + feature[None, :]
        tl.store(out + where, total.to(out.dtype.element_ty), mask=inside)

    return block_sparse
