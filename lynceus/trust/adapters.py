"""A subject as the models of other robustness libraries, whose attacks then see the same pixels in [0, 1].

foolbox: bethgelab/foolbox (MIT), extra `lynceus[trust]`. ART: Trusted-AI/adversarial-robustness-toolbox (MIT), to be
installed by whoever wants it. captum takes any function of pixels: the subject itself.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lynceus.core.errors import MissingError, missing_extra
from lynceus.core.subject import Subject


class AsModule(nn.Module):
    """A subject as a module: pixels in [0, 1] to logits."""

    def __init__(self, subject: Subject):
        super().__init__()
        self.subject = subject
        if isinstance(subject.model, nn.Module):
            self.inner = subject.model  # registered, so that parameters and devices are found
        self.eval()

    def forward(self, image: Tensor) -> Tensor:
        return self.subject(image)


def to_foolbox(subject: Subject) -> Any:
    """`foolbox.PyTorchModel` with bounds (0, 1); attack it with torch tensors."""
    try:
        import foolbox
    except ImportError:
        raise missing_extra("foolbox", "trust", use="An attack of foolbox") from None
    return foolbox.PyTorchModel(AsModule(subject), bounds=(0, 1), device=subject.device)


def to_art(subject: Subject, *, shape: tuple[int, int, int], classes: int) -> Any:
    """ART's `PyTorchClassifier` with clip values (0, 1); `shape` is that of one image (c, h, w). It takes numpy."""
    try:
        from art.estimators.classification import PyTorchClassifier
    except ImportError:
        raise MissingError(
            "An attack of ART needs the package 'art', which is not installed: "
            "pip install adversarial-robustness-toolbox"
        ) from None
    return PyTorchClassifier(
        model=AsModule(subject),
        loss=torch.nn.CrossEntropyLoss(),
        input_shape=shape,
        nb_classes=classes,
        clip_values=(0.0, 1.0),
        device_type=subject.device.type,
    )
