"""Short trainings on images in memory: a sub-model on its classes and "other", a fusion on features."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from lynceus.core.errors import AdviceError
from lynceus.core.rng import generator
from lynceus.core.types import as_float
from lynceus.rewrite.split.part import Part


@dataclass(frozen=True, kw_only=True)
class Retrain:
    """How a pruned sub-model is trained again: AdamW on one cycle.

    steps: of `batch` images, in each round of pruning; 0 leaves the sub-model as it was cut. lr, weight_decay: of
    AdamW. others: images of other classes for each of its own. distil: weight of the KL to what the whole model says,
    its foreign classes added up. shift: images are moved by up to so many pixels. flip: and mirrored at random.
    """

    steps: int = 300
    batch: int = 64
    lr: float = 1e-3
    weight_decay: float = 0.05
    others: float = 1.0
    distil: float = 1.0
    shift: int = 0
    flip: bool = False

    def __post_init__(self) -> None:
        if self.steps < 0 or self.batch < 2 or self.others <= 0 or self.distil < 0 or self.shift < 0:
            raise AdviceError(
                "Retraining takes steps from 0, a batch from 2, others above 0, distil and shift from 0; got "
                f"{self.steps}, {self.batch}, {self.others}, {self.distil} and {self.shift}."
            )


def cycle(
    modules: list[nn.Module],
    steps: int,
    loss: Callable[[], Tensor],
    *,
    lr: float,
    weight_decay: float,
) -> None:
    """`steps` steps of AdamW on one cycle, clipped at 1."""
    params = [p for m in modules for p in m.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in params if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in params if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr)
    warm = max(0.2 * steps, 1.0)
    for step in range(steps):
        rest = (step + 1 - warm) / max(steps - warm, 1.0)
        now = lr * ((step + 1) / warm if step + 1 < warm else 0.5 + 0.5 * math.cos(math.pi * min(max(rest, 0.0), 1.0)))
        for group in optimizer.param_groups:
            group["lr"] = max(now, 1e-3 * lr)
        optimizer.zero_grad()
        loss().backward()
        nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()


def moved(image: Tensor, draw: torch.Generator, *, shift: int, flip: bool) -> Tensor:
    """A batch shifted as a whole by up to `shift` pixels, edges repeated, and mirrored with probability 1/2."""
    if shift:
        h, w = image.shape[-2:]
        down, right = torch.randint(0, 2 * shift + 1, (2,), generator=draw).tolist()
        image = F.pad(image, [shift] * 4, mode="replicate")[..., down : down + h, right : right + w]
    return image.flip(-1) if flip and float(torch.rand((), generator=draw)) < 0.5 else image


def retrain(
    part: Part,
    head: nn.Linear,
    image: Tensor,
    own: Int[Tensor, " n"],
    target: Float[Tensor, "n k"] | None,
    config: Retrain,
    *,
    seed: int,
) -> None:
    """Trains `part` and `head` in place.

    image: as the part takes them, uint8 or float. own: the class of each among the sub-model's, -1 for another class.
    target: log-probabilities of the whole model over the same outputs, to distil from.
    """
    if not config.steps:
        return
    draw = generator(seed, "retrain")
    mine, theirs = (own >= 0).nonzero()[:, 0], (own < 0).nonzero()[:, 0]
    if not len(mine):
        mine, theirs = theirs, theirs[:0]
    label = torch.where(own < 0, head.out_features - 1, own)
    share = round(config.batch * config.others / (1 + config.others)) if len(theirs) else 0
    counts = (max(1, config.batch - share), share)

    def loss() -> Tensor:
        rows = torch.cat([p[torch.randint(len(p), (n,), generator=draw)] for p, n in zip((mine, theirs), counts) if n])
        x = moved(as_float(image[rows]).to(head.weight), draw, shift=config.shift, flip=config.flip)
        logits = head(part(x))
        total = F.cross_entropy(logits, label[rows].to(logits.device))
        if config.distil and target is not None:
            wanted = target[rows].to(logits)
            total = total + config.distil * F.kl_div(
                logits.log_softmax(-1), wanted, log_target=True, reduction="batchmean"
            )
        return total

    part.train()
    cycle([part, head], config.steps, loss, lr=config.lr, weight_decay=config.weight_decay)
    part.eval()
    for p in [*part.parameters(), *head.parameters()]:
        p.grad = None


@torch.no_grad()
def outputs(run: Callable[[Tensor], Tensor], image: Tensor, *, batch: int = 256) -> Tensor:
    """run(pixels as float) of all images, some at a time."""
    return torch.cat([run(as_float(x)) for x in image.split(batch)])
