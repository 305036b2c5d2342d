"""Part: a network up to the vector that its classifier reads, and that classifier as one linear layer beside it."""

from __future__ import annotations

import copy
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lynceus.core.errors import AdviceError
from lynceus.rewrite.split.cut import Cut, anatomy


class Part(nn.Module):
    """A headless ViT, DeiT or Swin with what prepares its images: image -> feature (b, width).

    The feature is what the classifier read: the pooled vector; of a distilled network the class token and the
    distillation token one after the other. `net` takes what the network that it came from took: a classifier of a Task
    pixels in [0, 1], a bare backbone normalised images.
    """

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net

    @property
    def backbone(self) -> Any:
        return getattr(self.net, "backbone", self.net)

    @property
    def width(self) -> int:
        """Numbers in a feature."""
        b = self.backbone
        return int(b.num_features) * (2 if getattr(b.config, "distilled", False) else 1)

    def prepared(self, image: Tensor) -> Tensor:
        """What the backbone takes."""
        made: Tensor = self.net.prepared(image) if hasattr(self.net, "prepared") else image  # type: ignore[operator]
        return made

    def pooled(self, features: Tensor) -> Float[Tensor, "b width"]:
        """What the classifier reads, of the backbone's `forward_features`."""
        b = self.backbone
        if getattr(b.config, "distilled", False):
            return features[:, :2].flatten(1)
        out: Tensor = b.forward_head(features, pre_logits=True)
        return out

    def forward(self, image: Tensor) -> Float[Tensor, "b width"]:
        return self.pooled(self.backbone.forward_features(self.prepared(image)))

    def cut(self, cut: Cut) -> Part:
        """The same of the cut network."""
        small = cut.backbone(self.backbone)
        if self.net is self.backbone:
            return Part(small)
        made = copy.deepcopy(self.net, {id(self.backbone): nn.Identity()})
        made.backbone = small
        return Part(made).eval()


def opened(model: nn.Module) -> tuple[Part, nn.Linear]:
    """A copy of `model` as its headless part and its classifier as one linear layer on the part's feature."""
    made: Any = copy.deepcopy(model).eval()
    inner = getattr(made, "backbone", made)
    anatomy(inner)  # says what cannot be split
    for module in (made, inner):
        for name in ("rewrite", "original"):
            module.__dict__.pop(name, None)
    heads = [inner.head, inner.head_dist] if getattr(inner.config, "distilled", False) else [inner.head]
    if not all(isinstance(h, nn.Linear) for h in heads):
        raise AdviceError(
            f"{inner.name} has no classifier, so there are no classes to split; "
            "give it one: model.reset_classifier(NUMBER), and train it."
        )
    head = nn.Linear(sum(h.in_features for h in heads), heads[0].out_features)
    like = heads[0].weight
    head = head.to(device=like.device, dtype=like.dtype)
    with torch.no_grad():
        head.weight.copy_(torch.cat([h.weight for h in heads], 1) / len(heads))
        biases = [torch.zeros_like(head.bias) if h.bias is None else h.bias for h in heads]
        head.bias.copy_(torch.stack(biases).mean(0))
    inner.reset_classifier(0)
    return Part(made).eval(), head


def cut_head(head: nn.Linear, cut: Cut, width: int) -> nn.Linear:
    """A linear layer on the feature of the cut part; width: channels of the last stage before."""
    kept = torch.tensor(cut.channels[-1], device=head.weight.device)
    tokens = head.in_features // width
    index = (torch.arange(tokens, device=kept.device)[:, None] * width + kept).flatten()
    made = nn.Linear(len(index), head.out_features).to(device=head.weight.device, dtype=head.weight.dtype)
    with torch.no_grad():
        made.weight.copy_(head.weight[:, index])
        made.bias.copy_(head.bias)
    return made


def own_head(head: nn.Linear, own: tuple[int, ...]) -> nn.Linear:
    """The rows of `own` classes, and behind them one for all others: their mean, raised by the log of their number.
    Of all classes there are no others, and the layer is a copy."""
    rest = [i for i in range(head.out_features) if i not in own]
    made = nn.Linear(head.in_features, len(own) + bool(rest)).to(device=head.weight.device, dtype=head.weight.dtype)
    with torch.no_grad():
        made.weight[: len(own)] = head.weight[list(own)]
        made.bias[: len(own)] = head.bias[list(own)]
        if rest:
            made.weight[-1] = head.weight[rest].mean(0)
            made.bias[-1] = head.bias[rest].mean() + torch.tensor(float(len(rest))).log()
    return made


def folded(log_p: Float[Tensor, "n k"], own: tuple[int, ...]) -> Float[Tensor, "n m"]:
    """Log-probabilities of all classes as those of `own` and, last, of all others together."""
    rest = [i for i in range(log_p.shape[1]) if i not in own]
    mine = log_p[:, list(own)]
    return torch.cat([mine, log_p[:, rest].logsumexp(1, keepdim=True)], 1) if rest else mine
