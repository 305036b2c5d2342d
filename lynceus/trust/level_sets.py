"""Blind spots: images far from the source, near another picture, that the model is just as sure of.

Exploring Geometry of Blind Spots in Vision Models, NeurIPS 2023, arXiv 2310.19889.
Reference code: SriramB-98/blindspots-neurips-sub (no licence file; nothing of it is used).

`traverse` walks from sources to targets on the level set of the source class (`walks`) and measures the set around them
(`level_shape`); `BlindSpots` is the Check; `compare` sets several models beside each other on the same pairs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from lynceus.core import plots
from lynceus.core.environment import environment
from lynceus.core.errors import AdviceError
from lynceus.core.guard import sensible
from lynceus.core.identity import image_key, model_key
from lynceus.core.ledger import Ledger
from lynceus.core.progress import progress
from lynceus.core.report import Report
from lynceus.core.rng import derive, generator
from lynceus.core.subject import Subject
from lynceus.core.types import Sample
from lynceus.data.dataset import Dataset
from lynceus.trust.attacks import fmn
from lynceus.trust.guard import Material, collect, examine
from lynceus.trust.level_figures import draw
from lynceus.trust.level_report import gather, list_walks, say_time, summarise
from lynceus.trust.level_shape import Lattice, line, rmse, triangle, widths
from lynceus.trust.walks import check_pairs, confidence, walk

CONTRAST_STEPS = 60


@dataclass(frozen=True, kw_only=True)
class BlindSpots:
    """Which pictures of something else is the model as sure of as of the original?

    images: sources that are walked from, each answered rightly. targets: pictures of other classes that each walks to.
    confident: only sources with at least this probability of their class.
    step_size: share of the way to the target that a step asks for. steps: of every walk. drop: probability that may
      be lost in all. adversarial: adds a push that keeps confidence up, at most adversarial_step per pixel.
    jitter: noise added to the start, 4 / 255 in the paper. backtrack: a refused step is tried at half its length next.
    lattice: exact, or reference, which drops two points as the authors' code does.
    widths: distances in L2 at which the tube around the walk is measured, such as 0.5 1 2; none by default.
    contrast: also shows the smallest change that flips the answer.
    record: steps between two points of the curves. limit: look for sources among this many images.
    batch_size: walks at a time. seconds: wall time for the whole check; walks not reached are left out.
    keep: folder in which finished walks are kept, so that a second run goes on.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"gradients", "labels"})

    images: int = 16
    targets: int = 2
    confident: float = 0.0
    step_size: float = 0.01
    steps: int = 400
    drop: float = 0.2
    adversarial: bool = True
    adversarial_step: float = 0.002
    jitter: float = 0.01568627450980392
    backtrack: bool = False
    lattice: Lattice = "exact"
    widths: tuple[float, ...] = ()
    contrast: bool = True
    record: int = 20
    limit: int = 512
    batch_size: int = 64
    seconds: float | None = None
    keep: Path | None = None

    def __call__(self, subject: Subject, data: Iterable[Sample], *, seed: int = 0) -> Report:
        """One row per walk. arrays: see `traverse`, and "source", "target": which of the images looked at they are."""
        sensible(self)
        began = time.monotonic()
        subject.require(self.needs)
        material = self._look(subject, data)
        source, target = self.pairs([subject], material, seed)
        report = self._traverse(subject, material, source, target, seed, began)
        report.arrays |= {"source": source.numpy(), "target": target.numpy()}
        report.summary["seconds"] = time.monotonic() - began
        return report

    def pairs(self, subjects: Sequence[Subject], material: Material, seed: int) -> tuple[Tensor, Tensor]:
        """Indices of the sources (n,), right for every subject, and of their targets (n, k)."""
        sure = torch.ones(len(material), dtype=torch.bool)
        for subject in subjects:
            with torch.no_grad():
                parts = [subject(x.to(subject.device)).softmax(1).cpu() for x in material.images.split(self.batch_size)]
            p = torch.cat(parts)
            own = p.gather(1, material.labels[:, None])[:, 0]
            sure &= (p.argmax(1) == material.labels) & (own >= self.confident)
        right = sure.nonzero()[:, 0]
        if len(right) == 0 or len(material) < 2:
            raise AdviceError(
                f"Walks start at images that the model answers rightly (with a probability of {self.confident:g} or "
                f"more) and need a second image to walk to; of {len(material)} images it is right on {len(right)}. "
                "Give the trained model, more images, or a lower `confident`."
            )
        order = right[torch.randperm(len(right), generator=generator(seed, "sources"))]
        source = order[: self.images].sort().values
        # a derangement of the sources, as in the paper, where there are enough for different targets
        enough = len(source) >= 10 * self.targets and len(set(material.labels[source].tolist())) > 1
        others = source if enough else torch.arange(len(material))
        return source, derangements(source, others, material.labels, self.targets, seed=seed)

    def _look(self, subject: Subject, data: Iterable[Sample]) -> Material:
        if isinstance(data, Dataset) and len(data) > self.limit:
            data = data.take(self.limit)
        return collect(subject, data, needs=self.needs, limit=self.limit).labelled()

    def _traverse(
        self, subject: Subject, material: Material, source: Tensor, target: Tensor, seed: int, began: float
    ) -> Report:
        images = material.images.clamp(0, 1)
        report = traverse(
            subject,
            images[source],
            images[target],
            material.labels[source],
            step_size=self.step_size,
            steps=self.steps,
            drop=self.drop,
            adversarial=self.adversarial,
            adversarial_step=self.adversarial_step,
            jitter=self.jitter,
            backtrack=self.backtrack,
            kind=self.lattice,
            tube=self.widths,
            contrast=self.contrast,
            record=self.record,
            batch_size=self.batch_size,
            seconds=None if self.seconds is None else max(0.0, self.seconds - (time.monotonic() - began)),
            keep=self.keep,
            names=[material.name(k) for k in range(material.classes)],
            ids=[material.ids[i] for i in source.tolist()],
            target_labels=material.labels[target],
            seed=seed,
        )
        report.notes = [*material.notes, *report.notes]
        return report


def traverse(
    subject: Subject | Callable[[Tensor], Tensor],
    sources: Float[Tensor, "n c h w"],
    targets: Float[Tensor, "n c h w"] | Float[Tensor, "n k c h w"],
    labels: Int[Tensor, " n"],
    *,
    step_size: float = 0.01,
    steps: int = 400,
    drop: float = 0.2,
    adversarial: bool = True,
    adversarial_step: float = 2e-3,
    jitter: float = 4 / 255,
    backtrack: bool = False,
    kind: Lattice = "exact",
    tube: Sequence[float] = (),
    contrast: bool = True,
    record: int = 20,
    batch_size: int = 64,
    seconds: float | None = None,
    keep: str | Path | None = None,
    names: Sequence[str] | None = None,
    ids: Sequence[str] | None = None,
    target_labels: Int[Tensor, "n k"] | Int[Tensor, " n"] | None = None,
    perceptual: Callable[[Tensor, Tensor], Tensor] | None = None,
    seed: int = 0,
) -> Report:
    """Walks from every source to each of its targets, and measures the level set there.

    subject: a Subject, or any differentiable function of pixels that gives logits. sources, targets: pixels in [0, 1];
      k targets per source give triangles between every two of them. labels: the class whose confidence is held;
      sources that the model answers otherwise are left out.
    step_size .. backtrack: see `walks.walk`. kind: the triangle's lattice. tube: L2 distances for `level_shape.widths`.
    contrast: adds the smallest change that flips the answer. record: steps between points of the curves.
    batch_size: walks at a time. seconds: wall time; keep: folder of finished walks. names, ids: of classes, sources.
    perceptual: a distance (a, b) -> (n,) of images scaled to [-1, 1], such as LPIPS.

    Arrays: "images" (n, k, c, h, w), "confidence", "clean", "accepted", "distances" (n, k, 3: RMSE, L-inf, SSIM),
    "path" (n, k, t, 2: confidence, RMSE to the target) at "steps", "line" (n, k, 11), "triangle" (n, pairs, points) at
    "lattice", "widths" (n, k, t, distances, 2), "kept" (n): which sources were walked from.
    """
    began = time.monotonic()
    subject = subject if isinstance(subject, Subject) else Subject(subject)
    many = targets[:, None] if targets.ndim == 4 else targets
    n, k = many.shape[:2]
    if k == 0:
        raise AdviceError("A walk needs at least one target per source.")
    check_pairs(sources.repeat_interleave(k, 0), many.flatten(0, 1), labels.repeat_interleave(k, 0))
    notes = examine(subject, sources, labels, ids=list(ids) if ids is not None else None)
    report = Report(name="blind spots", environment=environment(seed), notes=notes)
    device = subject.device
    sources, many, labels = sources.to(device), many.to(device), labels.to(device)
    with torch.no_grad():
        right = torch.cat([subject(x).argmax(1) for x in sources.split(batch_size)]) == labels
    if not bool(right.any()):
        raise AdviceError(
            f"The model answers none of the {n} sources with its label; there is no level set to walk on."
        )
    if not bool(right.all()):
        report.notes.append(f"{int((~right).sum())} of {n} sources are answered wrongly and were left out.")
    kept = right.nonzero()[:, 0]
    options = _Options(
        step_size=step_size,
        steps=steps,
        drop=drop,
        adversarial=adversarial,
        adversarial_step=adversarial_step,
        jitter=jitter,
        backtrack=backtrack,
        kind=kind,
        tube=tuple(tube),
        contrast=contrast,
        record=max(1, record),
    )
    until = None if seconds is None else began + seconds
    ledger = Ledger(keep, "blind-spots", (options, batch_size, seed, model_key(subject)))
    together = max(1, batch_size // k)
    done: list[dict[str, Any]] = []
    with progress("walking", total=len(kept) * k, unit="walks") as bar:
        for at in kept.split(together):
            s, t, y = sources[at], many[at], labels[at]
            named = b"".join(image_key(x) for x in [*s, *t.flatten(0, 1)]).hex()
            key = f"{derive(0, named, y.tolist()):x}"
            piece = ledger.get(key)
            if piece is None:
                if done and until is not None and time.monotonic() >= until:
                    break
                piece = _piece(subject, s, t, y, options, derive(seed, key), until)
                cut = piece["walked"] < steps
                if cut and done:
                    break  # only whole walks beside whole walks
                if not cut:
                    piece = ledger.put(key, piece)
            done.append(piece)
            bar.advance(len(at) * k, confidence=float(np.mean(np.asarray(piece["confidence"]))))
    count = sum(len(p["clean"]) for p in done)
    say_time(report, done, steps, count * k, len(kept) * k)
    gather(report, done, kept[:count], sources.cpu(), many.cpu(), perceptual)
    summarise(report, options.drop, seed)
    list_walks(report, labels.cpu(), target_labels, names, ids, k)
    draw(report, sources.cpu(), many.cpu(), labels.cpu(), names, drop, options.tube)
    return report


def compare(
    subjects: Mapping[str, Subject],
    data: Iterable[Sample],
    *,
    check: BlindSpots | None = None,
    seed: int = 0,
) -> Report:
    """The same walks on several models: one row per model, with an interval over sources for the triangle's fraction.

    Sources are images that every model answers rightly.
    """
    check = check or BlindSpots()
    if len(subjects) < 2:
        raise AdviceError(f"A comparison needs at least two models by name, not {len(subjects)}.")
    first = next(iter(subjects.values()))
    material = check._look(first, data)
    source, target = check.pairs(list(subjects.values()), material, seed)
    report = Report(name="blind spots compared", environment=environment(seed))
    curves = {}
    for name, subject in subjects.items():
        own = replace(check, keep=check.keep / name if check.keep is not None else None)
        found = own._traverse(subject, material, source, target, seed, time.monotonic())
        s = found.summary
        report.rows.append({"model": name, **{key: s[key] for key in _COMPARED if key in s}})
        report.figures |= {f"{name}: {figure}": value for figure, value in found.figures.items() if ".png" in figure}
        report.arrays |= {f"{name}/{key}": value for key, value in found.arrays.items()}
        report.summary |= {f"{name}: {key}": s[key] for key in _COMPARED if key in s}
        report.notes += [f"{name}: {note}" for note in found.notes]
        path = found.arrays["path"]
        curves[name] = (found.arrays["steps"], path[..., 1].mean((0, 1)))
    report.figures["distance to the target.plotly"] = plots.lines(curves, x_title="step", y_title="RMSE to the target")
    said = [f"{r['model']} {r['triangle within 0.1']:.2f}" for r in report.rows if "triangle within 0.1" in r]
    if said:
        report.answer = (
            "Share of the triangle that stays within 0.1 of the source's confidence: " + ", ".join(said) + "."
        )
    return report


_COMPARED = (
    "walks",
    "confidence, median",
    "RMSE to target",
    "share of the way left",
    "steps accepted",
    "lines within drop",
    "triangle mean",
    "triangle within 0.1",
    "triangle within 0.1, low",
    "triangle within 0.1, high",
)


def derangements(
    source: Int[Tensor, " n"], others: Int[Tensor, " m"], labels: Int[Tensor, " _"], count: int, *, seed: int = 0
) -> Int[Tensor, "n k"]:
    """`count` targets per source out of `others`: never itself, of another class and each only once where possible,
    and used as evenly as a random permutation uses them."""
    if count < 1:
        raise AdviceError(f"A walk needs at least one target per source, not {count}.")
    draw_from = generator(seed, "targets")
    out = torch.empty(len(source), 0, dtype=torch.long)
    for _ in range(count):
        repeats = -(-len(source) // len(others))
        pool = torch.cat([others[torch.randperm(len(others), generator=draw_from)] for _ in range(repeats)])

        def cost(i: int, j: int, taken: Tensor = out) -> int:
            """How bad `j` is as a target of source i."""
            same = int(source[i]) == j
            return 4 * same + 2 * int(labels[source[i]] == labels[j]) + int(bool((taken[i] == j).any()))

        for _sweep in range(50):
            bad = [i for i in range(len(source)) if cost(i, int(pool[i]))]
            if not bad:
                break
            for i in bad:
                j = int(torch.randint(len(pool), (1,), generator=draw_from))
                before = cost(i, int(pool[i])) + (cost(j, int(pool[j])) if j < len(source) else 0)
                after = cost(i, int(pool[j])) + (cost(j, int(pool[i])) if j < len(source) else 0)
                if after <= before:
                    pool[[i, j]] = pool[[j, i]]
        chosen = pool[: len(source)].clone()
        for i in (chosen == source).nonzero()[:, 0].tolist():
            chosen[i] = others[others != source[i]][0] if bool((others != source[i]).any()) else chosen[i]
        out = torch.cat([out, chosen[:, None]], 1)
    return out


@dataclass(frozen=True, kw_only=True)
class _Options:
    """What the findings depend on."""

    step_size: float
    steps: int
    drop: float
    adversarial: bool
    adversarial_step: float
    jitter: float
    backtrack: bool
    kind: Lattice
    tube: tuple[float, ...]
    contrast: bool
    record: int


def _piece(
    subject: Subject, s: Tensor, t: Tensor, y: Tensor, o: _Options, seed: int, until: float | None
) -> dict[str, Any]:
    """Everything about a few sources (b) and their targets (b, k)."""
    b, k = t.shape[:2]
    many, flat, held = s.repeat_interleave(k, 0), t.flatten(0, 1), y.repeat_interleave(k, 0)
    found = walk(
        subject,
        many,
        flat,
        held,
        step_size=o.step_size,
        steps=o.steps,
        drop=o.drop,
        adversarial=o.adversarial,
        adversarial_step=o.adversarial_step,
        jitter=o.jitter,
        backtrack=o.backtrack,
        record=sorted({0, o.steps, *range(o.record, o.steps, o.record)}),
        generator=generator(seed, "jitter"),
        until=until,
    )

    def per_source(x: Tensor) -> np.ndarray:
        value: np.ndarray = x.reshape(b, k, *x.shape[1:]).cpu().numpy()
        return value

    out: dict[str, Any] = {
        "walked": found.steps,
        "images": per_source(found.image),
        "confidence": per_source(found.confidence),
        "clean": per_source(found.clean)[:, 0],
        "accepted": per_source(found.accepted),
        "steps": [trace.step for trace in found.traces],
        "path": per_source(torch.stack([torch.stack([r.confidence, r.distance], 1) for r in found.traces], 1)),
        "line": per_source(line(subject, many, found.image, held)),
    }
    if k > 1:
        blind = found.image.view(b, k, *found.image.shape[1:])
        sides = [triangle(subject, s, blind[:, i], blind[:, j], y, kind=o.kind) for i, j in combinations(range(k), 2)]
        out["triangle"] = torch.stack([tri.values for tri in sides], 1).cpu().numpy()
        out["lattice"] = sides[0].points.numpy()
    if o.tube:
        draws = generator(seed, "widths")
        tubes = [
            widths(subject, r.image, r.direction, held, distances=o.tube, least=o.drop, generator=draws)
            for r in found.traces
        ]
        out["widths"] = per_source(torch.stack(tubes, 1))
    if o.contrast:
        small = fmn(subject, s, y, norm="l2", steps=CONTRAST_STEPS)
        with torch.no_grad():
            answer = subject(small.image).argmax(1)
        out["contrast"] = small.image.cpu().numpy()
        out["contrast answer"] = answer.cpu().numpy()
        out["contrast rmse"] = np.where(small.success.cpu().numpy(), rmse(small.image, s).cpu().numpy(), np.nan)
    return out


__all__ = ["BlindSpots", "compare", "confidence", "derangements", "line", "traverse", "triangle", "walk", "widths"]
