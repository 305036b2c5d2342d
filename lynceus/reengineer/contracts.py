"""What torch's tools make of each family: export with free sizes, one compiled graph, ONNX; measured, with reasons.

    python -m lynceus.reengineer.contracts --out docs/contracts.json [--family swin vit]

Each family's nano, with lively weights, is run through all three in a process of its own; what came out is run beside
the model at several sizes. `docs/build.py` renders the file; families measured anew replace their row.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lynceus.backbones import FAMILIES, create_model
from lynceus.core.errors import unknown
from lynceus.core.files import write_atomic
from lynceus.core.progress import progress

AXES = ("batch", "height", "width")
SIZES = ((2, 66, 92), (3, 64, 64), (1, 225, 301), (3, 64, 32), (2, 47, 61))  # batch, height, width
AGREES = 1e-4  # of the logits' standard deviation, float32


def contract(name: str, *, backend: str = "inductor") -> dict[str, Any]:
    """The row of one model: for export, compile and onnx what is free, the largest difference and the reason why not.

    Differences are in units of the logits' standard deviation. An empty reason means that the contract holds whole.
    """
    model = lively(name)
    row: dict[str, Any] = {"model": name, "parameters": sum(p.numel() for p in model.parameters())}
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        row["export"], plan = _exported(model)
        row["onnx"] = _onnx(model, plan)
        row["compile"] = _compiled(model, backend)
    return row


def lively(name: str) -> nn.Module:
    """A model whose branches all speak: fresh weights plus noise, layer scales of 0.5, uneven statistics."""
    torch.manual_seed(0)
    model = create_model(name, num_classes=10)
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for key, p in model.named_parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=draw))
            if "gamma" in key:
                p.fill_(0.5)
        for key, b in model.named_buffers():
            if key.endswith("running_var"):
                b.add_(0.2 * torch.rand(b.shape, generator=draw))
    return model


def _exported(model: nn.Module) -> tuple[dict[str, Any], Any]:
    from lynceus.rewrite.export import traced

    try:
        plan = traced(model, _image(*SIZES[0]), AXES)
    except Exception as error:
        return {"free": [], "difference": None, "reason": _short(error)}, None
    run = plan.program.module()
    least = {a: n for a, n in plan.free.items() if a != "batch"}
    gap, reason = _gap(run, model, plan.free)
    if not reason and plan.fixed:
        reason = "; ".join(f"{a} is fixed: {why}" for a, why in plan.fixed.items())
    return {"free": list(plan.free), "least": max(least.values(), default=1), "difference": gap, "reason": reason}, plan


def _onnx(model: nn.Module, plan: Any) -> dict[str, Any]:
    from lynceus.rewrite.export import open_onnx, write_onnx

    if plan is None:
        return {"free": [], "difference": None, "reason": "it cannot be exported"}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.onnx"
        try:
            made = write_onnx(plan, model, _image(*SIZES[0]), file)
            session = open_onnx(file)
        except Exception as error:
            return {"free": [], "difference": None, "reason": _short(error)}
        gap, reason = _gap(lambda x: session(x)[0], model, made.free)
    if not reason and made.fixed:
        reason = "; ".join(f"{a} is fixed: {why}" for a, why in made.fixed.items())
    return {"free": list(made.free), "difference": gap, "reason": reason}


def _compiled(model: nn.Module, backend: str) -> dict[str, Any]:
    """One graph, forward and backward; the difference is that of the logits, and of the gradients beside."""
    image = _image(2, 48, 64)
    try:
        made = torch.compile(model, fullgraph=True, backend=backend)
        gap = _apart(made(image), model(image))
        gradients: list[list[Tensor]] = []
        with torch.enable_grad():
            for run in (made, model):
                run(image).square().sum().backward()
                gradients.append([p.grad for p in model.parameters() if p.grad is not None])
                model.zero_grad(set_to_none=True)
        slope = max(_apart(a, b) for a, b in zip(*gradients))
    except Exception as error:
        return {"backend": backend, "difference": None, "reason": _short(error)}
    reason = "" if gap <= AGREES else f"the logits differ by {gap:.1e}"
    return {"backend": backend, "difference": gap, "gradients": slope, "reason": reason}


def _gap(run: Any, model: nn.Module, free: dict[str, int]) -> tuple[float | None, str]:
    """The largest difference over the sizes that the free axes allow, and what is wrong with it."""
    worst: float | None = None
    first = SIZES[0]
    least = {**dict.fromkeys(AXES, 1), **free}
    for size in SIZES:
        fixed = tuple(max(n, least[a]) if a in free else m for a, n, m in zip(AXES, size, first))
        x = _image(*fixed)
        try:
            apart = _apart(run(x), model(x))
        except Exception as error:
            return worst, f"at {fixed[1]}x{fixed[2]}: {_short(error)}"
        worst = apart if worst is None else max(worst, apart)
    assert worst is not None
    return worst, "" if worst <= AGREES else f"the logits differ by {worst:.1e}"


def _apart(a: Tensor, b: Tensor) -> float:
    spread = float(b.detach().double().std()) if b.numel() > 1 else float(b.detach().double().abs().max())
    return float((a.detach().double() - b.detach().double()).abs().max()) / max(spread, 1e-12)


def _image(batch: int, height: int, width: int) -> Tensor:
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(batch + height))


def _short(error: Exception) -> str:
    lines = [line.strip(" -") for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {(lines or ['no message'])[0][:200]}"


def _child(send: Any, name: str, backend: str) -> None:
    try:
        send.send(contract(name, backend=backend))
    except Exception as error:
        send.send({"model": name, "failed": _short(error)})


def measured(name: str, *, backend: str = "inductor") -> dict[str, Any]:
    """`contract` in a process of its own: compilers keep what they were told."""
    context = multiprocessing.get_context("spawn")
    receive, send = context.Pipe(duplex=False)
    child = context.Process(target=_child, args=(send, name, backend))
    child.start()
    send.close()
    try:
        row: dict[str, Any] = receive.recv()
    except EOFError:
        row = {"model": name, "failed": "the process was killed"}
    child.join()
    return row


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures the contracts of every family's nano and writes them; a minute or two per family."""
    parser = argparse.ArgumentParser(prog="python -m lynceus.reengineer.contracts", description=main.__doc__)
    parser.add_argument("--out", type=Path, default=Path("docs/contracts.json"))
    parser.add_argument("--family", nargs="*", help="only these; the other rows stay")
    parser.add_argument("--backend", default="inductor", help="of torch.compile")
    given = parser.parse_args(arguments)
    for family in given.family or ():
        if family not in FAMILIES:
            raise unknown("family", family, FAMILIES)
    table: dict[str, Any] = json.loads(given.out.read_text())["families"] if given.out.is_file() else {}
    names = given.family or sorted(FAMILIES)
    with progress("contracts", total=len(names), unit="families") as bar:
        for family in names:
            table[family] = measured(f"{family}_nano", backend=given.backend)
            table = {k: table[k] for k in sorted(table) if k in FAMILIES}
            made = {"torch": torch.__version__.partition("+")[0], "sizes": SIZES, "families": table}
            write_atomic(given.out, json.dumps(made, indent=1) + "\n")
            bar.advance(family=family)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
