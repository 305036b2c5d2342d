"""PruneTokens: a Vim or PlainMamba that drops unimportant tokens on its way, and knows where they stood.

Paper: Zhan et al., Exploring Token Pruning in Vision State Space Models, NeurIPS 2024, arXiv 2409.18962
Code: ZLKong/ToP-ViM, whose forward is that of compat="released" (the aligned recurrence is not in it)
Licence: Apache-2.0
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from lynceus.backbones.plain_mamba import PlainMamba
from lynceus.backbones.vim import Vim
from lynceus.core.errors import AdviceError, unknown
from lynceus.rewrite.prune_tokens.networks import PrunedPlainMamba, PrunedVim, Pruning, check_prunable
from lynceus.rewrite.prune_tokens.places import Carry, Score
from lynceus.rewrite.swap import signed

KINDS: dict[type, type] = {Vim: PrunedVim, PlainMamba: PrunedPlainMamba}


@dataclass(frozen=True, kw_only=True)
class PruneTokens:
    """Rewrite: after some blocks only the share `keep` of the tokens goes on; class tokens always do.

    blocks: how many blocks have run at each cut, e.g. (5, 10, 15) of 24; None: after 5, 10 and 15 twenty-fourths of
      them. keep: share of the tokens that each cut leaves, 1 for no cut. score: of a token, from the gated output of
      the block's scans: the sum over channels of max(0, y) ("clip"), y ("sum"), |y| ("l1"), y^2 ("l2"), or "random".
    carry: what a removed place does to the states that pass it: nothing ("hold"), what a token of zeros would
      ("decay"), what the kept token before it did ("decay_prev"); "none": survivors become neighbours, in scans and
      convolutions, as plain gathering has it.
    fill: what a removed place has in maps: the value that it had when it was cut ("last"), or "zero".
    compat: "released" runs the authors' forward: scores of the backward scan in reversed order, plain gathering. For
      networks with a class token in the middle. seed: of random scores.
    Fine-tuning is ordinary training, with the cuts in place: the authors take 30 epochs of AdamW at 5e-6 with weight
    decay 1e-8 and no stochastic depth.
    """

    blocks: tuple[int, ...] | None = None
    keep: float = 0.8
    score: Score = "clip"
    carry: Carry = "hold"
    fill: Literal["last", "zero"] = "last"
    compat: Literal["released"] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.blocks is not None:
            if not self.blocks:
                raise AdviceError("blocks names no cut: --blocks 5 10 15, or leave it out; keep=1 cuts nothing.")
            object.__setattr__(self, "blocks", tuple(sorted({int(i) for i in self.blocks})))
        if not 0 < self.keep <= 1:
            raise AdviceError(f"keep is a share above 0 and up to 1, not {self.keep}; .8 is the authors' choice.")
        for name, kind in (("score", Score), ("carry", Carry), ("fill", Literal["last", "zero"])):
            if getattr(self, name) not in get_args(kind):
                raise unknown(name, str(getattr(self, name)), get_args(kind))
        if self.compat not in (None, "released"):
            raise unknown("compat", str(self.compat), ("released",))

    def __call__(self, model: nn.Module, example: Tensor | None = None) -> nn.Module:
        """A copy of `model` (a Vim or PlainMamba, or what holds one in `.backbone`) that cuts tokens, in eval mode; its
        state is the same. `.inspect(image)` of the backbone gives masks and scores.

        example: pixels (b, 3, h, w), run once to see it fit. AdviceError for other networks, mixers and blocks."""
        found: Any = getattr(model, "backbone", model)
        name = getattr(found, "name", type(found).__name__)
        if isinstance(found, tuple(KINDS.values())):
            raise AdviceError(
                f"{name} is pruned already; take the model it was made from, with all cuts in one rewrite."
            )
        if type(found) not in KINDS:
            raise AdviceError(
                f"{name} ({type(found).__name__}) is no state-space model whose tokens could be pruned: vim and "
                "plain_mamba are. For transformers, Expedite runs blocks on clusters of tokens."
            )
        pruning = self.plan(len(found.layers))
        check_prunable(found, min(pruning.blocks, default=len(found.layers)))
        if self.compat == "released" and not (
            isinstance(found, Vim) and found.config.class_token == "middle" and found.config.direction == "v2"
        ):
            raise AdviceError(f"compat='released' knows a Vim with a class token in the middle, which {name} is not.")
        made = copy.deepcopy(model)
        inner: Any = getattr(made, "backbone", made)
        inner.__class__ = KINDS[type(inner)]
        inner.pruning = pruning
        signed(made, self)
        made.eval()
        if example is not None:
            with torch.no_grad():
                made(example)
        return made

    def plan(self, depth: int) -> Pruning:
        """The cuts in a network of `depth` blocks."""
        blocks = self.blocks
        if blocks is None:
            blocks = tuple(sorted({max(1, round(depth * k / 24)) for k in (5, 10, 15)} - {depth}))
        if any(not 1 <= i <= depth for i in blocks):
            raise AdviceError(f"blocks counts those before each cut, 1 to {depth}; {blocks} asks for others.")
        released = self.compat == "released"
        return Pruning(
            blocks=blocks,
            keep=self.keep,
            score=self.score,
            carry="none" if released else self.carry,
            fill=self.fill,
            released=released,
            seed=self.seed,
        )
