"""The authors' own code as peers, where somebody has put it: $LYNCEUS_PEERS/OWNER+NAME or $LYNCEUS_PEERS/NAME.

Nothing of it is copied or fetched here. A family adds a small function that imports the code from that folder and
builds the net, and one line in AUTHORS; where the folder is missing, the comparison is skipped and says so.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from bench.peers import Absent


@dataclass(frozen=True)
class Authored:
    """repository: "owner/name" on GitHub. load: (folder of the checkout, **options) -> the net, giving logits."""

    repository: str
    load: Callable[..., nn.Module]


def folder_of(repository: str) -> Path:
    """Where the checkout is; Absent when it is nowhere."""
    root = os.environ.get("LYNCEUS_PEERS")
    if not root:
        raise Absent(f"LYNCEUS_PEERS names no folder with a checkout of {repository}")
    owner, name = repository.split("/")
    for folder in (Path(root) / f"{owner}+{name}", Path(root) / name):
        if folder.is_dir():
            return folder
    raise Absent(f"no checkout of {repository} in $LYNCEUS_PEERS")


def author_model(name: str, **options: Any) -> nn.Module:
    """The authors' net with fresh weights; Absent when the code, or something that it needs, is not here."""
    authored = AUTHORS[name]
    folder = folder_of(authored.repository)
    try:
        return authored.load(folder, **options)
    except ImportError as error:
        raise Absent(f"the code of {authored.repository} needs something that is not here: {error}") from None


def imported(folder: Path, file: str, *, stand_ins: Mapping[str, Mapping[str, Any]] | None = None) -> ModuleType:
    """The module in `folder/file`, with `folder` on the import path meanwhile.

    stand_ins: module name -> attributes, for imports that the net itself does not use (a logger, a registry).
    """
    path = folder / file
    if not path.is_file():
        raise Absent(f"{path.name} is not in the checkout {folder.name}")
    name = "_peer_" + "_".join(path.relative_to(folder).with_suffix("").parts)
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with _importing(folder, path.parent, stand_ins=stand_ins or {}):
        sys.modules[name] = module  # dataclasses and pickles look themselves up
        spec.loader.exec_module(module)
    return module


@contextmanager
def _importing(*folders: Path, stand_ins: Mapping[str, Mapping[str, Any]]) -> Iterator[None]:
    path, modules = list(sys.path), dict(sys.modules)
    sys.path[:0] = [str(f) for f in folders]
    for name, attributes in stand_ins.items():
        made = ModuleType(name)
        made.__path__ = []  # so that its submodules may be stood in for too
        vars(made).update(attributes)
        sys.modules[name] = made
    try:
        yield
    finally:
        sys.path[:] = path
        for name in stand_ins:
            sys.modules.pop(name, None)
            if name in modules:
                sys.modules[name] = modules[name]


# name -> repository and loader, a line per net
AUTHORS: dict[str, Authored] = {}
