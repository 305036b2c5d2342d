"""The Mamba mixer on image tokens: one way, or both ways with shared or own weights, as in Vision Mamba.

Paper: Gu and Dao, arXiv 2312.00752; Zhu et al., Vision Mamba, ICML 2024, arXiv 2401.09417
Code: hustvl/Vim, whose parameter names are kept
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from lynceus.core.errors import AdviceError
from lynceus.layers.fused import linear
from lynceus.layers.mixers import Place
from lynceus.layers.scan import scan, selective_step

Direction = Literal["none", "v1", "v2"]


class CausalConv(nn.Conv1d):
    """A depthwise convolution over the tokens before and at each place, or with `reverse` those at and behind it."""

    def __init__(self, channels: int, kernel: int, *, bias: bool = True):
        super().__init__(channels, channels, kernel, groups=channels, padding=kernel - 1, bias=bias)

    def forward(self, x: Float[Tensor, "b n d"], *, reverse: bool = False) -> Float[Tensor, "b n d"]:
        k, n = self.kernel_size[0], x.shape[1]
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            weights = self.weight[:, 0].t()
            padded = F.pad(x, (0, 0, 0, k - 1) if reverse else (0, 0, k - 1, 0))
            y = padded[:, :n] * weights[k - 1 if reverse else 0]
            for i in range(1, k):
                y = torch.addcmul(y, padded[:, i : i + n], weights[k - 1 - i if reverse else i])
            return y if self.bias is None else y + self.bias
        kernel = (self.weight.flip(-1) if reverse else self.weight)[:, :, None]
        # as a map of one row in channels-last memory, which is what the tokens are already
        y = F.conv2d(x.transpose(1, 2)[:, :, None], kernel, self.bias, padding=(0, k - 1), groups=self.groups)
        y = y.squeeze(2).transpose(1, 2)
        return y[:, k - 1 :] if reverse else y[:, :n]


class MambaState(NamedTuple):
    """What a one-way mixer remembers between tokens: the last inputs of its convolution, and its states."""

    recent: Float[Tensor, "b k d"]
    hidden: Float[Tensor, "b d s"]


@dataclass(frozen=True, kw_only=True, slots=True)
class StepInit:
    """How the layer that makes the steps starts.

    kind: "random" or "constant" weights of variance-keeping size, times `scale`. least, largest: the softplus of its
    biases is log-uniform between them, and at least `floor`.
    """

    kind: Literal["random", "constant"] = "random"
    least: float = 1e-3
    largest: float = 0.1
    floor: float = 1e-4
    scale: float = 1.0

    def __call__(self, layer: nn.Linear) -> None:
        """Fills the weight and bias of `layer`."""
        width = layer.in_features**-0.5 * self.scale
        if self.kind == "constant":
            nn.init.constant_(layer.weight, width)
        else:
            nn.init.uniform_(layer.weight, -width, width)
        drawn = torch.rand(layer.out_features, device=layer.weight.device)
        low, high = math.log(self.least), math.log(self.largest)
        step = torch.exp(drawn * (high - low) + low).clamp(min=self.floor)
        with torch.no_grad():
            layer.bias.copy_(step + torch.log(-torch.expm1(-step)))


def decays(channels: int, states: int) -> nn.Parameter:
    """log(1 ... states) for every channel: the logarithm of -A."""
    return nn.Parameter(torch.arange(1, states + 1, dtype=torch.float32).log().repeat(channels, 1))


class Mamba(nn.Module):
    """in_proj -> (x, z); x through a causal convolution, SiLU and the selective scan; times silu(z); out_proj.

    direction: "none" scans forward only; "v1" also backward, with the same weights and an own A; "v2" with own weights
    for everything but the two projections. halve: "v2" passes on the mean of both instead of their sum. layer_scale:
    start of a factor per channel behind it, None for none. steps: how `dt_proj` starts.
    """

    conv1d: CausalConv
    x_proj: nn.Linear
    dt_proj: nn.Linear
    D: nn.Parameter
    D_b: nn.Parameter

    def __init__(
        self,
        dim: int,
        *,
        states: int = 16,
        conv: int = 4,
        expand: float = 2,
        rank: int | None = None,
        direction: Direction = "v2",
        halve: bool = True,
        layer_scale: float | None = None,
        conv_bias: bool = True,
        bias: bool = False,
        steps: StepInit | None = None,
    ):
        super().__init__()
        if direction not in ("none", "v1", "v2"):
            raise AdviceError(f"direction is 'none', 'v1' or 'v2', not {direction!r}.")
        inner = int(expand * dim)
        self.inner, self.states = inner, states
        self.rank = rank or math.ceil(dim / 16)
        self.direction, self.halve = direction, halve
        self.gamma = None if layer_scale is None else nn.Parameter(torch.full((dim,), float(layer_scale)))
        self.in_proj = nn.Linear(dim, 2 * inner, bias=bias)
        for end in ("", "_b") if direction == "v2" else ("",):
            self.add_module(f"conv1d{end}", CausalConv(inner, conv, bias=conv_bias))
            self.add_module(f"x_proj{end}", nn.Linear(inner, self.rank + 2 * states, bias=False))
            dt_proj = nn.Linear(self.rank, inner)
            (steps or StepInit())(dt_proj)
            self.add_module(f"dt_proj{end}", dt_proj)
            self.register_parameter(f"D{end}", nn.Parameter(torch.ones(inner)))
        self.A_log = decays(inner, states)
        if direction != "none":
            self.A_b_log = decays(inner, states)
        self.out_proj = nn.Linear(inner, dim, bias=bias)

    def forward(self, x: Float[Tensor, "b *grid c"], size: tuple[int, int] | None = None) -> Float[Tensor, "b *grid c"]:
        """A map b h w c, read row by row, or a sequence b n c of any tokens; `size` is not needed."""
        return self.mix_tokens(x.flatten(1, 2)).view(x.shape) if x.ndim == 4 else self.mix_tokens(x)

    def mix_tokens(self, tokens: Float[Tensor, "b n c"]) -> Float[Tensor, "b n c"]:
        x, z = linear(self.in_proj, tokens).chunk(2, dim=-1)
        x = x.contiguous()
        if self.direction == "v2":
            y = self._both(self._branch(x), self._branch(x, "_b", reverse=True))
        elif self.direction == "v1":
            branch = self._branch(x)
            y = self._both(branch, branch)
        else:
            u, delta, b, c = (_first(v)[:, None].contiguous() for v in self._branch(x))
            y, _ = scan(u, F.softplus(delta), _negative(self.A_log), b[..., None], c[..., None])
            y = y[:, 0].transpose(0, 1) + u[:, 0].transpose(0, 1) * self.D
        gate = F.silu(z)
        if self.direction == "v2" and self.halve:
            gate = gate * 0.5
        y = linear(self.out_proj, y.to(z.dtype) * gate)
        return y if self.gamma is None else y * self.gamma

    def _branch(
        self, x: Float[Tensor, "b n d"], end: str = "", *, reverse: bool = False
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """u and its steps before the softplus (b, n, d), B and C (b, n, s), in token order; at least in float32."""
        u = F.silu(getattr(self, f"conv1d{end}")(x, reverse=reverse))
        small = linear(getattr(self, f"x_proj{end}"), u)
        steps, b, c = small.split([self.rank, self.states, self.states], dim=-1)
        delta = linear(getattr(self, f"dt_proj{end}"), steps)
        return _wide(u), _wide(delta), _wide(b), _wide(c)

    def _both(self, ahead: tuple[Tensor, ...], back: tuple[Tensor, ...]) -> Float[Tensor, "b n d"]:
        """The sum of a scan forward and one backward, as one scan of two sequences."""
        u, delta, b, c = (torch.stack((_first(f), _first(r.flip(1))), 1) for f, r in zip(ahead, back))
        a = torch.cat((_negative(self.A_log), _negative(self.A_b_log)))
        y, _ = scan(u, F.softplus(delta), a, b[..., None], c[..., None])
        y = (y[:, 0] + y[:, 1].flip(0)).transpose(0, 1)
        if self.direction == "v1":
            return y + ahead[0] * (2 * self.D)
        return y + ahead[0] * self.D + back[0] * self.D_b

    # token by token ------------------------------------------------------------------------------
    def start(self, batch: int) -> MambaState:
        """The state before the first token."""
        like = self.in_proj.weight
        recent = like.new_zeros(batch, self.conv1d.kernel_size[0] - 1, self.inner)
        return MambaState(recent, like.new_zeros(batch, self.inner, self.states))

    def step(self, token: Float[Tensor, "b c"], state: MambaState) -> tuple[Float[Tensor, "b c"], MambaState]:
        """One token: (its output, the next state). Only for "none": the others look ahead."""
        if self.direction != "none":
            raise AdviceError(
                f"direction {self.direction!r} reads later tokens too; Mamba(..., direction='none') steps."
            )
        x, z = self.in_proj(token).chunk(2, dim=-1)
        window = torch.cat((state.recent, x[:, None]), 1)
        u = (window * self.conv1d.weight[:, 0].t()).sum(1)
        u = F.silu(u if self.conv1d.bias is None else u + self.conv1d.bias)
        steps, b, c = self.x_proj(u).split([self.rank, self.states, self.states], dim=-1)
        delta = F.softplus(self.dt_proj(steps))
        y, hidden = selective_step(state.hidden, u, delta, -self.A_log.exp(), b, c, self.D, z)
        y = self.out_proj(y)
        return y if self.gamma is None else y * self.gamma, MambaState(window[:, 1:], hidden)

    def no_weight_decay(self) -> set[str]:
        return {name for name, _ in self.named_parameters() if name in ("A_log", "A_b_log", "D", "D_b")}


def _first(x: Float[Tensor, "b n d"]) -> Float[Tensor, "n b d"]:
    return x.transpose(0, 1)


def _wide(x: Tensor) -> Tensor:
    """At least float32, in which recurrences are computed."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def _negative(log: Float[Tensor, "d s"]) -> Float[Tensor, "1 s d"]:
    return -_wide(log).exp().t()[None]


@dataclass(frozen=True, kw_only=True, slots=True)
class MambaMixer:
    """Mamba as a token mixer: see `Mamba`."""

    states: int = 16
    conv: int = 4
    expand: float = 2.0
    direction: Direction = "v2"
    halve: bool = True

    def build(self, place: Place) -> Mamba:
        mixer = Mamba(
            place.dim,
            states=self.states,
            conv=self.conv,
            expand=self.expand,
            direction=self.direction,
            halve=self.halve,
        )
        with torch.no_grad():
            mixer.out_proj.weight /= math.sqrt(place.depth)
        return mixer
