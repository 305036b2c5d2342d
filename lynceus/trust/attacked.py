"""Accuracy under attack, over a range of radii: PGD, APGD-CE, APGD-DLR and FMN, the worst of them per image.

The attacks and their papers are named in `lynceus.trust.attacks`, the tests for misleading gradients in
`lynceus.trust.masking`. Robust accuracy here is what these attacks leave: an upper bound of what is true.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence
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
from lynceus.trust.attacks import Adversarial, apgd, fgsm, fmn, pgd
from lynceus.trust.guard import Material, collect
from lynceus.trust.masking import Sign, masking

Attack = Literal["fgsm", "pgd", "apgd-ce", "apgd-dlr", "fmn"]
ATTACKS = ("fgsm", "pgd", "apgd-ce", "apgd-dlr", "fmn")
RADII = {
    "linf": (0.5 / 255, 1 / 255, 2 / 255, 4 / 255, 8 / 255, 16 / 255),
    "l2": (0.125, 0.25, 0.5, 1.0, 1.5, 2.0),
}
PROBED = 32  # images on which gradients are tested
KEPT_SIDE = 64  # adversarial images up to this side are all kept as arrays, larger ones for the first pictures only


@dataclass(frozen=True, kw_only=True)
class Attacked:
    """How much accuracy is left when every image may be changed within a small ball?

    norm: what the ball is measured in: linf (no pixel moves by more) or l2 (the length of the whole change).
    epsilons: radii in units of [0, 1] pixels, such as 0.03; default: 0.5 to 16 / 255 in linf, 0.125 to 2 in l2.
    attacks: which are run, each on what the ones before have left: fgsm, pgd, apgd-ce, apgd-dlr, fmn.
    steps: gradient steps of every attack (FMN takes twice as many). restarts: random starts of PGD and APGD.
    grid: adversarial images lie on the 8-bit grid, as files do.
    shown: adversarial images in the report. limit: at most this many images. batch_size: images per pass.
    seconds: wall time for the whole check; images not reached are left out, and the notes say so.
    keep: folder in which finished images are kept, so that a second run goes on.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"gradients", "labels"})

    norm: Literal["linf", "l2"] = "linf"
    epsilons: tuple[float, ...] | None = None
    attacks: tuple[str, ...] = ("pgd", "apgd-ce", "apgd-dlr", "fmn")
    steps: int = 40
    restarts: int = 1
    grid: bool = False
    shown: int = 8
    limit: int | None = None
    batch_size: int = 64
    seconds: float | None = None
    keep: Path | None = None

    def __call__(self, subject: Subject, data: Iterable[Sample], *, seed: int = 0) -> Report:
        """One row per radius. arrays: "broken" (images, radii) bool, "distance" (images,) of the smallest change found,
        "adversarial" and "index": the images that broke the model, and which of the data they are."""
        sensible(self)
        began = time.monotonic()
        radii = self._radii()
        for name in self.attacks:
            if name not in ATTACKS:
                raise unknown("attack", name, ATTACKS)
        material = collect(subject, data, needs=self.needs, limit=self.limit).labelled()
        report = Report(name="accuracy under attack", environment=environment(seed), notes=list(material.notes))
        images = _on_grid(material.images) if self.grid else material.images.clamp(0, 1)
        run = _Run(self, subject, images, material.labels, radii, material.classes, seed)
        if run.skipped:
            report.notes.append(run.skipped)
        until = None if self.seconds is None else began + self.seconds
        signs = _probe(subject, images, material.labels, seed)
        done = run.go(until)
        _fill(report, self, run, done, material, radii)
        _tell_signs(report, signs, run, done)
        _draw(report, self, run, done, material, radii)
        report.summary["seconds"] = time.monotonic() - began
        return report

    def _radii(self) -> tuple[float, ...]:
        if self.norm not in RADII:
            raise unknown("norm", str(self.norm), RADII)
        radii = tuple(sorted(float(e) for e in self.epsilons)) if self.epsilons else RADII[self.norm]
        if radii[0] <= 0 or (self.norm == "linf" and radii[-1] > 1):
            raise AdviceError(
                f"epsilons are radii above 0 in units of [0, 1] pixels, not {radii}; 8 of 255 levels are 0.0314."
            )
        if not self.attacks:
            raise AdviceError(f"Name at least one attack of {', '.join(ATTACKS)}.")
        return radii


class _Run:
    """The images in batches; of each finished batch, a dict of what every attack left."""

    def __init__(
        self,
        check: Attacked,
        subject: Subject,
        images: Tensor,
        labels: Tensor,
        radii: Sequence[float],
        classes: int,
        seed: int,
    ):
        self.check, self.subject, self.images, self.labels, self.radii = check, subject, images, labels, radii
        self.seed = seed
        self.skipped = ""
        names = [n for n in check.attacks if not (n == "apgd-dlr" and classes < 3)]
        if len(names) < len(check.attacks):
            self.skipped = "APGD-DLR compares three classes, and this model has two: its margin was attacked instead."
        self.attacks = [*names, *(["apgd-margin"] if self.skipped else [])]
        options = (check.norm, tuple(radii), tuple(self.attacks), check.steps, check.restarts, check.grid)
        identity = (options, check.batch_size, check.shown, seed, model_key(subject))
        self.ledger = Ledger(check.keep, "attacked", identity)

    def go(self, until: float | None) -> list[dict[str, Any]]:
        """Finished batches, in order. Stops before the batch during which time would run out, or did."""
        done: list[dict[str, Any]] = []
        with progress("attacking", total=len(self.images), unit="images") as bar:
            for start in range(0, len(self.images), self.check.batch_size):
                at = slice(start, start + self.check.batch_size)
                names = b"".join(image_key(x) for x in self.images[at]).hex()
                key = f"{start}-{derive(0, names, self.labels[at].tolist()):x}"
                piece = self.ledger.get(key)
                if piece is None:
                    found = self._batch(start, self.images[at], self.labels[at], until)
                    if found is None:
                        break
                    piece = self.ledger.put(key, found)
                done.append(piece)
                bar.advance(len(piece["clean"]), robust=1 - float(piece["broken"][-1, :, 0].mean()))
        return done

    def _batch(self, start: int, images: Tensor, labels: Tensor, until: float | None) -> dict[str, Any] | None:
        """broken: (attacks, images, radii), each attack with those before it; None when time ran out inside."""
        device = self.subject.device
        x, y = images.to(device), labels.to(device)
        with torch.no_grad():
            clean = self.subject(x).argmax(1) == y
        broken = torch.zeros(len(self.attacks), len(x), len(self.radii), dtype=torch.bool, device=device)
        broken[:] = ~clean[None, :, None]
        distance = torch.full((len(x),), math.inf, dtype=torch.float64, device=device)
        distance[~clean] = 0.0
        adversarial = x.clone()
        for a, name in enumerate(self.attacks):
            if a:
                broken[a] = broken[a - 1]
            if name == "fmn":
                self._minimal(x, y, broken[a], distance, adversarial, until)
                continue
            for r, radius in enumerate(self.radii):
                if until is not None and time.monotonic() >= until:
                    return None
                left = (~broken[a, :, r]).nonzero()[:, 0]
                if len(left) == 0:
                    continue
                seed = derive(self.seed, "attacked", start, name, r)
                found = self._attack(name, x[left], y[left], radius, seed, until)
                hit = left[found.success]
                broken[a, hit, r:] = True  # what lies in a ball lies in every larger one
                _closer(hit, found.image[found.success], found.distance[found.success], distance, adversarial)
        if until is not None and time.monotonic() >= until:
            return None  # the last attack may have been cut short
        kept = max(x.shape[-2:]) <= KEPT_SIDE or start < 4 * self.check.shown
        return {
            "clean": clean.cpu(),
            "broken": broken.cpu(),
            "distance": distance.cpu(),
            "adversarial": adversarial.cpu() if kept else None,
        }

    def _minimal(
        self, x: Tensor, y: Tensor, broken: Tensor, distance: Tensor, adversarial: Tensor, until: float | None
    ) -> None:
        """FMN looks for the smallest change; it breaks every radius from there on."""
        at = (distance > 0).nonzero()[:, 0]  # all that the clean model answers rightly
        if len(at) == 0:
            return
        found = fmn(self.subject, x[at], y[at], norm=self.check.norm, steps=2 * self.check.steps, until=until)
        image, ok, far = found.image, found.success, found.distance
        if self.check.grid:
            image = _on_grid(image)
            with torch.no_grad():
                ok = self.subject(image).argmax(1) != y[at]
            far = _length(image - x[at], self.check.norm)
        hit, image, far = at[ok], image[ok], far[ok]
        radii = torch.tensor(self.radii, dtype=torch.float64, device=x.device)
        slack = 1e-6 if self.check.grid else 0.0  # whole levels, counted in float32
        broken[hit] |= far[:, None] <= radii + slack
        _closer(hit, image, far, distance, adversarial)

    def _attack(self, name: str, x: Tensor, y: Tensor, radius: float, seed: int, until: float | None) -> Adversarial:
        c = self.check
        if name == "fgsm":
            return fgsm(self.subject, x, y, epsilon=radius, norm=c.norm, grid=c.grid)
        if name == "pgd":
            return pgd(
                self.subject,
                x,
                y,
                epsilon=radius,
                norm=c.norm,
                steps=c.steps,
                restarts=c.restarts,
                grid=c.grid,
                seed=seed,
                until=until,
            )
        loss: Any = name.removeprefix("apgd-")
        return apgd(
            self.subject,
            x,
            y,
            epsilon=radius,
            norm=c.norm,
            steps=c.steps,
            restarts=c.restarts,
            loss=loss,
            grid=c.grid,
            seed=seed,
            until=until,
        )


def _closer(at: Tensor, image: Tensor, far: Tensor, distance: Tensor, adversarial: Tensor) -> None:
    """Keeps the adversarial images that are closer than those known."""
    better = far < distance[at]
    distance[at[better]] = far[better]
    adversarial[at[better]] = image[better]


def _on_grid(images: Tensor) -> Tensor:
    return (images * 255).round().clamp(0, 255) / 255


def _length(change: Tensor, norm: str) -> Tensor:
    return torch.linalg.vector_norm(change.double().flatten(1), ord=math.inf if norm == "linf" else 2, dim=1)


def _probe(subject: Subject, images: Tensor, labels: Tensor, seed: int) -> list[Sign]:
    at = slice(0, PROBED)
    return masking(subject, images[at].to(subject.device), labels[at].to(subject.device), seed=seed)


def _fill(
    report: Report, check: Attacked, run: _Run, done: list[dict[str, Any]], material: Material, radii: Sequence[float]
) -> None:
    total = len(material)
    count = sum(len(p["clean"]) for p in done)
    if count < total:
        report.notes.append(
            f"Time ran out after {count} of {total} images; all figures are of those {count}. Give more seconds, a "
            "smaller batch_size, or a keep folder and run again to go on."
        )
    if not count:
        report.rows.append({"epsilon": 0.0, "images": 0})
        report.summary["images"] = 0.0
        report.answer = "Time ran out before the first batch of images was attacked; nothing is known."
        return
    clean = np.concatenate([p["clean"] for p in done])
    broken = np.concatenate([p["broken"] for p in done], 1)
    distance = np.concatenate([p["distance"] for p in done])
    report.arrays |= {"broken": broken[-1], "distance": distance}
    report.rows.append({"epsilon": 0.0, "radius": "clean", **{_column(a): clean.mean() for a in run.attacks}})
    for r, radius in enumerate(radii):
        row: dict[str, Any] = {"epsilon": radius, "radius": _radius(radius, check.norm)}
        for a, name in enumerate(run.attacks):
            row[_column(name)] = 1 - float(broken[a, :, r].mean())
        report.rows.append(row)
        report.summary[f"accuracy at {_radius(radius, check.norm)}"] = 1 - float(broken[-1, :, r].mean())
    report.summary = {"images": float(count), "accuracy": float(clean.mean()), **report.summary}
    finite = distance[np.isfinite(distance) & (distance > 0)]
    if len(finite):
        report.summary["median smallest change"] = float(np.median(finite))
    halved = next((r for r, e in enumerate(radii) if 1 - broken[-1, :, r].mean() <= clean.mean() / 2), None)
    at = "" if halved is None or not clean.any() else f" Half of them are lost at {_radius(radii[halved], check.norm)}."
    worst = 1 - float(broken[-1, :, -1].mean())
    report.answer = (
        f"{100 * clean.mean():.1f}% of {count} images are answered rightly, and {100 * worst:.1f}% still are when an "
        f"attacker may move within {_radius(radii[-1], check.norm)} ({check.norm}).{at}"
    )


def _tell_signs(report: Report, signs: list[Sign], run: _Run, done: list[dict[str, Any]]) -> None:
    for sign in signs:
        report.summary[f"sign: {sign.name}"] = sign.share
        if sign.flagged:
            report.notes.append(
                f"Gradients may mislead the attacks: {sign.name} on {100 * sign.share:.0f}% of {PROBED} images or "
                f"fewer: {sign.meaning}."
            )
    if done and "apgd-dlr" in run.attacks and run.attacks.index("apgd-dlr"):
        a = run.attacks.index("apgd-dlr")
        broken = np.concatenate([p["broken"] for p in done], 1)
        gap = (broken[a].mean(0) - broken[a - 1].mean(0)).max()
        if gap > 0.05:
            report.notes.append(
                f"The DLR loss breaks {100 * gap:.0f} points more than the cross-entropy does: the scale of the logits "
                "hides gradients. Do not trust an attack on cross-entropy alone for this model."
            )


def _draw(
    report: Report, check: Attacked, run: _Run, done: list[dict[str, Any]], material: Material, radii: Sequence[float]
) -> None:
    if not done:
        return
    broken = np.concatenate([p["broken"] for p in done], 1)
    clean = float(np.concatenate([p["clean"] for p in done]).mean())
    axis = [0.0, *radii]
    report.figures["robust accuracy.plotly"] = plots.lines(
        {_column(name): (axis, [clean, *(1 - broken[a].mean(0)).tolist()]) for a, name in enumerate(run.attacks)},
        x_title=f"radius ({check.norm})",
        y_title="accuracy",
    )
    images, labels = run.images, material.labels
    found: list[tuple[int, Tensor]] = []
    start = 0
    for piece in done:
        if piece["adversarial"] is not None:
            hit = np.flatnonzero(piece["clean"] & np.isfinite(piece["distance"]))
            found += [(start + int(i), torch.from_numpy(piece["adversarial"][i])) for i in hit]
        start += len(piece["clean"])
    if not found:
        return
    report.arrays["adversarial"] = torch.stack([x for _, x in found]).numpy()
    report.arrays["index"] = np.array([i for i, _ in found])
    few = found[: check.shown]
    with torch.no_grad():
        answers = run.subject(torch.stack([x for _, x in few])).argmax(1).tolist()
    distance = np.concatenate([p["distance"] for p in done])
    pictures: list[Tensor] = []
    captions: list[str] = []
    for (i, x), answer in zip(few, answers):
        change = x - images[i]
        most = float(change.abs().max())
        pictures += [images[i], x, 0.5 + change / (2 * max(most, 1e-12))]
        captions += [
            material.name(int(labels[i])),
            f"{material.name(answer)}, {_radius(float(distance[i]), check.norm)}",
            f"change x{0.5 / max(most, 1e-12):.0f}",
        ]
    report.figures[
        "adversarial images: the original, the new answer and the size of the change, the change itself.png"
    ] = plots.image_grid(pictures, captions, columns=6)


def _column(attack: str) -> str:
    return f"after {attack.upper()}"


def _radius(value: float, norm: str) -> str:
    return f"{value * 255:.3g}/255" if norm == "linf" else f"{value:.3g}"
