"""Swap: other token mixers in a trained or fresh backbone; everything else keeps its weights.

A backbone lists the places of its mixers (`mixer_sites`), a mixer is a module from a map b h w c to such a map
(`layers.mixers.MIXERS`), so any can stand in any place. What comes in is freshly initialised and has to be trained:
all of it, or, with the rest frozen, itself alone. Swapping half of the blocks gives the hybrids, e.g. of Hyena and
attention (Multi-Dimensional Hyena for Spatial Inductive Bias, AISTATS 2024, arXiv 2309.13600).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lynceus.core.errors import AdviceError, unknown
from lynceus.core.rng import borrowed
from lynceus.layers.mixers import MixerSite, OnTokens, mixer_config, placed
from lynceus.layers.windowed import Windowed, windowed

NAMED = ("all", "first half", "last half", "even", "odd")
Blocks = Literal["all", "first half", "last half", "even", "odd"]


@dataclass(frozen=True, kw_only=True)
class Swap:
    """Rewrite: another mixer in the chosen blocks, freshly initialised.

    mixer: a name of `layers.mixers.MIXERS`, such as attention, hyena or mamba. options: of its configuration.
    blocks: which of the exchangeable mixers, counted from 0 in the order of the network: "all", "first half" (0 to
    count // 2), "last half" (those after them), "even", "odd", or their numbers (negative ones from the end).
    window: mix inside windows of this side, moved by half of it in every second block; None mixes whole maps.
    keep: parameters that the old mixer has under the same name, in the same shape, go into the new one.
    seed: of the fresh weights.
    """

    mixer: str
    options: Mapping[str, Any] = field(default_factory=dict)
    blocks: Blocks | tuple[int, ...] = "all"
    window: int | None = None
    keep: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        mixer_config(self.mixer, self.options)
        if isinstance(self.blocks, str):
            if self.blocks not in NAMED:
                raise unknown("choice of blocks", self.blocks, NAMED, how="Or give their numbers.")
        else:
            object.__setattr__(self, "blocks", tuple(int(i) for i in self.blocks))
        if self.window is not None and self.window < 1:
            raise AdviceError(f"window is at least 1, or None for whole maps, not {self.window}.")

    def __call__(self, model: nn.Module, example: Tensor | None = None) -> nn.Module:
        """A copy of `model` (a Backbone, or what holds one in `.backbone`) with the mixers exchanged, in eval mode.

        example: pixels (b, 3, h, w), run once to see it fit.
        """
        made = copy.deepcopy(model)
        inner = backbone_of(made)
        sites = inner.mixer_sites()
        config = mixer_config(self.mixer, self.options)
        with borrowed(self.seed, "swap"):
            for i in self.chosen(sites):
                site, place = sites[i], sites[i].place
                old, like = inner.get_submodule(site.path), next(inner.parameters())
                if self.window is None:
                    fresh = config.build(place)
                else:
                    fresh = windowed(config, place, self.window)
                fresh = fresh.to(device=like.device, dtype=like.dtype)
                if self.keep:
                    take_over(fresh, old)
                inner.set_submodule(site.path, placed(fresh, site))
        signed(made, self)
        made.eval()
        if example is not None:
            with torch.no_grad():
                made(example)
        return made

    def chosen(self, sites: Sequence[MixerSite]) -> list[int]:
        """Numbers of the sites that are swapped."""
        count = len(sites)
        every, half = range(count), count // 2
        if isinstance(self.blocks, str):
            picked = {
                "all": every,
                "first half": range(half + 1),
                "last half": range(half + 1, count),
                "even": range(0, count, 2),
                "odd": range(1, count, 2),
            }
            return list(picked[self.blocks])
        found = [i + count if i < 0 else i for i in self.blocks]
        if not found or any(not 0 <= i < count for i in found):
            raise AdviceError(
                f"There are mixers 0 to {count - 1} to exchange; blocks={list(self.blocks)} asks for others."
            )
        return sorted(set(found))


class Unswapped:
    """The model before a swap, as far as its description goes: what it says is asked of the swapped one, which has the
    same configuration, task and name. `earlier`: swaps that came before; inside: those that its backbone came with."""

    def __init__(self, made: nn.Module, earlier: tuple[Any, ...], inside: tuple[Any, ...] = ()):
        self._made, self._inside = made, inside
        if earlier:
            # a rewrite that changes what the configuration says (a split) keeps a description of its own
            kept = getattr(made, "__dict__", {}).get("original")
            self.rewrite = earlier[-1]
            self.original = kept if isinstance(kept, nn.Module) else Unswapped(made, earlier[:-1], inside)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name in ("rewrite", "original"):
            raise AttributeError(name)
        found = getattr(self._made, name)
        return Unswapped(found, self._inside) if name == "backbone" else found


def rewrites_of(model: Any) -> tuple[Any, ...]:
    """What a model was changed by, oldest first."""
    if not (hasattr(model, "rewrite") and hasattr(model, "original")):
        return ()
    return (*rewrites_of(model.original), model.rewrite)


def signed(made: nn.Module, by: Any) -> None:
    """Gives a module `rewrite` and `original`; a task's module and the backbone in it get both, each for its file."""
    inner: Any = getattr(made, "backbone", made)
    inside, outside = rewrites_of(inner), rewrites_of(made)
    if inner is not made:
        before = inside[: len(inside) - len(outside)]
        made.rewrite, made.original = by, Unswapped(made, outside, before)  # type: ignore[assignment]
    inner.rewrite, inner.original = by, Unswapped(inner, inside)


def take_over(fresh: nn.Module, old: nn.Module) -> list[str]:
    """Copies what both mixers have under the same name and in the same shape; returns the names."""
    fresh, old = innermost(fresh), innermost(old)
    own, theirs = fresh.state_dict(), old.state_dict()
    shared = {n: v for n, v in theirs.items() if n in own and own[n].shape == v.shape}
    fresh.load_state_dict(shared, strict=False)
    return list(shared)


def innermost(mixer: nn.Module) -> nn.Module:
    """The mixer inside what makes it fit: windows, and the adapter for tokens."""
    while isinstance(mixer, (OnTokens, Windowed)):
        mixer = mixer.mixer
    return mixer


def backbone_of(model: nn.Module) -> Any:
    """The backbone whose mixers can be exchanged: the model itself or its `.backbone`; else an AdviceError."""
    inner: Any = getattr(model, "backbone", model)
    if not hasattr(inner, "mixer_sites") or not inner.mixer_sites():
        raise AdviceError(
            f"{getattr(inner, 'name', type(inner).__name__)} lists no mixers that could be exchanged; its class would "
            "have to write mixer_sites()."
        )
    return inner
