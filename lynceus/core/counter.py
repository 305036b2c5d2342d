"""Counts the multiply-adds of whatever operators run inside a block, and what was alive in memory meanwhile.

torch's own formulas (`torch.utils.flop_counter`) are taken where it has them; those that it misses stand here.
"""

from __future__ import annotations

import math
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

aten = torch.ops.aten

# operators that only make, move or choose numbers
_MOVES = """
    _local_scalar_dense _reshape_copy _to_copy _unsafe_index _unsafe_view arange as_strided_ as_strided_copy
    bernoulli bernoulli_ cat channel_shuffle clone col2im constant_pad_nd copy copy_ detach detach_ dropout
    embedding empty empty_like empty_strided eye fill_ flip full full_like gather im2col index index_put
    index_put_ index_select is_pinned lift_fresh linspace masked_fill masked_fill_ native_dropout new_empty
    new_empty_strided new_full new_ones new_zeros nonzero normal_ ones ones_like pixel_shuffle pixel_unshuffle
    rand rand_like randint randn randn_like randperm reflection_pad2d repeat replication_pad2d resize_ roll
    scalar_tensor scatter select_scatter set_ slice_scatter split_with_sizes_copy squeeze_ stack t_ transpose_
    tril triu unfold_copy uniform_ unsqueeze_ view_copy where zero_ zeros zeros_like
"""
MOVES = frozenset(_MOVES.split())
Formula = Callable[..., int]  # (operator's arguments, its output) -> floating-point operations; a multiply-add is two


def _attention(args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> int:
    q, k, v = args[:3]
    *lead, n, d = q.shape
    return int(2 * math.prod(lead) * n * k.shape[-2] * (d + v.shape[-1]))


def _fft(half: bool) -> Formula:
    """5 N log2 N for a complex transform of N points (Cooley-Tukey, radix 2), half of it for a real one."""

    def formula(args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> int:
        # of input and output the larger is the real side, whose length is that of the transform
        sides = [args[0], out] if isinstance(out, Tensor) else [args[0]]
        whole = max(sides, key=lambda t: t.numel())
        points = math.prod(whole.shape[d] for d in args[1])
        flops = 5 * whole.numel() * math.log2(points) if points > 1 else 0.0
        return round(flops / 2 if half else flops)

    return formula


def _cdist(args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> int:
    return int(2 * out.numel() * args[0].shape[-1])


def _vector(args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> int:
    matrix = args[0] if args[0].ndim == 2 else args[1]
    return int(2 * matrix.numel())


OURS: dict[Any, Formula] = {
    aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    aten._scaled_dot_product_fused_attention_overrideable: _attention,
    aten._fft_r2c: _fft(half=True),
    aten._fft_c2r: _fft(half=True),
    aten._fft_c2c: _fft(half=False),
    aten._cdist_forward: _cdist,
    aten.mv: _vector,
    aten.addmv: lambda args, kwargs, out: 2 * args[1].numel(),
    aten.dot: lambda args, kwargs, out: 2 * args[0].numel(),
    aten.addcmul: lambda args, kwargs, out: 2 * out.numel(),
    aten.addcmul_: lambda args, kwargs, out: 2 * out.numel(),
    aten.linear: lambda args, kwargs, out: 2 * out.numel() * args[1].shape[-1],
}


class Counting(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """flops and elements written by counted operators, per module name; names of what was not counted; peak memory."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.flops: Counter[str] = Counter()
        self.written = 0
        self.skipped: Counter[str] = Counter()
        self.inside: list[str] = [""]
        self.live = 0
        self.peak = 0
        self._storages: dict[int, Any] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        packet = func.overloadpacket
        if packet not in OURS and packet not in flop_registry:
            with self:
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        out = func(*args, **kwargs)
        self._count(func, packet, args, kwargs, out)
        self._watch(out)
        return out

    def _count(self, func: Any, packet: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        if packet in OURS:
            flops = OURS[packet](args, kwargs, out)
        elif packet in flop_registry:
            flops = int(flop_registry[packet](*args, **kwargs, out_val=out))
        else:
            name = packet.__name__
            if name not in MOVES and not _is_view(func):
                self.skipped[name.strip("_").removeprefix("native_")] += 1
            return
        for name in set(self.inside):
            self.flops[name] += flops
        self.written += sum(t.numel() for t in tree_leaves(out)[:1] if isinstance(t, Tensor))

    def _watch(self, out: Any) -> None:
        for tensor in tree_leaves(out):
            if not isinstance(tensor, Tensor) or tensor.layout != torch.strided:
                continue
            storage = tensor.untyped_storage()
            key = storage._cdata
            if key in self._storages:
                continue
            size = storage.nbytes()
            self.live += size
            self.peak = max(self.peak, self.live)
            self._storages[key] = weakref.finalize(storage, self._free, key, size)

    def _free(self, key: int, size: int) -> None:
        if self._storages.pop(key, None) is not None:
            self.live -= size

    def ignore(self, model: nn.Module, *tensors: Tensor) -> None:
        """Weights and input are not activations."""
        for tensor in [*model.parameters(), *model.buffers(), *tensors]:
            self._storages.setdefault(tensor.untyped_storage()._cdata, None)


def _is_view(func: Any) -> bool:
    return any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)


@contextmanager
def named(model: nn.Module, counting: Counting) -> Iterator[None]:
    """While inside, `counting` knows in which modules of `model` an operator runs."""
    handles = []
    for name, module in model.named_modules():
        if name:
            handles.append(module.register_forward_pre_hook(_enter(counting, name)))
            handles.append(module.register_forward_hook(_leave(counting, name), always_call=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _enter(counting: Counting, name: str) -> Any:
    return lambda module, args: counting.inside.append(name)


def _leave(counting: Counting, name: str) -> Any:
    def leave(module: nn.Module, args: Any, out: Any) -> None:
        if counting.inside[-1] == name:
            counting.inside.pop()

    return leave
