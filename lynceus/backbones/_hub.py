"""Backbones as folders (config.json, model.safetensors, README.md) and as repositories of the Hugging Face hub.

A folder holds plain values and tensors only; nothing in it is executed or unpickled. Reading looks at this machine
first and goes to the network only when told: download=True. `push_folder` and `local_folder` serve any model's folder.
"""

from __future__ import annotations

import json
import re
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import lynceus
from lynceus.backbones._base import Backbone
from lynceus.backbones._table import family_module, variants
from lynceus.core.config import from_dict, to_dict
from lynceus.core.errors import AdviceError, MissingError, unknown
from lynceus.core.files import write_atomic

FORMAT = 1
CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "README.md"
REPOSITORY = re.compile(r"^[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*$")


# writing -----------------------------------------------------------------------------------------
def save_pretrained(model: Backbone, folder: str | Path, *, licence: str | None = None, text: str = "") -> Path:
    """Writes `model` into `folder`, each file atomically: config.json, model.safetensors and a model card, README.md.

    licence: of the weights, for the card (an SPDX name, "apache-2.0"). text: what else it says. Returns the folder.
    """
    from safetensors.torch import save

    folder = Path(folder)
    described = json.dumps(describe(model), indent=2)
    weights = save(_untied(model), metadata={"format": "pt", "lynceus": described})
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, data in (
            (WEIGHTS, weights),
            (CONFIG, described.encode()),
            (CARD, card(model, licence, text).encode()),
        ):
            write_atomic(folder / name, data)
    except (PermissionError, NotADirectoryError, FileExistsError) as error:
        raise AdviceError(
            f"The model cannot be written to {folder.resolve()}: {error.strerror}; give another folder."
        ) from None
    return folder


def describe(model: Backbone) -> dict[str, Any]:
    """What rebuilds a backbone, as plain values. Raises AdviceError for one that no name builds."""
    name = str(model.name)
    if hasattr(model, "rewrite"):
        raise AdviceError(
            f"This {name} was changed by {type(model.rewrite).__name__}, which a folder for the hub cannot say; "
            "lynceus.train.checkpoint.save_model(model, FOLDER) writes both."
        )
    if name not in variants() and not name.startswith("timm:"):
        raise AdviceError(
            f"{name!r} is no model that create_model can build, so a folder of it could not be read back; "
            "save its weights alone: safetensors.torch.save_file(model.state_dict(), FILE)."
        )
    dtype = next((p.dtype for p in model.parameters()), torch.float32)
    return {
        "library_name": "lynceus",
        "format": FORMAT,
        "lynceus": lynceus.__version__,
        "task": None,
        "backbone": {
            "name": name,
            "config": to_dict(model.config),
            "mean": list(model.mean),
            "std": list(model.std),
            "dtype": str(dtype).removeprefix("torch."),
        },
    }


def card(model: Backbone, licence: str | None = None, text: str = "") -> str:
    """The model card, with the front matter that the hub reads."""
    h, w = model.input_size
    count = sum(p.numel() for p in model.parameters())
    levels = "\n".join(f"| {s.name} | {s.stride} | {s.channels} |" for s in model.stages)
    front = ["---", "library_name: lynceus", "pipeline_tag: image-classification", "tags: [vision, backbone, lynceus]"]
    front += [f"license: {licence}"] if licence else []
    return f"""{chr(10).join(front)}
---

# {model.name}

{text or "A backbone written by lynceus. Nobody has said yet what it was trained on, or what it is good for."}

- Parameters: {count:,}
- Made for {h}x{w}; {model.num_classes} classes; {model.config.in_chans} channels
- Normalisation: mean {list(model.mean)}, std {list(model.std)}, of pixels in [0, 1]
- Licence of the weights: {licence or "not stated"}

```python
from lynceus.backbones import Backbone

model = Backbone.from_pretrained("FOLDER or OWNER/NAME")  # add download=True to fetch it from the hub
```

| level | stride | channels |
|---|---|---|
{levels}
"""


def push_to_hub(
    model: Backbone,
    repository: str,
    *,
    licence: str | None = None,
    text: str = "",
    private: bool = False,
    message: str = "Upload by lynceus",
    token: str | None = None,
) -> str:
    """Uploads `model` to "OWNER/NAME" on the hub, which is made if it does not exist; returns the address."""
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(model, folder, licence=licence, text=text)
        return push_folder(folder, repository, private=private, message=message, token=token)


def push_folder(
    folder: str | Path,
    repository: str,
    *,
    private: bool = False,
    message: str = "Upload by lynceus",
    token: str | None = None,
) -> str:
    """Uploads the files of a folder to "OWNER/NAME" on the hub; returns the address."""
    from huggingface_hub import HfApi

    _check_repository(repository)
    api = HfApi(token=token)
    address = api.create_repo(repository, private=private, exist_ok=True)
    api.upload_folder(folder_path=folder, repo_id=repository, commit_message=message)
    return str(address)


# reading -----------------------------------------------------------------------------------------
def load_pretrained(
    source: str | Path, *, download: bool = False, revision: str | None = None, token: str | None = None
) -> Backbone:
    """The backbone that `save_pretrained` or `push_to_hub` wrote, in eval mode.

    source: a folder, or "OWNER/NAME" on the hub. The local cache is looked at first; the network only with
    download=True. revision: branch, tag or commit. Raises MissingError when it is not there, AdviceError when it is no
    backbone of ours or its files are broken.
    """
    folder = local_folder(source, download=download, revision=revision, token=token)
    described = _description(folder)
    if described["task"] is not None:
        raise AdviceError(
            f"{folder} holds a predictor for {described['task']}, not a bare backbone: "
            f"lynceus.train.checkpoint.load_model({str(folder)!r})."
        )
    model = rebuild(described["backbone"])
    model.load_state_dict(_weights(folder, model))
    return model.eval()


def local_folder(
    source: str | Path, *, download: bool = False, revision: str | None = None, token: str | None = None
) -> Path:
    """The folder on this machine that `source` means; fetched from the hub only with download=True."""
    folder = Path(source)
    if folder.is_dir():
        return folder
    name = str(source)
    if folder.is_file() or not REPOSITORY.match(name):
        raise MissingError(
            f"There is no folder {name!r} (looked at {folder.resolve()}); give one with {CONFIG} and {WEIGHTS}, "
            "or OWNER/NAME."
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    wanted = [CONFIG, WEIGHTS, CARD, "model.json"]
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=wanted, local_files_only=True))
    except LocalEntryNotFoundError:
        pass
    if not download:
        raise MissingError(
            f"{name!r} is neither a folder here (looked at {folder.resolve()}) nor in the local cache of the hub. "
            f"To fetch it: load_pretrained({name!r}, download=True)."
        )
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=wanted, token=token))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise MissingError(f"{name!r} could not be fetched from the hub: {line}") from None


def _description(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    if not path.is_file():
        raise MissingError(f"{folder.resolve()} has no {CONFIG}, so it is no model of lynceus.")
    try:
        described: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if described.get("library_name") != "lynceus":
            raise AdviceError(f"{path} was not written by lynceus; timm's models are create_model('timm:NAME').")
        if described["format"] > FORMAT:
            raise AdviceError(f"{path} was written by a newer lynceus ({described['lynceus']}): pip install -U lynceus")
        if described["task"] is None:
            described["backbone"] = {**described["backbone"], "name": str(described["backbone"]["name"])}
        return described
    except AdviceError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise AdviceError(
            f"{path} is broken ({type(error).__name__}: {error}); fetch or save the model again."
        ) from None


def rebuild(described: dict[str, Any]) -> Backbone:
    """A backbone, freshly initialised, from its name, configuration, mean and std as plain values."""
    name, config = described["name"], described["config"]
    table = variants()
    if name.startswith("timm:"):
        from lynceus.backbones.from_timm import TimmConfig, build

        # weights come from the folder: nothing is to be downloaded for it
        made = from_dict(TimmConfig, {**config, "pretrained": False, "options": {}}, where="timm config")
        model: Backbone = build(made, options=config.get("options", {}))
    elif name in table:
        module = family_module(table[name])
        model = module.build(from_dict(type(module.VARIANTS[name]), config, where=f"{table[name]} config"))
        model.name = name
    else:
        raise unknown("model", name, table, how="A newer lynceus may know it: pip install -U lynceus.")
    model.mean, model.std = tuple(described["mean"]), tuple(described["std"])
    dtype = getattr(torch, str(described.get("dtype", "float32")), None)
    return model.to(dtype) if isinstance(dtype, torch.dtype) and dtype.is_floating_point else model


def _weights(folder: Path, model: Backbone) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = folder / WEIGHTS
    if not path.is_file():
        raise MissingError(f"{folder.resolve()} has no {WEIGHTS}; the upload or the copy was not finished.")
    try:
        state = load_file(path)
    except SafetensorError as error:
        raise AdviceError(
            f"{path.resolve()} is not a whole .safetensors file ({error}); fetch or save it again."
        ) from None
    own = model.state_dict()
    wrong = sorted(own.keys() ^ state.keys()) or [k for k, v in own.items() if state[k].shape != v.shape]
    if wrong:
        raise AdviceError(f"{path} does not fit {model.name}: {len(wrong)} entries differ, the first is {wrong[0]}.")
    return state


def _untied(model: Backbone) -> dict[str, Tensor]:
    """The state with memory of its own for every entry: tied weights are written twice."""
    return {k: v.detach().cpu().clone(memory_format=torch.contiguous_format) for k, v in model.state_dict().items()}


def _check_repository(name: str) -> None:
    if not REPOSITORY.match(name):
        raise AdviceError(f"A repository of the hub is OWNER/NAME, for example me/my-model; not {name!r}.")
