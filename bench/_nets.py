"""The small plain CNNs of the measurements: four 3x3 convolutions, nothing else."""

import torch
from torch import Tensor, nn


class ConvNet(nn.Module):
    """Four 3x3 convolutions (w, 2w, 4w, 4w channels) with batch norm and ReLU, and a linear classifier.

    The map is halved three times: by max pooling after the convolutions, or by their strides (cheaper, weaker)."""

    mean, std = (0.49, 0.48, 0.45), (0.25, 0.24, 0.26)

    def __init__(self, width: int, classes: int, *, pooled: bool = False):
        super().__init__()
        layers: list[nn.Module] = []
        previous = 3
        for channels, stride in ((width, 2), (2 * width, 2), (4 * width, 2), (4 * width, 1)):
            conv = nn.Conv2d(previous, channels, 3, stride=1 if pooled else stride, padding=1, bias=False)
            layers += [conv, nn.BatchNorm2d(channels), nn.ReLU()]
            layers += [nn.MaxPool2d(2)] if pooled and stride == 2 else []
            previous = channels
        self.layers = nn.Sequential(*layers)
        self.head, self.num_classes = nn.Linear(previous, classes), classes

    def forward_features(self, image: Tensor) -> Tensor:
        return self.layers(image)

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        pooled = features.mean((2, 3))
        return pooled if pre_logits else self.head(pooled)

    def forward(self, image: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(image))


class RandomFilters(nn.Module):
    """Four untrained convolutions; the last map pooled to 2x2 gives 1024 numbers."""

    def __init__(self, seed: int = 0, channels: tuple[int, ...] = (32, 64, 128, 256)):
        super().__init__()
        layers: list[nn.Module] = []
        previous = 3
        draw = torch.Generator().manual_seed(seed)
        for width in channels:
            conv = nn.Conv2d(previous, width, 3, stride=2, padding=1, bias=False)
            with torch.no_grad():
                conv.weight.copy_(torch.randn(conv.weight.shape, generator=draw) * (2 / (9 * previous)) ** 0.5)
            layers += [conv, nn.ReLU()]
            previous = width
        self.layers = nn.Sequential(*layers)

    def forward_features(self, image: Tensor) -> Tensor:
        return self.layers(image)

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        return nn.functional.adaptive_avg_pool2d(features, 2).flatten(1)

    def forward(self, image: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(image))


def build(capacity: str, classes: int) -> nn.Module:
    """capacity: the width as text; the pooled network."""
    return ConvNet(int(capacity), classes, pooled=True)
