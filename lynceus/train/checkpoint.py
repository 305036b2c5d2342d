"""Checkpoints: the state a run resumes from (one file, written atomically) and predictors (safetensors that carry the
backbone's name and configuration, the task, its classes and the preprocessing in their header).

Nothing is unpickled: states are read with `torch.load(weights_only=True)`.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, get_type_hints

import torch
from torch import Tensor, nn

import lynceus
from lynceus.backbones import FAMILIES
from lynceus.backbones._hub import rebuild
from lynceus.backbones._table import variants
from lynceus.core.config import from_dict, to_dict
from lynceus.core.errors import AdviceError, MissingError
from lynceus.core.files import write_atomic
from lynceus.tasks import task_class

FORMAT = 1


# what a run resumes from --------------------------------------------------------------------------
def write_state(path: Path, state: dict[str, Any]) -> Path:
    """Writes tensors and plain values; a kill at any moment leaves the old file or the new one."""
    return write_atomic(path, lambda file: torch.save(state, file))


def read_state(path: Path) -> dict[str, Any]:
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
        raise AdviceError(f"{path.resolve()} is no checkpoint of a run ({error}); delete it to start anew.") from None
    return state


# predictors ---------------------------------------------------------------------------------------
def exportable(model: nn.Module) -> bool:
    """True for what `save_model` can write: a Task's module, a Backbone, or what a Rewrite made of one."""
    if hasattr(model, "rewrite") and hasattr(model, "original"):
        return exportable(model.original)  # type: ignore[arg-type]
    return (hasattr(model, "task") and hasattr(model, "backbone")) or (
        hasattr(model, "config") and (hasattr(model, "stages") or hasattr(model, "builder"))
    )


def describe_backbone(backbone: nn.Module) -> dict[str, Any]:
    """Name, configuration and preprocessing of a backbone, as plain values, and how it was rewritten."""
    if hasattr(backbone, "rewrite") and hasattr(backbone, "original"):
        made = describe_backbone(backbone.original)  # type: ignore[arg-type]
        return {**made, "rewrites": [*made.get("rewrites", []), _step(backbone.rewrite)]}
    return {
        "name": str(getattr(backbone, "name", type(backbone).__name__)),
        "config": to_dict(getattr(backbone, "config", None)),
        # networks that are no backbones of images say what builds them: "module:function" of (config, name)
        **({"builder": str(backbone.builder)} if hasattr(backbone, "builder") else {}),
        "mean": [float(v) for v in getattr(backbone, "mean", ())],
        "std": [float(v) for v in getattr(backbone, "std", ())],
    }


def describe_model(model: Any) -> dict[str, Any]:
    """What rebuilds a predictor: written into model.json and the header of the weights."""
    if not exportable(model):
        raise AdviceError(
            f"save_model writes what a Task built or a Backbone, not {type(model).__name__}; "
            "torch.save(model.state_dict(), ...) writes the bare weights."
        )
    # what a Rewrite made: the original, then how it was changed
    if hasattr(model, "rewrite") and hasattr(model, "original"):
        made = describe_model(model.original)
        return {**made, "rewrites": [*made.get("rewrites", []), _step(model.rewrite)]}
    out: dict[str, Any] = {"format": FORMAT, "lynceus": lynceus.__version__}
    if hasattr(model, "task"):
        out |= {"task": type(model.task).name, "options": to_dict(model.task)}
        out["backbone"] = describe_backbone(model.backbone)
    else:
        out |= {"task": None, "backbone": describe_backbone(model)}
    return out


def _step(rewrite: Any) -> dict[str, Any]:
    """A rewrite as plain values."""
    kind = type(rewrite)
    return {"rewrite": f"{kind.__module__}:{kind.__qualname__}", "options": to_dict(rewrite)}


def save_model(model: nn.Module, path: str | Path) -> Path:
    """Writes a predictor to `path`: a file ending in .safetensors, or a folder (model.safetensors and model.json).

    The header of the file holds everything that model.json does, so the one file is enough. Returns the file."""
    from safetensors.torch import save

    path = Path(path)
    file = path if path.suffix == ".safetensors" else path / "model.safetensors"
    text = json.dumps(describe_model(model), indent=2)
    state = {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}
    seen: dict[int, str] = {}
    for name, value in list(state.items()):  # safetensors writes each memory once; tied weights are copied
        if value.data_ptr() in seen and value.numel():
            state[name] = value.clone()
        seen[value.data_ptr()] = name
    write_atomic(file, save(state, metadata={"lynceus": text}))
    if path.suffix != ".safetensors":
        write_atomic(path / "model.json", text)
    return file


def model_file(path: str | Path, *, which: str = "last") -> Path:
    """The .safetensors file that a path means: itself, a predictor's folder, or a run folder (its last or best one)."""
    path = Path(path)
    if which not in ("last", "best"):
        raise AdviceError(f"which is 'last' or 'best', not {which!r}.")
    if path.is_dir():
        tries = [
            path / "checkpoints" / f"{which}.safetensors",
            path / f"{which}.safetensors",
            path / "model.safetensors",
        ]
        found = next((t for t in tries if t.is_file()), None)
        if found is None:
            state = path / "checkpoints" / "last.pt"
            hint = (
                "it holds an unfinished run; finish it with resume=True first." if state.is_file()
                else f"looked for {', '.join(str(t.relative_to(path)) for t in tries)}."
            )  # fmt: skip
            raise MissingError(f"There is no trained model in {path.resolve()}: {hint}")
        return found
    if not path.is_file():
        raise MissingError(
            f"There is no model at {str(path)!r} (looked at {path.resolve()}); give a run folder or a "
            ".safetensors file."
        )
    if path.suffix != ".safetensors":
        raise AdviceError(
            f"{path.name} is no predictor of lynceus (.safetensors). Authors' weights go into a named model: "
            f"create_model(NAME, weights={str(path)!r})."
        )
    return path


def read_description(file: Path) -> dict[str, Any]:
    """The description in the header of a .safetensors file, or in the model.json beside it."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as opened:
            text = (opened.metadata() or {}).get("lynceus")
    except SafetensorError as error:
        raise AdviceError(
            f"{file.resolve()} is not a whole .safetensors file ({error}); it may be truncated."
        ) from None
    if text is None and (file.parent / "model.json").is_file():
        text = (file.parent / "model.json").read_text()
    if text is None:
        raise AdviceError(
            f"{file} holds bare weights without a description, so what they belong to is unknown: "
            f"create_model(NAME, weights={str(file)!r})."
        )
    made: dict[str, Any] = json.loads(text)
    if made.get("format", 0) > FORMAT:
        raise AdviceError(
            f"{file} was written by lynceus {made.get('lynceus')}, newer than this {lynceus.__version__}; "
            "upgrade: pip install -U lynceus"
        )
    return made


def build_backbone(description: dict[str, Any]) -> nn.Module:
    """A backbone, freshly initialised, from what `describe_backbone` gave."""
    name = description["name"]
    if "builder" in description:
        made = _built(description)
        for step in description.get("rewrites", []):
            made = _rewrite(step, "this model")(made, None)
        return made
    if name not in variants() and not name.startswith("timm:"):
        raise AdviceError(
            f"This model's backbone {name!r} is none of this library's families ({', '.join(FAMILIES)}), so it cannot "
            "be rebuilt from the file alone: load_model(path, backbone=YourBackbone(...))."
        )
    made = rebuild(description)
    for step in description.get("rewrites", []):
        made = _rewrite(step, "this model")(made, None)
    return made


def _built(description: dict[str, Any]) -> nn.Module:
    """A network of this library that is no backbone of images, from the function that builds it."""
    module, _, name = str(description["builder"]).partition(":")
    if not module.startswith("lynceus.rewrite.") or name != "build":  # a file must not choose what is called
        raise AdviceError(f"{description['name']} is built by {description['builder']}, which is not of this library.")
    build = getattr(import_module(module), name)
    kind = get_type_hints(build)["config"]
    made: nn.Module = build(from_dict(kind, description["config"], where=description["name"]), description["name"])
    return made


def load_model(
    path: str | Path,
    *,
    which: str = "last",
    task: str | None = None,
    classes: Sequence[str] | None = None,
    backbone: nn.Module | None = None,
) -> nn.Module:
    """A trained predictor in eval mode, with its preprocessing and classes.

    path: a run folder, a predictor's folder or its .safetensors file. which: "last" or "best" of a run folder.
    task, classes: what the caller counts on; a model of another task or class list is an AdviceError.
    backbone: a module of your own, for models whose backbone is none of this library's.
    """
    from safetensors.torch import load_file

    file = model_file(path, which=which)
    description = read_description(file)
    if task is not None and description["task"] != task:
        raise AdviceError(
            f"{file} is a model for {description['task'] or 'features only'}, not for {task}; load it for what it "
            "was trained for."
        )
    inner = backbone if backbone is not None else build_backbone(description["backbone"])
    model = inner
    if description["task"] is not None:
        cls = task_class(description["task"])
        made = from_dict(cls, description["options"], where=description["task"])
        if classes is not None and hasattr(made, "check_classes"):
            made.check_classes(classes, what="the data given with this checkpoint")
        model = made.build(inner)
    for step in description.get("rewrites", []):
        model = _rewrite(step, file)(model, None)
    _load_strictly(model, load_file(file), file)
    return model.eval()


def _rewrite(step: dict[str, Any], file: Path | str) -> Any:
    """The rewrite that a description names; only this library's own are looked up."""
    module, _, name = str(step["rewrite"]).partition(":")
    if not module.startswith("lynceus.rewrite."):
        raise AdviceError(
            f"{file} was changed by {step['rewrite']}, which is no rewrite of this library, so it cannot be rebuilt."
        )
    return from_dict(getattr(import_module(module), name), step["options"], where=name)


def _load_strictly(model: nn.Module, state: dict[str, Tensor], file: Path) -> None:
    own = model.state_dict()
    missing, extra = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    shapes = [
        f"{k}: {tuple(state[k].shape)} in the file, {tuple(v.shape)} in the model"
        for k, v in own.items()
        if k in state and state[k].shape != v.shape
    ]
    if missing or extra or shapes:
        kinds = {"entries missing": missing, "entries too many": extra, "shapes differ": shapes}
        parts = [f"{len(v)} {what} ({v[0]}{' ...' if len(v) > 1 else ''})" for what, v in kinds.items() if v]
        raise AdviceError(
            f"The weights in {file} do not fit the model they name: {'; '.join(parts)}. Was the backbone's code "
            "or configuration changed?"
        )
    model.load_state_dict(state)
