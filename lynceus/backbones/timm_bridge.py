"""Ours for the others: timm, segmentation_models_pytorch and torchvision's detectors take lynceus backbones by name.

    from lynceus.backbones import timm_bridge
    timm_bridge.register()
    timm.create_model("lynceus_swin_tiny", features_only=True)
    segmentation_models_pytorch.Unet("tu-lynceus_resnet50", encoder_weights=None)
    torchvision.models.detection.FasterRCNN(timm_bridge.fpn_backbone("convnext_tiny"), num_classes=91)

Nothing is registered by importing. A columnar network (ViT) is also there as a pyramid, "lynceus_vit_small_pyramid",
for decoders that need several strides.
"""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from lynceus.backbones import create_model
from lynceus.backbones._base import Backbone
from lynceus.backbones._table import family_module, variants
from lynceus.backbones.pyramid import Pyramid, as_pyramid
from lynceus.core.errors import AdviceError, OptionError

PREFIX = "lynceus_"
COLUMNAR = frozenset({"plain_mamba", "vim", "vit"})  # families that are registered as pyramids too


def register() -> list[str]:
    """Makes every model of ours known to timm in this process; returns the names. Calling it again does nothing."""
    import timm
    from timm.models import register_model

    names = []
    for name, family in variants().items():
        for pyramid in (False, True) if family in COLUMNAR else (False,):
            full = f"{PREFIX}{name}{'_pyramid' if pyramid else ''}"
            names.append(full)
            if not timm.is_model(full):
                register_model(_entrypoint(name, full, pyramid))
    return names


def _entrypoint(name: str, full: str, pyramid: bool) -> Callable[..., nn.Module]:
    def make(pretrained: bool = False, **options: Any) -> nn.Module:
        return _make(name, pyramid, pretrained, options)

    make.__name__ = make.__qualname__ = full
    make.__module__ = __name__
    make.__doc__ = f"lynceus.create_model({name!r})" + (" with a simple feature pyramid." if pyramid else ".")
    setattr(sys.modules[__name__], full, make)
    return make


def _make(name: str, pyramid: bool, pretrained: bool, options: dict[str, Any]) -> nn.Module:
    if pretrained:
        raise AdviceError(
            f"lynceus brings no weights for {name}: pass pretrained=False (encoder_weights=None), and load yours with "
            f"lynceus.create_model({name!r}, weights=FILE)."
        )
    for unused in ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"):
        options.pop(unused, None)
    features_only, out_indices = options.pop("features_only", False), options.pop("out_indices", None)
    if options.get("output_stride", 32) != 32:
        raise OptionError(f"{name} has fixed strides; leave output_stride out.")
    options.pop("output_stride", None)
    if "img_size" in options:
        size = options.pop("img_size")
        config = family_module(variants()[name]).VARIANTS[name]
        if "image_size" in {f.name for f in fields(config)}:  # the other families take any size anyway
            options["image_size"] = (size, size) if isinstance(size, int) else tuple(size)
    model: Backbone = create_model(name, **options)
    if pyramid:
        model = Pyramid(model)
    model.train()  # timm's models start in train mode
    return _maps_only(model, out_indices) if features_only else model


def _maps_only(model: Backbone, out_indices: Any) -> Any:
    from timm.models._features import FeatureGetterNet

    take = model.take_indices(out_indices)
    cfg = model.pretrained_cfg
    getter: Any = FeatureGetterNet(model, out_indices=tuple(take))
    getter.pretrained_cfg = getter.default_cfg = {**cfg, "num_classes": 0}
    return getter


class FPNBackbone(nn.Module):
    """A backbone under a feature pyramid network, as torchvision's detectors want it: image -> ordered maps of
    `out_channels` channels, named "0", "1" ... and "pool". Takes normalised images, as Backbone does."""

    def __init__(self, backbone: Backbone, out_channels: int = 256):
        from torchvision.ops import FeaturePyramidNetwork
        from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

        super().__init__()
        self.body = as_pyramid(backbone)
        self.body.reset_classifier(0)
        self.fpn = FeaturePyramidNetwork([s.channels for s in self.body.stages], out_channels, LastLevelMaxPool())
        self.out_channels = out_channels
        self.mean, self.std = self.body.mean, self.body.std

    @property
    def strides(self) -> list[int]:
        """Of the maps that come out, "pool" included."""
        strides = [s.stride for s in self.body.stages]
        return [*strides, 2 * strides[-1]]

    def forward(self, image: Float[Tensor, "b c h w"]) -> OrderedDict[str, Tensor]:
        maps = OrderedDict((str(i), m) for i, m in enumerate(self.body.forward_stages(image)))
        return self.fpn(maps)


def fpn_backbone(
    name: str, *, out_channels: int = 256, in_chans: int = 3, weights: str | Path | None = None, **changes: Any
) -> FPNBackbone:
    """A backbone by any name of `create_model` (also "timm:NAME") under a feature pyramid network, in train mode."""
    model = create_model(name, in_chans=in_chans, weights=weights, **changes)
    return FPNBackbone(model, out_channels).train()


def faster_rcnn(
    name: str,
    *,
    num_classes: int,
    out_channels: int = 256,
    min_size: int = 800,
    max_size: int = 1333,
    weights: str | Path | None = None,
) -> nn.Module:
    """torchvision's Faster R-CNN on a backbone of any name. It takes lists of pixels in [0, 1] and normalises inside.

    num_classes: with the background. Anchors have the side of eight strides on each level. weights: of the backbone.
    """
    from torchvision.models.detection import FasterRCNN
    from torchvision.models.detection.anchor_utils import AnchorGenerator
    from torchvision.ops import MultiScaleRoIAlign

    backbone = fpn_backbone(name, out_channels=out_channels, weights=weights)
    sizes = tuple((8 * s,) for s in backbone.strides)
    levels = [str(i) for i in range(len(backbone.body.stages))]
    return FasterRCNN(
        backbone,
        num_classes=num_classes,
        min_size=min_size,
        max_size=max_size,
        image_mean=list(backbone.mean),
        image_std=list(backbone.std),
        rpn_anchor_generator=AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * len(sizes)),
        box_roi_pool=MultiScaleRoIAlign(levels, output_size=7, sampling_ratio=2),
    )
