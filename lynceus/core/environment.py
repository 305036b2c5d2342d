"""Where and with what a figure was made: versions, device, threads, commit of the library, seed, date."""

from __future__ import annotations

import os
import platform
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "torchvision", "timm", "numpy")


def environment(seed: int | None = None, **more: Any) -> dict[str, str]:
    """The stamp of a report. `more` adds entries; "command" and "twin" (the same in Python) are shown as code."""
    import torch

    import lynceus

    out = {"lynceus": lynceus.__version__}
    if commit := checkout_commit():
        out["commit"] = commit
    out["python"] = platform.python_version()
    out |= {name: installed for name in PACKAGES if (installed := version(name))}
    out["machine"] = f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores"
    out["device"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    out["threads"] = str(torch.get_num_threads())
    if seed is not None:
        out["seed"] = str(seed)
    out["date"] = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    return out | {k: str(v) for k, v in more.items()}


def version(package: str) -> str | None:
    """The installed version of a package, without importing it; None when it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def checkout_commit(folder: Path | None = None) -> str | None:
    """The commit that the library's checkout stands on, read from its .git; None when it was installed from a wheel."""
    folder = folder if folder is not None else Path(__file__).resolve().parents[2]
    try:
        git = folder / ".git"
        if git.is_file():  # a linked work tree
            git = (folder / git.read_text().partition("gitdir:")[2].strip()).resolve()
        head = (git / "HEAD").read_text().strip()
        if not head.startswith("ref:"):
            return head[:12] or None
        ref = head.partition("ref:")[2].strip()
        common = git / (git / "commondir").read_text().strip() if (git / "commondir").is_file() else git
        for place in (git / ref, common / ref):
            if place.is_file():
                return place.read_text().strip()[:12]
        for line in (common / "packed-refs").read_text().splitlines():
            if line.endswith(f" {ref}"):
                return line.split()[0][:12]
    except OSError:
        pass
    return None
