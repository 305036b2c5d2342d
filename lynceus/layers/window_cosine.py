"""Scaled cosine attention inside windows, with a continuous position bias: the spatial mixer of Swin V2.

The bias comes from a small perceptron of log-spaced relative coordinates, so a window of another size needs no new
parameters: coordinates are measured in units of the window that was trained (`pretrained`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from lynceus.layers.fused import affine, autocasting, fusable, hooked
from lynceus.layers.mixers import Place
from lynceus.layers.window import AnyWindowAttention, window_of

LARGEST = 4.605170249938965  # of logit_scale: ln 100, in float32 as the authors' code has it
TINY = 1e-12  # least length of a query or key
HIDDEN = 512  # width of the perceptron behind the bias


def log_coordinates(
    window: int, pretrained: int = 0, *, device: torch.device | None = None
) -> Float[Tensor, "side side 2"]:
    """Row and column offsets -(M - 1) .. M - 1, divided by P - 1, times 8, through sign(t) log2(|t| + 1) / 3.

    pretrained: the window P that the bias was trained with; 0: `window` itself. A window of one cell gives zeros.
    """
    unit = max((pretrained if pretrained > 0 else window) - 1, 1)
    t = torch.arange(-(window - 1), window, dtype=torch.float32, device=device) / unit * 8
    t = torch.sign(t) * torch.log2(t.abs() + 1) / 3
    return torch.stack(torch.meshgrid(t, t, indexing="ij"), -1)


class WindowCosineAttention(AnyWindowAttention):
    """Attention by the cosine of queries and keys, times a learned scale per head, plus 16 sigmoid(perceptron).

    State names as the authors': `logit_scale` (heads, 1, 1), `cpb_mlp`, `qkv` without bias (packs [3, heads, dim /
    heads]), `q_bias` and `v_bias` (None with qkv_bias=False), `proj`. pretrained: see `log_coordinates`.
    """

    scale = 1.0

    def __init__(
        self,
        dim: int,
        heads: int,
        window: int,
        *,
        shift: int = 0,
        pretrained: int = 0,
        qkv_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
    ):
        super().__init__(dim, heads, window, shift=shift, attn_drop=attn_drop, proj_drop=proj_drop)
        self.pretrained = pretrained
        self.logit_scale = nn.Parameter(torch.full((heads, 1, 1), math.log(10)))
        self.cpb_mlp = nn.Sequential(nn.Linear(2, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, heads, bias=False))
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(dim)) if qkv_bias else None
        self.v_bias = nn.Parameter(torch.zeros(dim)) if qkv_bias else None
        self.proj = nn.Linear(dim, dim)

    def table(self) -> Float[Tensor, "places heads"]:
        like = self.logit_scale
        places = log_coordinates(self.window, self.pretrained, device=like.device).to(like.dtype)
        return 16 * torch.sigmoid(self.cpb_mlp(places).view(-1, self.heads))

    def sources(self) -> tuple[Tensor, ...]:
        return tuple(self.cpb_mlp.parameters())

    def makers(self) -> tuple[nn.Module, ...]:
        return (self.cpb_mlp, *self.cpb_mlp)

    def project(self, x: Float[Tensor, "*batch c"]) -> Float[Tensor, "*batch d"]:
        """Queries, keys and values side by side; an adapter or listener on `qkv` is really called."""
        bias = None
        if self.q_bias is not None and self.v_bias is not None:
            bias = torch.cat([self.q_bias, torch.zeros_like(self.v_bias), self.v_bias])
        if type(self.qkv) is not nn.Linear or hooked(self.qkv):
            return self.qkv(x) if bias is None else self.qkv(x) + bias
        return affine(x, self.qkv.weight, bias)

    def heads_of(self, x: Float[Tensor, "windows cells c"]) -> tuple[Tensor, Tensor, Tensor]:
        count, cells, _ = x.shape
        qkv = self.project(x).view(count, cells, 3, self.heads, self.head_dim)
        scale = self.logit_scale.clamp(max=LARGEST).exp().view(self.heads, 1)
        if fusable(qkv) and not hooked(self.qkv):  # queries and keys are made unit vectors where they lie
            both = qkv[:, :, :2]
            factor = torch.linalg.vector_norm(both, dim=-1, keepdim=True, dtype=torch.float32)
            factor = factor.clamp_(min=TINY).reciprocal_()
            factor[:, :, 0].mul_(scale)
            both.mul_(factor)
            q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
            return q, k, v
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        wide = torch.promote_types(q.dtype, torch.float32)
        q = F.normalize(q.to(wide), dim=-1, eps=TINY) * scale[:, None].to(wide)
        k = F.normalize(k.to(wide), dim=-1, eps=TINY)
        if autocasting(x):  # the cosines stay in float32
            return q, k, v
        return q.to(v.dtype), k.to(v.dtype), v


@dataclass(frozen=True, kw_only=True, slots=True)
class WindowCosineMixer:
    """Cosine attention in windows. heads: None for those of the place. window: its side, no larger than the place's
    map. shift: whether windows are shifted by half; None: in every second block. pretrained: see `log_coordinates`."""

    heads: int | None = None
    window: int = 8
    shift: bool | None = None
    pretrained: int = 0
    qkv_bias: bool = True

    def build(self, place: Place) -> nn.Module:
        side, shift = window_of(place, self.window, self.shift)
        heads = self.heads or place.heads
        return WindowCosineAttention(
            place.dim, heads, side, shift=shift, pretrained=self.pretrained, qkv_bias=self.qkv_bias
        )
