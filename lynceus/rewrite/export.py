"""Models as files that run without this library: torch.export (.pt2) and ONNX, compared with the original when written.

Batch, height and width stay free wherever the model allows; the report says which axis does not, and why. The file that
was written is read back and run on several sizes beside the model: one that differs is not left behind.
"""

from __future__ import annotations

import os
import re
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lynceus.core.cost import evaluating
from lynceus.core.errors import AdviceError, missing_extra, unknown
from lynceus.core.progress import progress
from lynceus.core.report import Report, environment

Axis = Literal["batch", "height", "width"]
Format = Literal["torch", "onnx"]
AXES: dict[str, int] = {"batch": 0, "height": 2, "width": 3}
FILES = {"torch": "model.pt2", "onnx": "model.onnx"}
Run = Callable[[Tensor], list[Tensor]]


@dataclass(kw_only=True)
class Plan:
    """An exported program, its free axes with their smallest sizes, and why the other axes are fixed."""

    program: Any
    free: dict[str, int]
    fixed: dict[str, str] = field(default_factory=dict)


def export(
    model: nn.Module,
    example: Tensor,
    out: str | Path,
    *,
    formats: Sequence[Format] = ("torch", "onnx"),
    dynamic: Sequence[Axis] = ("batch", "height", "width"),
    tolerance: float = 1e-5,
    quiet: bool = False,
) -> Report:
    """Writes model.pt2 and model.onnx into the folder `out`, and compares them with `model` in eval mode.

    example: (b, c, h, w) of what the model takes: pixels for what a Task built, normalised images for a Backbone.
    dynamic: axes to leave free where possible. tolerance: the largest difference allowed, in units of the largest
    output. One row per format: file, free axes, difference, speed (time of the model / time of the file, above 1 the
    file is faster). Raises AdviceError when a file differs by more (it is removed), or when `out` cannot be written.
    """
    _check(example, formats, dynamic)
    folder, example = Path(out), example.detach()
    rows: list[dict[str, Any]] = []
    notes: list[str] = []
    summary: dict[str, float] = {}
    with evaluating(model), torch.no_grad(), _folder(folder) as part, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with progress("exporting", total=1 + len(formats), unit="steps", quiet=quiet) as bar:
            plan = traced(model, example, dynamic)
            bar.advance()
            for name in formats:
                start = time.perf_counter()
                made = _write(name, plan, model, example, part / FILES[name])
                seconds = time.perf_counter() - start
                run = _runner(name, part / FILES[name])
                sizes = _sizes(example, made.free)
                worst, at = _difference(model, run, example, sizes)
                if not worst <= tolerance:
                    raise AdviceError(
                        f"The {name} file differs from the model by {worst:.1e} of its largest output at "
                        f"{'x'.join(map(str, at))}, more than {tolerance:.0e}: nothing was written to {folder}. "
                        f"Choose another format, or accept it with tolerance={worst * 2:.0e}."
                    )
                ours, theirs = _times(lambda x: _outputs(model(x)), run, example)
                rows.append(
                    {
                        "format": name,
                        "file": FILES[name],
                        "free": ", ".join(made.free) or "none",
                        "difference": worst,
                        "sizes": len(sizes),
                        "model_ms": ours,
                        "file_ms": theirs,
                        "speed": ours / theirs,
                        "mb": sum(f.stat().st_size for f in part.glob(f"{FILES[name]}*")) / 1e6,
                        "seconds": seconds,
                    }
                )
                summary |= {f"{name}_difference": worst, f"{name}_speed": ours / theirs}
                notes += [
                    f"{name}: {axis} is fixed at {example.shape[AXES[axis]]}: {why}" for axis, why in made.fixed.items()
                ]
                least = {a: n for a, n in made.free.items() if a != "batch"}
                if least:
                    notes.append(f"{name}: {' and '.join(least)} from {max(least.values())} pixels on.")
                bar.advance()
        for file in sorted(part.iterdir(), key=lambda f: f.name in FILES.values()):  # outside data first
            os.replace(file, folder / file.name)
    notes.append(
        f"Times: medians at {'x'.join(map(str, example.shape))}, {torch.get_num_threads()} threads, alternating."
    )
    return Report(
        name=f"Export of {getattr(model, 'name', type(model).__name__)}",
        rows=rows,
        summary=summary,
        notes=notes,
        environment=environment(out=str(folder.resolve())),
    )


def _check(example: Tensor, formats: Sequence[str], dynamic: Sequence[str]) -> None:
    for name in formats:
        if name not in FILES:
            raise unknown("export format", str(name), FILES)
    for axis in dynamic:
        if axis not in AXES:
            raise unknown("axis", str(axis), AXES)
    if not formats:
        raise AdviceError(f"There is nothing to write: give formats, of {list(FILES)}.")
    if example.ndim != 4:
        raise AdviceError(f"The example is a batch of images (b, c, h, w), not {tuple(example.shape)}.")
    if "onnx" in formats:
        for package in ("onnx", "onnxscript", "onnxruntime"):
            if find_spec(package) is None:
                raise missing_extra(package, "export", use="ONNX export (or formats=('torch',))")


@contextmanager
def _folder(folder: Path) -> Iterator[Path]:
    """A hidden folder inside `folder` for unfinished files; it is gone afterwards."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        part = tempfile.TemporaryDirectory(dir=folder, prefix=".export-")
    except OSError as error:
        raise AdviceError(
            f"Nothing can be written to {folder.resolve()}: {error.strerror}. Give a folder of yours: --out FOLDER."
        ) from None
    with part as name:
        yield Path(name)


# tracing -----------------------------------------------------------------------------------------
def traced(model: nn.Module, example: Tensor, dynamic: Sequence[str]) -> Plan:
    """The model as a torch.export program with as many of the axes free as possible."""
    fixed: dict[str, str] = {}
    size = getattr(model, "image_size", None)
    if size is not None:
        why = f"the model brings every image to {size[0]}x{size[1]} itself; give the file images of that size"
        fixed = {axis: why for axis in dynamic if axis != "batch"}
        dynamic = [axis for axis in dynamic if axis == "batch"]
    program, why, least = _trace(model, example, dynamic)
    if program is not None:
        return Plan(program=program, free=dict.fromkeys(dynamic, 1) | least, fixed=fixed)
    free: list[str] = []
    for axis in dynamic:  # one that cannot be freed alone is the culprit
        program, reason, _ = _trace(model, example, [axis])
        if program is None:
            fixed[axis] = reason
        else:
            free.append(axis)
    while free:
        program, reason, least = _trace(model, example, free)
        if program is not None:
            return Plan(program=program, free=dict.fromkeys(free, 1) | least, fixed=fixed)
        fixed[free.pop()] = reason
    program, reason, _ = _trace(model, example, [])
    if program is None:
        raise AdviceError(f"{getattr(model, 'name', type(model).__name__)} cannot be exported by torch: {reason}")
    return Plan(program=program, free={}, fixed=fixed or dict.fromkeys(dynamic, why))


def _trace(model: nn.Module, example: Tensor, free: Sequence[str]) -> tuple[Any, str, dict[str, int]]:
    """(program, "", smallest sizes) or (None, why not, {}). Below a map of two cells torch takes other paths, so the
    smallest size is the first one above that works; it never exceeds the example's."""
    stride = max([s.stride for s in getattr(getattr(model, "backbone", model), "stages", ())], default=16)
    reason, asked = "", [stride + 1, 2 * stride + 1, 4 * stride + 1, 8 * stride + 1]
    if not set(free) & {"height", "width"}:
        asked = asked[:1]
    tried: set[int] = set()
    while asked:
        least = asked.pop(0)
        if least in tried or (tried and any(least > example.shape[AXES[a]] for a in free if a != "batch")):
            continue
        tried.add(least)
        pixels = _grown(example, free, least)
        bound = {a: least for a in free if a != "batch"}
        dims = {AXES[a]: torch.export.Dim(a, min=1 if a == "batch" else least) for a in free}
        try:
            program = torch.export.export(model, (pixels,), dynamic_shapes=(dims,) if dims else None, strict=False)
            run = program.module()
            for size in dict.fromkeys([tuple(example.shape), *_sizes(example, dict.fromkeys(free, 1) | bound)]):
                run(example.new_zeros(size))  # a guard that torch has put in may still refuse some sizes
            return program, "", bound
        except Exception as error:
            reason = reason or _short(error)
            hints = [int(n) for n in re.findall(r"= Dim\('(?:height|width)', min=(\d+)", str(error))]
            if hints and max(hints) not in tried:
                asked.insert(0, max(hints))
    return None, reason, {}


def _grown(example: Tensor, free: Sequence[str], least: int) -> Tensor:
    """The example with at least two images and two pixels more than `least` along its free axes, and h != w: sizes that
    happen to be equal would be taken for the same."""
    b, _, h, w = example.shape
    pixels = example
    if "batch" in free and b < 2:
        pixels = pixels.expand(2, -1, -1, -1)
    high = max(h, least + 2) if "height" in free else h
    wide = max(w, least + 2) if "width" in free else w
    if "width" in free and wide == high:
        wide += 2 * least
    if (high, wide) != (h, w):
        pixels = nn.functional.interpolate(pixels.float(), (high, wide), mode="nearest").to(example.dtype)
    return pixels.contiguous()


def _short(error: Exception) -> str:
    """The line of torch's message that says what happened."""
    lines = [line.strip(" -") for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if re.search(r"guard|specialized|constant|not support|Could not", line)]
    said = (telling or lines or ["no message"])[0].partition(". ")[0]
    return f"{type(error).__name__}: {said[:240]}"


# writing -----------------------------------------------------------------------------------------
def _write(name: str, plan: Plan, model: nn.Module, example: Tensor, path: Path) -> Plan:
    if name == "torch":
        torch.export.save(plan.program, path)
        return plan
    return write_onnx(plan, model, example, path)


def write_onnx(plan: Plan, model: nn.Module, example: Tensor, path: Path) -> Plan:
    """Writes the plan as ONNX, with fewer free axes where it must be; returns what was written."""
    reason = ""
    for made in _fallbacks(plan, model, example):
        try:
            onnx: Any = torch.onnx.export(
                made.program, dynamo=True, verbose=False, input_names=["image"], output_names=["out"]
            )
            onnx.save(str(path), external_data=_bytes(model) > 1_900_000_000)
            if reason:
                made.fixed |= {axis: reason for axis in plan.free if axis not in made.free}
            return made
        except Exception as error:
            reason = reason or _short(error)
    raise AdviceError(
        f"{getattr(model, 'name', type(model).__name__)} cannot be written as ONNX: {reason}. "
        "The torch format may work: formats=('torch',)."
    )


def _fallbacks(plan: Plan, model: nn.Module, example: Tensor) -> Iterator[Plan]:
    """The plan, then with the batch alone free, then with nothing free."""
    yield plan
    for free in (["batch"], []):
        if set(free) < plan.free.keys():
            program, _, _ = _trace(model, example, free)
            if program is not None:
                yield Plan(program=program, free=dict.fromkeys(free, 1), fixed=dict(plan.fixed))


def _bytes(model: nn.Module) -> int:
    return sum(t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()])


# running -----------------------------------------------------------------------------------------
def _runner(name: str, path: Path) -> Run:
    """What is in the file, as a function. It is the written file that is read, not the program in memory."""
    if name == "torch":
        module = torch.export.load(path).module()
        return lambda x: _outputs(module(x))
    return open_onnx(path)


def open_onnx(path: Path) -> Run:
    """An ONNX file as a function, with as many threads as torch has now."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    key = session.get_inputs()[0].name
    return lambda x: [torch.from_numpy(y) for y in session.run(None, {key: x.cpu().numpy()})]


def _outputs(value: Any) -> list[Tensor]:
    return [t for t in tree_leaves(value) if isinstance(t, Tensor)]


def _sizes(example: Tensor, free: dict[str, int]) -> list[tuple[int, ...]]:
    """Shapes to compare at: the example's, and others along the free axes: small, odd, not square."""
    b, c, h, w = example.shape

    def at(batch: int, height: int, width: int) -> tuple[int, ...]:
        return (
            batch if "batch" in free else b,
            c,
            max(height, free["height"]) if "height" in free else h,
            max(width, free["width"]) if "width" in free else w,
        )

    return list(dict.fromkeys([at(b, h, w), at(1, h, w), at(3, h + 1, w - 5), at(2, h - 7, w + 13), at(1, 0, 0)]))


def _difference(
    model: nn.Module, run: Run, example: Tensor, sizes: Sequence[tuple[int, ...]]
) -> tuple[float, tuple[int, ...]]:
    """The largest difference over the sizes, in units of the largest output; nan counts as infinite."""
    worst, where = 0.0, sizes[0]
    draw = torch.Generator().manual_seed(0)
    for size in sizes:
        if size == tuple(example.shape):
            image = example
        elif example.dtype.is_floating_point:
            image = torch.rand(size, generator=draw).to(example)
        else:
            image = torch.randint(0, 256, size, generator=draw).to(example)
        ours, theirs = _outputs(model(image)), run(image)
        shapes = [t.shape for t in ours], [t.shape for t in theirs]
        if shapes[0] != shapes[1]:
            raise AdviceError(f"The file gives outputs of shapes {shapes[1]} where the model gives {shapes[0]}.")
        for a, b in zip(ours, theirs):
            if a.numel() == 0:
                continue
            gap = (a.cpu().double() - b.double().cpu()).abs().max().item()
            part = gap / max(a.abs().max().item(), 1e-12)
            if not part <= worst:
                worst, where = (part if part == part else float("inf")), size
    return worst, where


def _times(first: Run, second: Run, image: Tensor, *, seconds: float = 2.0) -> tuple[float, float]:
    """Median milliseconds of both, measured in turns for about `seconds`, at least five times."""
    times: tuple[list[float], list[float]] = ([], [])
    first(image), second(image)
    begun = time.perf_counter()
    while len(times[0]) < 5 or (time.perf_counter() - begun < seconds and len(times[0]) < 100):
        for run, into in zip((first, second), times):
            start = time.perf_counter()
            run(image)
            into.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times[0]), statistics.median(times[1])
