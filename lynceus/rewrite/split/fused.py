"""Sub-models and the perceptron that fuses their features, as one module: what a plan computes, in one process."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from lynceus.core.rng import borrowed, generator
from lynceus.rewrite.split.cut import Cut
from lynceus.rewrite.split.part import Part, opened
from lynceus.rewrite.split.retrain import cycle


class Fusion(nn.Module):
    """Tower perceptron on all features: linear to `ratio` times the input, ReLU, linear to the classes."""

    def __init__(self, widths: Sequence[int], classes: int, ratio: float = 0.5):
        super().__init__()
        self.widths, total = tuple(widths), sum(widths)
        hidden = max(1, int(ratio * total))
        self.fc1 = nn.Linear(total, hidden)
        self.fc2 = nn.Linear(hidden, classes)

    def forward(self, features: Float[Tensor, "b n"]) -> Float[Tensor, "b classes"]:
        """features: those of all sub-models one after the other; zeros for one that did not answer."""
        out: Tensor = self.fc2(F.relu(self.fc1(features)))
        return out

    def spread(self, present: Bool[Tensor, "b parts"]) -> Float[Tensor, "b n"]:
        """1 where a feature's sub-model is present."""
        counts = torch.tensor(self.widths, device=present.device)
        return present.repeat_interleave(counts, 1).to(self.fc1.weight.dtype)


class Fused(nn.Module):
    """Images -> logits: every sub-model sees the image, the fusion reads all features.

    `groups`: the classes that each sub-model owns. Takes what the split model took.
    """

    rewrite: Any
    original: Any

    def __init__(self, parts: Sequence[Part], groups: Sequence[Sequence[int]], fusion: Fusion):
        super().__init__()
        self.parts = nn.ModuleList(parts)
        self.groups = tuple(tuple(g) for g in groups)
        self.fusion = fusion
        net = self.parts[0].net
        self.owns_pixels = bool(getattr(net, "owns_pixels", False))
        self.name = f"split {getattr(net, 'name', type(net).__name__)}"
        if not self.owns_pixels:
            self.mean, self.std = getattr(net, "mean", None), getattr(net, "std", None)

    @property
    def classes(self) -> list[str]:
        return list(getattr(self.parts[0].net, "classes", ()))

    @property
    def image_size(self) -> Any:
        return getattr(self.parts[0].net, "image_size", None)

    @property
    def input_size(self) -> tuple[int, int]:
        size: tuple[int, int] = self.parts[0].backbone.input_size  # type: ignore[union-attr, assignment]
        return size

    def features(self, image: Tensor) -> list[Float[Tensor, "b _"]]:
        """The feature of each sub-model."""
        return [part(image) for part in self.parts]

    def forward(self, image: Tensor) -> Float[Tensor, "b classes"]:
        out: Tensor = self.fusion(torch.cat(self.features(image), 1))
        return out


@dataclass(frozen=True, kw_only=True)
class Parts:
    """Rewrite, plain: `Fused` sub-models cut from a model, each for its group of classes. Needs no data, and so makes
    the network that a file's weights go into; fusion and retrained weights come from the file.

    groups: classes of each sub-model. cuts: what stays in it. ratio: of the fusion's hidden layer to its input.
    """

    groups: tuple[tuple[int, ...], ...]
    cuts: tuple[Cut, ...]
    ratio: float = 0.5
    seed: int = 0

    def __call__(self, model: nn.Module, example: Tensor | None = None) -> Fused:
        part, head = opened(model)
        made = [part.cut(cut) for cut in self.cuts]
        with borrowed(self.seed, "fusion"):
            fusion = Fusion([p.width for p in made], head.out_features, self.ratio)
        out = Fused(made, self.groups, fusion.to(device=head.weight.device, dtype=head.weight.dtype))
        return sign(out, self, model).eval()


def sign(made: Fused, by: Parts, model: nn.Module) -> Fused:
    """Gives `made` what its file needs: the rewrite, and the split model without its weights."""
    made.rewrite = by
    # past nn.Module's own __setattr__: it is a description, no submodule
    made.__dict__["original"] = copy.deepcopy(model).to("meta")
    return made


def joined(
    scores: Sequence[Float[Tensor, "b _"]], groups: Sequence[Sequence[int]], classes: int
) -> Float[Tensor, "b classes"]:
    """What the sub-models' classifiers say of their own classes, side by side ("other" left out): no fusion."""
    out = scores[0].new_zeros(len(scores[0]), classes)
    for said, group in zip(scores, groups):
        out[:, list(group)] = said[:, : len(group)]
    return out


def fit_fusion(
    fusion: Fusion,
    features: Float[Tensor, "n _"],
    label: Int[Tensor, " n"],
    *,
    steps: int,
    lr: float = 5e-3,
    batch: int = 128,
    dropout: float = 0.1,
    seed: int = 0,
) -> None:
    """Trains the fusion alone, in place, with cross-entropy over all classes.

    dropout: probability that the whole feature of a sub-model is missing from an image, so that a device that dies
    costs little; at least one stays.
    """
    draw = generator(seed, "fuse")
    count = len(fusion.widths)

    def loss() -> Tensor:
        rows = torch.randint(len(features), (min(batch, len(features)),), generator=draw)
        x = features[rows]
        if dropout:
            there = torch.rand(len(rows), count, generator=draw) >= dropout
            there[torch.arange(len(rows)), torch.randint(count, (len(rows),), generator=draw)] = True
            x = x * fusion.spread(there.to(x.device))
        return F.cross_entropy(fusion(x), label[rows].to(x.device))

    fusion.train()
    cycle([fusion], steps, loss, lr=lr, weight_decay=0.01)
    fusion.eval()
    for p in fusion.parameters():
        p.grad = None
