"""Which everyday corruptions break the answers? Error per corruption and severity, mean corruption error.

Benchmarking Neural Network Robustness to Common Corruptions and Perturbations (Hendrycks, Dietterich), ICLR 2019,
arXiv 1903.12261; hendrycks/robustness (Apache-2.0). The corruptions themselves are `lynceus.data.corrupt`.

mCE divides by a reference's errors. AlexNet's hold for ImageNet alone; on other data the reference is the report of a
baseline on the same pictures. The un-normalised mean is always there.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from lynceus.core import plots
from lynceus.core.environment import environment
from lynceus.core.errors import AdviceError, unknown
from lynceus.core.guard import sensible
from lynceus.core.identity import image_key, model_key
from lynceus.core.ledger import Ledger
from lynceus.core.progress import progress
from lynceus.core.report import Report
from lynceus.core.rng import derive
from lynceus.core.subject import Subject
from lynceus.core.types import Sample
from lynceus.data.corrupt import (
    ALEXNET,
    ALEXNET_CLEAN,
    BENCHMARK,
    GROUPS,
    SEVERITIES,
    Scale,
    chosen,
    corrupt,
    natural_scale,
    picture_generators,
)
from lynceus.data.corrupt.filters import grey
from lynceus.trust.guard import Material, collect

EVERY = (1, 2, 3, 4, 5)
_GROUP = {name: group for group, names in GROUPS.items() for name in names}


@dataclass(frozen=True, kw_only=True)
class Corrupted:
    """Check: the error on pictures with noise, blur, weather and digital damage, at five severities.

    corruptions: names, groups (noise, blur, weather, digital, validation), "benchmark" (the 15) or "all" (the 19).
    severities: 1 to 5.
    scale: constants made for pictures of a few hundred pixels ("imagenet") or for 32 ("cifar"); "auto" goes by size.
    reference: whose errors mCE divides by: "alexnet" (ImageNet only), or the folder or report.json of this check on a
      baseline; none: AlexNet where it holds, else no mCE.
    side: pictures are brought to this short side and cut square first; none: as they are, or the subject's own size
      when sizes differ.
    shown: pictures in the gallery of the worst corruption. limit: at most this many images. batch_size: images a pass.
    seconds: wall time for the whole check; what was not reached is left out, and the notes say so.
    keep: folder in which finished pieces are kept, so that a second run goes on.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"labels"})

    corruptions: tuple[str, ...] = ("benchmark",)
    severities: tuple[int, ...] = (1, 2, 3, 4, 5)
    scale: Literal["auto", "imagenet", "cifar"] = "auto"
    reference: str | None = None
    side: int | None = None
    shown: int = 4
    limit: int | None = None
    batch_size: int = 64
    seconds: float | None = None
    keep: Path | None = None

    def __call__(self, subject: Subject, data: Iterable[Sample], *, seed: int = 0) -> Report:
        """One row per corruption. arrays: "errors" (corruptions, severities), nan where time ran out."""
        sensible(self)
        began = time.monotonic()
        names, severities = chosen(self.corruptions), self._severities()
        if self.scale not in ("auto", *SEVERITIES):
            raise unknown("scale of corruptions", str(self.scale), ("auto", *SEVERITIES))
        material = collect(subject, data, needs=self.needs, limit=self.limit, side=self.side).labelled()
        high, wide = material.images.shape[-2:]
        scale: Scale = natural_scale(high, wide) if self.scale == "auto" else self.scale
        report = Report(name="common corruptions", environment=environment(seed), notes=list(material.notes))
        report.environment |= {
            "model": subject.name,
            "pictures": _identity(material, scale, seed),
        }
        base = self._base(report, names, severities, scale, material)
        run = _Run(self, subject, material, names, severities, scale, seed)
        run.go(None if self.seconds is None else began + self.seconds)
        _fill(report, run, base)
        report.notes.append(f'Constants: "{scale}" (pictures of {high} x {wide}).')
        _draw(report, self, run)
        report.summary["seconds"] = time.monotonic() - began
        return report

    def _severities(self) -> tuple[int, ...]:
        wrong = [s for s in self.severities if s not in EVERY]
        if wrong or not self.severities:
            raise AdviceError(f"severities are whole numbers from 1 to 5, at least one, not {self.severities}.")
        return tuple(sorted(set(self.severities)))

    def _base(
        self, report: Report, names: Sequence[str], severities: Sequence[int], scale: Scale, material: Material
    ) -> Reference | None:
        holds = scale == "imagenet" and material.classes == 1000
        if self.reference is None or self.reference == "alexnet":
            if self.reference is None and not (holds and tuple(severities) == EVERY):
                report.notes.append(
                    "No mCE: AlexNet's errors hold for the five severities of ImageNet with its 1000 classes only. For "
                    "other data give reference=, the report of this check on a baseline."
                )
                return None
            if not holds:
                raise AdviceError(
                    f"AlexNet's errors are those on ImageNet at 224 pixels; here are {material.classes} classes at the "
                    f'scale "{scale}". Run this check on a baseline with --out FOLDER, and give reference="FOLDER".'
                )
            if tuple(severities) != EVERY:
                raise AdviceError("AlexNet's errors are means over five severities; leave severities at 1 2 3 4 5.")
            return Reference(name="AlexNet", errors=dict(ALEXNET), clean=ALEXNET_CLEAN)
        return reference_of(Report.load(self.reference), names, severities, pictures=report.environment["pictures"])


@dataclass(frozen=True, kw_only=True)
class Reference:
    """Whose errors mCE divides by. errors: corruption -> mean error over the severities. clean: without corruption."""

    name: str
    errors: Mapping[str, float]
    clean: float | None = None


def reference_of(
    report: Report, names: Sequence[str], severities: Sequence[int], *, pictures: str | None = None
) -> Reference:
    """A baseline's report as a reference. Raises AdviceError unless it is of this check, with the same pictures,
    corruptions and severities."""
    rows = {str(r.get("corruption")): r for r in report.rows}
    if report.name != "common corruptions" or "clean error" not in report.summary:
        raise AdviceError(f"A reference is a report of the check 'corrupted', not of {report.name!r}.")
    columns = [f"severity {s}" for s in severities]
    lacking = [n for n in names if n not in rows or any(not _known(rows[n].get(c)) for c in columns)]
    if lacking:
        raise AdviceError(
            f"The reference ({report.environment.get('model')}) has no errors for {', '.join(lacking[:5])} at the "
            f"severities {', '.join(map(str, severities))}; run it with the same options, to the end."
        )
    theirs = report.environment.get("pictures")
    if pictures is not None and theirs != pictures:
        raise AdviceError(
            f"The reference saw other pictures ({theirs}) than these ({pictures}): errors are compared on the same "
            "data, limit, side, scale and seed only. Run it again with the options of this check."
        )
    errors = {n: float(np.mean([rows[n][c] for c in columns])) for n in names}
    return Reference(
        name=report.environment.get("model", "baseline"), errors=errors, clean=report.summary["clean error"]
    )


def corruption_error(
    errors: Mapping[str, Sequence[float]], reference: Reference, *, clean: float | None = None
) -> dict[str, tuple[float, float]]:
    """corruption -> (CE, relative CE); mCE is the mean of the first over the 15 of the benchmark.

    errors: corruption -> error per severity, the same severities as the reference's mean. CE is the sum of errors over
    the reference's sum; the relative one subtracts the clean error above and below, and is nan without `clean`, or
    where the reference loses nothing.
    """
    out = {}
    for name, values in errors.items():
        if name not in reference.errors:
            raise unknown("corruption in the reference", name, reference.errors)
        own, base = float(np.mean(values)), float(reference.errors[name])
        relative = float("nan")
        if clean is not None and reference.clean is not None and base != reference.clean:
            relative = (own - clean) / (base - reference.clean)
        out[name] = (own / base if base else float("nan"), relative)
    return out


class _Run:
    """Pieces: one batch under one corruption at all severities, each kept when done."""

    def __init__(
        self,
        check: Corrupted,
        subject: Subject,
        material: Material,
        names: Sequence[str],
        severities: Sequence[int],
        scale: Scale,
        seed: int,
    ):
        self.check, self.subject, self.material = check, subject, material
        self.names, self.severities, self.scale, self.seed = names, severities, scale, seed
        images = (material.images * 255).round().to(torch.uint8)
        self.grey = images.shape[1] == 1  # corrupted as RGB copies, and brought back by their luma
        self.images = images.expand(-1, 3, -1, -1) if self.grey else images
        self.ledger = Ledger(check.keep, "corrupted", (scale, tuple(severities), seed, model_key(subject)))
        self.wrong: dict[str, list[np.ndarray]] = {n: [] for n in ("clean", *names)}  # (severities, images) each
        self.until: float | None = None

    def go(self, until: float | None) -> None:
        self.until = until
        step = self.check.batch_size
        pieces = -(-len(self.images) // step) * (1 + len(self.names))
        with progress("corrupting", total=pieces, unit="pieces") as bar:
            for start in range(0, len(self.images), step):
                at = slice(start, start + step)
                mark = b"".join(image_key(x) for x in self.images[at]).hex()
                mark = f"{derive(0, mark, self.material.labels[at].tolist()):x}"
                for name in ("clean", *self.names):
                    key = f"{name}-{start}-{mark}"
                    piece = self.ledger.get(key)
                    if piece is None:
                        found = self._piece(name, start, at)
                        if found is None:
                            return
                        piece = self.ledger.put(key, found)
                    self.wrong[name].append(np.asarray(piece, dtype=bool))
                    bar.advance(error=float(np.mean(piece)))

    def _piece(self, name: str, start: int, at: slice) -> np.ndarray | None:
        """Wrong or not, (severities, images); None when time ran out inside."""
        y = self.material.labels[at]
        rows = []
        for severity in (0,) if name == "clean" else self.severities:
            if self.until is not None and name != "clean" and time.monotonic() >= self.until:
                return None
            rows.append((self.answers(self.picture(name, severity, start, at), f"{name} {severity}") != y).numpy())
        return np.stack(rows)

    def picture(self, name: str, severity: int, start: int, at: slice) -> Tensor:
        """The images at `at` with one corruption: each has a seed of its own, whatever the batch."""
        x = self.images[at]
        if severity:
            seeds = picture_generators(self.seed, name, severity, range(start, start + len(x)))
            x = corrupt(x, name, severity, generator=seeds, scale=self.scale)
        return grey(x.float()).round().to(torch.uint8) if self.grey else x

    def answers(self, x: Tensor, what: str) -> Tensor:
        with torch.no_grad():
            out = self.subject(x.to(self.subject.device)).cpu()
        odd = ~out.isfinite().all(1)
        if bool(odd.any()):
            raise AdviceError(
                f"{self.subject.name} answers {int(odd.sum())} pictures under {what} with numbers that are not finite "
                "(NaN or infinity); its answers on the clean ones were finite. Look at its weights and precision."
            )
        return out.argmax(1)

    def errors(self) -> np.ndarray:
        """(corruptions, severities) with nan for what was not reached."""
        out = np.full((len(self.names), len(self.severities)), np.nan)
        for i, name in enumerate(self.names):
            if self.wrong[name]:
                out[i] = np.concatenate(self.wrong[name], 1).mean(1)
        return out

    def count(self, name: str) -> int:
        return sum(p.shape[1] for p in self.wrong[name])


def _fill(report: Report, run: _Run, base: Reference | None) -> None:
    errors = run.errors()
    clean = float(np.concatenate(run.wrong["clean"], 1).mean())
    reached = [i for i, n in enumerate(run.names) if run.wrong[n]]
    means = {run.names[i]: float(errors[i].mean()) for i in reached}
    relative: dict[str, tuple[float, float]] = {}
    if base is not None:
        relative = corruption_error(
            {run.names[i]: errors[i].tolist() for i in reached if run.names[i] in base.errors}, base, clean=clean
        )
    for i, name in enumerate(run.names):
        row: dict[str, Any] = {"corruption": name, "group": _GROUP[name], "images": run.count(name)}
        row |= {f"severity {s}": float(errors[i, j]) for j, s in enumerate(run.severities)}
        row["error"] = means.get(name, float("nan"))
        if base is not None:
            row["CE"], row["relative CE"] = relative.get(name, (float("nan"), float("nan")))
        report.rows.append(row)
    report.arrays["errors"] = errors
    report.summary["clean error"] = clean
    counted = [n for n in run.names if n in BENCHMARK] or list(run.names)
    if all(n in means for n in counted):
        report.summary["mean corruption error, un-normalised"] = float(np.mean([means[n] for n in counted]))
    whole = all(n in means for n in BENCHMARK)
    if base is not None and whole:
        report.summary["mCE"] = float(np.mean([relative[n][0] for n in BENCHMARK]))
        report.summary["relative mCE"] = float(np.mean([relative[n][1] for n in BENCHMARK]))
        report.notes.append(f"mCE is relative to the errors of {base.name}: 1 is as bad as {base.name}.")
    elif base is not None:
        report.notes.append("No mCE: it is a mean over the 15 corruptions of the benchmark, and not all were measured.")
    report.summary["images"] = float(run.count("clean"))
    short = [n for n in run.names if run.count(n) < len(run.images)]
    if short:
        report.notes.append(
            f"Time ran out: {run.count(run.names[-1])} of {len(run.images)} images went through every corruption; the "
            "column `images` says how many each number stands on. A second run with the same keep= goes on."
        )
    if not means:
        report.answer = "Time ran out before the first corruption was measured."
        return
    worst, least = max(means, key=lambda n: means[n]), min(means, key=lambda n: means[n])
    report.answer = (
        f"{run.subject.name} is wrong on {100 * clean:.1f}% of the clean pictures and on "
        f"{100 * float(np.mean(list(means.values()))):.1f}% of the corrupted ones"
        + (
            f"; worst is {worst} ({100 * means[worst]:.1f}%), mildest {least} ({100 * means[least]:.1f}%)."
            if len(means) > 1
            else f" ({worst})."
        )
    )


def _draw(report: Report, check: Corrupted, run: _Run) -> None:
    errors = run.errors()
    reached = [i for i, n in enumerate(run.names) if run.wrong[n]]
    if not reached:
        return
    clean = report.summary["clean error"]
    places = [0, *run.severities]
    report.figures["error by severity.plotly"] = plots.lines(
        {run.names[i]: (places, [clean, *errors[i].tolist()]) for i in reached}, x_title="severity", y_title="error"
    )
    report.figures["error.plotly"] = plots.heatmap(
        errors[reached],
        x_names=[str(s) for s in run.severities],
        y_names=[run.names[i] for i in reached],
        x_title="severity",
        low=0.0,
        high=1.0,
    )
    worst = run.names[reached[int(np.argmax(errors[reached].mean(1)))]]
    report.figures[f"worst corruption: {worst}, by severity, with the answer.png"] = _gallery(check, run, worst)
    top = run.severities[-1]
    one = slice(0, 1)
    pictures = [run.picture("clean", 0, 0, one)[0], *(run.picture(n, top, 0, one)[0] for n in run.names)]
    report.figures[f"all at severity {top}.png"] = plots.image_grid(
        pictures, ["clean", *run.names], columns=4 if len(pictures) <= 16 else 5
    )


def _gallery(check: Corrupted, run: _Run, worst: str) -> bytes:
    """Pictures that were right when clean, and what became of the answers as the worst corruption grew."""
    bad = np.concatenate(run.wrong[worst], 1)[-1]
    good = ~np.concatenate(run.wrong["clean"], 1)[0][: len(bad)]
    order = np.argsort(~(bad & good), kind="stable")[: max(1, check.shown)]
    cells: list[Tensor] = []
    captions = []
    for i in order.tolist():
        at = slice(i, i + 1)
        true = int(run.material.labels[i])
        for severity in (0, *run.severities):
            x = run.picture(worst, severity, i, at)
            answer = int(run.answers(x, f"{worst} {severity}")[0])
            cells.append(x[0])
            mark = "" if answer == true else ", wrong"
            captions.append(f"{severity}{mark}: {run.material.name(answer)}")
    return plots.image_grid(cells, captions, columns=1 + len(run.severities))


def _identity(material: Material, scale: Scale, seed: int) -> str:
    """What the corrupted pictures depend on, in words: how many, their size, a hash of pixels and labels."""
    n, _, h, w = material.images.shape
    marks = b"".join(image_key(x) for x in material.images).hex()
    digest = derive(0, marks, material.labels.tolist())
    return f"{n} of {h} x {w}, {digest % 16**8:08x}, scale {scale}, seed {seed}"


def _known(value: Any) -> bool:
    return isinstance(value, (int, float)) and bool(np.isfinite(value))
