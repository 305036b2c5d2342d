"""One way to name a model on the command line: a name of ours, timm:NAME, a run folder, an exported model file; for
checks also the address of a service, or python:MODULE:NAME for a function of pixels."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lynceus.core.errors import AdviceError, MissingError, unknown

if TYPE_CHECKING:
    from torch import nn

    from lynceus.core.subject import Subject

SAYS = ("pretrained_cfg", "default_cfg", "mean")  # where a module says how it wants its pixels
MODEL_HELP = "a name of `lynceus models`, timm:NAME, or the run folder of a trained model"


def looks_like_path(text: str) -> bool:
    return Path(text).exists() or "/" in text or "\\" in text or text.endswith((".safetensors", ".json"))


def is_name(text: str) -> bool:
    """Whether `text` names a kind of model, with no weights: neither a file, an address nor a Python name."""
    others = text.startswith(("http://", "https://", "python:"))
    return not others and (text.startswith("timm:") or not looks_like_path(text))


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


def open_subject(
    text: str,
    *,
    weights: Path | None = None,
    num_classes: int | None = None,
    classes: Sequence[str] | None = None,
    size: int | None = None,
) -> Subject:
    """What `text` names as a check sees it: a model as in `open_model`, http://HOST/PATH, or python:MODULE:NAME."""
    from lynceus.core.subject import Subject

    if text.startswith(("http://", "https://")):
        from lynceus.core.remote import served

        subject = served(text)  # the names of its classes are not known; the data has its own
        return Subject(subject, size=size, name=text, needs_grad=False) if size else subject
    if text.startswith("python:"):
        found = _function(text)
        name = text.removeprefix("python:")
        if takes_pixels(found):
            return Subject(found, size=size, name=name, mean=(0.0,) * 3, std=(1.0,) * 3)
        return Subject(found, size=size, name=name)
    return Subject(open_model(text, weights=weights, num_classes=num_classes), size=size)


def takes_pixels(value: Any) -> bool:
    """Whether `value` is a module that says nothing of a mean and deviation of its own: as any function that
    python:MODULE:NAME names, it is then given pixels in [0, 1] as they are."""
    from torch import nn

    if not isinstance(value, nn.Module) or getattr(value, "owns_pixels", False):
        return False
    return not any(isinstance(getattr(value, n, None), dict | tuple | list) for n in SAYS)


def _function(text: str) -> Any:
    """The function or module (not a class) that python:MODULE:NAME names; MODULE is also looked for in this folder."""
    _, _, place = text.partition(":")
    module, _, name = place.partition(":")
    if not module or not name:
        raise AdviceError(f"{text!r} names no function; write python:MODULE:NAME, such as python:mine:predict.")
    sys.path.insert(0, str(Path.cwd()))
    try:
        found = import_module(module)
    except ModuleNotFoundError as error:
        raise MissingError(
            f"There is no Python module {error.name!r} (asked for by {text!r}); it is looked for in {Path.cwd()} and "
            "among the installed packages."
        ) from None
    finally:
        sys.path.remove(str(Path.cwd()))
    if not hasattr(found, name):
        raise unknown(f"name in {module}", name, [n for n in vars(found) if not n.startswith("_")])
    value = getattr(found, name)
    if isinstance(value, type):
        raise AdviceError(
            f"{text!r} is the class {name}, not a model of it. Write a line such as `model = {name}().eval()` in "
            f"{module}, with its weights loaded, and name python:{module}:model."
        )
    if not callable(value):
        raise AdviceError(f"{text!r} is no function of images (b, 3, h, w) but a {type(value).__name__}.")
    return value


def size_of(model: nn.Module, wanted: int | tuple[int, int] | None = None) -> tuple[int, int]:
    """Height and width of an example for `model`: what is wanted, else what the model was made for."""
    inner = getattr(model, "backbone", model)
    size: Any = wanted or getattr(model, "image_size", None) or getattr(inner, "input_size", (224, 224))
    height, width = (size, size) if isinstance(size, int) else size
    return height, width


def twin_of(text: str, *, weights: Path | None = None, num_classes: int | None = None) -> tuple[str, str]:
    """(import line, expression) that make the same model in Python."""
    if text.startswith(("http://", "https://")):
        return "from lynceus.core.remote import served", f"served({text!r})"
    if text.startswith("python:"):
        _, module, name = text.split(":", 2)
        return f"from {module} import {name}", name
    if not text.startswith("timm:") and looks_like_path(text):
        return "from lynceus.train.checkpoint import load_model", f"load_model({text!r})"
    more = "".join(
        f", {name}={value!r}"
        for name, value in (("weights", str(weights) if weights else None), ("num_classes", num_classes))
        if value
    )
    return "from lynceus import create_model", f"create_model({text!r}{more})"
