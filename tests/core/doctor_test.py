"""The doctor finds what is there and says what to do about the rest."""

import tomllib
from pathlib import Path

import pytest

from lynceus.core import doctor as module
from lynceus.core.doctor import EXTRAS, NEEDED, doctor, writable

PROJECT = tomllib.loads((Path(__file__).resolve().parents[2] / "pyproject.toml").read_text())["project"]


def names(requirements):
    return {r.split(">")[0].split("=")[0].split("[")[0].strip() for r in requirements}


def test_it_knows_every_dependency_and_extra():
    assert names(PROJECT["dependencies"]) == NEEDED.keys() | {"torch", "torchvision", "timm"}
    for extra, packages in EXTRAS.items():
        assert names(PROJECT["optional-dependencies"][extra]) == {p for p, _ in packages}
    assert EXTRAS.keys() == PROJECT["optional-dependencies"].keys() - {"all", "docs", "dev"}


def test_a_row_per_finding():
    report = doctor()
    rows = {r["what"]: r for r in report.rows}
    assert {"torch", "threads", "memory", "this folder", "cache", "onnx", "ray"} <= rows.keys()
    assert rows["torch"]["state"] == "ok"
    assert sum(report.summary.values()) == len(report.rows)
    assert "GB free" in rows["memory"]["value"]


def test_a_missing_extra_says_what_it_adds_and_how_to_get_it(monkeypatch):
    monkeypatch.setattr(module, "version", lambda p: None if p in ("ray", "rich") else "1.0")
    report = doctor()
    rows = {r["what"]: r for r in report.rows}
    assert rows["ray"]["state"] == "missing"
    assert 'pip install "lynceus[cluster]"' in rows["ray"]["advice"]
    assert report.summary["missing"] == 2
    assert any("pip install rich" in n for n in report.notes)


def test_a_folder_without_rights(monkeypatch, tmp_path):
    assert writable(tmp_path / "not" / "yet")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("")
    assert not writable(tmp_path / "file")
    monkeypatch.setattr(module, "writable", lambda folder: folder != tmp_path)
    monkeypatch.chdir(tmp_path)
    report = doctor()
    row = next(r for r in report.rows if r["what"] == "this folder")
    assert row["state"] == "no"
    assert any("--out" in n for n in report.notes)


def test_low_memory_advises(monkeypatch):
    monkeypatch.setattr(module, "_memory", lambda: (1e9, 8e9))
    report = doctor()
    assert report.summary["low"] >= 1
    assert any("smaller batch" in n for n in report.notes)


@pytest.mark.parametrize("gone", ["/proc/meminfo"])
def test_a_system_that_does_not_say(monkeypatch, gone):
    real = Path.read_text
    monkeypatch.setattr(
        Path,
        "read_text",
        lambda self, *a, **k: (_ for _ in ()).throw(OSError) if str(self) == gone else real(self, *a, **k),
    )
    assert module._memory() is None
