"""The networks of video, skeletons and tokens by name: `create("x3d_xs")`, which "cox3d_xs" means too."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from lynceus.backbones._weights import load_weights
from lynceus.core.config import changed
from lynceus.core.errors import unknown
from lynceus.core.rules import Rule

AUTHORS: tuple[Rule, ...] = (  # the authors' parameter names -> ours
    # X3D: numbers are places in containers
    Rule(pattern=r"^(s\d\.pathway0_\w+)(?:\.\d+)+\.", name=r"\1."),
    Rule(pattern=r"\.branch2\.se\.\d+\.", name=".branch2.se."),
    # ST-GCN
    Rule(pattern=r"^(layers\.layer\d+)\.0\.[01]\.", name=r"\1."),
    Rule(pattern=r"^data_bn\.", name="joints_in.norm."),
    # stack of convolutions: the identity comes first in a residual
    Rule(pattern=r"^(res2?)\.1\.", name=r"\1.fn."),
    # encoders
    Rule(pattern=r"\._ff_block\.(?:1|fn)\.", name="."),
    *[Rule(pattern=r"^((?:layers|norm)\b[\w.]*?)\.fn\.", name=r"\1.")] * 2,
    Rule(pattern=r"^layers\.(\d+)\.[01]\.(?=self_attn|norm|linear)", name=r"layers.\1."),
)
MODULES = ("x3d", "st_gcn", "encoder")


def variants() -> dict[str, ModuleType]:
    """Every name -> the module that has it in VARIANTS."""
    modules = [import_module(f"lynceus.rewrite.streaming.{m}") for m in MODULES]
    return {name: m for m in modules for name in m.VARIANTS}


def known(name: str) -> str | None:
    """The name of the table that `name` means, or None."""
    table = variants()
    return next((n for n in (name, name.removeprefix("co")) if n in table), None)


def create(name: str, *, weights: str | Path | None = None, **changes: Any) -> nn.Module:
    """A network in eval mode. weights: a checkpoint of ours or the authors'; None: fresh weights. changes: to the
    fields of its configuration. AdviceError for a name or field that is not there, or weights that do not fit."""
    found = known(name)
    if found is None:
        raise unknown("network of sequences", name, variants())
    module = variants()[found]
    made: nn.Module = module.build(changed(module.VARIANTS[found], changes, kind=found), found)
    if weights is not None:
        load_weights(made, weights, rules=AUTHORS)
    return made.eval()


def frame_shape(model: Any) -> tuple[int, ...] | None:
    """(c, ...) of a frame that a network of the table was made for; None for others."""
    builder = getattr(model, "builder", "")
    if not str(builder).startswith("lynceus.rewrite.streaming."):
        return None
    shape: tuple[int, ...] = import_module(str(builder).partition(":")[0]).frame_shape(model.config)
    return shape
