"""Backbone: a family writes `forward_stages`; pyramid, classifier, timm's contract and export come from here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lynceus.core.errors import AdviceError
from lynceus.core.subject import IMAGENET_MEAN, IMAGENET_STD
from lynceus.core.types import Stage
from lynceus.layers.mixers import MixerSite


@dataclass(frozen=True, kw_only=True, slots=True)
class BackboneConfig:
    """Fields that every family has.

    num_classes: outputs of the classifier; 0 leaves it out. in_chans: channels of the image.
    drop_rate: dropout before the classifier. drop_path_rate: largest stochastic depth (last block), linear from 0.
    """

    num_classes: int = 1000
    in_chans: int = 3
    drop_rate: float = 0.0
    drop_path_rate: float = 0.0


class Backbone(nn.Module):
    """A network family: image -> pyramid of maps, fine -> coarse, and logits if it has a classifier.

    A backbone takes *normalised* images (b, c, h, w) of any size, with its own `mean` and `std`; the doors (Subject,
    a Task's module, predict, the command line) take pixels in [0, 1] and normalise for it.

    A family sets `self.head` (a Linear, or Identity when num_classes is 0), writes `forward_stages`, and, only if its
    classifier reads more than the last map, the pair `forward_features` and `pool`. `stages` describes the levels, so a
    family's own lists of blocks carry other names (`layers`, `blocks`).
    """

    config: Any
    stages: tuple[Stage, ...]
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    head_name: str = "head"  # attribute that holds the classifier
    more_heads: tuple[str, ...] = ()  # and those of further ones, which a checkpoint's are dropped with

    def __init__(self, config: Any, stages: Sequence[Stage]):
        super().__init__()
        self.config = config
        self.stages = tuple(stages)
        self.name = type(self).__name__.lower()
        self.num_classes: int = config.num_classes
        self.num_features: int = stages[-1].channels
        self.head_hidden_size: int = self.num_features
        self.grad_checkpointing = False

    # what a family writes ------------------------------------------------------------------------
    def forward_stages(self, image: Float[Tensor, "b c h w"]) -> list[Float[Tensor, "b ci hi wi"]]:
        """The maps described by `stages`. Any h, w: pad inside, crop nothing away."""
        raise NotImplementedError(f"{type(self).__name__} must write forward_stages")

    def forward_features(self, image: Float[Tensor, "b c h w"]) -> Tensor:
        """What `pool` and the classifier read. Default: the last map; token families: (b, prefix + n, c)."""
        return self.forward_stages(image)[-1]

    def pool(self, features: Tensor) -> Float[Tensor, "b c"]:
        """The vector that the classifier reads. Default: mean over the map."""
        return features.mean((-2, -1))

    def features_and_stages(self, image: Float[Tensor, "b c h w"]) -> tuple[Tensor, list[Tensor]]:
        """`forward_features` and `forward_stages` in one pass; written where features are not the last map."""
        maps = self.forward_stages(image)
        return maps[-1], maps

    def stages_up_to(self, image: Float[Tensor, "b c h w"], last: int) -> list[Float[Tensor, "b ci hi wi"]]:
        """The maps of levels 0 to `last`; a family that can stops computing there."""
        return self.forward_stages(image)[: last + 1]

    def norm_level(self, x: Float[Tensor, "b c h w"], index: int) -> Float[Tensor, "b c h w"]:
        """The map of a level through the final norm, for families whose maps are taken before it. Default: as it is."""
        return x

    def keep_levels(self, count: int, *, norm: bool) -> None:
        """Cuts what only the levels from `count` on need, and the final norm if `norm`; default: keeps everything."""

    # timm's contract, derived --------------------------------------------------------------------
    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        """Pooled vector (pre_logits) or logits (b, num_classes) of `forward_features`' output."""
        x = self.pool(features)
        if pre_logits:
            return x
        if self.config.drop_rate:
            x = nn.functional.dropout(x, self.config.drop_rate, self.training)
        return self.get_classifier()(x)

    def forward(self, image: Float[Tensor, "b c h w"]) -> Tensor:
        """Logits (b, num_classes); with num_classes=0 the pooled vector."""
        return self.forward_head(self.forward_features(image))

    def forward_intermediates(
        self,
        image: Float[Tensor, "b c h w"],
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """(features, maps) or the maps alone, in the order of `indices`.

        indices: levels to give (an int: that many last ones; None: all). norm: maps through the final norm, where a
        family has one behind its maps. stop_early: nothing behind the last level asked for is computed, and features is
        its map.
        """
        if output_fmt not in ("NCHW", "NHWC"):
            raise AdviceError(f"output_fmt is 'NCHW' or 'NHWC', not {output_fmt!r}.")
        take = self.take_indices(indices)
        if stop_early:
            maps = self.stages_up_to(image, max(take))
            features = maps[-1]
        else:
            features, maps = self.features_and_stages(image)
        maps = [self.norm_level(maps[i], i) if norm else maps[i] for i in take]
        if output_fmt == "NHWC":
            maps = [m.permute(0, 2, 3, 1) for m in maps]
        return maps if intermediates_only else (features, maps)

    def take_indices(self, indices: int | Sequence[int] | None) -> list[int]:
        """Non-negative level numbers; an AdviceError when one does not exist."""
        count = len(self.stages)
        if indices is None:
            return list(range(count))
        if isinstance(indices, int):
            indices = range(count - indices, count)
        chosen = [i + count if i < 0 else i for i in indices]
        if not chosen or any(not 0 <= i < count for i in chosen):
            raise AdviceError(f"{self.name} has levels 0 to {count - 1}; {list(indices)} asks for others.")
        return chosen

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] | None = None, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drops the classifier and what lies behind the last level asked for; returns the level numbers.

        prune_norm: the final norm goes too. A network cut before its last level gives maps, no logits.
        """
        take = self.take_indices(indices)
        self.keep_levels(max(take) + 1, norm=prune_norm)
        if prune_head:
            self.reset_classifier(0)
        return take

    @property
    def feature_info(self) -> list[dict[str, Any]]:
        return [
            {"num_chs": s.channels, "reduction": s.stride, "module": s.name, "index": i}
            for i, s in enumerate(self.stages)
        ]

    @property
    def pretrained_cfg(self) -> dict[str, Any]:
        """What timm's `resolve_model_data_config` reads."""
        return {
            "architecture": self.name,
            "input_size": (self.config.in_chans, *self.input_size),
            "mean": self.mean,
            "std": self.std,
            "interpolation": "bicubic",
            "crop_pct": 0.875,
            "num_classes": self.num_classes,
            "classifier": self.head_name,
            "fixed_input_size": False,
        }

    default_cfg = pretrained_cfg

    @property
    def input_size(self) -> tuple[int, int]:
        """The size the variant was made for; any other works too."""
        return getattr(self.config, "image_size", (224, 224))

    def get_classifier(self) -> nn.Module:
        return self.get_submodule(self.head_name)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A fresh classifier with `num_classes` outputs (0: none, forward gives the pooled vector)."""
        parent, _, leaf = self.head_name.rpartition(".")
        setattr(self.get_submodule(parent), leaf, self.new_classifier(num_classes))
        self.num_classes = num_classes
        self.config = replace(self.config, num_classes=num_classes)

    def new_classifier(self, num_classes: int) -> nn.Module:
        """A freshly initialised classifier on this model's device, in its dtype and mode."""
        if num_classes <= 0:
            return nn.Identity()
        like = next(self.parameters())
        head = nn.Linear(self.head_hidden_size, num_classes, device=like.device, dtype=like.dtype)
        nn.init.trunc_normal_(head.weight, std=0.02)
        nn.init.zeros_(head.bias)
        return head.train(self.training)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.grad_checkpointing = enable

    def run_block(self, block: Callable[..., Tensor], x: Tensor, *args: Any) -> Tensor:
        """Runs a block, through activation checkpointing when that is on and the model is training."""
        if self.grad_checkpointing and self.training and not torch.jit.is_scripting():
            return checkpoint(block, x, *args, use_reentrant=False)
        return block(x, *args)

    def run_group(
        self, blocks: Sequence[nn.Module], x: Tensor, group: int, size: tuple[int, int] | None = None
    ) -> Tensor:
        """The blocks of group `group`, one after another; a rewrite may run some of them on fewer tokens.

        x: a map b h w c; or, with its `size`, tokens b n c that end with it and begin with extra ones.
        """
        place = () if size is None else (size,)
        for block in blocks:
            x = self.run_block(block, x, *place)
        return x

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Regular expressions that put every parameter into a depth group (timm's layer decay)."""
        raise NotImplementedError(f"{type(self).__name__} must write group_matcher")

    def mixer_sites(self) -> list[MixerSite]:
        """The token mixers that `rewrite.swap` may exchange, in the order of the blocks; default: none."""
        return []

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that are never decayed, beyond the one-dimensional ones."""
        return set()

    # folders and the hub -------------------------------------------------------------------------
    def save_pretrained(self, folder: str | Path, *, licence: str | None = None, text: str = "") -> Path:
        """Writes config.json, model.safetensors and a model card into `folder`; licence and text are for the card."""
        from lynceus.backbones._hub import save_pretrained

        return save_pretrained(self, folder, licence=licence, text=text)

    @staticmethod
    def from_pretrained(source: str | Path, *, download: bool = False, revision: str | None = None) -> Backbone:
        """The backbone in a folder, or of "OWNER/NAME" in the hub's local cache; download=True fetches it."""
        from lynceus.backbones._hub import load_pretrained

        return load_pretrained(source, download=download, revision=revision)

    def push_to_hub(self, repository: str, *, licence: str | None = None, private: bool = False) -> str:
        """Uploads to "OWNER/NAME" on the hub with the token of this machine; returns the address."""
        from lynceus.backbones._hub import push_to_hub

        return push_to_hub(self, repository, licence=licence, private=private)
