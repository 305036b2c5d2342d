"""Stand-ins for the paper's four tasks, all on MobileNetV3: what differs is how much the answer weighs.

Weights are drawn, not learnt: what is measured is time, and answers are as large as real ones. Detection is
torchvision's SSDlite, segmentation its LR-ASPP with 21 classes, depth the same with one channel.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from lynceus.core.errors import unknown
from lynceus.core.rng import borrowed
from lynceus.core.types import Prediction

TASKS = ("classification", "segmentation", "detection", "depth")
SIDES = {"classification": 224, "segmentation": 224, "detection": 320, "depth": 224}


class Dense(nn.Module):
    """LR-ASPP: a class map per picture, or a depth map."""

    owns_pixels = True

    def __init__(self, *, depth: bool):
        super().__init__()
        from torchvision.models.segmentation import lraspp_mobilenet_v3_large

        self.depth = depth
        self.net = lraspp_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=1 if depth else 21)

    def forward(self, image: Tensor) -> list[Prediction]:
        found = self.net(image)["out"]
        if self.depth:
            return [Prediction(depth=d) for d in F.softplus(found[:, 0]).mul(100).round() / 100]
        return [Prediction(segments=s) for s in found.argmax(1)]


class Boxes(nn.Module):
    """SSDlite: at most 50 boxes per picture."""

    owns_pixels = True

    def __init__(self) -> None:
        super().__init__()
        from torchvision.models.detection import ssdlite320_mobilenet_v3_large

        self.net = ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None, detections_per_img=50)

    def forward(self, image: Tensor) -> list[Prediction]:
        return [
            Prediction(boxes=f["boxes"], classes=f["labels"], scores=f["scores"])
            for f in self.net(list(image.unbind()))
        ]


def network(task: str) -> Any:
    """The stand-in of a task, as `serve` takes it; give it pictures of SIDES[task]."""
    with borrowed(0, task):
        if task == "classification":
            from torchvision.models import mobilenet_v3_small

            return mobilenet_v3_small(weights=None).eval()
        if task == "segmentation":
            return Dense(depth=False).eval()
        if task == "depth":
            return Dense(depth=True).eval()
        if task == "detection":
            return Boxes().eval()
    raise unknown("task", task, TASKS)
