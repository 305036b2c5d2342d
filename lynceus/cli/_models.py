"""One way to name a model on the command line: a name of ours, timm:NAME, a run folder, or an exported model file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from lynceus.core.errors import MissingError

if TYPE_CHECKING:
    from torch import nn

MODEL_HELP = "a name of `lynceus models`, timm:NAME, or the run folder of a trained model"


def looks_like_path(text: str) -> bool:
    return Path(text).exists() or "/" in text or "\\" in text or text.endswith((".safetensors", ".json"))


def open_model(text: str, *, weights: Path | None = None, num_classes: int | None = None) -> nn.Module:
    """The module that `text` names, in eval mode: a Task's predictor for run folders, else a fresh backbone."""
    if not text.startswith("timm:") and looks_like_path(text):
        if not Path(text).exists():
            raise MissingError(
                f"There is no model at {Path(text).resolve()}. Give a run folder of `lynceus train`, "
                "or a name of `lynceus models`."
            )
        from lynceus.train.checkpoint import load_model

        return load_model(text)
    from lynceus.backbones import create_model

    return create_model(text, weights=weights, **({} if num_classes is None else {"num_classes": num_classes}))


def size_of(model: nn.Module, wanted: int | tuple[int, int] | None = None) -> tuple[int, int]:
    """Height and width of an example for `model`: what is wanted, else what the model was made for."""
    inner = getattr(model, "backbone", model)
    size: Any = wanted or getattr(model, "image_size", None) or getattr(inner, "input_size", (224, 224))
    height, width = (size, size) if isinstance(size, int) else size
    return height, width


def twin_of(text: str, *, weights: Path | None = None, num_classes: int | None = None) -> tuple[str, str]:
    """(import line, expression) that make the same model in Python."""
    if not text.startswith("timm:") and looks_like_path(text):
        return "from lynceus.train.checkpoint import load_model", f"load_model({text!r})"
    more = "".join(
        f", {name}={value!r}"
        for name, value in (("weights", str(weights) if weights else None), ("num_classes", num_classes))
        if value
    )
    return "from lynceus import create_model", f"create_model({text!r}{more})"
