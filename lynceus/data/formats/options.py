"""What the door passes to every format."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """labels: False ignores labels, an array gives them. columns: role -> name. max_bad: see `open_dataset`."""

    labels: Any = None
    columns: Mapping[str, str] = field(default_factory=dict)
    max_bad: int | float = 0.05
