"""Floor 6: a vision server that shows where the milliseconds go. `serve` starts one; `Pipeline` works without HTTP."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lynceus.serve.config import Chain as Chain
    from lynceus.serve.config import ServeConfig as ServeConfig
    from lynceus.serve.config import Step as Step
    from lynceus.serve.engine import Answer as Answer
    from lynceus.serve.pipeline import Pipeline as Pipeline
    from lynceus.serve.server import Server as Server
    from lynceus.serve.server import serve as serve
    from lynceus.serve.spans import SPANS as SPANS
    from lynceus.serve.spans import Trace as Trace

_DOORS = {
    "SPANS": "lynceus.serve.spans",
    "Trace": "lynceus.serve.spans",
    "Chain": "lynceus.serve.config",
    "ServeConfig": "lynceus.serve.config",
    "Step": "lynceus.serve.config",
    "Answer": "lynceus.serve.engine",
    "Pipeline": "lynceus.serve.pipeline",
    "Server": "lynceus.serve.server",
    "serve": "lynceus.serve.server",
}


def __getattr__(name: str) -> Any:
    if name in _DOORS:
        return getattr(import_module(_DOORS[name]), name)
    raise AttributeError(f"module 'lynceus.serve' has no attribute {name!r}; it has {', '.join(sorted(_DOORS))}")
