"""Rules that translate the parameter names of one implementation into those of another, value transforms included."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Rule:
    """One rewriting step, applied to every foreign name in order; all matching rules apply, one after the other.

    pattern: regular expression, used with `re.sub` on the whole name (anchor it with ^ and $ where that matters).
    name: its replacement ("\\\\1" groups allowed); None drops the entry (buffers that are always rebuilt).
    transform: applied to the value when the pattern matches: a name of `lynceus.reengineer.importer.TRANSFORMS`
      ("transpose", "squeeze", "hwio_to_oihw" ...) or a function Tensor -> Tensor.
    """

    pattern: str
    name: str | None
    transform: str | Callable[[Tensor], Tensor] | None = None
