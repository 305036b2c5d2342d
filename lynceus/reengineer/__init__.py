"""Floor 5: bring a published model in, and show that it is the same one. Names are loaded when first used.

inspect a checkpoint, map its names, compare records (parity) and models (diff), keep golden records, compare training,
environments, write model cards, and log defects.
"""

from importlib import import_module
from typing import Any

_ROOMS = ("card", "defects", "divergence", "env", "golden", "importer", "inspect", "parity", "training")
_DOORS = {
    "map_keys": "lynceus.reengineer.importer",
    "diff": "lynceus.reengineer.divergence",
    "train_check": "lynceus.reengineer.training",
    "bisect": "lynceus.reengineer.training",
}

__all__ = [*_ROOMS, *_DOORS]


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return import_module(f"lynceus.reengineer.{name}")
    if name in _DOORS:
        return getattr(import_module(_DOORS[name]), name)
    raise AttributeError(f"module 'lynceus.reengineer' has no attribute {name!r}; it has {', '.join(sorted(__all__))}")


def __dir__() -> list[str]:
    return sorted(__all__)
