"""Before and after: what a rewrite changed. Measured time and memory stand beside parameters, MACs and accuracy."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lynceus.core.cost import cost, latency
from lynceus.core.errors import AdviceError
from lynceus.core.report import Report, environment
from lynceus.core.subject import Subject
from lynceus.train.evaluate import batches


def compare(
    before: nn.Module | Subject,
    after: nn.Module | Subject,
    data: Iterable[Any] | None,
    example: Float[Tensor, "b 3 h w"],
    *,
    repeats: int = 20,
    seed: int = 0,
) -> Report:
    """Rows "before" and "after": parameters, MACs, median milliseconds for `example`, accuracy where `data` has labels.

    example: pixels that both accept. data: images that both are shown as they are; None compares cost alone.
    summary: agreement (share of images with the same first answer), speed (before / after), and the accuracy lost.
    """
    subjects = {"before": _subject(before), "after": _subject(after)}
    rows: dict[str, dict[str, Any]] = {}
    for name, subject in subjects.items():
        counted = cost(subject.model, example)
        timed = latency(subject, example, repeats=repeats)
        rows[name] = {
            "model": name,
            "what": subject.name,
            "parameters": counted.params,
            "MACs": counted.macs,
            "milliseconds": timed.median,
        }
    summary = {"speed": rows["before"]["milliseconds"] / rows["after"]["milliseconds"]}
    if data is not None:
        right, same, labelled, seen = dict.fromkeys(subjects, 0), 0, 0, 0
        with torch.inference_mode():
            for batch in batches(data, subjects["before"], 64):
                answers = {name: subject(batch.image).argmax(-1).cpu() for name, subject in subjects.items()}
                seen += len(batch)
                same += int((answers["before"] == answers["after"]).sum())
                if batch.label is not None and batch.label.ndim == 1:
                    labelled += int((batch.label >= 0).sum())
                    for name, answer in answers.items():
                        right[name] += int((answer == batch.label).sum())
        if not seen:
            raise AdviceError("There is no image to compare on: the data is empty.")
        summary |= {"agreement": same / seen, "images": float(seen)}
        if labelled:
            for name in subjects:
                rows[name]["accuracy"] = right[name] / labelled
            summary["accuracy lost"] = (right["before"] - right["after"]) / labelled
    shape = "x".join(map(str, example.shape))
    notes = [f"Time and MACs are for one batch {shape}; time is a median of {repeats} on this machine as it was."]
    return Report(
        name="before and after", rows=list(rows.values()), summary=summary, notes=notes, environment=environment(seed)
    )


def _subject(model: nn.Module | Subject) -> Subject:
    return model if isinstance(model, Subject) else Subject(model, needs_grad=False)
