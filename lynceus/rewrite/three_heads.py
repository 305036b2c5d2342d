"""Three heads on one feature: a classifier for clean pictures, one for corrupted ones, one for both, and a rule that
picks one of the first two for every picture.

Paper: Jain et al., Efficiently Robustify Pre-trained Models, ICCV 2023, arXiv 2309.07499
Code: none public. The paper describes a choice by uncertainty and by divergence; the formula here is ours.

The heads begin as copies of the classifier; `recipes.robustify` teaches them.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from lynceus.core import rng
from lynceus.core.errors import AdviceError
from lynceus.tasks.classify import Classifier, Classify

HEADS = ("clean", "robust", "combined")


class ThreeHeads(Classifier):
    """A classifier on pixels with the heads clean (the backbone's own), robust and combined.

    The answer is the clean or the robust head's, by the smaller of KL(combined || head) * the entropy of that head's
    mean answer under dropout. The dropout masks are drawn once, from the rewrite's seed, so the same picture has the
    same answer in any batch.
    """

    masks: Tensor

    def __init__(self, backbone: Any, task: Classify, rewrite: AddHeads):
        super().__init__(backbone, task)
        head = backbone.get_classifier()
        self.robust_head, self.combined_head = copy.deepcopy(head), copy.deepcopy(head)
        self.rewrite = rewrite
        like = next(head.parameters())
        width = int(getattr(head, "in_features", 0) or backbone.head_hidden_size)
        draws = torch.rand((rewrite.passes, width), generator=rng.generator(rewrite.seed, "three heads"))
        masks = (draws >= rewrite.dropout).to(like) / (1 - rewrite.dropout)
        self.register_buffer("masks", masks, persistent=False)

    @property
    def original(self) -> Classifier:
        """The classifier with the clean head alone, on the same weights."""
        return Classifier(self.backbone, self.task)

    def vector(self, image: Tensor) -> Float[Tensor, "b c"]:
        """What the heads read, of pixels."""
        net: Any = self.backbone
        made: Tensor = net.forward_head(net.forward_features(self.prepared(image)), pre_logits=True)
        return made

    def heads(self, vector: Float[Tensor, "b c"]) -> dict[str, Float[Tensor, "b k"]]:
        """Logits of the three heads."""
        return {name: self.head(name)(vector) for name in HEADS}

    def head(self, name: str) -> nn.Module:
        net: Any = self.backbone
        module: nn.Module = net.get_classifier() if name == "clean" else getattr(self, f"{name}_head")
        return module

    def uncertainty(self, vector: Float[Tensor, "b c"], name: str) -> Float[Tensor, " b"]:
        """Entropy, in nats, of a head's mean answer under the dropout masks."""
        dropped = (vector[None] * self.masks[:, None]).flatten(0, 1)
        mean = self.head(name)(dropped).softmax(-1).unflatten(0, (len(self.masks), -1)).mean(0)
        return -(mean * mean.clamp(min=1e-12).log()).sum(-1)

    def choice(self, vector: Float[Tensor, "b c"], logits: dict[str, Tensor]) -> Int[Tensor, " b"]:
        """0 where the clean head answers, 1 where the robust one does."""
        both = logits["combined"].log_softmax(-1)
        products = [
            F.kl_div(logits[name].log_softmax(-1), both, reduction="none", log_target=True).sum(-1)
            * self.uncertainty(vector, name)
            for name in ("clean", "robust")
        ]
        return (products[1] < products[0]).long()

    def head_used(self, image: Tensor) -> Int[Tensor, " b"]:
        """Which head answers for pixels (b, 3, h, w): 0 clean, 1 robust."""
        vector = self.vector(image)
        return self.choice(vector, self.heads(vector))

    def forward(self, image: Tensor) -> Float[Tensor, "b k"]:
        vector = self.vector(image)
        logits = self.heads(vector)
        robust = self.choice(vector, logits).bool()[:, None]
        return torch.where(robust, logits["robust"], logits["clean"])


@dataclass(frozen=True, kw_only=True)
class AddHeads:
    """Rewrite: a robust and a combined head beside the classifier, as copies of it; answers stay the same until they
    are taught (`recipes.robustify`).

    passes: dropout passes of the choice between the heads. dropout: share of the feature that each leaves out.
    seed: of the dropout masks.
    """

    passes: int = 10
    dropout: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        if self.passes < 1:
            raise AdviceError(f"passes is at least 1, not {self.passes}.")
        if not 0 <= self.dropout < 1:
            raise AdviceError(f"dropout is a share in [0, 1), not {self.dropout}.")

    def __call__(self, model: nn.Module, example: Tensor | None = None) -> ThreeHeads:
        """A copy of `model` (what Classify built, or a backbone with a classifier) with three heads, in eval mode.

        example: pixels (b, 3, h, w), on which the answers must be as before; None leaves that unchecked.
        AdviceError when the classifier is no single head on the pooled vector.
        """
        task = getattr(model, "task", None)
        inner: Any = copy.deepcopy(getattr(model, "backbone", model))
        name = type(inner).__name__
        if not all(hasattr(inner, part) for part in ("forward_features", "forward_head", "get_classifier")):
            raise AdviceError(
                f"{name} does not part its features from its classifier (forward_features, forward_head, "
                "get_classifier), so it cannot get more heads; take one of lynceus.create_model."
            )
        head = inner.get_classifier()
        if not isinstance(head, nn.Module) or not any(True for _ in head.parameters()):
            raise AdviceError(f"{name} has no single classifier with weights to copy; it gives {type(head).__name__}.")
        if task is None:
            task = Classify(num_classes=int(inner.num_classes))
        if not isinstance(task, Classify) or task.multi_label:
            raise AdviceError("Three heads are for classifiers of one label per picture.")
        made = ThreeHeads(inner, task, self).eval()
        if example is not None:
            with torch.no_grad():
                was = model.training
                want = Classifier(getattr(model, "backbone", model).eval(), task)(example)
                model.train(was)
                have = made.heads(made.vector(example))["clean"]
            if have.shape != want.shape or not torch.allclose(have, want, rtol=1e-3, atol=1e-3):
                raise AdviceError(f"The answers of {name} are not one head's on its pooled vector; it gets no others.")
        return made
