"""Hyena N-D: gates and long convolutions whose filters are a small network's answer to "how far away, on which axis".

Paper: Zimerman and Wolf, Multi-Dimensional Hyena for Spatial Inductive Bias, AISTATS 2024, arXiv 2309.13600
Code: Itamarzimm/HyenaND
Licence: Apache-2.0

With order 2: y = out(x0 * conv(v * x1)), where x0, x1 and v are a linear map and a 3-wide depthwise convolution of x.
The convolution reaches as far as the grid and looks back along every axis; `direction` lets it look the other ways.
Works on sequences (b, l, c), maps (b, h, w, c) and volumes (b, t, h, w, c), at any size: the network is asked again.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from lynceus.core.errors import AdviceError, unknown
from lynceus.layers.fused import fusable, hooked, linear, without_autocast
from lynceus.layers.long_conv import LongKernel, choose, long_conv, prepare
from lynceus.layers.mixers import Place

Form = Literal["joint", "product", "direct"]
Decay = Literal["standard", "learn", "symmetric", "no"]
Direction = Literal["standard", "seq", "4dir", "4dirp", "parallel"]
FORMS, DECAYS = ("joint", "product", "direct"), ("standard", "learn", "symmetric", "no")
DIRECTIONS = ("standard", "seq", "4dir", "4dirp", "parallel")
LETTERS = "XYZ"


# the filter ---------------------------------------------------------------------------------------
def position_features(length: int, size: int, *, device: torch.device | None = None) -> Float[Tensor, "length size"]:
    """(t, cos(f w), -sin(f w)) along an axis, float64: t from 0 to 1, w = 2 pi i / length, (size - 1) / 2 bands f."""
    place = torch.arange(length, device=device).to(torch.float64)
    bands = (size - 1) // 2
    f = torch.linspace(1e-4, bands - 1, bands, device=device, dtype=torch.float64)
    angle = f * (2 * math.pi * place / length)[:, None]
    return torch.cat([_fractions(length, device), angle.cos(), -angle.sin()], 1)


class Positions(nn.Module):
    """Trainable features `z` (1, length, size) of an axis. Other lengths: those that `length` would have started with
    there, plus what training has added, interpolated."""

    def __init__(self, length: int, size: int):
        super().__init__()
        if size < 3 or size % 2 == 0:
            raise AdviceError(f"Position features are t and pairs of bands: an odd number from 3, not {size}.")
        self.length, self.size = length, size
        self.z = nn.Parameter(position_features(length, size).float()[None])

    def table(self, length: int) -> Float[Tensor, "length size"]:
        if not torch.compiler.is_exporting() and length == self.length:
            return self.z[0]
        old, new = (position_features(n, self.size, device=self.z.device).to(self.z) for n in (self.length, length))
        place = _fractions(length, self.z.device).to(self.z.dtype) * (self.length - 1)
        near = torch.arange(self.length, device=self.z.device).to(self.z.dtype)
        weight = (1 - (place - near).abs()).clamp(min=0)
        return new + weight @ (self.z[0] - old)


class Sine(nn.Module):
    """sin(freq * x), one trainable frequency per channel."""

    def __init__(self, dim: int, freq: float = 1.0):
        super().__init__()
        self.freq = nn.Parameter(freq * torch.ones(1, dim))

    def forward(self, x: Float[Tensor, "*batch c"]) -> Float[Tensor, "*batch c"]:
        return torch.sin(self.freq * x)


class Rates(nn.Module):
    """Rates of the exponential window over channels, and the `shift` that is added to it.

    names: of the rates, one per axis that has its own. rates, add: train them, train the shift (from U(0, 1)).
    """

    def __init__(
        self, dim: int, names: Sequence[str], *, rates: bool, add: bool, fast: float, slow: float, shift: float
    ):
        super().__init__()
        self.dim, self.fast, self.slow = dim, fast, slow
        for name in names if rates else ():
            self.register_parameter(name, nn.Parameter(self._start().float()[None, None]))
        self.shift: nn.Parameter | float = nn.Parameter(torch.rand(1, 1, dim)) if add else shift

    def _start(self, device: torch.device | None = None) -> Float[Tensor, " c"]:
        least, most = (math.log(0.01) / part for part in (self.slow, self.fast))
        return torch.linspace(least, most, self.dim, dtype=torch.float64, device=device)

    def rate(self, name: str, like: Tensor) -> Float[Tensor, " c"]:
        found = getattr(self, name, None)
        return (self._start(like.device) if found is None else found[0, 0]).abs().to(like.dtype)

    def added(self) -> Tensor | float:
        return self.shift[0, 0] if isinstance(self.shift, Tensor) else self.shift


class HyenaFilter(nn.Module):
    """Kernels of `dim` channels on any grid of `axes` axes: network(position features) x window, and `bias`, the
    weight of each channel's own value.

    form: "product" (one network per axis, their answers multiplied) or "joint" (one network on all axes' features).
    One vector of sine frequencies is shared by all layers of all networks, so `freq` has several names in a state.
    """

    def __init__(
        self,
        dim: int,
        length: int,
        *,
        axes: int = 2,
        width: int = 64,
        form: Literal["joint", "product"] = "joint",
        decay: Decay = "standard",
        sqrt_decay: bool = False,
        features: int = 3,
        hidden: int = 2,
        freq: float = 1.0,
        fast: float = 0.3,
        slow: float = 1.5,
        shift: float = 0.0,
        train_rates: bool = False,
    ):
        super().__init__()
        self.dim, self.axes, self.decay = dim, axes, decay
        self.joint = form == "joint" and axes > 1
        self.sqrt_decay = sqrt_decay
        if decay == "symmetric" and not self.joint and axes > 1:
            raise AdviceError("decay='symmetric' looks at all axes at once: form='joint'.")
        self.bias = nn.Parameter(torch.randn(dim))
        self.pos_emb = Positions(length, features)
        act = Sine(width, freq)

        def network(inputs: int) -> nn.Sequential:
            layers: list[nn.Module] = [nn.Linear(inputs, width), act]
            for _ in range(hidden):
                layers += [nn.Linear(width, width), act]
            return nn.Sequential(*layers, nn.Linear(width, dim, bias=False))

        def window(names: Sequence[str]) -> Rates:
            learn = decay in ("learn", "symmetric")
            return Rates(dim, names, rates=learn or train_rates, add=learn, fast=fast, slow=slow, shift=shift)

        if self.joint or axes == 1:
            self.implicit_filter = network(features * axes)
            if decay != "no":
                own = [f"{a}deltas" for a in LETTERS[:axes]] if axes > 1 and decay != "symmetric" else ["deltas"]
                self.modulation = window(own)
        else:
            for letter in reversed(LETTERS[:axes]):
                setattr(self, f"{letter}implicit_filter", network(features))
                if decay != "no":
                    setattr(self, f"{letter}modulation", window(["deltas"]))

    def forward(self, grid: Sequence[int]) -> Float[Tensor, "*grid c"]:
        """The kernels on a grid, in float32 where the parameters are half precision."""
        wide = _wide(self.bias.dtype)
        if self.joint or self.axes == 1:
            parts = []
            for axis, length in enumerate(grid):
                z = self.pos_emb.table(length).to(wide)
                z = z.reshape(*(length if i == axis else 1 for i in range(self.axes)), z.shape[-1])
                parts.append(z.expand(*grid, z.shape[-1]))
            k = self._network(self.implicit_filter, torch.cat(parts, -1))
            if self.decay == "no":
                return k
            window = self._window(grid, wide)
            window = window**0.5 if self.sqrt_decay and self.joint else window
            return k * (window + self.modulation.added())
        out: Tensor | None = None
        for axis, length in enumerate(grid):
            k = self._network(getattr(self, f"{LETTERS[axis]}implicit_filter"), self.pos_emb.table(length).to(wide))
            if self.decay != "no":
                part = getattr(self, f"{LETTERS[axis]}modulation")
                k = k * (torch.exp(-_time(length, k) * part.rate("deltas", k)) + part.added())
            k = k.reshape(*(length if i == axis else 1 for i in range(self.axes)), self.dim)
            out = k if out is None else out * k
        assert out is not None
        return out

    def _window(self, grid: Sequence[int], dtype: torch.dtype) -> Tensor:
        """The decay of all axes together, (*grid, c)."""
        like = torch.empty((), device=self.bias.device, dtype=dtype)
        if self.decay == "symmetric":  # in cells, not in parts of the grid
            steps = [torch.arange(n, device=like.device).to(like) for n in grid]
            total = sum(s.reshape(*(-1 if i == a else 1 for i in range(self.axes))) for a, s in enumerate(steps))
            assert isinstance(total, Tensor)
            return torch.exp(-total[..., None] * self.modulation.rate("deltas", like))
        out: Tensor | None = None
        for axis, length in enumerate(grid):
            rate = self.modulation.rate(f"{LETTERS[axis]}deltas" if self.axes > 1 else "deltas", like)
            part = torch.exp(-_time(length, like) * rate)
            part = part.reshape(*(length if i == axis else 1 for i in range(self.axes)), self.dim)
            out = part if out is None else out * part
        assert out is not None
        return out

    @staticmethod
    def _network(net: nn.Sequential, x: Tensor) -> Tensor:
        if net[0].weight.dtype == x.dtype:
            return net(x)
        for layer in net:  # half-precision weights, single-precision positions
            if isinstance(layer, Sine):
                x = torch.sin(layer.freq.to(x.dtype) * x)
            elif isinstance(layer, nn.Linear):
                x = F.linear(x, layer.weight.to(x.dtype), None if layer.bias is None else layer.bias.to(x.dtype))
        return x


def _time(length: int, like: Tensor) -> Tensor:
    """0 to 1 along an axis, (length, 1)."""
    return _fractions(length, like.device).to(like.dtype)


def _fractions(length: int, device: torch.device | None) -> Tensor:
    """i / (length - 1), (length, 1), in float64."""
    last: Any = torch.sym_max(length - 1, 1)
    return (torch.arange(length, device=device).to(torch.float64) / last)[:, None]


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


# the operator -------------------------------------------------------------------------------------
class Hyena(nn.Module):
    """The operator on a grid of len(grid) axes; `grid` is what it is made for, any other works too.

    order: linear maps are order + 1, gates order, convolutions order - 1. form: of the filter: "joint", "product", or
    "direct", a free table per cell of the grid (resized on others). width: of the filter's network. decay: the window
    over the filter: "standard" fixed rates, "learn" trained ones, "symmetric" one trained rate per channel and cells
    counted, "no" window. sqrt_decay: the root of it (joint form).
    direction: "standard" looks back along every axis; "seq" looks forward in its first convolution (networks do so in
    every second block); "4dir" looks in all 2^axes directions and mixes them with one number each, "4dirp" with a
    linear map; "parallel" has gates and values of its own per direction slot but looks back in all of them.
    causal_short: the 3-wide convolution looks back too. scaled: kernels are divided by twice the side, as the authors'
    (with unequal sides: their geometric mean). Half precision is carried out in float32 between gate and gate.
    features, hidden, freq, fast, slow, shift, train_rates: of the filter, see `HyenaFilter`.
    """

    def __init__(
        self,
        dim: int,
        grid: Sequence[int],
        *,
        order: int = 2,
        form: Form = "joint",
        width: int = 64,
        decay: Decay = "standard",
        sqrt_decay: bool = False,
        direction: Direction = "standard",
        drop: float = 0.0,
        causal_short: bool = False,
        scaled: bool = True,
        features: int = 3,
        hidden: int = 2,
        freq: float = 1.0,
        fast: float = 0.3,
        slow: float = 1.5,
        shift: float = 0.0,
        train_rates: bool = False,
    ):
        super().__init__()
        axes = len(grid)
        for name, value, known in (
            ("form", form, FORMS),
            ("decay", decay, DECAYS),
            ("direction", direction, DIRECTIONS),
        ):
            if value not in known:
                raise unknown(name, value, known)
        if order < 2:
            raise AdviceError(f"order is at least 2 (one convolution between two gates), not {order}.")
        if not 1 <= axes <= 3:
            raise AdviceError(f"A grid has one to three axes here; {tuple(grid)} has {axes}.")
        self.dim, self.grid, self.order, self.axes = dim, tuple(grid), order, axes
        self.form, self.direction, self.scaled = form, direction, scaled
        self.causal_short = causal_short
        self.turns = directions(axes)
        slots = len(self.turns)
        inner = (order + 1) * dim
        if direction in ("4dir", "4dirp"):
            self.linear_mix = nn.Linear(slots, 1) if direction == "4dir" else nn.Linear(slots * dim, dim)
        self.dropout = nn.Dropout(drop)
        self.in_proj = nn.Linear(dim, inner)
        parallel = direction == "parallel"
        self.out_proj = nn.Linear(dim * slots if parallel else dim, dim)
        kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[axes - 1]
        self.short_filter = kind(
            inner, inner * (slots if parallel else 1), 3, padding=0 if causal_short else 1, groups=inner
        )
        if form == "direct":
            self.filter = nn.Parameter(torch.randn(order, dim, *grid))
            self.bias = nn.Parameter(torch.randn(order, dim))
        else:
            self.filter_fn = HyenaFilter(
                dim * (order - 1),
                max(grid),
                axes=axes,
                width=width,
                form=form,
                decay=decay,
                sqrt_decay=sqrt_decay,
                features=features,
                hidden=hidden,
                freq=freq,
                fast=fast,
                slow=slow,
                shift=shift,
                train_rates=train_rates,
            )
        self._kept: tuple[object, list[Tensor], list[list[LongKernel]]] | None = None

    # kernels --------------------------------------------------------------------------------------
    def kernels(self, grid: Sequence[int]) -> Float[Tensor, "convolutions *grid c"]:
        """The filters of the convolutions on a grid, without scale and bias."""
        if self.form != "direct":
            k = self.filter_fn(grid)
            return k.reshape(*k.shape[:-1], self.order - 1, self.dim).movedim(-2, 0)
        k = self.filter[:-1].to(_wide(self.filter.dtype))
        if torch.compiler.is_exporting() or tuple(grid) != self.grid:
            mode = ("linear", "bilinear", "trilinear")[self.axes - 1]
            k = F.interpolate(k, tuple(grid), mode=mode, align_corners=True)
        return k.movedim(1, -1)

    def biases(self) -> Float[Tensor, "convolutions c"]:
        if self.form == "direct":
            return self.bias[:-1]
        return self.filter_fn.bias.reshape(self.order - 1, self.dim)

    def whole_kernels(self, grid: Sequence[int]) -> Float[Tensor, "convolutions *grid c"]:
        """What the convolutions multiply with: the filters, scaled, with the bias at distance 0."""
        k = self.kernels(grid)
        if self.scaled:
            k = k / (2 * math.prod(grid) ** (1 / self.axes))
        here = torch.ones((), dtype=k.dtype, device=k.device)
        for length in grid:
            here = here[..., None] * (torch.arange(length, device=k.device) == 0).to(k.dtype)
        bias = self.biases().to(k.dtype)
        return k + here[None, ..., None] * bias.reshape(-1, *[1] * self.axes, self.dim)

    def turned(self, number: int) -> list[tuple[int, ...]]:
        """Axes along which convolution `number` looks forward, for each direction."""
        if self.direction in ("4dir", "4dirp"):
            return self.turns
        return [tuple(range(self.axes)) if self.direction == "seq" and number == 0 else ()]

    def _prepared(self, x: Tensor, dtype: torch.dtype) -> list[list[LongKernel]]:
        """Kernels [convolution][direction]; from last time if grid, way and every parameter are still the same."""
        grid = x.shape[1:-1]
        way = choose(x, grad=torch.is_grad_enabled())
        source = [self.filter, self.bias] if self.form == "direct" else self._source()
        lean = fusable(x) and not self.training and (self.form == "direct" or not hooked(*self.filter_fn.modules()))
        key = (grid, way, dtype)
        kept = self._kept
        if lean and kept is not None and kept[0] == key and _same(kept[1], source):
            return kept[2]
        whole = self.whole_kernels(grid).to(dtype)
        made = [[prepare(k, way, turn) for turn in self.turned(i)] for i, k in enumerate(whole.unbind(0))]
        if lean:
            self._kept = (key, [t.detach().clone() for t in source], made)
        return made

    def _source(self) -> list[Tensor]:
        return [*self.filter_fn.parameters(), *self.filter_fn.buffers()]

    # forward --------------------------------------------------------------------------------------
    def forward(self, x: Float[Tensor, "b *grid c"]) -> Float[Tensor, "b *grid c"]:
        if x.ndim != self.axes + 2:
            raise AdviceError(f"This Hyena mixes {self.axes} axes, (b, {'n, ' * self.axes}c), not {tuple(x.shape)}.")
        b, grid, d = x.shape[0], x.shape[1:-1], self.dim
        x = self._short(linear(self.in_proj, x))
        slots = len(self.turns) if self.direction == "parallel" else 1
        if slots > 1:  # slots become images of their own
            x = x.reshape(b, *grid, slots, (self.order + 1) * d).movedim(-2, 1).flatten(0, 1)
        dtype = x.dtype
        with without_autocast(x):
            wide = x.to(_wide(dtype))
            kernels = self._prepared(wide, wide.dtype)
            *gates, v = wide.split(d, -1)
            looks = [v] * (len(self.turns) if self.direction in ("4dir", "4dirp") else 1)
            for i, gate in enumerate(reversed(gates[1:])):
                if i == 0:
                    v = self.dropout(v * gate) if len(looks) == 1 else v * gate
                    looks = [long_conv(v if len(looks) == 1 else self.dropout(v), k) for k in kernels[i]]
                else:
                    looks = [long_conv(self.dropout(y * gate), k) for y, k in zip(looks, kernels[i])]
            y = self._mixed([look * gates[0] for look in looks], dtype)
        if slots > 1:
            y = y.reshape(b, slots, *grid, d).movedim(1, -2).flatten(-2)
        return linear(self.out_proj, y)

    def _short(self, x: Tensor) -> Tensor:
        image = x.movedim(-1, 1)
        if self.causal_short:
            image = F.pad(image, (2, 0) * self.axes)
        return self.short_filter(image).movedim(1, -1)

    def _mixed(self, looks: list[Tensor], dtype: torch.dtype) -> Tensor:
        """One map of the directions' maps."""
        if len(looks) == 1:
            return looks[0].to(dtype)
        y = torch.stack(looks, -1)
        layer = self.linear_mix
        if self.direction == "4dirp":
            y = y.flatten(-2)
        y = F.linear(y, layer.weight.to(y.dtype), layer.bias.to(y.dtype))
        return (y.squeeze(-1) if self.direction == "4dir" else y).to(dtype)


def directions(axes: int) -> list[tuple[int, ...]]:
    """Axes to turn, for each of 2^axes directions: none, all, then the others, last axis first."""
    rest = [c for n in range(1, axes) for c in combinations(reversed(range(axes)), n)]
    return [(), tuple(range(axes)), *(tuple(sorted(c)) for c in rest)]


def _same(old: Sequence[Tensor], new: Sequence[Tensor]) -> bool:
    return len(old) == len(new) and all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(old, new))


class RowHyena(Hyena):
    """1-D Hyena on a map: its rows, laid end to end, are one sequence that only ever looks back."""

    def __init__(self, dim: int, grid: Sequence[int], **options: Any):
        super().__init__(dim, (math.prod(grid),), causal_short=True, scaled=False, **options)

    def forward(self, x: Float[Tensor, "b *grid c"]) -> Float[Tensor, "b *grid c"]:
        return super().forward(x.flatten(1, -2)).reshape(x.shape)


@dataclass(frozen=True, kw_only=True, slots=True)
class HyenaMixer:
    """Hyena in the place of another mixer. Fields as of `Hyena`; direction="seq" looks back in every second block.

    axes: 2, or 1 for the rows as one causal sequence, whatever the direction.
    """

    axes: Literal[1, 2] = 2
    order: int = 2
    form: Form = "joint"
    width: int = 64
    decay: Decay = "standard"
    sqrt_decay: bool = False
    direction: Direction = "seq"
    drop: float = 0.0

    def build(self, place: Place) -> nn.Module:
        direction: Direction = "standard" if self.direction == "seq" and place.index % 2 else self.direction
        kind, one = (RowHyena, True) if self.axes == 1 else (Hyena, False)
        layer = kind(
            place.dim,
            place.grid,
            order=self.order,
            form=self.form,
            width=self.width,
            decay=self.decay,
            sqrt_decay=self.sqrt_decay,
            direction="standard" if one else direction,
            drop=self.drop,
        )
        init_linears(layer)
        return layer


def init_linears(module: nn.Module) -> None:
    """Truncated normals of 0.02 and biases 0 in every linear layer, the filter's network too; convolutions stay."""
    for m in module.modules():
        if isinstance(m, nn.Linear):
            nn.init.trunc_normal_(m.weight, std=0.02)
            if m.bias is not None:
                nn.init.zeros_(m.bias)
