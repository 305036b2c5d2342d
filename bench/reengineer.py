"""The figures of the re-engineering tools, measured now.

python -m bench.reengineer                  # everything, about two minutes
python -m bench.reengineer --out figures.json

Parity of every stored record; checkpoints of timm and torchvision loaded and compared; planted faults named by `diff`;
time and length of `inspect` on a model of more than 300 tensors; `bisect` among twelve options.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import time
from pathlib import Path
from typing import Any

import timm
import torch

from lynceus.core.report import Report
from lynceus.reengineer import bisect, diff, inspect, parity

TESTS = Path(__file__).resolve().parents[1] / "tests"


def _tests(name: str) -> Any:
    """A file of tests as a module: the faults and runs are planted there."""
    spec = importlib.util.spec_from_file_location(name, TESTS / "reengineer" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def records() -> dict[str, Any]:
    found = [
        p
        for p in sorted((TESTS / "parity").glob("*/*.json"))
        if json.loads(p.read_text())["family"] in parity.families()
    ]
    report = parity.parity(found)
    return {
        "records": len(found), "agree": int(report.summary["agree"]),
        "largest difference / std": report.summary["largest difference / std"],
    }  # fmt: skip


def faults() -> dict[str, Any]:
    planted = _tests("divergence_test")
    named, missed, seconds = 0, [], []
    for family, fault in planted.FAULTS:
        good, bad, where = planted.planted(family, fault)
        began = time.perf_counter()
        report = diff(good, bad, planted.image())
        seconds.append(time.perf_counter() - began)
        if report.culprit in (where, where.rpartition(".")[0]):
            named += 1
        else:
            missed.append(f"{family} {fault.__name__}: {report.culprit} instead of {where}")
    return {
        "faults": len(planted.FAULTS),
        "module or its parent named": named,
        "others": missed,
        "seconds each": sum(seconds) / len(seconds),
    }


def screen() -> dict[str, Any]:
    state = {f"module.{k}": v for k, v in timm.create_model("swin_small_patch4_window7_224").state_dict().items()}
    began = time.perf_counter()
    report = inspect.inspect(state)
    return {"tensors": len(state), "lines": len(report.rows), "seconds": time.perf_counter() - began}


def options() -> dict[str, Any]:
    runs = _tests("practice_test")
    report = bisect(runs.short_run, runs.REFERENCE, runs.OURS)
    found = [r["option"] for r in report.rows if r["verdict"] == "explains"]
    return {"options": len(runs.REFERENCE), "runs": int(report.summary["runs"]), "found": found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the figures here as JSON")
    given = parser.parse_args()
    torch.set_num_threads(1)
    figures = {"parity": records(), "diff": faults(), "inspect": screen(), "bisect": options()}
    report = Report(name="re-engineering")
    report.rows = [
        {"tool": tool, "figure": k, "value": str(v)} for tool, values in figures.items() for k, v in values.items()
    ]
    print(report.table())
    if given.out is not None:
        given.out.write_text(json.dumps({"figures": figures, "environment": report.environment}, indent=1))


if __name__ == "__main__":
    main()
