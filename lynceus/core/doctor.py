"""`doctor`: what this machine has. Versions, device, threads, memory, disk, rights, and what extras would add."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from lynceus.core.environment import environment, version
from lynceus.core.report import Report

# extra -> (package, what it adds)
EXTRAS: dict[str, tuple[tuple[str, str], ...]] = {
    "hub": (
        ("datasets", "data sets of the Hugging Face hub by name"),
        ("webdataset", "WebDataset shards"),
    ),
    "cluster": (("ray", "gauntlets on several machines: engine='ray'"),),
    "export": (
        ("onnx", "models as ONNX files"),
        ("onnxscript", "models as ONNX files"),
        ("onnxruntime", "running ONNX files, and the comparison after an export"),
    ),
    "smp": (("segmentation-models-pytorch", "U-Net and its kin on any backbone, by name"),),
    "samples": (
        ("scikit-image", "photographs to try things on"),
        ("matplotlib", "photographs to try things on"),
    ),
    "formats": (("h5py", "data in HDF5 files"),),
    "trust": (
        ("z3-solver", "exact proofs of small networks"),
        ("opencv-python-headless", "SIFT keypoints, inpainting and blending"),
        ("captum", "attributions to compare ours with"),
        ("foolbox", "decision-based and other attacks"),
    ),
    "vlm": (("transformers", "fewer image tokens in vision-language models"),),
    "serve": (
        ("fastapi", "lynceus serve"),
        ("uvicorn", "lynceus serve"),
        ("redis", "jobs that outlive a crash: the broker redis://"),
        ("simplejpeg", "decoding JPEG in a server"),
    ),
}
NEEDED = {
    "accelerate": "training",
    "einops": "models",
    "jaxtyping": "shapes in signatures",
    "rich": "tables and progress",
    "tyro": "the command line",
    "scikit-learn": "digits and probes",
    "scipy": "fits",
    "torchmetrics": "metrics",
    "faster-coco-eval": "box and mask metrics",
    "jinja2": "reports",
    "plotly": "figures",
    "safetensors": "weights",
    "huggingface-hub": "weights of the hub",
    "pyarrow": "parquet files",
    "pyyaml": "configurations",
}
LOW_DISK, LOW_MEMORY = 2_000_000_000, 2_000_000_000


def doctor() -> Report:
    """One row per finding: what, value, "ok" or "missing" or "low" or "no", and what to do about it.

    Nothing is downloaded and nothing is left behind. summary: findings by state."""
    rows = [*_versions(), *_machine(), *_folders(), *_extras()]
    counts: dict[str, float] = {
        state: sum(r["state"] == state for r in rows) for state in ("ok", "missing", "low", "no")
    }
    notes = [f"{r['what']}: {r['advice']}" for r in rows if r["state"] in ("low", "no")]
    needed = [r["what"] for r in rows if r["state"] == "missing" and r["group"] == "package"]
    if needed:
        notes.append(f"Missing packages that lynceus itself needs: pip install {' '.join(needed)}")
    return Report(name="doctor", rows=rows, summary=counts, notes=notes)


def _row(group: str, what: str, value: str, state: str = "ok", advice: str = "") -> dict[str, Any]:
    return {"group": group, "what": what, "value": value, "state": state, "advice": advice}


def _versions() -> list[dict[str, Any]]:
    rows = [
        _row("version", k, v) for k, v in environment().items() if k not in ("machine", "device", "threads", "date")
    ]
    for package, use in NEEDED.items():
        found = version(package)
        rows.append(
            _row("package", package, found or "not installed", "ok" if found else "missing", "" if found else use)
        )
    return rows


def _machine() -> list[dict[str, Any]]:
    import torch

    rows = []
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            unused, size = torch.cuda.mem_get_info(i)
            value = f"{torch.cuda.get_device_name(i)}, {unused / 1e9:.1f} of {size / 1e9:.1f} GB free"
            rows.append(_row("device", f"cuda:{i}", value))
    elif torch.backends.mps.is_available():
        rows.append(_row("device", "mps", "Apple GPU"))
    else:
        rows.append(_row("device", "cpu", "no GPU that torch can use"))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = torch.get_num_threads()
    advice = "" if threads <= cores else f"more threads than cores: set OMP_NUM_THREADS={cores}"
    rows.append(_row("device", "threads", f"{threads} of {cores} cores", "no" if advice else "ok", advice))
    if memory := _memory():
        available, total = memory
        low = available < LOW_MEMORY
        advice = "training may be stopped by the system: close other programs, or take a smaller batch" if low else ""
        rows.append(
            _row(
                "device",
                "memory",
                f"{available / 1e9:.1f} of {total / 1e9:.1f} GB free",
                "low" if low else "ok",
                advice,
            )
        )
    if os.name == "posix" and Path("/dev/shm").is_dir():
        free = shutil.disk_usage("/dev/shm").free
        low = free < 200_000_000
        advice = "loading with workers may fail: use workers=0, or give the container more shared memory" if low else ""
        rows.append(_row("device", "shared memory", f"{free / 1e9:.1f} GB free", "low" if low else "ok", advice))
    return rows


def _memory() -> tuple[float, float] | None:
    """Free and total bytes of memory, the limit of a container included; None where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    values = {name: 1024.0 * int(rest.split()[0]) for name, _, rest in (line.partition(":") for line in lines)}
    free, total = values["MemAvailable"], values["MemTotal"]
    try:
        limit = float(Path("/sys/fs/cgroup/memory.max").read_text())
        used = float(Path("/sys/fs/cgroup/memory.current").read_text())
        free, total = min(free, limit - used), min(total, limit)
    except (OSError, ValueError):
        pass
    return free, total


def _folders() -> list[dict[str, Any]]:
    rows = []
    cache = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
    places = {"this folder": Path.cwd(), "cache": cache, "temporary files": Path(tempfile.gettempdir())}
    for name, folder in places.items():
        if writable(folder):
            free = shutil.disk_usage(_standing(folder)).free
            low = free < LOW_DISK
            advice = "make room before training" if low else ""
            rows.append(_row("folder", name, f"{folder}, {free / 1e9:.1f} GB free", "low" if low else "ok", advice))
        else:
            ways = {"this folder": "write elsewhere with --out FOLDER", "cache": "set HF_HOME to a folder of yours"}
            rows.append(_row("folder", name, str(folder), "no", f"cannot be written: {ways.get(name, 'set TMPDIR')}"))
    return rows


def _standing(folder: Path) -> Path:
    """The folder itself, or the nearest one above it that exists."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return folder


def writable(folder: Path) -> bool:
    """True when a file can really be made in `folder`, or in the nearest folder above it that exists."""
    try:
        with tempfile.NamedTemporaryFile(dir=_standing(folder), prefix=".lynceus-"):
            return True
    except OSError:
        return False


def _extras() -> list[dict[str, Any]]:
    rows = []
    for extra, packages in EXTRAS.items():
        for package, adds in packages:
            found = version(package)
            advice = "" if found else f'{adds}: pip install "lynceus[{extra}]"'
            rows.append(_row(f"extra {extra}", package, found or "not installed", "ok" if found else "missing", advice))
    return rows
