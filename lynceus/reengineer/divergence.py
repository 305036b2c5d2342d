"""Which module makes two models differ: both run on the same inputs in float64, module by module, side by side.

Parameters, buffers and configuration are compared first; then every module's inputs and outputs. The culprit is the
first module to finish whose inputs still agree and whose outputs do not. What differs only in configuration is said
apart.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lynceus.core.errors import AdviceError
from lynceus.core.report import Report
from lynceus.core.rng import generator
from lynceus.reengineer.gaps import Gap, compare, gap_of

Key = tuple[str, int]  # (module name, number of the call)
DROPPING = ("p", "rate", "drop_prob", "drop_path_rate", "drop_rate", "drop_path", "attn_drop", "proj_drop")


@dataclass(kw_only=True)
class Divergence(Report):
    """A Report with its answer as values.

    culprit: the first module whose inputs agree and whose outputs differ (its name in the first model), or None.
    operation: the first operation inside it that differs, when it could be told.
    configuration: (module, option, in the first, in the second).
    """

    culprit: str | None = None
    operation: str = ""
    verdict: str = ""
    configuration: list[tuple[str, str, Any, Any]] = field(default_factory=list)

    @property
    def equal(self) -> bool:
        return self.summary["exit_code"] == 0


def diff(
    model_a: nn.Module,
    model_b: nn.Module,
    inputs: Tensor | Sequence[Any],
    mapping: Mapping[str, str] | None = None,
    *,
    tolerance: float = 1e-9,
    gradients: bool = False,
    training: bool = False,
    unfused: bool = False,
    float32: bool = False,
    expand: bool = False,
    seed: int = 0,
) -> Divergence:
    """Runs both models (float64, eval) on `inputs` and names the first module that makes them differ.

    Both models are given back as they came: dtype, mode, gradients and buffers.
    inputs: the model's argument, or a sequence of arguments. mapping: module names of a -> names of b; None aligns
    equal names, and the rest by order of execution, kind and size. tolerance: in units of an output's std.
    gradients: also one backward of a seeded scalar, compared parameter by parameter. training: train mode with every
    dropout and stochastic depth off. unfused: attention through its plain formula. float32: the gap of the outputs in
    float32 is measured too. expand: a row for every module instead of those that differ.
    summary["exit_code"] is 1 when the outputs differ by more than the tolerance.
    """
    arguments = (inputs,) if isinstance(inputs, Tensor) else tuple(inputs)
    if not any(isinstance(x, Tensor) for x in arguments):
        raise AdviceError("diff needs at least one tensor to run the models on, e.g. torch.randn(1, 3, 224, 224).")
    pair = [model_a, model_b]
    doubles = tuple(_double(x) for x in arguments)
    report = Divergence(name="divergence")
    with ExitStack() as stack:
        for model in pair:
            stack.enter_context(_prepared(model, training=training))
        if unfused:
            stack.enter_context(torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH))
        if not gradients:
            stack.enter_context(torch.no_grad())
        names, pairs, outputs = _run_both(pair, doubles, mapping)
        report.configuration = _configuration(pair[0], pair[1], names)
        values = _values(pair[0], pair[1], names)
        _tell(report, pairs, values, outputs, tolerance, expand)
        if gradients:
            _gradients(report, pair, outputs, names, tolerance, seed)
        if report.culprit is not None:
            report.operation = _first_operation(pair, doubles, report.culprit, names, tolerance)
            if report.operation:
                report.notes.append(f"inside it, the first operation that differs: {report.operation}")
    if float32:
        with ExitStack() as stack, torch.no_grad():
            for model in pair:
                stack.enter_context(_prepared(model, training=training, dtype=torch.float32))
            a, b = (_tensors(m(*(_cast(x, torch.float32) for x in arguments))) for m in pair)
        report.summary["float32 output gap"] = max((compare(x, y).relative for x, y in zip(a, b)), default=math.nan)
    return report


# running --------------------------------------------------------------------------------------------------------------
@dataclass(slots=True)
class _Call:
    """One call of one module: copies of what went in and came out."""

    key: Key
    kind: str
    inputs: list[Tensor]
    outputs: list[Tensor] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _Pair:
    """A compared call: gaps of its inputs and outputs (largest over their tensors)."""

    a: str
    b: str
    kind: str
    inputs: Gap
    outputs: Gap


@contextmanager
def _recorded(model: nn.Module, done: Callable[[_Call], None]) -> Iterator[None]:
    """Calls `done` whenever a module finishes. Tensors are copied at hook time: in-place changes cannot reach them."""
    open_calls: dict[str, list[_Call]] = {}
    counts: dict[str, int] = {}
    handles = []

    def before(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            counts[name] = counts.get(name, -1) + 1
            call = _Call(
                (name, counts[name]), type(module).__name__, [t.detach().clone() for t in _tensors((args, kwargs))]
            )
            open_calls.setdefault(name, []).append(call)

        return hook

    def after(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            call = open_calls[name].pop()
            call.outputs = [t.detach().clone() for t in _tensors(output)]
            done(call)

        return hook

    for name, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(before(name), with_kwargs=True))
        handles.append(module.register_forward_hook(after(name), with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _run_both(
    pair: list[nn.Module], arguments: tuple[Any, ...], mapping: Mapping[str, str] | None
) -> tuple[dict[str, str], list[_Pair], tuple[Any, Any]]:
    """(module names of a -> b, compared calls in order of finishing, raw outputs)."""
    calls: dict[Key, _Call] = {}
    with _recorded(pair[0], lambda call: calls.__setitem__(call.key, call)):
        out_a = pair[0](*_fresh(arguments))
    own, other = [n for n, _ in pair[0].named_modules()], {n for n, _ in pair[1].named_modules()}
    if mapping is not None:
        wrong = [f"{a} -> {b}" for a, b in mapping.items() if a not in own or b not in other]
        if wrong:
            raise AdviceError(f"The mapping names modules that do not exist: {', '.join(wrong[:5])}.")
    names = {"": "", **{n: n for n in own if n in other}} if mapping is None else {"": "", **mapping}
    back = {b: a for a, b in names.items()}
    pairs: list[_Pair] = []
    late: list[_Call] = []
    enough = mapping is not None or len(names) > 0.5 * len(own)

    def met(call: _Call) -> None:
        ours = back.get(call.key[0])
        mine = calls.pop((ours, call.key[1]), None) if ours is not None else None
        if mine is not None:
            pairs.append(_paired(mine, call))
        elif not enough:
            late.append(call)

    with _recorded(pair[1], met):
        out_b = pair[1](*_fresh(arguments))
    if late:  # names say little: align leaves by order of execution, kind and size
        mine = [c for c in calls.values() if c.outputs]
        marks = [[(c.kind.rstrip("2d"), tuple(t.numel() for t in c.outputs)) for c in side] for side in (mine, late)]
        found = difflib.SequenceMatcher(None, marks[0], marks[1], autojunk=False)
        extra = []
        for i, j, n in found.get_matching_blocks():
            for a, b in zip(mine[i : i + n], late[j : j + n]):
                extra.append(_paired(a, b))
                names.setdefault(a.key[0], b.key[0])
        pairs = [*extra, *pairs]
    return names, pairs, (out_a, out_b)


def _paired(a: _Call, b: _Call) -> _Pair:
    return _Pair(a.key[0], b.key[0], a.kind, _worst(a.inputs, b.inputs), _worst(a.outputs, b.outputs))


def _worst(a: list[Tensor], b: list[Tensor]) -> Gap:
    if len(a) != len(b):
        return Gap(math.inf, math.inf, 0.0, None, f"{len(a)} and {len(b)} tensors")
    gaps = [compare(x, y) for x, y in zip(a, b)]
    return max(gaps, key=lambda g: g.relative, default=Gap(0.0, 0.0, 1.0, None))


# what can be read without running -------------------------------------------------------------------------------------
def _values(a: nn.Module, b: nn.Module, names: Mapping[str, str]) -> list[dict[str, Any]]:
    """A row for every parameter and buffer that differs or has no partner."""
    rows = []
    mine, theirs = dict(_state(a)), dict(_state(b))
    partners = {_join(x, leaf): _join(y, leaf) for x, y in names.items() for leaf in _own_leaves(a, x)}
    met = set()
    for name, value in mine.items():
        other = partners.get(name, name)
        if other not in theirs:
            rows.append(_row("parameter", name, "only in the first"))
            continue
        met.add(other)
        if value.shape != theirs[other].shape:
            rows.append(_row("parameter", name, f"shape {list(value.shape)} and {list(theirs[other].shape)}"))
        elif not torch.equal(value, theirs[other]):
            gap = gap_of(value, theirs[other], "")
            rows.append(_row("parameter", name, "values differ", gap))
    rows += [_row("parameter", name, "only in the second") for name in theirs if name not in met]
    return rows


def _configuration(a: nn.Module, b: nn.Module, names: Mapping[str, str]) -> list[tuple[str, str, Any, Any]]:
    """Options that differ between partners: plain attributes, their configurations, kinds of module, functions."""
    mine, theirs = dict(a.named_modules()), dict(b.named_modules())
    found = []
    for x, y in names.items():
        if x not in mine or y not in theirs:
            continue
        left, right = _options(mine[x]), _options(theirs[y])
        found += [
            (x, k, left.get(k), right.get(k)) for k in dict.fromkeys([*left, *right]) if left.get(k) != right.get(k)
        ]
    return found


def _options(module: nn.Module) -> dict[str, Any]:
    out: dict[str, Any] = {"kind": type(module).__name__}
    for name, value in vars(module).items():
        if name.startswith("_") or name in ("training", "name", "weights_account"):
            continue
        if isinstance(value, (bool, int, float, str, type(None))):
            out[name] = value
        elif isinstance(value, (tuple, list)) and all(isinstance(v, (bool, int, float, str)) for v in value):
            out[name] = tuple(value)
        elif dataclasses.is_dataclass(value) and not isinstance(value, type):
            out |= {f"{name}.{f.name}": getattr(value, f.name) for f in dataclasses.fields(value)}
        elif callable(value) and hasattr(value, "__qualname__"):
            out[name] = value.__qualname__
    return out


def _state(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def _own_leaves(model: nn.Module, name: str) -> list[str]:
    try:
        module = model.get_submodule(name)
    except AttributeError:
        return []
    return [n for n, _ in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))]


# what to say ----------------------------------------------------------------------------------------------------------
def _tell(
    report: Divergence,
    pairs: list[_Pair],
    values: list[dict[str, Any]],
    outputs: tuple[Any, Any],
    tolerance: float,
    expand: bool,
) -> None:
    final = _worst([t.detach() for t in _tensors(outputs[0])], [t.detach() for t in _tensors(outputs[1])])
    # the first module to finish (children finish before parents) whose inputs agree and whose outputs do not
    first = next((p for p in pairs if p.outputs.relative > tolerance and p.inputs.relative <= tolerance), None)
    if final.relative > tolerance and first is None:
        first = next((p for p in pairs if p.a == ""), None)
    different = [p for p in pairs if p.outputs.relative > tolerance]
    shown = pairs if expand else different[:12]
    report.rows = [
        *values[: None if expand else 12],
        *(_row("option", m, f"{k}: {x!r} -> {y!r}") for m, k, x, y in report.configuration[: None if expand else 12]),
        *(
            _row(f"output of {p.kind}", p.a or "(whole model)", "CULPRIT" if p is first else "differs", p.outputs)
            if p.outputs.relative > tolerance
            else _row(f"output of {p.kind}", p.a or "(whole model)", "agrees", p.outputs)
            for p in shown
        ),
    ]
    options = "; ".join(f"{m or '(model)'}.{k}: {x!r} -> {y!r}" for m, k, x, y in report.configuration[:4])
    if first is not None:
        report.culprit = first.a
        report.verdict = (
            f"differs first in {first.a or '(the whole model)'} ({first.kind}): its inputs agree, its output does not"
        )
        near = [c for c in report.configuration if c[0] == first.a or c[0].startswith(first.a + ".")]
        if near:
            report.notes.append(
                "options that differ there: " + "; ".join(f"{m}.{k}: {x!r} -> {y!r}" for m, k, x, y in near[:4])
            )
        agree = [p.a for p in pairs[: pairs.index(first)] if p.outputs.relative <= tolerance and p.a]
        if agree:
            report.notes.append(f"last module that agrees before it: {agree[-1]}")
    elif report.configuration:
        report.verdict = f"equal in eval, differs in configuration: {options}"
    elif values:
        report.verdict = f"equal outputs, but {len(values)} parameters or buffers differ"
    else:
        report.verdict = "equal"
    layouts = sorted({p.outputs.layout for p in pairs if p.outputs.layout and p.outputs.relative <= tolerance})
    report.notes = [report.verdict, *report.notes]
    if layouts:
        report.notes.append(f"layouts matched: {', '.join(layouts)}")
    report.summary = {
        "modules compared": float(len(pairs)),
        "modules that differ": float(len(different)),
        "parameters that differ": float(len(values)),
        "options that differ": float(len(report.configuration)),
        "output gap": final.relative,
        "exit_code": float(final.relative > tolerance or first is not None),
    }


def _row(what: str, name: str, finding: str, gap: Gap | None = None) -> dict[str, Any]:
    return {
        "what": what,
        "name": name,
        "finding": finding + (f" ({gap.layout})" if gap is not None and gap.layout else ""),
        "max abs": gap.largest if gap else None,
        "relative": gap.relative if gap else None,
        "cosine": gap.cosine if gap else None,
        "first at": str(list(gap.first)) if gap and gap.first is not None else None,
    }


def _gradients(
    report: Divergence,
    pair: list[nn.Module],
    outputs: tuple[Any, Any],
    names: Mapping[str, str],
    tolerance: float,
    seed: int,
) -> None:
    """One backward of sum(output * noise), noise seeded and shared; the first parameter (from the top) that differs."""
    for model, output in zip(pair, outputs):
        model.zero_grad(set_to_none=True)
        tensors = [t for t in _tensors(output) if t.requires_grad]
        noise = [
            torch.randn(t.shape, generator=generator(seed, "diff", i), dtype=t.dtype) for i, t in enumerate(tensors)
        ]
        torch.autograd.backward([(t * n).sum() for t, n in zip(tensors, noise)])
    theirs = dict(pair[1].named_parameters())
    partners = {_join(x, leaf): _join(y, leaf) for x, y in names.items() for leaf in _own_leaves(pair[0], x)}
    worst, differ = 0.0, []
    for name, parameter in pair[0].named_parameters():
        other = theirs.get(partners.get(name, name))
        if other is None or parameter.shape != other.shape or (parameter.grad is None and other.grad is None):
            continue
        if parameter.grad is None or other.grad is None:
            side = "first" if parameter.grad is None else "second"
            differ.append(_row("gradient", name, f"none reaches it in the {side}"))
            worst = math.inf
            continue
        gap = gap_of(parameter.grad, other.grad, "")
        worst = max(worst, gap.relative)
        if gap.relative > tolerance:
            differ.append(_row("gradient", name, "differs", gap))
    report.rows += differ[-12:]
    report.summary |= {"gradient gap": worst, "gradients that differ": float(len(differ))}
    if differ:
        report.summary["exit_code"] = 1.0
        report.notes.append(f"{len(differ)} gradients differ; the last in the model: {differ[-1]['name']}")


class _Operations(TorchFunctionMode):
    """Records name and tensors of every torch operation while `active`."""

    def __init__(self) -> None:
        super().__init__()
        self.active = False
        self.seen: list[tuple[str, list[Tensor]]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if self.active and getattr(func, "__name__", "") not in ("__get__", "size", "dim", "clone", "detach"):
            found = [t.detach().clone() for t in _tensors(out)]
            if found:
                self.seen.append((func.__name__, found))
        return out


def _first_operation(
    pair: list[nn.Module], arguments: tuple[Any, ...], culprit: str, names: Mapping[str, str], tolerance: float
) -> str:
    """The first operation inside the culprit whose result differs; "" when the two do not run the same operations."""
    traces = []
    for model, name in zip(pair, (culprit, names.get(culprit, culprit))):
        mode = _Operations()
        module = model.get_submodule(name)
        start = module.register_forward_pre_hook(lambda *_, m=mode: setattr(m, "active", True))
        stop = module.register_forward_hook(lambda *_, m=mode: setattr(m, "active", False))
        try:
            with mode, torch.no_grad():
                model(*_fresh(arguments))
        finally:
            start.remove()
            stop.remove()
        traces.append(mode.seen)
    for number, ((op_a, a), (op_b, b)) in enumerate(zip(*traces), 1):
        if op_a != op_b:
            return f"number {number}: {op_a} in the first, {op_b} in the second"
        if _worst(a, b).relative > tolerance:
            return f"number {number}: {op_a}"
    return ""


@contextmanager
def _prepared(model: nn.Module, *, training: bool, dtype: torch.dtype = torch.float64) -> Iterator[None]:
    """The model itself in `dtype` and mode inside the block, as it was afterwards. No copy is run: a method replaced on
    an instance would still belong to the original."""
    modes = [(m, m.training) for m in model.modules()]
    data = [(p, p.data, p.grad) for p in model.parameters()]
    buffers = [(m, dict(m._buffers)) for m in model.modules()]
    options: list[tuple[nn.Module, str, Any]] = []
    try:
        for module in model.modules():
            module._buffers.update({k: None if v is None else v.clone() for k, v in module._buffers.items()})
            if training:
                options += _without_drop(module)
        model.to(dtype).train(training)
        yield
    finally:
        for module, name, value in options:
            setattr(module, name, value)
        for module, kept in buffers:
            module._buffers.update(kept)
        for parameter, value, grad in data:
            parameter.data, parameter.grad = value, None
            parameter.grad = grad
        for module, mode in modes:
            module.training = mode


def _without_drop(module: nn.Module) -> list[tuple[nn.Module, str, Any]]:
    """Sets every dropout rate of one module to 0; gives what it was."""
    old = [(module, n, vars(module)[n]) for n in DROPPING if isinstance(vars(module).get(n), float)]
    for _, name, _ in old:
        setattr(module, name, 0.0)
    config: Any = vars(module).get("config")
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        rates = [f.name for f in dataclasses.fields(config) if f.name in DROPPING]
        zero = {n: 0.0 for n in rates if isinstance(getattr(config, n), float)}
        old.append((module, "config", config))
        vars(module)["config"] = dataclasses.replace(config, **zero)
    return old


def _tensors(value: Any) -> list[Tensor]:
    """Every tensor inside tuples, lists, dicts and dataclasses, in order."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        return [t for v in value.values() for t in _tensors(v)]
    if isinstance(value, (tuple, list)):
        return [t for v in value for t in _tensors(v)]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [t for f in dataclasses.fields(value) for t in _tensors(getattr(value, f.name))]
    return []


def _cast(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


def _double(value: Any) -> Any:
    return _cast(value, torch.float64)


def _fresh(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(x.clone() if isinstance(x, Tensor) else x for x in arguments)


def _join(module: str, leaf: str) -> str:
    return f"{module}.{leaf}" if module else leaf
