"""Floor 2: network families. `create_model` makes one by name, `list_models` finds names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lynceus.backbones._base import Backbone as Backbone
from lynceus.backbones._base import BackboneConfig as BackboneConfig
from lynceus.backbones._table import FAMILIES as FAMILIES
from lynceus.backbones._table import family_module, matching, variants
from lynceus.backbones._weights import load_weights as load_weights
from lynceus.core.config import changed
from lynceus.core.errors import unknown


def create_model(
    name: str,
    *,
    num_classes: int = 1000,
    in_chans: int = 3,
    weights: str | Path | None = None,
    **changes: Any,
) -> Backbone:
    """A backbone by name, in eval mode, with freshly initialised weights unless `weights` is given.

    name: one of `list_models()`, or "timm:NAME" for any timm model in the same contract.
    num_classes: outputs of the classifier, 0 for none. in_chans: channels of the image.
    weights: a checkpoint file of ours, the authors', timm or torchvision (.safetensors, .pth, .pt, .bin); strict.
    changes: fields of the family's config; an unknown one is a TypeError that names the nearest field.
    """
    if name.startswith("timm:"):
        from lynceus.backbones.from_timm import create_timm

        model: Backbone = create_timm(
            name.removeprefix("timm:"), num_classes=num_classes, in_chans=in_chans, changes=changes
        )
    else:
        check_name(name)
        table = variants()
        module = family_module(table[name])
        config = changed(
            module.VARIANTS[name],
            {**changes, "num_classes": num_classes, "in_chans": in_chans},
            kind=f"{table[name]} config",
        )
        model = module.build(config)
        model.name = name
    if weights is not None:
        load_weights(getattr(model, "model", model) if name.startswith("timm:") else model, weights)
    return model.eval()


def list_models(pattern: str = "*") -> list[str]:
    """Names of our models that match a shell pattern, e.g. list_models("*nano*")."""
    return matching(pattern)


def check_name(name: str) -> None:
    """Raises the error that names the nearest model when `name` is none."""
    if name.startswith("timm:"):
        from lynceus.backbones.from_timm import check_timm

        check_timm(name.removeprefix("timm:"))
    elif name not in variants():
        raise unknown(
            "model", name, variants(), how="lynceus.list_models('*') lists all; 'timm:NAME' takes any of timm."
        )
