"""The whole trust wing on one model and one set of images: one report with a section per check, under one budget.

Sections whose needs the model or the data do not meet, or whose optional package is missing, leave a line instead. What
a section found is kept in `keep` as soon as it is finished, so that a second run goes on with the next one.
"""

from __future__ import annotations

import hashlib
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar

from torch import nn

from lynceus.core.errors import AdviceError, MissingError, unknown
from lynceus.core.guard import collect, sensible
from lynceus.core.identity import image_key, model_key
from lynceus.core.ledger import Ledger
from lynceus.core.progress import clock
from lynceus.core.report import Report, environment
from lynceus.core.subject import Subject
from lynceus.core.types import Sample

SMALL = 200_000  # parameters of a network whose answers can be proven in minutes
CUT = 0.97  # a section that used this share of its time is taken as cut short: a second run does it again


@dataclass(frozen=True, kw_only=True, slots=True)
class Section:
    """One check of the report.

    title: of the section. check: "module:Class". weight: its share of the time. images: how many it looks at.
    options: of the check. asks: of the model or data, beyond the check's own. numbers: keys of its summary that stand
    on top of the whole report, with the names that they have there. say: a sentence for checks that give none.
    largest: parameters of a model above which the section is left out.
    """

    title: str
    check: str
    weight: float
    images: int | None = None
    options: Mapping[str, Any] | None = None
    asks: frozenset[str] = frozenset()
    numbers: Mapping[str, str] | None = None
    say: str = ""
    largest: int | None = None


SECTIONS: dict[str, Section] = {
    "accuracy": Section(
        title="Clean accuracy",
        check="lynceus.train.evaluate:Evaluate",
        weight=0.5,
        options={"quiet": True},
        numbers={"accuracy": "accuracy", "ece": "calibration error"},
        say="{accuracy:.1%} of {images:.0f} images are answered rightly; confidence is off by {ece:.1%} on average.",
    ),
    "attacks": Section(
        title="Under attack",
        check="lynceus.trust.attacked:Attacked",
        weight=4,
        images=200,
        options={"steps": 10, "batch_size": 10, "attacks": ("pgd", "apgd-dlr")},
        numbers={"accuracy at 2/255": "under attack, 2/255", "accuracy at 8/255": "under attack, 8/255"},
    ),
    "verify": Section(
        title="Proven",
        check="lynceus.trust.verified:Verify",
        weight=4,
        images=40,
        largest=SMALL,
        options={"pixels": 6, "step": 0.05, "boxes": 300},
        numbers={"safe": "proven, 6 pixels by 0.1", "median proven radius": "median proven radius"},
    ),
    "shift": Section(
        title="Moved by a pixel",
        check="lynceus.trust.shift:ShiftConsistency",
        weight=1,
        images=200,
        numbers={"realistic_adversarial": "unmoved by every shift of 1 px", "certified": "certified for shifts"},
        say="{realistic_consistency:.1%} of answers stay the same when the camera moves by a pixel; for "
        "{realistic_adversarial:.1%} of the images all eight do.",
    ),
    "corrupted": Section(
        title="Noise, blur, weather, digital damage",
        check="lynceus.trust.corrupted:Corrupted",
        weight=4,
        images=200,
    ),
    "edits": Section(
        title="Edited scenes",
        check="lynceus.trust.edits.audits:Edits",
        weight=3,
        images=200,
        options={"quiet": True},
        asks=frozenset({"masks"}),
    ),
    "blind-spots": Section(
        title="Blind spots",
        check="lynceus.trust.level_sets:BlindSpots",
        weight=2,
        images=200,
        options={"images": 8, "steps": 200},
    ),
    "fooling": Section(
        title="Fooling images",
        check="lynceus.trust.fooling:Fooling",
        weight=3,
        options={"generations": 60, "population": 100},
    ),
    "game": Section(
        title="Few painted pixels",
        check="lynceus.trust.game:Game",
        weight=3,
        images=12,
        options={"queries": 1500},
    ),
    "attribution": Section(
        title="What the worst answers rest on",
        check="lynceus.explain.worst_cases:Attribution",
        weight=1,
        images=500,
    ),
}


@dataclass(frozen=True, kw_only=True)
class TrustReport:
    """Every check of the trust wing that fits the model and the data, as one report.

    seconds: wall time for all sections together; each gets its share of what is left, and what it does not use goes on
      to the next. only, skip: names of sections to run, or to leave out.
    limit: at most this many images in every section; default: what each section takes.
    keep: folder in which finished sections are kept, so that a second run goes on.
    """

    needs: ClassVar[frozenset[str]] = frozenset()

    seconds: float | None = 500.0
    only: tuple[str, ...] = ()
    skip: tuple[str, ...] = ()
    limit: int | None = None
    keep: Path | None = None

    def __call__(self, subject: Subject, data: Iterable[Sample], *, seed: int = 0) -> Report:
        """One row and one part per section; `parts` are the checks' own reports."""
        sensible(self)
        began = time.monotonic()
        names = self._names()
        pictures = data if hasattr(data, "take") else list(data)
        first = _some(pictures, 64)
        found = collect(subject, first)  # what would make every section meaningless is said here, before any work
        have = _offers(subject, first)
        report = Report(name=f"trust report of {subject.name}", environment=environment(seed), notes=list(found.notes))
        ledger = Ledger(self.keep, "trust", (replace(self, keep=None, seconds=None), model_key(subject), seed))
        data_key = _data_key(first, pictures)
        for i, name in enumerate(names):
            section = SECTIONS[name]
            lacking = self._lacking(section, subject, have)
            if lacking:
                report.rows.append({"section": section.title, "state": "left out", "finding": lacking})
                continue
            share = None
            if self.seconds is not None:
                left = self.seconds - (time.monotonic() - began)
                rest = sum(SECTIONS[n].weight for n in names[i:] if not self._lacking(SECTIONS[n], subject, have))
                share = max(2.0, left * section.weight / rest)
            started = time.monotonic()
            key = f"{name} {data_key}"
            kept = ledger.get(key)
            if kept is None:
                print(f"{section.title} ...", file=sys.stderr, flush=True)
            part, state, why = self._run(section, subject, pictures, share, seed) if kept is None else _read(kept)
            took = time.monotonic() - started
            if part is None:
                report.rows.append({"section": section.title, "state": state, "finding": why, "seconds": took})
                continue
            cut = share is not None and took > CUT * share and _timed(section)
            if kept is None and not cut:
                ledger.put(key, part.json())
            part.name = section.title
            part.answer = part.answer or _said(section, part)
            part.environment.clear()
            report.parts.append(part)
            state = "ended by its time" if cut else "done"
            report.rows.append({"section": section.title, "state": state, "finding": finding(part), "seconds": took})
            for wanted, shown in (section.numbers or {}).items():
                if wanted in part.summary:
                    report.summary[shown] = part.summary[wanted]
        report.answer = _answer(report)
        report.summary["seconds"] = time.monotonic() - began
        return report

    def _names(self) -> list[str]:
        for name in (*self.only, *self.skip):
            if name not in SECTIONS:
                raise unknown("section of the trust report", name, SECTIONS)
        names = [n for n in SECTIONS if (not self.only or n in self.only) and n not in self.skip]
        if not names:
            raise AdviceError("Every section is skipped; name at least one with only=.")
        if self.seconds is not None and self.seconds <= 0:
            raise AdviceError(f"seconds is the time for all sections, above 0, not {self.seconds}.")
        return names

    def _lacking(self, section: Section, subject: Subject, have: frozenset[str]) -> str:
        """Why a section cannot run; nothing if it can."""
        kind = _load(section.check)
        lacking = sorted((frozenset(kind.needs) | section.asks) - have)
        words = {
            "gradients": f"{subject.name} gives no gradients (only its answers are known)",
            "features": f"{subject.name} gives no features",
            "labels": "the images have no labels",
            "masks": "the images have no masks of objects",
        }
        size = sum(p.numel() for p in subject.model.parameters()) if isinstance(subject.model, nn.Module) else 0
        if not lacking and section.largest is not None and size > section.largest:
            return f"{subject.name} has {size:,} parameters; within minutes this is for up to {section.largest:,}"
        return "; ".join(words.get(n, f"{n} is not there") for n in lacking)

    def _run(
        self, section: Section, subject: Subject, data: Any, share: float | None, seed: int
    ) -> tuple[Report | None, str, str]:
        kind = _load(section.check)
        known = {f.name for f in fields(kind)}
        options = dict(section.options or {})
        if "seconds" in known:
            options["seconds"] = share
        if "keep" in known and self.keep is not None:
            options["keep"] = self.keep
        count = min((n for n in (self.limit, section.images) if n is not None), default=None)
        if "limit" in known and count is not None:
            options["limit"] = count
        images = data if count is None else _some(data, count)
        try:
            return _fitted(kind, options, subject, images, seed), "done", ""
        except MissingError as error:
            return None, "left out", str(error)
        except AdviceError as error:
            return None, "not possible", str(error)
        except Exception as error:  # one broken section must not cost the others; the row says what broke
            where = traceback.extract_tb(error.__traceback__)[-1]
            return None, "failed", f"{type(error).__name__}: {error} ({Path(where.filename).name}, line {where.lineno})"


def _fitted(kind: Callable[..., Any], options: dict[str, Any], subject: Subject, images: Any, seed: int) -> Report:
    """The check's report; a model of one fixed size gets its shifted views from pictures with repeated borders."""
    try:
        report: Report = kind(**options)(subject, images, seed=seed)
    except (RuntimeError, AssertionError, AdviceError):
        if getattr(kind, "__name__", "") != "ShiftConsistency":
            raise
        side = tuple(collect(subject, images, limit=1).images.shape[-2:])
        if side[0] != side[1]:
            raise
        report = kind(**options, extend=1, view=int(side[0]))(subject, images, seed=seed)
    return report


def _said(section: Section, part: Report) -> str:
    try:
        return section.say.format_map(part.summary)
    except KeyError:
        return ""


def finding(part: Report) -> str:
    """The section in one sentence: its answer, else its first numbers."""
    if part.answer:
        return part.answer
    shown = [f"{k.replace('_', ' ')} {v:.3g}" for k, v in part.summary.items() if "seconds" not in k and k != "images"]
    return ", ".join(shown[:4])


def _read(kept: str) -> tuple[Report | None, str, str]:
    return Report.from_json(kept), "done", ""


def _load(target: str) -> Any:
    module, _, name = target.partition(":")
    return getattr(import_module(module), name)


def _timed(section: Section) -> bool:
    return "seconds" in {f.name for f in fields(_load(section.check))}


def _offers(subject: Subject, samples: Iterable[Sample]) -> frozenset[str]:
    have = {"images"}
    if subject.needs_grad and isinstance(subject.model, nn.Module):
        have.add("gradients")
    if subject._features is not None or isinstance(subject.model, nn.Module):
        have.add("features")
    some = list(samples)
    if any(s.label is not None for s in some):
        have.add("labels")
    if some and all(s.masks is not None and len(s.masks) for s in some):
        have.add("masks")
    return frozenset(have)


class _Few(list[Sample]):
    """Some samples of a set, with the names of its classes."""

    classes: Sequence[str] | None = None


def _some(data: Any, count: int) -> Any:
    """At most `count` samples, spread over the set, with the set's classes."""
    if hasattr(data, "take"):
        return data.take(count)
    step = max(1, len(data) // count)
    few = _Few(data[::step][:count])
    few.classes = getattr(data, "classes", None)
    return few


def _data_key(first: Iterable[Sample], data: Any) -> str:
    digest = hashlib.blake2b(digest_size=6)
    for sample in first:
        digest.update(image_key(sample.image))
        digest.update(repr(sample.label).encode())
    digest.update(str(len(data)).encode())
    return digest.hexdigest()


def _answer(report: Report) -> str:
    """The numbers that matter, in two sentences."""
    s = report.summary
    said = []
    if "accuracy" in s:
        said.append(f"right on {s['accuracy']:.1%} of clean images")
    if "under attack, 8/255" in s:
        share = f"on {s['under attack, 8/255']:.1%} when an attacker may move every pixel by 8 of 255 levels"
        said.append(share if said else f"right {share}")
    left = [r for r in report.rows if r["state"] in ("left out", "not possible", "failed")]
    done = len(report.rows) - len(left)
    text = f"{done} of {len(report.rows)} sections ran"
    took = sum(float(r.get("seconds") or 0.0) for r in report.rows)
    text += f" in {clock(took)}."
    return f"The model is {', '.join(said)}. {text}" if said else text
