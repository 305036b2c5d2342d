"""The networks of video, skeletons and tokens by name: `create("x3d_xs")`, which "cox3d_xs" means too."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType
from typing import Any

from torch import nn

from lynceus.core.config import changed
from lynceus.core.errors import unknown

MODULES = ("x3d", "st_gcn", "encoder")


def variants() -> dict[str, ModuleType]:
    """Every name -> the module that has it in VARIANTS."""
    modules = [import_module(f"lynceus.rewrite.streaming.{m}") for m in MODULES]
    return {name: m for m in modules for name in m.VARIANTS}


def known(name: str) -> str | None:
    """The name of the table that `name` means, or None."""
    table = variants()
    return next((n for n in (name, name.removeprefix("co")) if n in table), None)


def create(name: str, **changes: Any) -> nn.Module:
    """A network with fresh weights in eval mode. changes: to the fields of its configuration."""
    found = known(name)
    if found is None:
        raise unknown("network of sequences", name, variants())
    module = variants()[found]
    made: nn.Module = module.build(changed(module.VARIANTS[found], changes, kind=found), found)
    return made.eval()


def frame_shape(model: Any) -> tuple[int, ...] | None:
    """(c, ...) of a frame that a network of the table was made for; None for others."""
    builder = getattr(model, "builder", "")
    if not str(builder).startswith("lynceus.rewrite.streaming."):
        return None
    shape: tuple[int, ...] = import_module(str(builder).partition(":")[0]).frame_shape(model.config)
    return shape
