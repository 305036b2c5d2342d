"""Floor 2: what to predict, on any backbone. `TASKS` is the one table of tasks: name -> (module, class)."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from lynceus.core.errors import unknown

TASKS: dict[str, tuple[str, str]] = {
    "classify": ("lynceus.tasks.classify", "Classify"),
}


def task_class(name: str) -> Any:
    """The task's dataclass by its name; an unknown name is an error that says the nearest."""
    if name not in TASKS:
        raise unknown("task", name, TASKS)
    module, attribute = TASKS[name]
    return getattr(import_module(module), attribute)
