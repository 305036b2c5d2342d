"""AugMix as a recipe: cross-entropy on the picture, and one answer for it and two mixtures of its changes.

Paper: Hendrycks et al., AugMix: A Simple Data Processing Method to Improve Robustness and Uncertainty, ICLR 2020,
arXiv 1912.02781
Code: google-research/augmix
Licence: Apache-2.0

A step costs three passes. The authors: ResNet-50 on ImageNet, 180 epochs, clean error 22.5%, mCE 65.3 (plain training:
23.9%, 76.7). What minutes on a CPU give is measured by `python -m bench.trust_robustify`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from lynceus.core.config import to_dict
from lynceus.core.errors import AdviceError
from lynceus.core.nouns import Task
from lynceus.core.types import Batch
from lynceus.data.augmix import AugMixConfig, augmix
from lynceus.recipes.supervised import Supervised, SupervisedConfig

WEIGHT = 12.0  # of the consistency, the authors' on CIFAR and ImageNet
MIXED = "augmix"  # under this name the mixtures ride in a batch's extra


def consistency(
    clean: Float[Tensor, "b k"], first: Float[Tensor, "b k"], second: Float[Tensor, "b k"]
) -> Float[Tensor, ""]:
    """The Jensen-Shannon divergence of three answers, given as logits, in nats: the mean of KL(p_i || their mean).

    The mean is clamped to [1e-7, 1] before the logarithm; b is averaged over.
    """
    logs = torch.stack([F.log_softmax(logits, -1) for logits in (clean, first, second)])
    answers = logs.exp()
    middle = answers.mean(0).clamp(1e-7, 1).log()
    # log p comes from the logits: the gradient of p log p at an underflown p would not be finite
    return (answers * (logs - middle)).sum(-1).mean()


def with_mixtures(batch: Batch, count: int, generator: torch.Generator, config: AugMixConfig) -> Batch:
    """The batch, with `count` mixtures (count, 3, h, w) of every picture in its `extra`."""
    repeated = batch.image.repeat_interleave(count, 0)
    made = augmix(repeated, generator, config).unflatten(0, (-1, count))
    before = batch.extra or [{}] * len(batch)
    batch.extra = [{**extra, MIXED: mixed} for extra, mixed in zip(before, made.unbind(0))]
    return batch


def mixtures(batch: Batch) -> Float[Tensor, "b count 3 h w"]:
    """What `with_mixtures` put there."""
    if not batch.extra or MIXED not in batch.extra[0]:
        raise AdviceError("This batch has no mixtures; the recipe's augment(batch, generator) makes them.")
    made = torch.stack([e[MIXED] for e in batch.extra])
    return made.to(batch.image.device)


class AugMix(Supervised):
    """Learns `task` on `backbone`; loss = task's loss on the clean picture + weight * `consistency`.

    task: Classify(...) of one label. backbone: as for Supervised. config: the mixing. weight: of the consistency.
    views: crops, shifts and flips before the mixing; mixup, cutmix and erasing must be off.
    """

    def __init__(
        self,
        task: Task,
        backbone: nn.Module,
        config: AugMixConfig | None = None,
        *,
        weight: float = WEIGHT,
        views: SupervisedConfig | None = None,
        loss: Callable[[Any, Batch], dict[str, Tensor]] | None = None,
    ):
        super().__init__(task, backbone, pure(views), loss=loss)
        if getattr(task, "multi_label", False):
            raise AdviceError("AugMix compares answers that are one class each; multi_label tasks take Supervised.")
        if weight < 0:
            raise AdviceError(f"weight cannot be below 0; it is {weight}. The authors take 12.")
        self.mixing, self.weight = config or AugMixConfig(), weight

    def augment(self, batch: Batch, generator: torch.Generator) -> Batch:
        """Supervised's, and two mixtures of every picture."""
        return with_mixtures(super().augment(batch, generator), 2, generator, self.mixing)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        clean, mixed = batch.pixels(), mixtures(batch)
        clean_logits, first, second = self.model(torch.cat([clean, mixed[:, 0], mixed[:, 1]])).chunk(3)
        losses = self.loss(clean_logits, batch)
        apart = consistency(clean_logits.float(), first.float(), second.float())
        return {**losses, "loss": losses["loss"] + self.weight * apart, "consistency": apart.detach()}

    def describe(self) -> dict[str, Any]:
        return {**super().describe(), "recipe": "augmix", "augmix": to_dict(self.mixing), "weight": self.weight}


def pure(views: SupervisedConfig | None) -> SupervisedConfig:
    """The views, unless they mix or erase."""
    views = views or SupervisedConfig()
    if views.mixup or views.cutmix or views.erase:
        raise AdviceError("AugMix mixes a picture with itself only: SupervisedConfig(mixup=0, cutmix=0, erase=0).")
    return views
