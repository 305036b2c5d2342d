"""Rules that translate the parameter names of one implementation into those of another, value transforms included."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from lynceus.core.errors import AdviceError


@dataclass(frozen=True, kw_only=True, slots=True)
class Rule:
    """One rewriting step, applied to every foreign name in order; all matching rules apply, one after the other.

    pattern: regular expression, used with `re.sub` on the whole name (anchor it with ^ and $ where that matters).
    name: its replacement ("\\\\1" groups allowed); None drops the entry (buffers that are always rebuilt).
    transform: applied to the value when the pattern matches: a name of `TRANSFORMS` below
      ("transpose", "squeeze", "hwio_to_oihw" ...) or a function Tensor -> Tensor.
    """

    pattern: str
    name: str | None
    transform: str | Callable[[Tensor], Tensor] | None = None


TRANSFORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "transpose": lambda t: t.transpose(0, 1),
    "squeeze": lambda t: t.squeeze(),
    "hwio_to_oihw": lambda t: t.permute(3, 2, 0, 1),
    "linear_to_conv": lambda t: t[:, :, None, None],
    "conv_to_linear": lambda t: t.flatten(1),
}


def apply_rules(rules: Sequence[Rule], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state under our names. A rule with name None drops the entry. Two names that become one are an AdviceError."""
    out: dict[str, Tensor] = {}
    origin: dict[str, str] = {}
    for name, value in state.items():
        new: str | None = name
        for rule in rules:
            if new is not None and re.search(rule.pattern, new):
                if rule.transform is not None:
                    value = (TRANSFORMS[rule.transform] if isinstance(rule.transform, str) else rule.transform)(value)
                new = None if rule.name is None else re.sub(rule.pattern, rule.name, new)
        if new is None:
            continue
        if new in out:
            raise AdviceError(f"Both {origin[new]!r} and {name!r} become {new!r}; one of the rules is too wide.")
        out[new], origin[new] = value, name
    return out
