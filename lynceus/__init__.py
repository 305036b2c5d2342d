"""Lynceus: which vision model should I take for my images, can I trust it, and how do I make it small and fast?

Five nouns: Backbone, Task, Recipe, Rewrite, Check (see `lynceus.core.nouns`). Names are loaded when first used, so that
`import lynceus` costs nothing and `lynceus --help` never imports torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from lynceus.backbones import create_model as create_model
    from lynceus.backbones import list_models as list_models
    from lynceus.core.nouns import Check as Check
    from lynceus.core.nouns import Recipe as Recipe
    from lynceus.core.nouns import Rewrite as Rewrite
    from lynceus.core.nouns import Task as Task
    from lynceus.core.nouns import chain as chain
    from lynceus.core.report import Report as Report
    from lynceus.core.subject import Subject as Subject
    from lynceus.core.types import Prediction as Prediction
    from lynceus.core.types import Sample as Sample
    from lynceus.train.fit import FitConfig as FitConfig
    from lynceus.train.fit import fit as fit

_DOORS = {
    "create_model": "lynceus.backbones",
    "list_models": "lynceus.backbones",
    "Backbone": "lynceus.backbones",
    "Task": "lynceus.core.nouns",
    "Recipe": "lynceus.core.nouns",
    "Rewrite": "lynceus.core.nouns",
    "Check": "lynceus.core.nouns",
    "chain": "lynceus.core.nouns",
    "Sample": "lynceus.core.types",
    "Prediction": "lynceus.core.types",
    "Subject": "lynceus.core.subject",
    "Report": "lynceus.core.report",
    "cost": "lynceus.core.cost",
    "fit": "lynceus.train.fit",
    "FitConfig": "lynceus.train.fit",
}
_ROOMS = (
    "core",
    "layers",
    "backbones",
    "tasks",
    "data",
    "train",
    "recipes",
    "rewrite",
    "trust",
    "reengineer",
    "gauntlet",
)

__all__ = ["__version__", *_DOORS, *_ROOMS]


def __getattr__(name: str) -> Any:
    if name in _DOORS:
        return getattr(import_module(_DOORS[name]), name)
    if name in _ROOMS:
        return import_module(f"lynceus.{name}")
    raise AttributeError(f"module 'lynceus' has no attribute {name!r}; it has {', '.join(sorted(_DOORS))}")


def __dir__() -> list[str]:
    return sorted(__all__)
