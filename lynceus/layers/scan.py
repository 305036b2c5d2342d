"""The selective scan of Mamba (Gu and Dao, 2023, arXiv 2312.00752): a linear recurrence whose coefficients are tokens'.

For every channel c and state n, from h_0 = 0 (or a state that is given),

    h_t = exp(delta_t A) h_{t-1} + delta_t B_t u_t        y_t = sum over n of C_t h_t  +  D u_t

Only decays exp(delta A) <= 1 are ever formed, never their inverses, so no length and no step overflows.

Two routes compute it. "sequential" is the definition, a step at a time. "chunked" makes all decays and inputs of a tile
of tokens in a few large operations, so that a token costs one fused multiply-add, and runs chunks of the sequence side
by side where there are few channels; its backward is closed-form and keeps one state per tile, not one per token.
Under export the recurrence is one `scan` operator with a free length, under torch.compile one opaque operator.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable
from torch.utils.flop_counter import register_flop_formula

from lynceus.core.errors import AdviceError
from lynceus.layers import scan_tiles
from lynceus.layers.fused import without_autocast
from lynceus.layers.scan_tiles import chunks_of

Route = Literal["auto", "sequential", "chunked"]


def selective_scan(
    u: Float[Tensor, "b d l"],
    delta: Float[Tensor, "b d l"],
    A: Float[Tensor, "d n"],
    B: Float[Tensor, "*b_shape"],
    C: Float[Tensor, "*c_shape"],
    D: Float[Tensor, " d"] | None = None,
    z: Float[Tensor, "b d l"] | None = None,
    delta_bias: Float[Tensor, " d"] | None = None,
    *,
    delta_softplus: bool = False,
    initial_state: Float[Tensor, "b d n"] | None = None,
    return_last_state: bool = False,
    route: Route = "auto",
) -> Any:
    """y (b, d, l), or (y, last state (b, d, n)) if `return_last_state`.

    A: negative. B and C each: (b, n, l) shared by all channels, (b, g, n, l) shared by each of g groups of d / g
    neighbouring channels, or (d, n) constant in time. D: skip. z: the result is multiplied by silu(z). delta_bias is
    added to delta before the softplus. 16-bit inputs are computed in float32 and y comes back in the type of u.
    AdviceError for shapes that do not fit.
    """
    b, d, length = u.shape
    states = A.shape[1]
    for name, x in (("B", B), ("C", C)):
        _check_coefficients(name, x, b, d, states, length)
    out_type = u.dtype
    kind = torch.promote_types(torch.promote_types(u.dtype, A.dtype), torch.float32)
    groups = max(B.shape[1] if B.ndim == 4 else 1, C.shape[1] if C.ndim == 4 else 1)
    for name, x in (("B", B), ("C", C)):
        if x.ndim == 4 and groups % x.shape[1]:
            raise AdviceError(f"{name} has {x.shape[1]} groups beside {groups}; one number must divide the other.")
    # tokens first, once: everything below then runs along neighbouring numbers
    values, steps = (x.to(kind).permute(2, 0, 1).contiguous() for x in (u, delta))
    if delta_bias is not None:
        steps = steps + delta_bias.to(kind)
    if delta_softplus:
        steps = F.softplus(steps)
    state = None if initial_state is None else initial_state.to(kind).view(b, groups, -1, states).permute(1, 0, 3, 2)
    y, last = scan(
        values.unflatten(2, (groups, -1)).transpose(1, 2),
        steps.unflatten(2, (groups, -1)).transpose(1, 2),
        A.to(kind).view(groups, -1, states).transpose(1, 2),
        _coefficients(B.to(kind), groups),
        _coefficients(C.to(kind), groups),
        state,
        route=route,
    )
    y = y.transpose(1, 2).flatten(2)
    if D is not None:
        y = torch.addcmul(y, values, D.to(kind))
    if z is not None:
        y = y * F.silu(z.to(kind).permute(2, 0, 1).contiguous())
    y = y.permute(1, 2, 0).to(out_type)
    return (y, last.permute(1, 0, 3, 2).reshape(b, d, states)) if return_last_state else y


def selective_step(
    state: Float[Tensor, "b d n"],
    u: Float[Tensor, "b d"],
    delta: Float[Tensor, "b d"],
    A: Float[Tensor, "d n"],
    B: Float[Tensor, "b *groups n"],
    C: Float[Tensor, "b *groups n"],
    D: Float[Tensor, " d"] | None = None,
    z: Float[Tensor, "b d"] | None = None,
    delta_bias: Float[Tensor, " d"] | None = None,
    *,
    delta_softplus: bool = False,
) -> tuple[Float[Tensor, "b d"], Float[Tensor, "b d n"]]:
    """One token: (y, next state). As `selective_scan`, without the length; a constant B or C (d, n) is given expanded
    to (b, d, n)."""
    if delta_bias is not None:
        delta = delta + delta_bias
    if delta_softplus:
        delta = F.softplus(delta)
    per_channel = [x[:, None] if x.ndim == 2 else x.repeat_interleave(u.shape[1] // x.shape[1], 1) for x in (B, C)]
    state = torch.exp(delta[..., None] * A) * state + (delta * u)[..., None] * per_channel[0]
    y = (state * per_channel[1]).sum(-1)
    if D is not None:
        y = y + D * u
    if z is not None:
        y = y * F.silu(z)
    return y, state


def scan(
    u: Float[Tensor, "t s b d"],
    delta: Float[Tensor, "t e b d"],
    A: Float[Tensor, "#s n d"],
    B: Float[Tensor, "#t #s #b n #d"],
    C: Float[Tensor, "#t #s #b n #d"],
    state: Float[Tensor, "s b n d"] | None = None,
    *,
    route: Route = "auto",
) -> tuple[Float[Tensor, "t s b d"], Float[Tensor, "s b n d"]]:
    """(y, last state) of the bare recurrence, tokens first, for s sequences (groups, directions, sweeps) at once.

    delta is the step itself (after any softplus). Where delta, A, B or C has one sequence, all share it, and what
    depends on it alone is computed once. B and C: one number per token and state (last axis 1), or constant per
    channel (first and third axis 1).
    """
    if route not in ("auto", "sequential", "chunked"):
        raise AdviceError(f"route is 'auto', 'sequential' or 'chunked', not {route!r}.")
    t, s, b, d = u.shape
    if state is None:
        state = u.new_zeros(s, b, A.shape[1], d)
    with without_autocast(u):
        if route == "auto" and torch.compiler.is_exporting():
            return _operator(u, delta, A, B, C, state)
        if route == "sequential" or (route == "auto" and _transformed()):
            return _sequential(u, delta, A, B, C, state)
        chunks = 1 if isinstance(t * b, torch.SymInt) else chunks_of(t, s * b * A.shape[1] * d, wide=u.is_cuda)
        if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0:
            return _opaque(u, delta, A, B, C, state, chunks)
        if torch.is_grad_enabled() and any(x.requires_grad for x in (u, delta, A, B, C, state)):
            return _Chunked.apply(u, delta, A, B, C, state, chunks)
        return _run(u, delta, A, B, C, state, chunks, keep=False)[:2]


def _sequential(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """The definition, token by token; differentiable as often as one likes."""
    found = []
    for i in range(u.shape[0]):
        b, c = (x[i if x.shape[0] > 1 else 0] for x in (B, C))
        state = torch.exp(delta[i, ..., None, :] * A[:, None]) * state + (delta[i] * u[i])[..., None, :] * b
        found.append((state * c).sum(-2))
    return torch.stack(found), state


def _operator(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """The definition as torch's `scan`, whose length may be free."""
    from torch._higher_order_ops.scan import scan as scan_operator

    constant = [x[0] if x.shape[-1] > 1 else None for x in (B, C)]
    A = A.contiguous()  # the state must keep its layout from step to step

    def step(h: Tensor, now: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        u, delta, *moving = now
        b, c = (moving.pop(0) if x is None else x for x in constant)
        h = torch.exp(delta[..., None, :] * A[:, None]) * h + (delta * u)[..., None, :] * b
        return h, (h * c).sum(-2)

    moving = [x for x, fixed in zip((B, C), constant) if fixed is None]
    inputs = [x.contiguous() for x in (u, delta.expand_as(u), *moving)]
    last, y = scan_operator(step, state, inputs, dim=0)
    return y, last


def _transformed() -> bool:
    """Under torch.func or forward-mode differentiation, which know ordinary operators only."""
    return torch._C._functorch.maybe_current_level() is not None or forward_ad._current_level >= 0


# the chunked route -----------------------------------------------------------------------------------
def _run(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor, chunks: int, *, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """y, last state, and what the backward pass starts from."""
    u, delta, A, B, C = (x.contiguous() for x in (u, delta, A, B, C))
    if chunks == 1:
        return scan_tiles.forward(u, delta, A, B, C, state, keep=keep)
    length = u.shape[0]
    u, delta, B, C = _folded((u, delta, B, C), length, chunks)
    enters, last = scan_tiles.carry(scan_tiles.ends(u, delta, A, B), _decays(delta, A, u), state, chunks)
    y, _, starts = scan_tiles.forward(u, delta, A, B, C, enters, keep=keep)
    return scan_tiles.unfold(y, chunks)[:length].contiguous(), last, starts


def _run_back(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    starts: Tensor,
    dy: Tensor,
    dlast: Tensor,
    chunks: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of u, delta, A, B, C and the first state."""
    u, delta, A, B, C, dy = (x.contiguous() for x in (u, delta, A, B, C, dy))
    if chunks == 1:
        return scan_tiles.backward(u, delta, A, B, C, starts, dy, dlast)
    length, shapes = u.shape[0], [B.shape, C.shape]
    u, delta, B, C, dy = _folded((u, delta, B, C, dy), length, chunks)
    enters, dstate = scan_tiles.carry(
        scan_tiles.flows(delta, A, C, dy), _decays(delta, A, u), dlast, chunks, backwards=True
    )
    du, ddelta, dA, dB, dC, _ = scan_tiles.backward(u, delta, A, B, C, starts, dy, enters)
    du, ddelta = (scan_tiles.unfold(x, chunks)[:length] for x in (du, ddelta))
    dB, dC = (
        x if shape[0] == 1 != length else scan_tiles.unfold(x, chunks)[:length] for x, shape in zip((dB, dC), shapes)
    )
    return du, ddelta, dA, dB, dC, dstate


def _folded(tensors: Sequence[Tensor], length: int, chunks: int) -> list[Tensor]:
    """Chunks as images; the length is first filled up with steps of 0, which change no state."""
    more = -length % chunks
    out = []
    for x in tensors:
        if x.shape[0] == 1 != length:  # constant
            out.append(x)
            continue
        if more:
            x = torch.cat([x, x.new_zeros(more, *x.shape[1:])])
        out.append(scan_tiles.fold(x, chunks))
    return out


def _decays(delta: Tensor, A: Tensor, u: Tensor) -> Tensor:
    return scan_tiles.total_decay(delta, A).expand(u.shape[1], -1, -1, -1)


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, u, delta, A, B, C, state, chunks):
        y, last, starts = _run(u, delta, A, B, C, state, chunks, keep=True)
        ctx.save_for_backward(u, delta, A, B, C, starts)
        ctx.chunks = chunks
        return y, last

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy, dlast):
        u, delta, A, B, C, starts = ctx.saved_tensors
        return *_run_back(u, delta, A, B, C, starts, dy, dlast, ctx.chunks), None


# for compilers and counters the route is one operator, which they need not look into
@torch.library.custom_op("lynceus::scan", mutates_args=())
def _scan_op(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor, chunks: int
) -> tuple[Tensor, Tensor, Tensor]:
    return _run(u, delta, A, B, C, state, chunks, keep=True)


@_scan_op.register_fake
def _(u, delta, A, B, C, state, chunks):
    t, s, b, d = u.shape
    n = A.shape[1]
    part = -(-t // chunks)
    tiles = -(-part // scan_tiles.steps_of(s * n * d))
    return (
        torch.empty_like(u, memory_format=torch.contiguous_format),
        state.new_empty(s, b, n, d),
        u.new_empty(tiles, s, b * chunks, n, d),
    )


@torch.library.custom_op("lynceus::scan_backward", mutates_args=())
def _scan_backward_op(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    starts: Tensor,
    dy: Tensor,
    dlast: Tensor,
    chunks: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    found = _run_back(u, delta, A, B, C, starts, dy, dlast, chunks)
    du, ddelta, dA, dB, dC, dstate = (x.contiguous() for x in found)
    return du, ddelta, dA, dB, dC, dstate


@_scan_backward_op.register_fake
def _(u, delta, A, B, C, starts, dy, dlast, chunks):
    plain = torch.contiguous_format
    return tuple(torch.empty_like(x, memory_format=plain) for x in (u, delta, A, B, C, dlast))


def _setup(ctx: Any, inputs: Any, output: Any) -> None:
    *tensors, _state, ctx.chunks = inputs
    ctx.save_for_backward(*tensors, output[2])


def _backward(ctx: Any, dy: Tensor, dlast: Tensor, dstarts: Tensor) -> Any:
    return *_scan_backward_op(*ctx.saved_tensors, dy, dlast, ctx.chunks), None


_scan_op.register_autograd(_backward, setup_context=_setup)


def _opaque(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor, chunks: int
) -> tuple[Tensor, Tensor]:
    y, last, _ = _scan_op(u, delta, A, B, C, state, chunks)
    return y, last


# the layout of the public operator -------------------------------------------------------------------
def _coefficients(x: Tensor, groups: int) -> Float[Tensor, "l g b n e"]:
    """B or C in any of its forms, as `scan` takes it."""
    if x.ndim == 2:
        return x.unflatten(0, (groups, -1)).transpose(1, 2)[None, :, None]
    if x.ndim == 3:
        return x.permute(2, 0, 1)[:, None, ..., None]
    if x.shape[1] < groups:
        x = x.repeat_interleave(groups // x.shape[1], 1)
    return x.permute(3, 1, 0, 2)[..., None]


def _check_coefficients(name: str, x: Tensor, b: int, d: int, states: int, length: int) -> None:
    fits = (
        (x.ndim == 2 and x.shape == (d, states))
        or (x.ndim == 3 and x.shape == (b, states, length))
        or (x.ndim == 4 and x.shape[0] == b and d % x.shape[1] == 0 and x.shape[2:] == (states, length))
    )
    if not fits:
        raise AdviceError(
            f"{name} has the shape {tuple(x.shape)}; it may be ({b}, {states}, {length}), ({b}, groups, {states}, "
            f"{length}) with groups a divisor of {d}, or ({d}, {states}) where it is constant."
        )


@register_flop_formula(torch.ops.lynceus.scan)
def _operations(u: Any, delta: Any, A: Any, B: Any, C: Any, state: Any, chunks: Any, *, out_shape: Any = None) -> int:
    """9 per token, channel and state (Mamba's count: decay, input, recurrence, output; the exponential left out)."""
    t, s, b, d = u
    return int(9 * t * s * b * d * A[1])
