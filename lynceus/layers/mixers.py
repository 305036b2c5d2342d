"""Token mixers under one signature, so that one can take another's place.

A mixer is a module from a map b h w c to a map of the same shape. Its configuration is a frozen dataclass whose
`build(place)` makes one for a place in a network; `MIXERS` finds the configuration by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Literal, Protocol

from torch import nn

from lynceus.core.config import from_dict
from lynceus.core.errors import unknown

# name -> "module:configuration"
MIXERS: dict[str, str] = {
    "depthwise": "lynceus.layers.depthwise:DepthwiseMixer",
    "gated_conv": "lynceus.layers.gated_conv:GatedConvMixer",
    "global_filter": "lynceus.layers.global_filter:GlobalFilterMixer",
    "gated_position": "lynceus.layers.gated_position:GatedPositionMixer",
    "outlook": "lynceus.layers.outlook:OutlookMixer",
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
