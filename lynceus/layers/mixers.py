"""Token mixers under one signature, so that one can take another's place.

A mixer is a module from a map b h w c to a map of the same shape. Its configuration is a frozen dataclass whose
`build(place)` makes one for a place in a network; `MIXERS` finds the configuration by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Literal, Protocol

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lynceus.core.config import from_dict
from lynceus.core.errors import unknown

# name -> "module:configuration"
MIXERS: dict[str, str] = {
    "attention": "lynceus.layers.attention:AttentionMixer",
    "hyena": "lynceus.layers.hyena:HyenaMixer",
    "conv_projection": "lynceus.layers.conv_projection:ConvProjectionMixer",
    "softmax_free": "lynceus.layers.softmax_free:SoftmaxFreeMixer",
    "window": "lynceus.layers.window:WindowMixer",
    "window_mlp": "lynceus.layers.window:WindowMlpMixer",
    "window_cosine": "lynceus.layers.window_cosine:WindowCosineMixer",
    "depthwise": "lynceus.layers.depthwise:DepthwiseMixer",
    "gated_conv": "lynceus.layers.gated_conv:GatedConvMixer",
    "large_small": "lynceus.layers.large_small:LargeSmallMixer",
    "offset_attention": "lynceus.layers.offset_attention:OffsetAttentionMixer",
    "halo": "lynceus.layers.halo:HaloMixer",
    "global_filter": "lynceus.layers.global_filter:GlobalFilterMixer",
    "two_field": "lynceus.layers.wave:TwoFieldConfig",
    "gated_position": "lynceus.layers.gated_position:GatedPositionMixer",
    "outlook": "lynceus.layers.outlook:OutlookMixer",
    "mamba": "lynceus.layers.mamba:MambaMixer",
    "plain_mamba": "lynceus.layers.plain_scan:PlainMambaMixer",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """Where a mixer is to work.

    dim: channels. heads: heads of the attention that stands or stood there (1 where there is none). grid: rows and
    columns of the map at the size that the network is made for; other sizes work too. index: number of the block in
    the whole network, from 0, of `depth`.
    """

    dim: int
    heads: int = 1
    grid: tuple[int, int] = (14, 14)
    index: int = 0
    depth: int = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class MixerSite:
    """A mixer of a network that may be exchanged: its module path, its place, and how its block calls it.

    call: "map", as mixer(x) with x b h w c; "tokens", as mixer(x, (h, w)) with x b n c, where `extra` tokens that are
    no part of the map stand in front ("prefix") or before token h * w // 2 of the map ("middle").
    """

    path: str
    place: Place
    call: Literal["map", "tokens"] = "map"
    extra: int = 0
    where: Literal["prefix", "middle"] = "prefix"


class MixerConfig(Protocol):
    """What `layers` offers per mixer: options, and a module for a place."""

    def build(self, place: Place) -> nn.Module: ...


def mixer_config(name: str, options: Mapping[str, Any] | None = None) -> MixerConfig:
    """The configuration of a mixer by name; an unknown name or option is an advising error."""
    if name not in MIXERS:
        raise unknown("mixer", name, MIXERS)
    module, _, attribute = MIXERS[name].partition(":")
    made: MixerConfig = from_dict(getattr(import_module(module), attribute), dict(options or {}), where=f"mixer {name}")
    return made


class OnTokens(nn.Module):
    """A map mixer where a block carries tokens: called as mixer(x, (h, w)) with the map's tokens and `extra` more.

    The map is mixed alone; the other tokens get its mean. Mixers of sequences have a method `mix_tokens` (b n c). They
    are given all tokens where those stand in the middle, and everywhere if they say `orderless`, as attention does.
    """

    def __init__(self, mixer: nn.Module, *, extra: int = 0, where: Literal["prefix", "middle"] = "prefix"):
        super().__init__()
        self.mixer = mixer
        self.extra, self.where = extra, where

    def forward(self, x: Float[Tensor, "b n c"], size: tuple[int, int]) -> Float[Tensor, "b n c"]:
        mix_tokens = getattr(self.mixer, "mix_tokens", None)
        if mix_tokens is not None and (self.where == "middle" or getattr(self.mixer, "orderless", False)):
            mixed: Tensor = mix_tokens(x)
            return mixed
        (h, w), e = size, self.extra
        at = h * w // 2 if self.where == "middle" else 0
        image = x if e == 0 else x[:, e:] if at == 0 else torch.cat([x[:, :at], x[:, at + e :]], 1)
        y = self.mixer(image.reshape(x.shape[0], h, w, x.shape[2])).reshape(image.shape)
        if e == 0:
            return y
        others = y.mean(1, keepdim=True).expand(-1, e, -1)
        return torch.cat([others, y] if self.where == "prefix" else [y[:, :at], others, y[:, at:]], 1)


def placed(mixer: nn.Module, site: MixerSite) -> nn.Module:
    """A map mixer as the block at `site` calls it."""
    return mixer if site.call == "map" else OnTokens(mixer, extra=site.extra, where=site.where)
