"""Before and after: what rewrites changed. Measured time and memory stand beside parameters, MACs and accuracy.

`compare` sets one model beside what it became, `compare_all` any number of models beside the first, on the same images
and timed in turns, so that a busy machine slows all of them alike.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lynceus.core import plots
from lynceus.core.cost import cost
from lynceus.core.errors import AdviceError
from lynceus.core.progress import track
from lynceus.core.report import Report, environment
from lynceus.core.subject import Subject
from lynceus.train.evaluate import batches

# what is asked for first stands first, where a page shows it without scrolling
COLUMNS = (
    "model", "what", "accuracy", "agreement", "milliseconds", "speed", "MACs", "parameters", "memory MB", "weights MB",
)  # fmt: skip
SHARE = 0.6  # of the saving in MACs; where the measured saving is less, the report says where the time goes


def compare(
    before: nn.Module | Subject,
    after: nn.Module | Subject,
    data: Iterable[Any] | None,
    example: Float[Tensor, "b 3 h w"],
    *,
    repeats: int = 20,
    seed: int = 0,
) -> Report:
    """Rows "before" and "after": parameters, MACs, median milliseconds for `example`, megabytes of weights and of the
    largest set of intermediate results, accuracy where `data` has labels.

    example: pixels that both accept. data: images that both are shown as they are; None compares cost alone.
    summary: agreement (share of images with the same first answer), speed (median of before / after over the turns),
    MACs and memory (before / after), and the accuracy lost. Where the time saved is less than .6 of the MACs saved,
    a note names the operators that take the time.
    """
    report = compare_all({"before": before, "after": after}, data, example, repeats=repeats, seed=seed)
    first, last = report.rows
    summary = {"speed": last["speed"]}
    for key in ("MACs", "parameters", "memory MB"):
        if last[key]:
            summary[f"{key} saved"] = 1 - last[key] / first[key] if first[key] else 0.0
    if "agreement" in last:
        summary |= {"agreement": last["agreement"], "images": report.summary["images"]}
    if "accuracy" in last:
        summary["accuracy lost"] = first["accuracy"] - last["accuracy"]
    rows = [{k: v for k, v in row.items() if k not in ("speed", "agreement")} for row in report.rows]
    return Report(
        name="before and after", rows=rows, summary=summary, notes=report.notes, environment=report.environment
    )


def compare_all(
    models: Mapping[str, nn.Module | Subject],
    data: Iterable[Any] | None,
    example: Float[Tensor, "b 3 h w"],
    *,
    repeats: int = 20,
    seed: int = 0,
) -> Report:
    """One row per model; the first is what `speed` and `agreement` of the others are relative to.

    models: name -> model; all take `example`, pixels in [0, 1]. data, repeats: as in `compare`. With labels the report
    draws accuracy against measured milliseconds."""
    if len(models) < 2:
        raise AdviceError(f"There is nothing to compare: {len(models)} model given, two or more are needed.")
    subjects = {name: _subject(model) for name, model in models.items()}
    times = _in_turns(subjects, example, repeats)
    first = next(iter(subjects))
    rows: dict[str, dict[str, Any]] = {}
    for name, subject in subjects.items():
        counted = cost(subject.model, example)
        held = _weights(subject.model)
        rows[name] = {
            "model": name,
            "what": subject.name,
            "parameters": counted.params,
            "MACs": counted.macs,
            "milliseconds": statistics.median(times[name]),
            "memory MB": (held + counted.peak_bytes) / 1e6,
            "weights MB": held / 1e6,
            "speed": statistics.median(a / b for a, b in zip(times[first], times[name])),
        }
    summary: dict[str, float] = {}
    if data is not None:
        summary = _answers(subjects, data, rows)
    rows = {name: {k: row[k] for k in COLUMNS if k in row} for name, row in rows.items()}
    shape = "x".join(map(str, example.shape))
    notes = [
        f"Time, MACs and memory are for one batch {shape}; time is the median of {repeats} passes, in turns, "
        f"on {torch.get_num_threads()} thread{'s' * (torch.get_num_threads() > 1)} of this machine as it was. Memory: "
        "weights, and the most bytes of intermediate results alive at once, as counted."
    ]
    for name, subject in list(subjects.items())[1:]:
        notes += _short_of_macs(name, subject, rows[first], rows[name], example)
    figures = {}
    if all("accuracy" in r for r in rows.values()) and len(rows) > 2:
        figures["accuracy against time.plotly"] = plots.scatter(
            [r["milliseconds"] for r in rows.values()],
            [r["accuracy"] for r in rows.values()],
            labels=list(rows),
            x_title=f"milliseconds for {shape}",
            y_title="accuracy",
        )
    return Report(
        name="models beside each other",
        rows=list(rows.values()),
        summary=summary,
        notes=notes,
        figures=figures,
        environment=environment(seed),
    )


def _subject(model: nn.Module | Subject) -> Subject:
    return model if isinstance(model, Subject) else Subject(model, needs_grad=False)


def _weights(model: Any) -> int:
    """Bytes of parameters and buffers, shared ones once."""
    if not isinstance(model, nn.Module):
        return 0
    held = {t.data_ptr(): t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers())}
    return sum(held.values())


def _in_turns(subjects: Mapping[str, Subject], example: Tensor, repeats: int) -> dict[str, list[float]]:
    """Milliseconds of each subject in each round."""
    times: dict[str, list[float]] = {name: [] for name in subjects}
    wait = (lambda: torch.cuda.synchronize(example.device)) if example.device.type == "cuda" else (lambda: None)
    with torch.inference_mode():
        for turn in track(range(repeats + 2), "timing"):
            for name, subject in subjects.items():
                wait()
                start = time.perf_counter()
                subject(example)
                wait()
                if turn >= 2:
                    times[name].append(1e3 * (time.perf_counter() - start))
    return times


def _answers(subjects: Mapping[str, Subject], data: Iterable[Any], rows: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Fills in accuracy (where there are labels) and agreement with the first subject; how many images there were."""
    first = next(iter(subjects))
    right, same, labelled, seen = dict.fromkeys(subjects, 0), dict.fromkeys(subjects, 0), 0, 0
    with torch.inference_mode():
        for batch in track(batches(data, subjects[first], 64), "answers"):
            answers = {name: subject(batch.image).argmax(-1).cpu() for name, subject in subjects.items()}
            seen += len(batch)
            for name, answer in answers.items():
                same[name] += int((answers[first] == answer).sum())
            if batch.label is not None and batch.label.ndim == 1:
                labelled += int((batch.label >= 0).sum())
                for name, answer in answers.items():
                    right[name] += int((answer == batch.label).sum())
    if not seen:
        raise AdviceError("There is no image to compare on: the data is empty.")
    for name in subjects:
        if name != first:
            rows[name]["agreement"] = same[name] / seen
        if labelled:
            rows[name]["accuracy"] = right[name] / labelled
    return {"images": float(seen)}


def _short_of_macs(
    name: str, subject: Subject, first: Mapping[str, Any], row: Mapping[str, Any], example: Tensor
) -> list[str]:
    """A line on where the time goes, when it fell by less than SHARE of what the multiply-adds did."""
    if not first["MACs"] or row["MACs"] >= first["MACs"]:
        return []
    fewer, less = 1 - row["MACs"] / first["MACs"], 1 - 1 / row["speed"]
    if less >= SHARE * fewer:
        return []
    top = ", ".join(f"{op} {share:.0%}" for op, share in _where(subject, example)[:4])
    time = f"{less:.0%} less" if less >= 0 else f"{1 / row['speed'] - 1:.0%} more"
    return [f"{name} has {fewer:.0%} fewer MACs and takes {time} time; most of it goes to {top}."]


def _where(subject: Subject, example: Tensor) -> Sequence[tuple[str, float]]:
    """Operators and their shares of one pass, the longest first."""
    with torch.inference_mode(), _Clock() as clock:
        subject(example)
    total = sum(clock.spent.values()) or 1
    return sorted(((k, v / total) for k, v in clock.spent.items()), key=lambda item: -item[1])


class _Clock(TorchDispatchMode):
    """Seconds spent in each operator; torch's own profiler writes lines of its machinery to the terminal."""

    def __init__(self) -> None:
        super().__init__()
        self.spent: dict[str, float] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        start = time.perf_counter()
        out = func(*args, **(kwargs or {}))
        name = str(func.overloadpacket).removeprefix("aten.").replace(".", "::")
        self.spent[name] = self.spent.get(name, 0.0) + time.perf_counter() - start
        return out
