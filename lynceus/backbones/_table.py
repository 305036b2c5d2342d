"""The one table of families: family -> module, which holds `VARIANTS: dict[str, Config]` and `build(config)`."""

from __future__ import annotations

import fnmatch
from importlib import import_module
from types import ModuleType

FAMILIES: dict[str, str] = {
    "convit": "lynceus.backbones.convit",
    "convnext": "lynceus.backbones.convnext",
    "lsnet": "lynceus.backbones.lsnet",
    "halonet": "lynceus.backbones.halonet",
    "cvt": "lynceus.backbones.cvt",
    "hornet": "lynceus.backbones.hornet",
    "hyena_vit": "lynceus.backbones.hyena_vit",
    "plain_mamba": "lynceus.backbones.plain_mamba",
    "resnas": "lynceus.backbones.resnas",
    "resnet": "lynceus.backbones.resnet",
    "sam_vit": "lynceus.backbones.sam_vit",
    "soft": "lynceus.backbones.soft",
    "spartan": "lynceus.backbones.spartan",
    "swin": "lynceus.backbones.swin",
    "swin_v2": "lynceus.backbones.swin_v2",
    "vim": "lynceus.backbones.vim",
    "vit": "lynceus.backbones.vit",
    "volo": "lynceus.backbones.volo",
}


def family_module(family: str) -> ModuleType:
    return import_module(FAMILIES[family])


def variants() -> dict[str, str]:
    """Every model name -> its family, sorted by name."""
    names = {name: family for family in FAMILIES for name in family_module(family).VARIANTS}
    return dict(sorted(names.items()))


def matching(pattern: str) -> list[str]:
    return [name for name in variants() if fnmatch.fnmatch(name, pattern)]
