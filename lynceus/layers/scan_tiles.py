"""The selective scan in tiles of tokens, forward and backward, with ordinary operators and no graph.

Axes: t tokens, s sequences with their own coefficients (groups, directions, sweeps), b images, n states, d channels.
u (t, s, b, d), delta (t, s | 1, b, d), A (s | 1, n, d); B and C (t, s | 1, b, n, 1), or constant (1, s | 1, 1, n, d).
What has one sequence where u has several is shared by them: its decays are made once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

LOG2E = math.log2(math.e)
TILE = 2**17  # numbers of one buffer: a few of them stay in the cache
SLICE = 2**14  # numbers per token above which images go one after the other
FEW = 2**12  # numbers per token below which chunks of the sequence run side by side


def steps_of(per_image: int) -> int:
    """Tokens of a tile, given the numbers per token of one image."""
    return int(min(max(TILE // max(per_image, 1), 8), 128))


def chunks_of(length: int, per_token: int, *, wide: bool) -> int:
    """How many chunks run side by side: 1 where a token's own numbers are work enough. wide: on a GPU."""
    if wide:
        return max(1, math.isqrt(length))
    if per_token >= FEW or length < 16:
        return 1
    return max(1, min(SLICE // per_token, math.isqrt(2 * length)))


def forward(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor, *, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """y (t, s, b, d), last state (s, b, n, d), and if `keep` the state before each tile (tiles, s, b, n, d)."""
    length, s, b, d = u.shape
    n = A.shape[1]
    steps = steps_of(s * n * d)
    y = torch.empty_like(u, memory_format=torch.contiguous_format)
    last = u.new_empty(s, b, n, d)
    starts = u.new_empty(-(-length // steps) if keep else 0, s, b, n, d)
    scaled = (A * LOG2E).contiguous()
    for some in _images(b, s * n * d, length, u):
        h = u.new_empty(min(steps, length) + 1, s, some.stop - some.start, n, d)
        a = _decay_buffer(h[1:], delta, A)
        each, decays = h.unbind(0), a.unbind(0)
        h[0] = state[:, some]
        for i, t in enumerate(_tiles(length, steps)):
            k = t.stop - t.start
            if keep:
                starts[i, :, some] = h[0]
            _fill(a[:k], h[1 : k + 1], u[t, :, some], delta[t, :, some], scaled, _part(B, t, some))
            _recur(each, decays, k)
            y[t, :, some] = _over_states(_part(C, t, some), h[1 : k + 1])
            h[0] = each[k]
        last[:, some] = h[0]
    return y, last, starts


def ends(u: Tensor, delta: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """The last state alone (s, b, n, d), from a state of zero."""
    length, s, b, d = u.shape
    n = A.shape[1]
    steps = steps_of(s * n * d)
    h = u.new_zeros(min(steps, length) + 1, s, b, n, d)
    a = _decay_buffer(h[1:], delta, A)
    each, decays = h.unbind(0), a.unbind(0)
    scaled = (A * LOG2E).contiguous()
    for t in _tiles(length, steps):
        k = t.stop - t.start
        _fill(a[:k], h[1 : k + 1], u[t], delta[t], scaled, _part(B, t, slice(None)))
        _recur(each, decays, k)
        h[0] = each[k]
    return h[0]


def backward(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    starts: Tensor,
    dy: Tensor,
    dlast: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of u, delta, A, B, C and the first state. The states of a tile are made again from its start.

    With g_t the gradient of h_t:  g_t = C_t dy_t + exp(delta_{t+1} A) g_{t+1}.
    """
    length, s, b, d = u.shape
    n = A.shape[1]
    steps = steps_of(s * n * d)
    du, ddelta = torch.empty_like(u), u.new_empty(u.shape) if delta.shape[1] == s else torch.empty_like(delta)
    dA, dB, dC = torch.zeros_like(A), torch.zeros_like(B), torch.zeros_like(C)
    dstate = u.new_empty(s, b, n, d)
    scaled = (A * LOG2E).contiguous()
    for some in _images(b, s * n * d, length, u):
        h = u.new_empty(min(steps, length) + 1, s, some.stop - some.start, n, d)
        g = torch.empty_like(h[1:])
        a = _decay_buffer(h[1:], delta, A)
        each, decays, pulls = h.unbind(0), a.unbind(0), g.unbind(0)
        flow = dlast[:, some].clone()  # into the last state of the tile
        for i, t in reversed(list(enumerate(_tiles(length, steps)))):
            k = t.stop - t.start
            here = (u[t, :, some], delta[t, :, some])
            b_here, c_here = _part(B, t, some), _part(C, t, some)
            h[0] = starts[i, :, some]
            _fill(a[:k], h[1 : k + 1], *here, scaled, b_here)
            _recur(each, decays, k)
            torch.mul(dy[t, :, some][..., None, :], c_here, out=g[:k])
            _flow_back(pulls, decays, flow, k)
            _gradients(
                a[:k], h[: k + 1], g[:k], *here, A, b_here, c_here, dy[t, :, some],
                du[t, :, some], ddelta[t, :, some], dA, _part(dB, t, some), _part(dC, t, some),
            )  # fmt: skip
        dstate[:, some] = flow
    return du, ddelta, dA, dB, dC, dstate


def flows(delta: Tensor, A: Tensor, C: Tensor, dy: Tensor) -> Tensor:
    """The gradient of the first state (s, b, n, d) when none flows into the last one."""
    length, s, b, d = dy.shape
    n = A.shape[1]
    steps = steps_of(s * n * d)
    g = dy.new_empty(min(steps, length), s, b, n, d)
    a = _decay_buffer(g, delta, A)
    pulls, decays = g.unbind(0), a.unbind(0)
    flow = torch.zeros_like(g[0])
    scaled = (A * LOG2E).contiguous()[:, None]
    for t in reversed(list(_tiles(length, steps))):
        k = t.stop - t.start
        torch.exp2(torch.mul(delta[t][..., None, :], scaled, out=a[:k]), out=a[:k])
        torch.mul(dy[t][..., None, :], _part(C, t, slice(None)), out=g[:k])
        _flow_back(pulls, decays, flow, k)
    return flow


def total_decay(delta: Tensor, A: Tensor) -> Tensor:
    """exp(sum over the tokens of delta * A): (s, b, n, d), or one sequence where both have one."""
    return torch.exp2(delta.sum(0)[..., None, :] * (A * LOG2E)[:, None])


def _fill(a: Tensor, h: Tensor, u: Tensor, delta: Tensor, scaled: Tensor, B: Tensor) -> None:
    """The decays of a tile, and in the place of its states what each token adds."""
    torch.mul(delta[..., None, :], scaled[:, None], out=a)
    torch.exp2(a, out=a)
    torch.mul((delta * u)[..., None, :], B, out=h)


def _recur(each: Sequence[Tensor], decays: Sequence[Tensor], count: int) -> None:
    """The states 1 to `count`, from number 0."""
    before = each[0]
    for now, decay in zip(each[1 : count + 1], decays):
        before = now.addcmul_(decay, before)


def _flow_back(pulls: Sequence[Tensor], decays: Sequence[Tensor], flow: Tensor, count: int) -> None:
    """Gradients of the states, last to first; `flow` comes in from behind the tile and leaves in front of it."""
    after = pulls[count - 1].add_(flow)
    for i in range(count - 2, -1, -1):
        after = pulls[i].addcmul_(decays[i + 1], after)
    torch.mul(after, decays[0], out=flow)


def _gradients(
    a: Tensor,
    h: Tensor,
    g: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    dy: Tensor,
    du: Tensor,
    ddelta: Tensor,
    dA: Tensor,
    dB: Tensor,
    dC: Tensor,
) -> None:
    """Writes the gradients of one tile; those of constants are added. Overwrites h and g."""
    _add_coefficients(dC, h[1:], dy)
    _add_coefficients(dB, g, delta * u)
    inner = _over_states(B, g)
    torch.mul(inner, delta, out=du)
    inner = inner * u
    q = h[:-1].mul_(a).mul_(g)  # the gradient of delta * A
    if delta.shape[1] < q.shape[1]:
        inner = inner.sum(1, keepdim=True)
    if a.shape[1] < q.shape[1]:
        q = q.sum(1, keepdim=True)
    into = g[:, : q.shape[1]]  # fresh memory would cost more than the product
    through = torch.mul(q, A[:, None], out=into).sum(-2)
    if delta.shape[1] < through.shape[1]:
        through = through.sum(1, keepdim=True)
    torch.add(inner, through, out=ddelta)
    dA += torch.mul(q, delta[..., None, :], out=into).sum((0, 2)).sum_to_size(dA.shape)


def _over_states(coefficients: Tensor, h: Tensor) -> Tensor:
    """The sum over n of coefficients times h: (k, s, b, d)."""
    if coefficients.shape[-1] == 1 and h.shape[-1] > 1:
        return torch.matmul(coefficients.transpose(-1, -2), h).squeeze(-2)
    return (coefficients * h).sum(-2)


def _add_coefficients(into: Tensor, h: Tensor, weights: Tensor) -> None:
    """Adds the sum of h * weights (k, s, b, d) over every axis that `into` has not."""
    if into.shape[-1] == 1:
        # a row times a matrix: the other way round is eight times slower
        into += torch.matmul(weights[..., None, :], h.transpose(-1, -2)).transpose(-1, -2).sum_to_size(into.shape)
    else:
        into += (h * weights[..., None, :]).sum_to_size(into.shape)


def _decay_buffer(h: Tensor, delta: Tensor, A: Tensor) -> Tensor:
    k, _, b, n, d = h.shape
    return h.new_empty(k, max(delta.shape[1], A.shape[0]), b, n, d)


def _part(x: Tensor, tokens: slice, images: slice) -> Tensor:
    return x[tokens if x.shape[0] > 1 else slice(None), :, images if x.shape[2] > 1 else slice(None)]


def _tiles(length: int, steps: int) -> Iterator[slice]:
    return (slice(t, min(t + steps, length)) for t in range(0, length, steps))


def _images(b: int, per_image: int, length: int, like: Tensor) -> Iterator[slice]:
    """Images that go through together; of few tokens more fit into a tile."""
    room = max(SLICE, TILE // max(length, 1))
    count = b if like.is_cuda else max(1, room * torch.get_num_threads() // max(per_image, 1))
    return (slice(i, min(i + count, b)) for i in range(0, b, count))


def fold(x: Tensor, chunks: int) -> Tensor:
    """(chunks * t, s, b, ...) -> (t, s, chunks * b, ...): chunks of the sequence become images."""
    t = x.shape[0] // chunks
    return x.unflatten(0, (chunks, t)).permute(1, 2, 0, *range(3, x.ndim + 1)).flatten(2, 3)


def unfold(x: Tensor, chunks: int) -> Tensor:
    """The reverse of `fold`."""
    x = x.unflatten(2, (chunks, -1))
    return x.permute(2, 0, 1, *range(3, x.ndim)).flatten(0, 1)


def carry(
    local: Tensor, decay: Tensor, state: Tensor, chunks: int, *, backwards: bool = False
) -> tuple[Tensor, Tensor]:
    """What enters each chunk (s, chunks * b, n, d), and what leaves the last one, from what each makes of nothing."""
    added, factor = local.unflatten(1, (chunks, -1)), decay.unflatten(1, (chunks, -1))
    enters = torch.empty_like(added)
    for i in reversed(range(chunks)) if backwards else range(chunks):
        enters[:, i] = state
        state = torch.addcmul(added[:, i], factor[:, i], state)
    return enters.flatten(1, 2), state
