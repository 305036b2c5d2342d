"""A pruned model on disk: the options, beside or pointing to a folder of transformers. Pruning changes no weights."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import nn

import lynceus
from lynceus.core.config import from_dict
from lynceus.core.errors import AdviceError, MissingError, missing_extra
from lynceus.rewrite.vlm_tokens import VlmTokens, prune, unpruned

FILE = "vlm_tokens.json"


def save(model: nn.Module, folder: str | Path, *, source: str | Path | None = None) -> Path:
    """Writes the options of a pruned model to `folder`/vlm_tokens.json, and returns that file.

    source: the folder of transformers that the model came from; only its place is written, relative to `folder`.
    Without one the weights are written into `folder` too (save_pretrained), which plain transformers can read as well.
    """
    by = getattr(model, "rewrite", None)
    if not isinstance(by, VlmTokens):
        raise AdviceError(f"This {type(model).__name__} was not pruned; save prune(model), or use save_pretrained.")
    if by.criterion is not None:
        raise AdviceError("A criterion= is a function, which a file cannot hold; prune again after loading.")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if source is None:
        if not hasattr(model, "save_pretrained"):
            raise AdviceError("Only models of transformers can be saved whole; save the decoder's state dict yourself.")
        unpruned(model).save_pretrained(folder)  # type: ignore[operator]
        place = "."
    else:
        _check_folder(Path(source))
        place = os.path.relpath(Path(source).resolve(), folder.resolve())
    options = {k: v for k, v in asdict(by).items() if k != "criterion"}
    text = {"format": 1, "lynceus": lynceus.__version__, "rewrite": "vlm_tokens", "options": options, "model": place}
    file = folder / FILE
    file.write_text(json.dumps(text, indent=2) + "\n", encoding="utf-8")
    return file


def load(folder: str | Path) -> nn.Module:
    """The pruned model of a folder that `save` wrote, in eval mode. Nothing is unpickled or downloaded."""
    file = Path(folder) / FILE
    if not file.is_file():
        raise MissingError(
            f"There is no {FILE} in {Path(folder).resolve()}; save(prune(model), {str(folder)!r}) writes it."
        )
    said: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    options = from_dict(VlmTokens, said["options"], where=str(file))
    model = open_vlm(Path(folder) / said["model"])
    return prune(model, **{k: v for k, v in asdict(options).items() if k != "criterion"})


def open_vlm(folder: str | Path) -> nn.Module:
    """The vision-language model of a local folder of transformers (config.json and safetensors), in eval mode."""
    folder = Path(folder)
    _check_folder(folder)
    try:
        from transformers import AutoModelForImageTextToText
    except ImportError:
        raise missing_extra("transformers", "vlm", use="A vision-language model") from None
    try:
        model: nn.Module = AutoModelForImageTextToText.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:300]
        raise AdviceError(
            f"{folder.resolve()} holds no vision-language model that transformers can open ({reason}). It needs a "
            "config.json of a LLaVA-like model and its weights as safetensors: model.save_pretrained(FOLDER)."
        ) from None
    return model.eval()


def open_processor(folder: str | Path) -> Any:
    """The processor (tokenizer and image preprocessing) that lies in a local folder of transformers."""
    _check_folder(Path(folder))
    from transformers import AutoProcessor

    try:
        return AutoProcessor.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:200]
        raise MissingError(
            f"{Path(folder).resolve()} holds no processor ({reason}); leave --prompt out, or save it there: "
            "processor.save_pretrained(FOLDER)."
        ) from None


def _check_folder(folder: Path) -> None:
    if not (folder / "config.json").is_file():
        raise MissingError(
            f"There is no model of transformers in {folder.resolve()} (no config.json); give the folder that "
            "model.save_pretrained wrote."
        )
