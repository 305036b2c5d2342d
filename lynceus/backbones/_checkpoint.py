"""Reading checkpoint files safely: tensors and plain values only, nothing is ever unpickled that could run code."""

from __future__ import annotations

import argparse
import io
import json
import pickle
import pickletools
import re
import struct
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lynceus.core.errors import AdviceError, MissingError, missing_extra, unknown

# where the weights are inside a training checkpoint, in the order in which they are looked for
ENTRIES = ("model", "state_dict", "module", "params", "net", "network", "weights", "teacher", "student", "backbone")
AVERAGED = ("model_ema", "state_dict_ema", "ema", "ema_state_dict", "params_ema", "ema_model")
FOLDER = ("model.safetensors", "pytorch_model.bin", "model.pth", "model.pt", "checkpoint.pth")
SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt", ".tar", ".npz", ".h5", ".hdf5", ".keras")


@dataclass(slots=True)
class Checkpoint:
    """What a file holds. state: name -> tensor. entry: keys followed to reach it. others: key -> what else is there,
    listed but not loaded (optimiser, schedule, epoch, averaged weights ...)."""

    path: Path
    format: str
    bytes: int
    state: dict[str, Tensor]
    entry: list[str] = field(default_factory=list)
    others: dict[str, str] = field(default_factory=dict)


def read_checkpoint(path: str | Path, *, entry: str | None = None) -> Checkpoint:
    """The tensors in a .safetensors, torch (.pth .pt .bin .ckpt), .npz or .h5 file, or in a folder that holds one.

    Raises AdviceError for a missing, truncated, unknown or unsafe file, and when `entry` is not in it.
    """
    path = Path(path)
    if path.is_dir():
        return _read_folder(path, entry)
    if not path.is_file():
        raise MissingError(
            f"There is no checkpoint at {str(path)!r} (looked at {path.resolve()}). Nothing is downloaded."
        )
    size = path.stat().st_size
    with path.open("rb") as stream:
        start = stream.read(64)
    if size == 0:
        raise AdviceError(f"{path} is empty (0 bytes).")
    if start.startswith(b"version https://git-lfs"):
        raise AdviceError(
            f"{path} ({size} bytes) is a Git LFS pointer, not the weights: run `git lfs pull` where it came from."
        )
    if start.lstrip()[:5].lower() in (b"<!doc", b"<html"):
        raise AdviceError(
            f"{path} ({size} bytes) is a web page, not a checkpoint: the download did not give the file itself."
        )
    suffix = path.suffix.lower()
    if suffix == ".safetensors" or (len(start) > 9 and start[8:9] == b"{"):
        raw: Any = _read_safetensors(path, size)
        form = "safetensors"
    elif suffix == ".npz":
        raw, form = _read_npz(path, size), "npz"
    elif start.startswith(b"\x89HDF"):
        raw, form = _read_h5(path), "h5"
    else:
        raw, form = _read_torch(path, size)
    state, followed, others = unwrap(raw, entry=entry, path=path)
    return Checkpoint(path, form, size, state, followed, others)


def unwrap(
    raw: Any, *, entry: str | None = None, path: str | Path = "the checkpoint"
) -> tuple[dict[str, Tensor], list[str], dict[str, str]]:
    """(name -> tensor, keys followed to reach it, the rest described) of whatever a checkpoint file held."""
    followed: list[str] = []
    others: dict[str, str] = {}
    node = raw
    while True:
        if not isinstance(node, Mapping):
            what = f"a {type(node).__name__}" if not isinstance(node, Tensor) else "one tensor"
            raise AdviceError(f"{path} holds {what}, not a dict of tensors; save model.state_dict().")
        if entry is not None and entry in node:
            key: str | None = entry
            entry = None
        else:
            key = _entry(node)
        if key is None:
            break
        others |= {str(k): describe(v) for k, v in node.items() if k != key}
        followed.append(str(key))
        node = node[key]
    if entry is not None:
        raise unknown("entry", entry, [str(k) for k in (raw if isinstance(raw, Mapping) else {})], how=f"({path})")
    state: dict[str, Tensor] = {}
    _flatten(node, "", state, others)
    if not state:
        raise AdviceError(f"{path} holds no tensors; it has {', '.join(map(str, node)) or 'nothing'}.")
    return state, followed, others


def describe(value: Any) -> str:
    """What an entry is, in a few words."""
    if isinstance(value, Tensor):
        return f"tensor {list(value.shape)} {str(value.dtype).removeprefix('torch.')}"
    if isinstance(value, Mapping):
        tensors = sum(isinstance(v, Tensor) for v in value.values())
        if "param_groups" in value and "state" in value:
            return f"optimiser state of {len(value['state'])} parameters"
        return f"{len(value)} entries" + (f", {tensors} tensors" if tensors else "")
    if isinstance(value, (list, tuple)):
        return f"{type(value).__name__} of {len(value)}"
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _entry(node: Mapping[Any, Any]) -> str | None:
    """The key that leads on to the weights; None when `node` is the state itself."""
    if sum(isinstance(v, Tensor) for v in node.values()) > 0.5 * len(node):
        return None
    for key in (*ENTRIES, *AVERAGED):
        if isinstance(node.get(key), Mapping) and node[key]:
            return key
    return None


def _flatten(node: Mapping[Any, Any], prefix: str, state: dict[str, Tensor], others: dict[str, str]) -> None:
    for key, value in node.items():
        name = f"{prefix}{key}"
        if isinstance(value, Tensor):
            state[name] = value
        elif isinstance(value, np.ndarray) and value.dtype.kind in "fiub":
            state[name] = torch.from_numpy(np.array(value))
        elif isinstance(value, Mapping) and not {"param_groups", "state"} <= set(value) and _has_tensors(value):
            _flatten(value, f"{name}.", state, others)
        else:
            others[name] = describe(value)


def _has_tensors(node: Mapping[Any, Any]) -> bool:
    return any(
        isinstance(v, (Tensor, np.ndarray)) or (isinstance(v, Mapping) and _has_tensors(v)) for v in node.values()
    )


def _read_folder(folder: Path, entry: str | None) -> Checkpoint:
    for index in sorted(folder.glob("*.index.json")):
        shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        parts = [read_checkpoint(folder / name, entry=entry) for name in shards]
        state = {k: v for part in parts for k, v in part.state.items()}
        return Checkpoint(
            folder, f"{len(parts)} shards, {parts[0].format}", sum(p.bytes for p in parts), state, parts[0].entry
        )
    named = [folder / n for n in FOLDER if (folder / n).is_file()]
    files = named or sorted(p for p in folder.iterdir() if p.suffix in SUFFIXES)
    if len(files) != 1 and not named:
        have = ", ".join(p.name for p in files) or "no checkpoint"
        raise AdviceError(f"The folder {folder} holds {have}; give the file itself ({', '.join(SUFFIXES)}).")
    return read_checkpoint(files[0], entry=entry)


def _read_safetensors(path: Path, size: int) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except SafetensorError as error:
        raise AdviceError(
            f"{path} is not a readable safetensors file: {_safetensors_needs(path, size) or error}."
        ) from None


def _safetensors_needs(path: Path, size: int) -> str:
    with path.open("rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8).ljust(8, b"\0"))
        if length + 8 > size:
            return f"truncated: its header alone needs {length + 8} bytes, the file has {size}"
        try:
            header = json.loads(stream.read(length))
            need = 8 + length + max((v["data_offsets"][1] for k, v in header.items() if k != "__metadata__"), default=0)
        except (ValueError, KeyError, TypeError):
            return ""
    return f"truncated: it needs {need} bytes and has {size} ({need - size} missing)" if need > size else ""


def _read_npz(path: Path, size: int) -> dict[str, Tensor]:
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {name: torch.from_numpy(np.array(archive[name])) for name in archive.files}
    except (zipfile.BadZipFile, EOFError, OSError) as error:
        raise AdviceError(f"{path} ({size} bytes) is not a readable .npz: {_zip_needs(path, size) or error}.") from None
    except ValueError as error:
        raise AdviceError(
            f"{path} holds Python objects, which are never unpickled ({error}); save plain arrays."
        ) from None


def _read_h5(path: Path) -> dict[str, Tensor]:
    if find_spec("h5py") is None:
        raise missing_extra("h5py", "formats", use=f"Reading {path.name}")
    import h5py

    state: dict[str, Tensor] = {}

    def visit(name: str, item: Any) -> None:
        if isinstance(item, h5py.Dataset) and item.dtype.kind in "fiub":
            state[name.replace("/", ".")] = torch.from_numpy(np.array(item))

    try:
        with h5py.File(path, "r") as archive:
            archive.visititems(visit)
    except OSError as error:
        raise AdviceError(f"{path} ({path.stat().st_size} bytes) is not a readable .h5 file: {error}.") from None
    return state


def _read_torch(path: Path, size: int) -> tuple[Any, str]:
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            names = [n for n in archive.namelist() if not n.endswith("/")]
            if any("/code/" in n for n in names):
                raise AdviceError(
                    f"{path} is a TorchScript archive: it holds code, which is not run; save its state_dict()."
                )
            if not any(n.endswith("data.pkl") for n in names):  # an ordinary zip around one checkpoint
                inner = [n for n in names if n.endswith(SUFFIXES)]
                if len(inner) != 1:
                    raise AdviceError(
                        f"{path} is a zip of {len(names)} files with {len(inner)} checkpoints in it; unpack it."
                    )
                return _torch_load(io.BytesIO(archive.read(inner[0])), path, size), f"zip({inner[0]})"
        return _torch_load(path, path, size), "torch"
    return _torch_load(path, path, size), "torch, legacy pickle"


def _torch_load(source: Any, path: Path, size: int) -> Any:
    try:
        # Namespace is plain data, and training scripts keep their arguments in it
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the pickle protocol
            return torch.load(source, map_location="cpu", weights_only=True)
    except (
        pickle.UnpicklingError,
        RuntimeError,
        EOFError,
        OSError,
        ValueError,
        KeyError,
        IndexError,
        AttributeError,
    ) as error:
        raise _refusal(error, path, size) from None


def _refusal(error: Exception, path: Path, size: int) -> AdviceError:
    text = str(error)
    needs = _zip_needs(path, size)
    if needs:
        return AdviceError(f"{path} is truncated or damaged: {needs}. Copy or download it again.")
    more = re.search(r"expected (\d+) more bytes", text)
    if more:
        return AdviceError(f"{path} is truncated: it has {size} bytes and needs at least {size + int(more[1])}.")
    found = re.search(r"GLOBAL `?([\w.]+\.[\w.]+)`?", text)
    asked = [found[1]] if found else _globals(path)
    if asked:
        return AdviceError(
            f"{path} was refused: it asks for the Python object {asked[0]!r}, which could run code. Nothing of it was "
            "run. Only tensors and plain values are read; if you trust its source, save model.state_dict() there."
        )
    if isinstance(error, EOFError) or "Ran out of input" in text:
        return AdviceError(f"{path} is truncated: it ends after {size} bytes, in the middle of its contents.")
    first = text.splitlines()[0][:160] if text else type(error).__name__
    return AdviceError(f"{path} ({size} bytes) is not a checkpoint that can be read safely: {first}")


def _globals(path: Path) -> list[str]:
    """The Python objects that a bare pickle asks for, read off its opcodes without running them."""
    found: list[str] = []
    strings: list[str] = []
    with path.open("rb") as stream:
        if stream.read(1) != b"\x80":
            return []
        stream.seek(0)
        try:
            for code, value, _ in pickletools.genops(stream):
                if code.name in ("GLOBAL", "INST"):
                    found.append(str(value).replace(" ", "."))
                elif code.name == "STACK_GLOBAL" and len(strings) >= 2:
                    found.append(".".join(strings[-2:]))
                elif isinstance(value, str):
                    strings.append(value)
        except (ValueError, EOFError, OverflowError):
            pass
    plain = ("collections.OrderedDict", "torch._utils.", "torch.FloatStorage", "torch.storage.", "numpy.")
    return [f for f in found if not f.startswith(plain)]


def _zip_needs(path: Path, size: int) -> str:
    """What a zip without its directory (the end of the file) lacks; "" for a whole zip or another file."""
    with path.open("rb") as stream:
        if stream.read(4) != b"PK\x03\x04"[: min(size, 4)] or zipfile.is_zipfile(path):
            return ""
        stream.seek(0)
        need = _storage_bytes(stream.read(64 << 20))
    least = f" and needs more than {need}" if need > size else ""
    return f"it has {size} bytes{least}; its directory, the last part of the file, is missing"


def _storage_bytes(start: bytes) -> int:
    """The bytes of all tensors that the pickle at the start of a torch file names; 0 when it cannot be read."""
    at = start.find(b"data.pkl")
    begin = start.find(b"\x80\x02", at)
    if at < 0 or begin < 0:
        return 0
    widths = {"Half": 2, "BFloat16": 2, "Double": 8, "Long": 8, "Byte": 1, "Bool": 1, "Char": 1}
    sizes: dict[str, int] = {}
    classes: dict[int, str] = {}
    kind, key, number, last = "", "", 0, ""
    try:
        for code, value, _ in pickletools.genops(start[begin:]):
            if code.name == "GLOBAL":
                last = str(value).split(" ")[-1]
                kind = last if last.endswith("Storage") else kind
            elif code.name in ("BINPUT", "LONG_BINPUT"):
                if last.endswith("Storage"):
                    classes[int(value or 0)] = last
                last = ""
            elif code.name in ("BINGET", "LONG_BINGET"):
                kind = classes.get(int(value or 0), kind)
            elif code.name == "BINUNICODE":
                key, last = (str(value) if str(value).isdigit() else key), ""
            elif code.name in ("BININT", "BININT1", "BININT2"):
                number = int(value or 0)
            elif code.name == "BINPERSID":
                sizes[key] = number * widths.get(kind.removesuffix("Storage"), 4)
    except (ValueError, EOFError):
        pass
    return sum(sizes.values())
