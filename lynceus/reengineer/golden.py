"""Golden records: what a function or model gives on filled weights and seeded inputs, kept as fingerprints.

The format is that of the parity records, plus the versions, dtype and threads it was made with, so that a drift can be
laid to what changed. Weights are filled by name, so the record holds no weights.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lynceus.core.errors import AdviceError, MissingError
from lynceus.core.files import write_atomic
from lynceus.core.report import Report
from lynceus.reengineer import env
from lynceus.reengineer.filling import filled, fingerprint, gap, image

# largest difference in units of an output's std, by the dtype of the check; float64: what 9 digits leave
TOLERANCES = {torch.float64: 1e-7, torch.float32: 1e-3, torch.bfloat16: 0.25, torch.float16: 0.05}

Outputs = Tensor | Mapping[str, Tensor]


def record(
    function: nn.Module | Callable[..., Outputs],
    path: str | Path,
    *,
    inputs: Mapping[str, Mapping[str, Any]] | None = None,
    name: str = "",
    note: str = "",
) -> dict[str, Any]:
    """Runs `function` in float64 on seeded inputs and writes what it gave (atomically); returns the record.

    function: a module (its parameters and statistics are filled by name; put back afterwards), or any function.
    inputs: name -> {"shape": [...], "seed": 0, "scale": 1, "shift": 0}; default one image of 1 x 3 x 64 x 64.
    """
    inputs = dict(inputs or {"image": {"shape": [1, 3, 64, 64], "seed": 0}})
    outputs, state = _run(function, inputs, torch.float64)
    made = {
        "family": "golden",
        "model": name or getattr(function, "name", None) or getattr(function, "__name__", type(function).__name__),
        "note": note,
        "config": {},
        "state": state,
        "inputs": {k: dict(v) for k, v in inputs.items()},
        "outputs": {k: fingerprint(v.numpy()) for k, v in outputs.items()},
        "parameters": sum(p.numel() for p in function.parameters()) if isinstance(function, nn.Module) else None,
        "environment": env.snapshot(),
    }
    write_atomic(Path(path), json.dumps(made, indent=1))
    return made


def check(
    function: nn.Module | Callable[..., Outputs],
    path: str | Path,
    *,
    dtype: torch.dtype = torch.float64,
    threads: int | None = None,
    tolerance: float | None = None,
) -> Report:
    """Runs `function` again and compares; the report says how far each output drifted and what changed since.

    dtype, threads: the setting to check under. tolerance: in units of an output's std; None takes `TOLERANCES[dtype]`.
    summary["exit_code"] is 1 when an output drifted beyond it.
    """
    path = Path(path)
    if not path.is_file():
        raise MissingError(f"There is no golden record at {str(path)!r}; make one with golden.record(function, path).")
    kept = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(kept, dict) or "outputs" not in kept or "inputs" not in kept:
        raise AdviceError(f"{path} is no golden record: it has no inputs and outputs.")
    limit = TOLERANCES[dtype] if tolerance is None else tolerance
    with _threads(threads):
        outputs, state = _run(function, kept["inputs"], dtype)
    report = Report(name=f"golden {kept['model']}")
    changed = [n for n in {**kept["state"], **state} if kept["state"].get(n) != state.get(n)]
    if changed:
        report.notes.append(f"the model changed since: {', '.join(changed[:6])}{' ...' if len(changed) > 6 else ''}")
    for name, want in kept["outputs"].items():
        far = gap(fingerprint(outputs[name].double().numpy(), exact=True), want) if name in outputs else float("inf")
        verdict = "holds" if far <= limit else "DRIFTED"
        report.rows.append({"output": name, "largest difference / std": far, "tolerance": limit, "verdict": verdict})
    drifted = [r for r in report.rows if r["verdict"] != "holds"]
    difference = env.compare(kept["environment"], env.snapshot())
    if difference.rows:
        told = "; ".join(f"{r['what']}: {r['first']} -> {r['second']}" for r in difference.rows[:8])
        report.notes.append(f"changed since it was recorded, likeliest to matter first: {told}")
    elif drifted:
        report.notes.append("no version or setting changed since: look at the code, or at a default that was replaced")
    report.summary = {
        "outputs": float(len(report.rows)),
        "drifted": float(len(drifted)),
        "largest difference / std": max((r["largest difference / std"] for r in report.rows), default=0.0),
        "exit_code": float(bool(drifted or changed)),
    }
    return report


def drift(function: nn.Module | Callable[..., Outputs], folder: str | Path) -> Report:
    """Checks every record in a folder, oldest library version first: the drift by version."""
    report = Report(name="drift by version")
    found = [(json.loads(p.read_text(encoding="utf-8")), p) for p in sorted(Path(folder).glob("*.json"))]
    for kept, path in sorted(found, key=lambda f: [f[0]["environment"].get(k, "") for k in ("lynceus", "torch")]):
        one = check(function, path)
        made = kept["environment"]
        report.rows.append({
            "record": path.stem, "lynceus": made.get("lynceus"), "torch": made.get("torch"),
            "largest difference / std": one.summary["largest difference / std"],
            "verdict": "holds" if one.summary["exit_code"] == 0 else "DRIFTED",
        })  # fmt: skip
    report.summary = {
        "records": float(len(report.rows)),
        "drifted": float(sum(r["verdict"] != "holds" for r in report.rows)),
    }
    return report


def _run(
    function: Any, inputs: Mapping[str, Mapping[str, Any]], dtype: torch.dtype
) -> tuple[dict[str, Tensor], dict[str, list[int]]]:
    tensors = [
        torch.from_numpy(image(s["shape"], s.get("seed", 0)) * s.get("scale", 1.0) + s.get("shift", 0.0)).to(dtype)
        for s in inputs.values()
    ]
    state: dict[str, list[int]] = {}
    with contextlib.ExitStack() as stack, torch.no_grad():
        if isinstance(function, nn.Module):
            state = stack.enter_context(_filled(function, dtype))
        out = function(*tensors)
    if isinstance(out, Tensor):
        return {"output": out}, state
    if isinstance(out, Mapping):
        return {str(k): v for k, v in out.items() if isinstance(v, Tensor)}, state
    if isinstance(out, (tuple, list)):
        return {f"output{i}": v for i, v in enumerate(out) if isinstance(v, Tensor)}, state
    raise AdviceError(
        f"A golden record needs tensors; {getattr(function, '__name__', function)} gave a {type(out).__name__}."
    )


@contextlib.contextmanager
def _filled(model: nn.Module, dtype: torch.dtype) -> Iterator[dict[str, list[int]]]:
    """The module holding filled values in eval mode inside the block; afterwards as it was."""
    modes = [(m, m.training) for m in model.modules()]
    data = [(p, p.data) for p in model.parameters()]
    buffers = [(m, dict(m._buffers)) for m in model.modules()]
    try:
        model.to(dtype).eval()
        state = {}
        for name, tensor in model.state_dict(keep_vars=True).items():
            if tensor.is_floating_point():
                state[name] = list(tensor.shape)
                fresh = torch.from_numpy(filled(name, tensor.shape)).to(dtype)
                if isinstance(tensor, nn.Parameter):
                    tensor.data = fresh
                else:
                    owner, _, leaf = name.rpartition(".")
                    model.get_submodule(owner)._buffers[leaf] = fresh
        yield state
    finally:
        for module, kept in buffers:
            module._buffers.update(kept)
        for parameter, value in data:
            parameter.data = value
        for module, mode in modes:
            module.training = mode


@contextlib.contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    try:
        if count is not None:
            torch.set_num_threads(count)
        yield
    finally:
        torch.set_num_threads(before)
