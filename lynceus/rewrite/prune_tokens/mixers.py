"""Mamba's and PlainMamba's mixers on the tokens that are left, as if the others were still in their places.

Projections, norms and gates run on the kept tokens only; convolutions take their taps at the original places (zero
where a token was removed); scans pass the gaps as `places` says.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from lynceus.layers.fused import linear
from lynceus.layers.mamba import Mamba
from lynceus.layers.plain_scan import PlainMamba2d
from lynceus.layers.scan import scan
from lynceus.layers.scan_order import sweeps
from lynceus.rewrite.prune_tokens.places import Carry, Places, gaps_of, through_gaps

Mixed = tuple[Tensor, Tensor, Tensor]


def mix_mamba(mixer: Mamba, tokens: Float[Tensor, "b k c"], places: Places | None, carry: Carry) -> Mixed:
    """The mixer's output, its gated values before `out_proj`, and those of the backward scan alone (of the only one,
    where there is one); all (b, k, ...) in the tokens' order. places: None while all tokens are there."""
    x, z = linear(mixer.in_proj, tokens).chunk(2, dim=-1)
    x = x.contiguous()
    here = None if carry == "none" else places
    ahead = _branch(mixer, x, "", here)
    if mixer.direction == "none":
        u, delta, b, c = (v.transpose(0, 1)[:, None] for v in ahead)
        gaps, a = _stacked(here, backwards=False), _negative(mixer.A_log)
    else:
        back = _branch(mixer, x, "_b", here, reverse=True) if mixer.direction == "v2" else ahead
        u, delta, b, c = (torch.stack((f.transpose(0, 1), r.flip(1).transpose(0, 1)), 1) for f, r in zip(ahead, back))
        gaps, a = _stacked(here, backwards=True), torch.cat((_negative(mixer.A_log), _negative(mixer.A_b_log)))
    delta, values = F.softplus(delta), u
    if gaps is not None:
        ends = {"none": ("",), "v1": ("", ""), "v2": ("", "_b")}[mixer.direction]
        idle = F.softplus(torch.stack([_wide(getattr(mixer, f"dt_proj{e}").bias) for e in ends]))[:, None]
        values, delta = through_gaps(u, delta, gaps, carry, idle)
    y, _ = scan(values.contiguous(), delta.contiguous(), a, b.contiguous()[..., None], c.contiguous()[..., None])
    first = y[:, 0].transpose(0, 1) + ahead[0] * mixer.D
    if mixer.direction == "none":
        last, both = first, first
    else:
        skip = mixer.D_b if mixer.direction == "v2" else mixer.D
        last = y[:, 1].flip(0).transpose(0, 1) + back[0] * skip
        both = first + last
    gate = F.silu(z)
    behind = last.to(z.dtype) * gate
    gated = both.to(z.dtype) * (gate * 0.5 if mixer.direction == "v2" and mixer.halve else gate)
    out = linear(mixer.out_proj, gated)
    return (out if mixer.gamma is None else out * mixer.gamma), gated, behind


def _branch(
    mixer: Mamba, x: Float[Tensor, "b k d"], end: str, places: Places | None, *, reverse: bool = False
) -> tuple[Tensor, ...]:
    """u, steps before the softplus, B and C of one direction, in token order."""
    if places is None:
        return mixer._branch(x, end, reverse=reverse)
    conv = getattr(mixer, f"conv1d{end}")
    u = F.silu(places.gather(conv(places.spread(x), reverse=reverse)))
    small = linear(getattr(mixer, f"x_proj{end}"), u)
    steps, b, c = small.split([mixer.rank, mixer.states, mixer.states], dim=-1)
    delta = linear(getattr(mixer, f"dt_proj{end}"), steps)
    return tuple(_wide(v) for v in (u, delta, b, c))


def _stacked(places: Places | None, *, backwards: bool) -> Tensor | None:
    """Gaps (k, directions, b)."""
    if places is None:
        return None
    gaps = [places.gaps(), places.gaps(reverse=True)] if backwards else [places.gaps()]
    return torch.stack(gaps, 1)


def mix_plain(
    mixer: PlainMamba2d, tokens: Float[Tensor, "b k c"], size: tuple[int, int], places: Places | None, carry: Carry
) -> Mixed:
    """The same for PlainMamba's mixer on a map of `size`, whose four scans have no backward one of their own: the last
    result is the second. With carry "none" the survivors form one row."""
    batch, count, _ = tokens.shape
    if carry == "none" and places is not None:
        size, places = (1, count), None
    x, z = linear(mixer.in_proj, tokens).chunk(2, dim=-1)
    whole = x.contiguous() if places is None else places.spread(x)
    whole = mixer.conv2d(whole.unflatten(1, size)).flatten(1, 2)
    x = F.silu(whole if places is None else places.gather(whole))
    steps, b, c = linear(mixer.x_proj, x).split([mixer.rank, mixer.states, mixer.states], dim=-1)
    delta = linear(mixer.dt_proj, steps)
    u, delta, b, c = (_wide(v).transpose(0, 1)[:, None].contiguous() for v in (x, delta, b, c))  # tokens first
    bias = _wide(mixer.dt_proj.bias)
    if mixer.double_bias:
        delta = delta + bias
    delta = F.softplus(delta)
    path = sweeps(*size, mixer.order, device=x.device)
    at = torch.arange(count, device=x.device).expand(batch, -1) if places is None else places.at
    rank, order = path.inverse[:, at].sort(-1)  # 4 b k: steps of the whole sweep, and whose they are
    swept = _along(u, order)
    if mixer.reorder_all:
        delta, b, c = (_along(v, order) for v in (delta, b, c))
    if mixer.direction_Bs is not None:
        codes = path.codes[:, None].expand(-1, batch, -1).gather(2, rank)
        b = b + _wide(mixer.direction_Bs)[codes.permute(2, 0, 1)]
    values = swept
    if places is not None:
        idle = F.softplus(bias * (2 if mixer.double_bias else 1))[None, None]
        values, delta = through_gaps(swept, delta, gaps_of(rank).permute(2, 0, 1), carry, idle)
    a = -_wide(mixer.A_log).exp().t()[None]
    y, _ = scan(values.contiguous(), delta.contiguous(), a, b.contiguous()[..., None], c.contiguous()[..., None])
    y = _along(y, order.argsort(-1)).sum(1).transpose(0, 1) + 4 * mixer.D * u[:, 0].transpose(0, 1)
    gated = y.to(z.dtype) * F.silu(z)
    out = linear(mixer.out_proj, gated)
    return (out if mixer.gamma is None else out * mixer.gamma), gated, gated


def _along(x: Float[Tensor, "t e b c"], order: Tensor) -> Float[Tensor, "t s b c"]:
    """x with its tokens in the order (s, b, t) of each sequence."""
    place = order.permute(2, 0, 1)[..., None].expand(-1, -1, -1, x.shape[3])
    return x.expand(-1, place.shape[1], -1, -1).gather(0, place)


def _wide(x: Tensor) -> Tensor:
    """At least float32, in which recurrences are computed."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def _negative(log: Float[Tensor, "d s"]) -> Float[Tensor, "1 s d"]:
    return -_wide(log).exp().t()[None]
