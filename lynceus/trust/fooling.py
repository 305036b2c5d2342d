"""Fooling images: pictures that mean nothing to people and that a classifier names with near certainty.

Deep Neural Networks are Easily Fooled: High Confidence Predictions for Unrecognizable Images, CVPR 2015, arXiv
1412.1897. Reference code: Evolving-AI-Lab/fooling, GPL of its sferes part; written anew from the paper.

`evolve` needs nothing but answers: MAP-Elites (`lynceus.trust.evolution`) over pixels (`lynceus.trust.pixels`) or over
pattern networks (`lynceus.trust.cppn`). `ascend` follows gradients, `retrain` teaches a model what fooled it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor, nn

from lynceus.core import rng
from lynceus.core.environment import environment
from lynceus.core.errors import AdviceError, unknown
from lynceus.core.guard import sensible
from lynceus.core.plots import image_grid, lines
from lynceus.core.report import Report
from lynceus.core.subject import Subject
from lynceus.core.types import Sample
from lynceus.trust.ascend import AscentConfig
from lynceus.trust.ascend import ascend as ascend
from lynceus.trust.cppn import Expression as Expression
from lynceus.trust.cppn import PatternConfig, Patterns
from lynceus.trust.encodings import encoding_of
from lynceus.trust.evolution import Encoding, Run, judge, search
from lynceus.trust.guard import collect, examine
from lynceus.trust.pixels import PixelConfig, check_shape
from lynceus.trust.real import resemblance, told_apart
from lynceus.trust.retrain import learner as learner
from lynceus.trust.retrain import retrain as retrain

LEVELS = (0.99, 0.9999)
PROBES = 64  # patterns that show whether a model has learnt anything
SPREAD = 0.75  # least standard deviation of log odds over them; untrained networks stay below 0.6
SHOWN = 40  # pictures in the gallery
LARGE = 128  # side at which patterns are drawn for people


def evolve(
    subject: Subject | nn.Module | Callable[[Tensor], Tensor],
    shape: tuple[int, int, int],
    encoding: str | PixelConfig | PatternConfig = "pixels",
    generations: int = 200,
    population: int = 200,
    seed: int = 0,
    *,
    real: Tensor | None = None,
    labels: Int64[Tensor, " n"] | None = None,
    classes: Sequence[int] | None = None,
    grey: bool = False,
    crops: int = 0,
    goal: float | None = None,
    batch_size: int | None = None,
    seconds: float | None = None,
    queries: int | None = None,
    keep: str | Path | None = None,
    keep_every: int = 25,
    untrained: bool = False,
    quiet: bool = False,
) -> Report:
    """An image for every class that `subject` takes for that class with as much confidence as evolution finds.

    shape: (channels, height, width) of the images. encoding: "pixels", "cppn", or a PixelConfig or PatternConfig.
    real: images (n, c, h, w), uint8 or [0, 1], to compare with; labels: their classes, -1 unknown.
    classes: those to fool, default all. grey: coloured images without colour. crops: side of ten averaged crops.
    goal: confidence at which a class is done and its image left alone. None goes on to the last generation: images
      grow ever surer, and on small pictures slowly begin to resemble their class.
    batch_size: images per call of the model, default a whole population.
    seconds: wall time. queries: images that the model may be asked about, all together. keep: folder that lets a second
      run go on, bit for bit as if never interrupted; it is written every `keep_every` generations.
    untrained: True also searches where a model seems to have learnt nothing, which is refused otherwise.

    Returns a Report, a row per class. arrays: "images" (classes, c, h, w) uint8, "confidence" (measured on these 8-bit
    images), "curve" (generations + 1, classes) log odds, and "expressions" (cppn): read them with `expressions`.
    """
    began = time.monotonic()
    subject = subject if isinstance(subject, Subject) else Subject(subject)
    shape = check_shape(shape)
    made = encoding_of(encoding, shape, grey)
    if real is not None and tuple(real.shape[1:]) != shape:
        raise AdviceError(f"The real images are {tuple(real.shape[1:])}, those to evolve {shape}; give equal shapes.")
    report = Report(name="fooling images", environment=environment(seed))
    counted = _Counted(subject, name=subject.name, needs_grad=subject.needs_grad)
    _examine(counted, shape, real, labels, report)
    count = check_trained(counted, shape, real, labels, crops=crops, untrained=untrained)
    asked = counted.asked + (0 if real is None else len(real) + (count if classes is None else len(classes)))
    run = search(
        subject,
        made,
        generations=generations,
        population=population,
        seed=seed,
        classes=classes,
        crops=crops,
        goal=goal,
        batch_size=batch_size,
        seconds=None if seconds is None else seconds - (time.monotonic() - began),
        queries=None if queries is None else queries - asked,
        keep=keep,
        keep_every=keep_every,
        quiet=quiet,
    )
    picked = torch.tensor(list(classes) if classes is not None else range(len(run.archive.odds)))
    _fill(report, subject, made, run, picked, real, labels, batch_size or population)
    report.summary |= {"generations": float(run.generations), "queries": float(asked + run.queries)}
    seconds_taken = time.monotonic() - began
    report.summary |= {"seconds": seconds_taken}
    fresh = (run.generations + 1 - run.resumed) * population
    report.summary["images_per_second"] = fresh / seconds_taken
    if run.stopped:
        report.notes.append(
            f"The budget of {run.stopped} ended the search after {run.generations} of {generations} generations."
        )
    return report


class _Counted(Subject):
    """Counts the images that it is asked about."""

    asked = 0

    def __call__(self, image: Tensor) -> Tensor:
        self.asked += len(image)
        return super().__call__(image)


def _examine(
    subject: Subject, shape: tuple[int, int, int], real: Tensor | None, labels: Tensor | None, report: Report
) -> None:
    """What the model is asked about, looked at before any long work."""
    if labels is not None and (real is None or len(labels) != len(real)):
        raise AdviceError("labels belong to the real images: give both, one label per image.")
    images = real if real is not None else torch.rand(4, *shape, generator=rng.generator(0, "examined"))
    try:
        report.notes += examine(subject, images, labels)
    except AdviceError:
        raise
    except (RuntimeError, ValueError, TypeError) as error:
        raise AdviceError(
            f"{subject.name} fails on images {shape}: {str(error).splitlines()[0]}. Give the shape that it takes, or "
            "Subject(model, size=SIDE); a model of grey images needs Subject(model, mean=(0.,), std=(1.,))."
        ) from error


def expressions(report: Report) -> list[Expression | None]:
    """The pattern of each class of an evolved report, None where nothing was found: `.render(512, 512)`, `.formula()`.

    Raises AdviceError for a report whose images are no patterns."""
    if "expressions" not in report.arrays:
        raise AdviceError("These images are no patterns; evolve(..., encoding='cppn') finds some.")
    return [Expression.from_json(str(text)) if str(text) else None for text in report.arrays["expressions"]]


def check_trained(
    subject: Subject,
    shape: tuple[int, int, int],
    real: Tensor | None = None,
    labels: Tensor | None = None,
    *,
    crops: int = 0,
    untrained: bool = False,
) -> int:
    """How many classes the model has, once it is seen that it has learnt something.

    Raises AdviceError when it has not: it names labelled images hardly better than chance or, without labels, answers
    much the same for very different patterns."""
    probes = Patterns(shape)
    images = probes.render(probes.initial(PROBES, rng.derive(0, "probes")))
    odds = judge(subject, images, crops=crops).cpu()
    classes = int(odds.shape[1])
    if untrained:
        return classes
    advice = "Train it first, or insist with untrained=True."
    known = None if labels is None or real is None else (labels >= 0).nonzero().flatten()
    if known is not None and real is not None and labels is not None and len(known) >= 20:
        answers = judge(subject, to_bits(real[known]), batch_size=256, crops=crops).cpu().argmax(1)
        right, chance = float((answers == labels[known]).double().mean()), 1 / classes
        # a random head over good features hits by luck what no 3 sigma explain, but not a fifth of the way to all
        luck = max(3 * (chance * (1 - chance) / len(known)) ** 0.5, min(2 * chance, 0.2 * (1 - chance)))
        if right <= chance + luck:
            raise AdviceError(
                f"{subject.name} names {100 * right:.0f}% of {len(known)} real images rightly, hardly better than "
                f"chance: that it can be fooled would say nothing. {advice}"
            )
        return classes
    if (spread := float(odds.std(0).mean())) < SPREAD:
        raise AdviceError(
            f"{subject.name} has learnt nothing yet, it seems: over {PROBES} very different patterns the log odds of "
            f"its classes vary by {spread:.2g} only (trained networks: by 2 and more). {advice}"
        )
    return classes


@dataclass(frozen=True, kw_only=True)
class Fooling:
    """Which meaningless images does the model name with near certainty, and can it tell them from real ones?

    encoding: "cppn" evolves regular patterns, "pixels" noise, both from answers alone; "ascent" climbs gradients.
    generations: rounds of evolution. population: images per round. goal: confidence at which a class is done.
    decays: of the ascent, side by side. steps: of the ascent.
    coordinates: of patterns, "raw" pixel indices (the authors') or "unit" (smoother). grey: pictures without colour;
    default: as the data.
    size: side of the images; default: the data's. crops: side of ten averaged crops, 0 for none.
    limit: real images to compare with. batch_size: images per pass.
    untrained: True also goes on with a model that has learnt nothing.
    seconds: wall time for the whole check. queries: images that the model may be asked about.
    keep: folder in which the search is kept, so that a second run goes on.
    """

    needs: ClassVar[frozenset[str]] = frozenset()

    encoding: Literal["cppn", "pixels", "ascent"] = "cppn"
    generations: int = 100
    population: int = 200
    goal: float | None = None
    decays: tuple[float, ...] = (0.0, 0.01, 0.05)
    steps: int = 300
    coordinates: Literal["raw", "unit"] = "raw"
    grey: bool | None = None
    size: int | None = None
    crops: int = 0
    limit: int = 256
    batch_size: int = 200
    untrained: bool = False
    seconds: float | None = None
    queries: int | None = None
    keep: Path | None = None

    def __call__(self, subject: Subject, data: Iterable[Sample], *, seed: int = 0) -> Report:
        """One row per class: see `evolve` and `ascend`."""
        sensible(self)
        began = time.monotonic()
        if self.encoding not in ("cppn", "pixels", "ascent"):
            raise unknown("encoding", str(self.encoding), ("cppn", "pixels", "ascent"))
        needs = frozenset({"gradients"}) if self.encoding == "ascent" else self.needs
        seen = _Counted(subject, name=subject.name, needs_grad=subject.needs_grad)
        material = collect(seen, data, needs=needs, limit=self.limit, side=self.size)
        theirs = getattr(data, "classes", None)
        matched = theirs is None or len(theirs) == material.classes
        labels = material.labels if matched and bool((material.labels >= 0).any()) else None
        channels, height, width = (int(n) for n in material.images.shape[1:])
        shape = (channels, height, width)
        left = None if self.seconds is None else max(0.0, self.seconds - (time.monotonic() - began))
        if self.encoding == "ascent":
            if self.queries is not None:
                raise AdviceError("queries bound a search by answers alone; the ascent is bounded by steps=.")
            check_trained(subject, shape, material.images, labels, untrained=self.untrained)
            config = AscentConfig(steps=self.steps, mean=float(material.images.double().mean()))
            report = ascend(
                subject, None, self.decays, shape=shape, config=config, batch_size=self.batch_size, seconds=left,
                seed=seed,
            )  # fmt: skip
        else:
            grey = self.grey
            if grey is None:
                grey = bool((material.images - material.images[:, :1]).abs().max() < 1e-3)
            patterns = PatternConfig(coordinates=self.coordinates)
            report = evolve(
                subject,
                shape,
                patterns if self.encoding == "cppn" else "pixels",
                self.generations,
                self.population,
                seed,
                real=material.images,
                labels=labels,
                grey=grey,
                crops=self.crops,
                goal=self.goal,
                batch_size=self.batch_size,
                seconds=left,
                queries=None if self.queries is None else self.queries - seen.asked,
                keep=self.keep,
                untrained=self.untrained,
            )
        report.notes = list(dict.fromkeys([*material.notes, *report.notes]))
        if not matched:
            report.notes.append("The data has other classes than the model; its labels were not used.")
        return report


def to_bits(images: Tensor) -> Tensor:
    """uint8 images; [0, 1] is rounded to the nearest of 255 steps."""
    return images if images.dtype == torch.uint8 else (images * 255).round().clamp(0, 255).to(torch.uint8)


def _fill(
    report: Report,
    subject: Subject,
    encoding: Encoding,
    run: Run,
    picked: Tensor,
    real: Tensor | None,
    labels: Tensor | None,
    batch_size: int,
) -> None:
    archive = run.archive
    found = archive.cells >= 0
    images = torch.zeros(len(picked), *encoding.shape, dtype=torch.uint8)
    images[found] = encoding.render(encoding.select([archive.elites], archive.cells[found]))
    confidence, curve = archive.confidence, np.stack(run.curve)
    names = [_name(subject, int(c)) for c in picked]
    likeness: list[dict[str, Any]] = [{} for _ in names]
    if real is not None and labels is not None and bool((labels >= 0).any()):
        known = labels >= 0
        likeness = resemblance(images, picked, real[known], labels[known])
    for i, name in enumerate(names):
        row: dict[str, Any] = {"class": name, "confidence": float(confidence[i]), "log odds": float(archive.odds[i])}
        for level in LEVELS:
            above = np.flatnonzero(curve[:, i] > np.log(level / (1 - level)))
            row[f"generation > {level}"] = int(above[0]) if len(above) else None
        if likeness[i]:
            row["correlation"] = likeness[i]["correlation"]
            row["nearest real image"] = _name(subject, likeness[i]["nearest"])
        report.rows.append(row)
    share = float((confidence > LEVELS[0]).double().mean())
    report.summary = {
        "median_confidence": float(confidence.quantile(0.5)),
        "minimum_confidence": float(confidence.min()),
        f"share_above_{LEVELS[0]}": share,
    }
    if any(likeness):
        alike = [v["correlation"] for v in likeness if v["correlation"] is not None]
        if alike:
            report.summary["highest_correlation"] = max(alike)
        agree = sum(v["nearest"] == int(c) for v, c in zip(likeness, picked))
        report.summary["nearest_neighbour_agrees"] = agree / len(picked)
    if real is not None:
        summary, figures, arrays = told_apart(subject, images[found], real, batch_size=batch_size)
        report.summary |= summary
        report.arrays |= arrays
        report.figures |= figures
    report.arrays |= {
        "images": images.numpy(),
        "confidence": confidence.numpy(),
        "curve": curve,
        "classes": picked.numpy(),
    }
    if isinstance(encoding, Patterns):
        texts = [
            encoding.expression(archive.elites[int(c)]).to_json() if c >= 0 else "" for c in archive.cells.tolist()
        ]
        report.arrays["expressions"] = np.array(texts)
    _draw(report, encoding, images, names, confidence, curve)
    certain = int((confidence > LEVELS[0]).sum())
    report.answer = (
        f"For {certain} of {len(names)} classes a meaningless image was found that {subject.name} takes for it with "
        f"more than {100 * LEVELS[0]:.0f}% confidence (median {float(confidence.quantile(0.5)):.4%})."
    )
    if not bool(found.all()):
        report.notes.append(f"{int((~found).sum())} classes stayed without any image: their probability was always 0.")


def _draw(
    report: Report, encoding: Encoding, images: Tensor, names: list[str], confidence: Tensor, curve: np.ndarray
) -> None:
    first = confidence.argsort(descending=True)[:SHOWN].sort().values
    captions = [f"{names[i]} {100 * float(confidence[i]):.2f}%" for i in first.tolist()]
    pictures = {"fooling_images.png": image_grid(images[first], captions)}
    if "expressions" in report.arrays:
        drawn = [(i, e) for i, e in enumerate(expressions(report)) if e is not None and i in first.tolist()]
        large = [e.render(LARGE, LARGE * encoding.shape[2] // encoding.shape[1] or 1) for _, e in drawn]
        pictures["the_same_patterns_drawn_larger.png"] = image_grid(large, [names[i] for i, _ in drawn], side=LARGE)
    p = 1 / (1 + np.exp(-curve))
    across = np.arange(len(curve))
    middle, lowest = np.median(p, 1), p.min(1)
    steps = {"median of the classes": (across, middle), "lowest class": (across, lowest)}
    more = {"confidence_over_generations.plotly": lines(steps, x_title="generation", y_title="confidence")}
    finite = np.where(np.isfinite(curve), curve, np.nan)
    odds = {"median of the classes": (across, np.nanmedian(finite, 1)), "lowest class": (across, np.nanmin(finite, 1))}
    more["log_odds_over_generations.plotly"] = lines(odds, x_title="generation", y_title="log odds")
    report.figures = {**pictures, **more, **report.figures}


def _name(subject: Subject, index: int) -> str:
    return subject.classes[index] if subject.classes and index < len(subject.classes) else str(index)
