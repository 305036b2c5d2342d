"""Parity records of token pruning in Vim: what the released code of ToP-ViM does."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lynceus.backbones.keys.vim import SOURCES as SOURCES
from lynceus.core.errors import AdviceError
from lynceus.reengineer.keys import vim
from lynceus.rewrite.prune_tokens import PruneTokens
from lynceus.rewrite.prune_tokens.networks import PrunedVim

_OWN = {"prune_after_blocks": (5, 10, 15), "keep_ratio": 0.8}


def build(config: Mapping[str, Any], record: Mapping[str, Any] | None = None) -> nn.Module:
    """The pruned network, from the authors' constructor names."""
    given = {k: v for k, v in config.items() if k not in {*_OWN, "if_devide_out"}}
    given["if_divide_out"] = bool(config.get("if_devide_out", config.get("if_divide_out", False)))
    given.setdefault("if_cls_token", False)
    given.setdefault("use_middle_cls_token", False)
    blocks, keep = (config.get(name, value) for name, value in _OWN.items())
    return PruneTokens(blocks=tuple(blocks), keep=float(keep), compat="released")(vim.build(given, record))


def compare(model: nn.Module, inputs: Mapping[str, Tensor], record: Mapping[str, Any]) -> dict[str, Tensor]:
    """keptK: numbers before cut K; scoreB: after block B; features: what the head reads; logits."""
    if not isinstance(model, PrunedVim):
        raise AdviceError(f"{type(model).__name__} prunes no tokens.")
    with torch.no_grad():
        cuts = model.inspect(inputs["image"])
        features = model.pool(model.forward_features(inputs["image"]))
        return {
            "logits": model(inputs["image"]),
            "features": features,
            **{f"kept{i + 1}": kept for i, kept in enumerate(cuts.kept)},
            **{f"score{b}": score for b, score in zip(model.pruning.blocks, cuts.scores)},
        }
