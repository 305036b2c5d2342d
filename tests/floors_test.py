"""Imports go down the floors only, and each heavy library is imported in its doors only."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1] / "lynceus"
FLOORS = {
    "core": 0,
    "layers": 1,
    "backbones": 2,
    "tasks": 2,
    "data": 2,
    "train": 3,
    "rewrite": 3,
    "recipes": 4,
    "trust": 5,
    "explain": 5,
    "search": 5,
    "gauntlet": 6,
    "reengineer": 6,
    "serve": 6,
    "cli": 7,
}
# third party -> the files that may import it
DOORS = {
    "timm": {"backbones/from_timm.py", "backbones/timm_bridge.py", "train/optim.py", "data/views.py"},
    "accelerate": {"train/place.py"},
    "ray": {"gauntlet/engine.py", "serve"},
    "transformers": {"rewrite/vlm_tokens"},
    "triton": {"rewrite"},
    "fastapi": {"serve"},
    "starlette": {"serve"},
    "uvicorn": {"serve"},
    "redis": {"serve"},
    "prometheus_client": {"serve"},
    "simplejpeg": {"serve"},
    "onnx": {"rewrite/export.py"},
    "onnxruntime": {"rewrite/export.py"},
    "tyro": {"cli"},
    "plotly": {"core/report.py", "core/plots.py"},
    "jinja2": {"core/report.py", "core/html.py"},
    "pyarrow": {"data"},
    "datasets": {"data"},
    "webdataset": {"data"},
    "huggingface_hub": {"backbones/_hub.py"},
    "sklearn": {"data", "gauntlet"},
    "faster_coco_eval": {"tasks"},
    "skimage": {"data"},
    "matplotlib": {"data"},
    "z3": {"trust/smt.py"},
    "cv2": {"trust", "data/corrupt"},
    "captum": {"explain/attribution.py"},
    "foolbox": {"trust/adapters.py"},
    "h5py": {"data", "backbones/_checkpoint.py"},
}
FILES = sorted(ROOT.rglob("*.py"))


def imports(path: Path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module
            if node.module == "lynceus":
                yield from (f"lynceus.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", FILES, ids=[str(f.relative_to(ROOT)) for f in FILES])
def test_imports_go_down(path):
    room = path.relative_to(ROOT).parts[0]
    for name in imports(path):
        parts = name.split(".")
        if parts[0] != "lynceus" or len(parts) < 2 or parts[1] not in FLOORS:
            continue
        if room in FLOORS:
            other = parts[1]
            assert other == room or FLOORS[other] < FLOORS[room], f"{room} (floor {FLOORS[room]}) imports {name}"


@pytest.mark.parametrize("path", FILES, ids=[str(f.relative_to(ROOT)) for f in FILES])
def test_third_parties_enter_by_their_doors(path):
    here = str(path.relative_to(ROOT))
    for name in imports(path):
        doors = DOORS.get(name.split(".")[0])
        if doors is not None:
            assert any(here == d or here.startswith(d + "/") for d in doors), (
                f"{here} imports {name}; its doors are {doors}"
            )


def test_the_checker_sees_a_fault(tmp_path):
    bad = tmp_path / "x.py"
    bad.write_text("def f():\n    import timm.models\n    from lynceus import gauntlet\n")
    assert list(imports(bad)) == ["timm.models", "lynceus", "lynceus.gauntlet"]
