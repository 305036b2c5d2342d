"""Rules of `group_matcher` for a network that stands inside another one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def inside(rules: dict[str, Any], parent: str) -> dict[str, Any]:
    """The rules of a network for its parameters under the name of the module `parent` that holds it."""
    return {k: _below(v, parent) for k, v in rules.items()}


def _below(rule: Any, parent: str) -> Any:
    if isinstance(rule, str):
        # timm matches at the beginning of a name, so "^a|b" means "^(a|b)"
        return f"^{parent}\\.(?:{rule.replace('^', '')})" if "^" in rule else f"^{parent}\\..*{rule}"
    if isinstance(rule, Sequence):
        return [(_below(first, parent), *rest) for first, *rest in rule]
    return rule
