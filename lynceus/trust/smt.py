"""Z3 on what bounds leave open: small boxes with few undecided ReLUs, and pre-images of a layer's values.

The only file that imports z3 (extra "trust"). Weights and box corners go in as the exact rational numbers that the
floats are; every operator of the network becomes linear equalities, ReLUs that the bounds decide become one linear
piece, and the others a choice of two with their bounds beside. An answer is about real arithmetic.
"""

from __future__ import annotations

import math
import time
from fractions import Fraction
from importlib.util import find_spec
from typing import Any, Literal

import torch
from torch import Tensor

from lynceus.core.errors import missing_extra
from lynceus.trust.bounds import Box, Propagation
from lynceus.trust.bounds_ops import Input, Network, Relu
from lynceus.trust.verify_query import Query
from lynceus.trust.verify_search import Solver

Answer = Literal["safe", "unsafe", "unknown"]
PATIENCE = 5.0  # seconds for one leaf of a search


def z3() -> Any:
    """The module. Raises MissingError that says how to install it."""
    if find_spec("z3") is None:
        raise missing_extra("z3-solver", "trust", use="Solving with Z3")
    import z3 as module

    return module


def leaf_solver(query: Query) -> Solver:
    """A function (box, until) -> verdict and point, for the search."""

    def solve(box: Box, until: float) -> tuple[Answer, Tensor | None]:
        seconds = min(PATIENCE, until - time.perf_counter())
        if seconds <= 0:
            return "unknown", None
        answer, sample = solve_box(query.plain, box, query.rows, tolerance=query.tolerance, seconds=seconds)
        return answer, None if sample is None else sample.flatten()[query.dims]

    return solve


def solve_box(
    network: Network,
    box: Box,
    rows: Tensor,
    *,
    tolerance: float = 0.0,
    seconds: float | None = None,
    prune: bool = True,
) -> tuple[Answer, Tensor | None]:
    """Is every margin rows (s, k) . logits above `tolerance` in one box, a batch of one?

    prune: ReLUs that CROWN decides are replaced by their piece, and bounds go in as constraints; False gives Z3 the
      network as it is. Answers "safe", "unsafe" with a sample (1, *shape) in float64, or "unknown" after `seconds`.
    """
    module = z3()
    start = time.perf_counter()
    known: dict[int, tuple[Tensor, Tensor]] = {}
    open_rows = list(range(len(rows)))
    if prune:
        with torch.no_grad():
            found = Propagation(network, box, method="crown")
            least = found.margins(rows[None])[0]
        known = found.hidden
        open_rows = [i for i in range(len(rows)) if not float(least[i]) > tolerance]
        if not open_rows:
            return "safe", None
    solver = module.Solver() if not prune else module.SolverFor("QF_LRA")
    inputs, logits = encode(network, box, solver, known)
    bad = [_combination(module, rows[i].tolist(), logits) <= _number(module, tolerance) for i in open_rows]
    solver.add(module.Or(*bad))
    if seconds is not None:
        solver.set("timeout", max(1, int(1000 * (seconds - (time.perf_counter() - start)))))
    answer = solver.check()
    if answer == module.unsat:
        return "safe", None
    if answer != module.sat:
        return "unknown", None
    return "unsafe", _values(solver.model(), inputs, box)


def encode(
    network: Network, box: Box, solver: Any, known: dict[int, tuple[Tensor, Tensor]]
) -> tuple[list[Any], list[Any]]:
    """Adds one box and the network to a solver; the expressions of inputs and logits. `known`: bounds of what ReLUs
    read; without them every ReLU is a choice."""
    module = z3()
    low, high = box.lower.flatten().tolist(), box.upper.flatten().tolist()
    values: list[list[Any]] = []
    for index, node in enumerate(network.nodes):
        if isinstance(node.op, Input):
            row: list[Any] = []
            for i, (a, b) in enumerate(zip(low, high)):
                if a == b:
                    row.append(_number(module, a))
                    continue
                x = module.Real(f"x{i}")
                solver.add(x >= _number(module, a), x <= _number(module, b))
                row.append(x)
        elif isinstance(node.op, Relu):
            row = _relus(module, solver, node.op.slope, index, values[node.inputs[0]], known.get(node.inputs[0]))
        else:
            row = _affine(module, solver, network, index, [values[i] for i in node.inputs])
        values.append(row)
    return list(values[0]), values[-1]


def _relus(
    module: Any, solver: Any, leak: float, index: int, before: list[Any], known: tuple[Tensor, Tensor] | None
) -> list[Any]:
    slope = _number(module, leak)
    row = []
    bounds = None if known is None else list(zip(known[0].flatten().tolist(), known[1].flatten().tolist()))
    for i, z in enumerate(before):
        low, high = bounds[i] if bounds is not None else (-math.inf, math.inf)
        if low >= 0:
            row.append(z)
        elif high <= 0:
            row.append(z * slope if leak else _number(module, 0.0))
        elif bounds is None:
            row.append(module.If(z > 0, z, z * slope if leak else _number(module, 0.0)))
        else:
            y = module.Real(f"r{index}_{i}")
            solver.add(z >= _number(module, low), z <= _number(module, high))
            solver.add(module.Or(module.And(z >= 0, y == z), module.And(z <= 0, y == z * slope)))
            chord = (Fraction(high) - Fraction(leak) * Fraction(low)) / (Fraction(high) - Fraction(low))
            solver.add(
                y >= z,
                y >= z * slope,
                y <= _number(module, high) + _number(module, chord) * (z - _number(module, high)),
            )
            row.append(y)
    return row


def _affine(module: Any, solver: Any, network: Network, index: int, before: list[list[Any]]) -> list[Any]:
    """One affine operator: its outputs as new variables, or as plain expressions where a row reads one input."""
    node = network.nodes[index]
    rows = []
    matrices = []
    for i, source in enumerate(node.inputs):
        shape = network.nodes[source].shape
        size = network.nodes[source].size
        eye = torch.eye(size, dtype=network.dtype).reshape(size, *shape)
        others = [
            torch.zeros(size, *network.nodes[j].shape, dtype=network.dtype) if k != i else eye
            for k, j in enumerate(node.inputs)
        ]
        matrices.append(node.op.linear(*others).reshape(size, -1).T)
    offset = network.offset(index)
    constant = [0.0] * node.size if offset is None else offset.flatten().tolist()
    for out in range(node.size):
        terms, total = [], Fraction(constant[out])
        for matrix, values in zip(matrices, before):
            row = matrix[out]
            for at in row.nonzero().flatten().tolist():
                weight = Fraction(float(row[at]))
                value = values[at]
                if module.is_rational_value(value):
                    total += weight * value.as_fraction()
                else:
                    terms.append(value if weight == 1 else _number(module, weight) * value)
        if not terms:
            rows.append(_number(module, total))
        elif len(terms) == 1:
            rows.append(terms[0] + _number(module, total) if total else terms[0])
        else:
            z = module.Real(f"z{index}_{out}")
            solver.add(z == module.Sum(*terms, _number(module, total)))
            rows.append(z)
    return rows


def _combination(module: Any, weights: list[float], values: list[Any]) -> Any:
    return module.Sum(*(_number(module, w) * v for w, v in zip(weights, values) if w))


def _number(module: Any, value: float | Fraction) -> Any:
    """The exact rational number that a float is."""
    exact = value if isinstance(value, Fraction) else Fraction(*float(value).as_integer_ratio())
    return module.RealVal(f"{exact.numerator}/{exact.denominator}")


def _values(model: Any, inputs: list[Any], box: Box) -> Tensor:
    numbers = []
    for x, low in zip(inputs, box.lower.flatten().tolist()):
        value = model.eval(x, model_completion=True)
        if hasattr(value, "approx"):  # algebraic numbers do not occur in linear problems, but cost nothing to allow
            value = value.approx(20)
        numbers.append(float(value.as_fraction()) if hasattr(value, "as_fraction") else low)
    return torch.tensor(numbers, dtype=torch.float64).reshape(box.lower.shape)


def pull_back(
    network: Network,
    index: int,
    target: Tensor,
    box: Box,
    *,
    slack: float = 1e-3,
    seconds: float = 10.0,
) -> Tensor | None:
    """A sample (1, *shape) of the box whose values at node `index` are within `slack` of `target`, or None where there
    is none or the time ends. The point is not replayed here."""
    module = z3()
    found = Propagation(network, box, method="crown")
    part = Network(nodes=network.nodes[: index + 1], name=network.name, device=network.device)
    solver = module.SolverFor("QF_LRA")
    inputs, outputs = encode(part, box, solver, found.hidden)
    for value, want in zip(outputs, target.flatten().tolist()):
        solver.add(value >= _number(module, want - slack), value <= _number(module, want + slack))
    solver.set("timeout", max(1, int(1000 * seconds)))
    return _values(solver.model(), inputs, box) if solver.check() == module.sat else None
