"""Vim and PlainMamba on fewer and fewer tokens: a cut after some blocks, everything else as it was."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lynceus.backbones.plain_mamba import Layer, PlainMamba
from lynceus.backbones.vim import Block, Vim
from lynceus.core.errors import AdviceError
from lynceus.layers.folded import conv_bn
from lynceus.rewrite.prune_tokens.mixers import mix_mamba, mix_plain
from lynceus.rewrite.prune_tokens.places import (
    Carry,
    Places,
    Score,
    chosen,
    everything,
    importance,
    keep_count,
    take,
)


@dataclass(frozen=True, kw_only=True)
class Pruning:
    """What is cut where: see `PruneTokens`."""

    blocks: tuple[int, ...]
    keep: float
    score: Score
    carry: Carry
    fill: str
    released: bool
    seed: int


@dataclass(frozen=True)
class Cuts:
    """What a pass cut, one entry per cut. kept: numbers of the kept tokens in the sequence before the cut. scores: of
    all tokens before it. masks: which patches are left, on the grid."""

    kept: list[Int[Tensor, "b j"]] = field(default_factory=list)
    scores: list[Float[Tensor, "b k"]] = field(default_factory=list)
    masks: list[Bool[Tensor, "b h w"]] = field(default_factory=list)


class Pruned:
    """What both networks share."""

    pruning: Pruning

    def inspect(self, image: Float[Tensor, "b c h w"]) -> Cuts:
        """One pass, for what it cuts: scores, numbers and masks."""
        cuts = Cuts()
        self._pass(image, (), cuts=cuts)
        return cuts

    def _pass(self, image: Tensor, wanted: Sequence[int], *, stop: bool = False, cuts: Cuts | None = None) -> Any:
        raise NotImplementedError

    def _restored(self, last: Tensor | None, places: Places, x: Tensor) -> Tensor:
        """The whole sequence: kept tokens as they are, the others as they were when they were cut, or zero."""
        return places.spread(x, last if self.pruning.fill == "last" else None)


class PrunedVim(Pruned, Vim):
    """A Vim that cuts tokens. Maps are whole; `forward_features` gives the tokens that are left, class tokens in their
    places by number, so that `pool` finds them."""

    def run(
        self, image: Float[Tensor, "b c h w"], wanted: Sequence[int] = (), *, stop: bool = False
    ) -> tuple[Tensor, Tensor, list[Tensor], tuple[int, int]]:
        return self._pass(image, wanted, stop=stop)

    def _pass(self, image: Tensor, wanted: Sequence[int], *, stop: bool = False, cuts: Cuts | None = None) -> Any:
        p = self.pruning
        hidden, size = self.embed(image)
        residual: Tensor | None = None
        places, last, kept = everything(len(hidden), hidden.shape[1], hidden.device), None, {}
        end = max(wanted) if stop and wanted else len(self.layers) - 1
        for i, block in enumerate(cast(Iterable[Block], self.layers)):
            if i > end:
                break
            whole = places.at.shape[1] == places.count
            cutting = i + 1 in p.blocks and p.keep < 1
            if whole and not cutting:
                hidden, residual = self.run_block(block, hidden, residual, size)
            else:
                hidden, residual, gated, behind = self.run_block(
                    self._placed,
                    hidden,
                    residual,
                    block,
                    None if whole else places,
                )
            if i in wanted:
                kept[i] = hidden + residual if whole else self._restored(last, places, hidden + residual)
            if cutting:
                if wanted:
                    last = places.spread(hidden + residual, last)
                score = behind.detach().sum(-1).flip(1) if p.released else self._score(gated, i, places)
                numbers = self._numbers(score, places, size)
                if cuts is not None:
                    cuts.kept.append(numbers)
                    cuts.scores.append(score)
                hidden, residual, places = take(hidden, numbers), take(residual, numbers), places.cut(numbers)
                if cuts is not None:
                    mask = self.patches(places.mask()[..., None].float(), size)[..., 0] > 0
                    cuts.masks.append(mask.unflatten(1, size))
        assert residual is not None
        if self.config.class_token == "middle" and places.at.shape[1] < places.count and not p.released:
            hidden, residual = (self._middled(x, places, size) for x in (hidden, residual))
        return hidden, residual, [kept[i] for i in wanted], size

    def _placed(self, hidden: Tensor, residual: Tensor | None, block: Block, places: Places | None) -> Any:
        residual = hidden if residual is None else residual + block.drop_path(hidden)
        out, gated, behind = mix_mamba(block.mixer, block.norm(residual), places, self.pruning.carry)
        return out, residual, gated, behind

    def _score(self, gated: Tensor, block: int, places: Places) -> Tensor:
        return importance(gated, self.pruning.score, seed=self.pruning.seed + block, places=places)

    def _numbers(self, score: Tensor, places: Places, size: tuple[int, int]) -> Tensor:
        """Numbers of the tokens that stay. Released: the class token stands at the middle by count, also afterwards."""
        p, middle = self.pruning, self.config.class_token == "middle"
        extra, here = self.config.extra, places.at.shape[1]
        count = keep_count(here - extra, p.keep, odd=middle)
        if not p.released:
            return chosen(score, self._is_class(places, size), count + extra)
        at = here // 2
        rest = score.index_fill(1, torch.tensor([at], device=score.device), -torch.inf).topk(count, 1).indices
        rest = rest.sort(1).values
        own = rest.new_full((len(rest), 1), at)
        return torch.cat([rest[:, : count // 2], own, rest[:, count // 2 :]], 1)

    def _is_class(self, places: Places, size: tuple[int, int]) -> Tensor:
        where = self.config.class_token
        if where == "none":
            return torch.zeros_like(places.at, dtype=torch.bool)
        if where == "ends":
            return (places.at == 0) | (places.at == places.count - 1)
        return places.at == self.place(size[0] * size[1])

    def _middled(self, x: Tensor, places: Places, size: tuple[int, int]) -> Tensor:
        """The class token where `pool` looks for it, the patches in their order."""
        own = self._is_class(places, size)
        at = self.place(x.shape[1] - 1)
        number = torch.arange(x.shape[1], device=x.device).expand_as(own)
        rank = torch.where(own, at - 0.5, number - (number > own.int().argmax(1, keepdim=True)).float())
        return take(x, rank.argsort(1))


class PrunedPlainMamba(Pruned, PlainMamba):
    """A PlainMamba that cuts tokens. Maps are whole; `forward_features` gives the tokens that are left as one row
    (b, d, 1, k), of which `pool` takes the mean."""

    def run(
        self, image: Float[Tensor, "b c h w"], wanted: Sequence[int], *, stop: bool = False
    ) -> tuple[Tensor, list[Tensor]]:
        return self._pass(image, wanted, stop=stop)

    def _pass(self, image: Tensor, wanted: Sequence[int], *, stop: bool = False, cuts: Cuts | None = None) -> Any:
        p, x = self.pruning, self.embed(image)
        size = (x.shape[1], x.shape[2])
        places, before, found = everything(len(x), size[0] * size[1], x.device), None, {}
        end = max(wanted) if stop and wanted else len(self.layers) - 1
        final = self.config.depth - 1
        for i, layer in enumerate(cast(Iterable[Layer], self.layers)):
            if i > end:
                break
            whole = places.at.shape[1] == places.count
            cutting = i + 1 in p.blocks and p.keep < 1
            if whole and not cutting:
                x = self.run_block(layer, x)
            else:
                x = x.flatten(1, 2) if x.ndim == 4 else x
                x, gated = self.run_block(self._placed, x, layer, size, None if whole else places)
            if i == final and self.config.out_indices is not None:
                x = self.ln1(x)
            if i in wanted:
                map_ = x if x.ndim == 4 else self._restored(before, places, x).unflatten(1, size)
                own = getattr(self, f"norm_layer{i}", None)
                found[i] = map_ if own is None else own(map_)
            if cutting:
                if wanted:
                    before = places.spread(x, before)
                score = importance(gated, p.score, seed=p.seed + i, places=places)
                none = torch.zeros_like(places.at, dtype=torch.bool)
                numbers = chosen(score, none, keep_count(places.at.shape[1], p.keep, odd=False))
                x, places = take(x, numbers), places.cut(numbers)
                if cuts is not None:
                    cuts.kept.append(numbers)
                    cuts.scores.append(score)
                    cuts.masks.append(places.mask().unflatten(1, size))
        if end == final and self.config.out_indices is None:
            x = self.ln1(x)
        return (x if x.ndim == 4 else x[:, None]), [found[i] for i in wanted]

    def _placed(self, x: Tensor, layer: Layer, size: tuple[int, int], places: Places | None) -> Any:
        out, gated, _ = mix_plain(layer.mamba, layer.norm(x), size, places, self.pruning.carry)
        x = x + layer.drop_path(out)
        if layer.dw is not None:
            conv, norm, act = layer.dw
            grid = x if places is None else places.spread(x)
            grid = grid.unflatten(1, size).permute(0, 3, 1, 2)
            grid = act(conv_bn(grid, conv, norm, folds=layer.folds, name="dw")).flatten(2).transpose(1, 2)
            x = grid if places is None else places.gather(grid)
        return x, gated


def check_prunable(model: Any, first: int) -> None:
    """AdviceError where something before or behind the first cut cannot run on the tokens that are left."""
    c, name = model.config, model.name
    if isinstance(model, Vim):
        if c.paired or c.flip_ratio > 0 or c.rotary:
            what = "paired=True" if c.paired else "flip_ratio > 0" if c.flip_ratio > 0 else "rotary=True"
            raise AdviceError(
                f"{name} was built with {what}, for which no rule says what a removed token leaves behind; "
                "create_model('vim_tiny') and its kin can be pruned."
            )
        mixers, wanted = [(f"layers.{i}.mixer", layer.mixer) for i, layer in enumerate(model.layers)], "Mamba"
    else:
        mixers, wanted = [(f"layers.{i}.mamba", layer.mamba) for i, layer in enumerate(model.layers)], "PlainMamba2d"
    for path, mixer in mixers[max(first - 1, 0) :]:
        if type(mixer).__name__ != wanted:
            raise AdviceError(
                f"{path} of {name} is {type(mixer).__name__}, no {wanted}: it has no recurrence that could pass the "
                "gaps. Cut behind it, or swap it back."
            )
