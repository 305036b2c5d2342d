"""A query as ONNX and VNNLIB, so that alpha-beta-CROWN, Marabou or another solver of VNN-COMP can confirm a verdict.

VNN-LIB standard: vnnlib.org. The property states what would refute safety: a point of the box at which some other class
is at least as high as the label; "unsat" is "safe".
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lynceus.core.errors import AdviceError
from lynceus.core.subject import Subject
from lynceus.rewrite.export import export
from lynceus.trust.verify_query import Query, ask


class _Whole(nn.Module):
    """A subject with its resizing and normalisation as one module."""

    def __init__(self, subject: Subject):
        super().__init__()
        self.inner, self.subject = subject.model, subject

    def forward(self, x: Tensor) -> Tensor:
        out: Any = self.inner(self.subject.prepare(x))
        logits: Any = out.get("logits", out.get("out")) if isinstance(out, dict) else out
        return logits


def to_vnnlib(query: Query) -> str:
    """The text of the property: inputs X_i between the box's corners, and a disjunction over the other classes."""
    box = query.box(query.lower[None], query.upper[None])
    classes = query.rows.shape[1]
    low, high = box.lower.flatten().tolist(), box.upper.flatten().tolist()
    lines = [f"; is a class other than {query.label} reached? unsat: the whole region is safe"]
    lines += [f"(declare-const X_{i} Real)" for i in range(len(low))]
    lines += [f"(declare-const Y_{j} Real)" for j in range(classes)]
    for i, (a, b) in enumerate(zip(low, high)):
        lines += [f"(assert (>= X_{i} {_decimal(a)}))", f"(assert (<= X_{i} {_decimal(b)}))"]
    others = "".join(f"\n  (and (>= Y_{j} Y_{query.label}))" for j in range(classes) if j != query.label)
    return "\n".join(lines) + f"\n(assert (or{others}\n))\n"


def _decimal(value: float) -> str:
    """All digits of a float64, without an exponent, which the standard's readers do not all know."""
    text = format(torch.tensor(value, dtype=torch.float64).item(), ".60f").rstrip("0")
    return text + "0" if text.endswith(".") else text


def export_query(
    subject: Subject | nn.Module,
    x: Tensor,
    folder: str | Path,
    *,
    step: float,
    count: int = 1,
    dims: Sequence[int] | Tensor | None = None,
    clip: tuple[float, float] | None = (0.0, 1.0),
    label: int | None = None,
) -> tuple[Path, Path]:
    """Writes model.onnx and query.vnnlib for the real region that `verify(..., goal="region")` asks about.

    Inputs are the network's own: pixels for a subject. Returns the two paths. Other arguments as in `verify`.
    Raises AdviceError when the query is no query, or the model cannot be written as ONNX.
    """
    query = ask(subject, x, dims=dims, step=step, count=count, clip=clip, label=label)
    folder = Path(folder)
    module = _Whole(subject) if isinstance(subject, Subject) else subject
    try:
        export(module.eval(), query.x[None], folder, formats=("onnx",), dynamic=(), quiet=True)
        path = folder / "query.vnnlib"
        path.write_text(to_vnnlib(query), encoding="utf-8")
    except OSError as error:
        raise AdviceError(f"The query cannot be written to {folder.resolve()}: {error.strerror}.") from None
    return folder / "model.onnx", path
