"""Which attribute of the scene does a model lean on? Accuracy before and after each edit, net of what editing costs.

ImageNet-E: Benchmarking Neural Network Robustness via Attribute Editing, CVPR 2023, arXiv 2303.17096. The drop of
every setting is also given net of the identity's (object taken out and put back unchanged): that is the artefacts'.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from lynceus.core.errors import AdviceError
from lynceus.core.guard import sensible
from lynceus.core.identity import image_key, model_key
from lynceus.core.ledger import Ledger
from lynceus.core.plots import bars, image_grid
from lynceus.core.progress import progress
from lynceus.core.report import Report, environment
from lynceus.core.rng import derive, numpy_generator
from lynceus.core.subject import Subject
from lynceus.core.types import Sample
from lynceus.trust.edits.compose import Blend
from lynceus.trust.edits.find import Finder
from lynceus.trust.edits.material import Material, collect, logits
from lynceus.trust.edits.remove import Method
from lynceus.trust.edits.scene import NEAR, edit
from lynceus.trust.edits.settings import IDENTITY, STANDARD, Setting, setting

WORST = 3  # pictures shown per setting
DRAWS = 2000  # of the bootstrap


@dataclass(frozen=True, kw_only=True)
class Edits:
    """Check: how many answers are lost when one attribute of a masked object's scene is edited.

    settings: what to edit, NAME=VALUE (several joined by commas: all at once): size=SHARE or full, direction=DEGREES
      (at random up to so many either way), angle=DEGREES, position=random, complexity=SHARE (signed, of what the
      background has), background=plain, blurred, random (another image's) or adversarial (the worst of `candidates`).
    masks: "given" reads the samples' masks; for pictures without any, "grabcut" guesses them from a centred box (needs
      OpenCV) and "threshold" takes what differs from the border's colour.
    backgrounds: folder of pictures that lend their background; default: the images themselves, without their objects.
    candidates: backgrounds tried per image by background=adversarial.
    blend: "feather", "poisson" or "paste". fill: how the object's place is filled: "moved", "telea" or "ring".
    limit: at most this many images. seconds: end after so much time and report what is done.
    keep: folder in which finished images are kept, so that a second run goes on.
    quiet: no progress.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"masks"})

    settings: tuple[str, ...] = STANDARD
    masks: Literal["given", "grabcut", "threshold"] = "given"
    backgrounds: Path | None = None
    candidates: int = 8
    blend: Literal["feather", "poisson", "paste"] = "feather"
    fill: Literal["moved", "telea", "ring"] = "moved"
    limit: int | None = None
    seconds: float | None = None
    keep: Path | None = None
    quiet: bool = False

    def __call__(self, subject: Subject, data: Iterable[Sample], *, seed: int = 0) -> Report:
        """One row per setting; see `audit`."""
        sensible(self)
        subject.require(self.needs)
        donors: Iterable[Sample] | None = None
        if self.backgrounds is not None:
            import lynceus.data

            donors = lynceus.data.open(self.backgrounds)
        return audit(
            subject,
            data,
            self.settings,
            masks=self.masks,
            donors=donors,
            candidates=self.candidates,
            blend=self.blend,
            fill=self.fill,
            limit=self.limit,
            seconds=self.seconds,
            keep=self.keep,
            quiet=self.quiet,
            seed=seed,
        )


def audit(
    subject: Subject | Callable[[Tensor], Tensor],
    data: Iterable[Sample],
    settings: Sequence[str | Setting] = STANDARD,
    *,
    masks: Literal["given"] | Finder = "given",
    donors: Iterable[Sample] | None = None,
    candidates: int = 8,
    blend: Blend = "feather",
    fill: Method = "moved",
    oracle: Callable[[Sample], bool] | None = None,
    limit: int | None = None,
    seconds: float | None = None,
    keep: Path | None = None,
    quiet: bool = False,
    seed: int = 0,
) -> Report:
    """Accuracy before and after each edit, drop, drop net of the identity's with its bootstrap interval, worst cases.

    subject: any classifier of pixels in [0, 1]. data: samples with masks (or class maps); labels are the samples', else
      those of the masks' classes, else the subject's own answers (said in the notes). settings: see Edits, or Setting.
    oracle: edited sample -> whether a person (or a better model) still sees its label; others do not count.
    arrays: "right" (images, 1 + settings) int8: answer right, wrong, or -1 where the edit could not be made; "margin":
      logit of the label over the best other, NaN there. First column: the unedited image, second: the identity.
    Raises AdviceError, before any edit, for samples without or with empty masks, labels that the model does not know,
    pixels outside [0, 1] and answers that are not finite.
    """
    subject = subject if isinstance(subject, Subject) else Subject(subject)
    asked = [s if isinstance(s, Setting) else setting(s) for s in settings]
    plans = [Setting(name=IDENTITY), *(s for s in asked if s.name != IDENTITY)]
    if len({p.name for p in plans}) < len(plans):
        raise AdviceError(f"Every setting must be named once; got {', '.join(p.name for p in plans[1:])}.")
    if candidates < 1:
        raise AdviceError(f"candidates is the number of backgrounds tried per image, at least 1; got {candidates}.")
    report = Report(name="attribute edits", environment=environment(seed))
    material, notes = collect(subject, data, masks=masks, donors=donors, fill=fill, limit=limit, seed=seed)
    report.notes += notes
    identity = (model_key(subject), plans, masks, candidates, blend, fill, seed, material.donor_key, oracle is not None)
    run = _Run(subject, material, plans, candidates=candidates, blend=blend, oracle=oracle, seed=seed)
    ledger = Ledger(keep, "edits", identity)
    pieces: list[dict[str, Any]] = []
    began = time.monotonic()
    with progress("editing", total=len(material), unit="images", quiet=quiet) as bar:
        for index in range(len(material)):
            if seconds is not None and pieces and time.monotonic() - began > seconds:
                report.notes.append(f"The budget of {seconds:g} s ended after {len(pieces)} of {len(material)} images.")
                break
            key = f"{index} {image_key(material.fetch(index).image).hex()}"
            pieces.append(ledger.get(key) or ledger.put(key, run.look(index)))
            bar.advance()
    _fill(report, run, pieces, seed)
    return report


class _Run:
    """Edits one image in every way and asks the subject about all of them at once."""

    def __init__(
        self,
        subject: Subject,
        material: Material,
        plans: list[Setting],
        *,
        candidates: int,
        blend: Blend,
        oracle: Callable[[Sample], bool] | None,
        seed: int,
    ):
        self.subject, self.material, self.plans = subject, material, plans
        self.candidates, self.blend, self.oracle, self.seed = candidates, blend, oracle, seed

    def look(self, index: int) -> dict[str, Any]:
        """{"original": [right, margin, answer], "settings": {name: [right, margin, answer, picked] or a reason}}."""
        label, scene = self.material.labels[index], self.material.scene(index)
        made: list[tuple[str, int, Sample]] = []
        out: dict[str, Any] = {}
        for plan in self.plans:
            try:
                for picked, edited in self.edits(index, plan):
                    made.append((plan.name, picked, edited))
            except AdviceError as error:
                out[plan.name] = str(error)
                continue
            reason = self.refused(plan, made[-1][2])
            if reason:
                made = [m for m in made if m[0] != plan.name]
                out[plan.name] = reason
        images = torch.stack([scene.sample.image, *(s.image for _, _, s in made)])
        answered = logits(self.subject, images)
        if not bool(answered.isfinite().all()):
            raise AdviceError(
                f"{self.subject.name} answers an edit of {self.material.names[index]} with numbers that are not finite."
            )
        margins = _margins(answered, label)
        answers = answered.argmax(1).tolist()
        for at, (name, picked, _) in enumerate(made, start=1):
            # of several candidates the one that hurts most; of equals the first
            if name not in out or margins[at] < out[name][1]:
                out[name] = [int(answers[at] == label), margins[at], answers[at], picked]
        return {
            "original": [int(answers[0] == label), margins[0], answers[0]],
            "settings": out,
        }

    def edits(self, index: int, plan: Setting) -> list[tuple[int, Sample]]:
        """(lender, edited sample) for every candidate of a setting; one for all but adversarial backgrounds."""
        scene = self.material.scene(index)
        rng = numpy_generator(self.seed, "audit", index, plan.name)
        angle = plan.angle
        if plan.direction is not None:
            angle = float(rng.uniform(-plan.direction, plan.direction))
        grounds: list[tuple[int, Any]] = [(-1, plan.background)]
        if plan.background in ("random", "adversarial"):
            others = self.material.others(index)
            if not others:
                raise AdviceError("there is no other image that could lend its background")
            count = 1 if plan.background == "random" else min(self.candidates, len(others))
            chosen = [others[int(i)] for i in rng.permutation(len(others))[:count]]
            grounds = [(i, torch.from_numpy(self.material.ground(i, scene)).permute(2, 0, 1)) for i in chosen]
        donor = self.material.busiest(index, scene) if (plan.complexity or 0) > 0 else None
        out = []
        for lender, ground in grounds:
            edited = edit(
                scene,
                size=plan.size,
                angle=angle,
                position=plan.position,
                background=ground,
                complexity=plan.complexity,
                donors=[donor] if donor is not None else [],
                blend=self.blend,
                seed=derive(self.seed, "edit", index, plan.name) % 2**31,
            )
            out.append((lender, edited))
        return out

    def again(self, index: int, plan: Setting, picked: int) -> Sample:
        """The edited sample that a piece speaks of."""
        return next(s for lender, s in self.edits(index, plan) if lender == picked)

    def refused(self, plan: Setting, edited: Sample) -> str:
        """Why an edit does not count: what was wanted was not reached, or nobody can see the label any more."""
        log = edited.extra["edit"]
        upright = plan.angle is None and plan.direction is None
        if isinstance(plan.size, float) and upright and abs(log["rate"] - plan.size) > NEAR:
            return "the object cannot be that large inside its picture"
        if plan.complexity is not None and abs(log["complexity"] - plan.complexity) > 0.05 * (1 + plan.complexity):
            return "the background cannot be that busy or calm"
        if self.oracle is not None and not self.oracle(edited):
            return "the oracle does not see the label any more"
        return ""


def _margins(answered: Tensor, label: int) -> list[float]:
    others = answered.clone()
    others[:, label] = -torch.inf
    return [float(v) for v in (answered[:, label] - others.amax(1)).tolist()]


def _fill(report: Report, run: _Run, pieces: list[dict[str, Any]], seed: int) -> None:
    names = [p.name for p in run.plans]
    right = np.full((len(pieces), 1 + len(names)), -1, dtype=np.int8)
    margin = np.full(right.shape, np.nan)
    reasons: dict[str, dict[str, int]] = {n: {} for n in names}
    for i, piece in enumerate(pieces):
        right[i, 0], margin[i, 0] = piece["original"][:2]
        for k, name in enumerate(names, start=1):
            said = piece["settings"][name]
            if isinstance(said, str):
                reasons[name][said] = reasons[name].get(said, 0) + 1
            else:
                right[i, k], margin[i, k] = said[:2]
    report.arrays["right"], report.arrays["margin"] = right, margin
    drops: list[float] = []
    nets: list[float] = []
    errors: list[float] = []
    shown: list[str] = []
    for k, name in enumerate(names, start=1):
        both = (right[:, k] >= 0) & (right[:, 1] >= 0)
        for reason, count in reasons[name].items():
            report.notes.append(f"{name}: {count} of {len(pieces)} images do not count: {reason}.")
        if not both.any():
            continue
        before, after, same = (right[both, c].astype(float) for c in (0, k, 1))
        drop, net = 100 * (before - after), 100 * (same - after)
        low, high = _interval(net, seed, name)
        row = {
            "setting": name,
            "images": int(both.sum()),
            "accuracy": 100 * float(after.mean()),
            "drop": float(drop.mean()),
            "net drop": float(net.mean()),
            "from": low,
            "to": high,
            "margin": float(np.median(margin[both, k] - margin[both, 0])),
        }
        report.rows.append(row)
        if name != IDENTITY:
            drops.append(float(drop.mean()))
            nets.append(float(net.mean()))
            errors.append((high - low) / 2)
            shown.append(name)
    report.summary["images"] = float(len(pieces))
    report.summary["accuracy"] = 100 * float((right[:, 0] == 1).mean())
    if report.rows and report.rows[0]["setting"] == IDENTITY:
        report.summary["identity_drop"] = float(report.rows[0]["drop"])
    if nets:
        worst = int(np.argmax(nets))
        report.summary |= {"mean_drop": float(np.mean(drops)), "mean_net_drop": float(np.mean(nets))}
        report.summary["worst_net_drop"] = nets[worst]
        report.answer = (
            f"{report.summary['accuracy']:.1f}% right before; {shown[worst]} costs most: {nets[worst]:.1f} points net "
            f"of what editing itself costs, {np.mean(nets):.1f} on average."
        )
        report.figures["net drop in points.plotly"] = bars(shown, nets, errors=errors, title="net drop, points")
    _pictures(report, run, pieces)


def _interval(values: np.ndarray, seed: int, name: str) -> tuple[float, float]:
    """95 % by the bootstrap over images."""
    rng = numpy_generator(seed, "bootstrap", name)
    means = values[rng.integers(len(values), size=(DRAWS, len(values)))].mean(1)
    low, high = np.percentile(means, (2.5, 97.5))
    return float(low), float(high)


def _pictures(report: Report, run: _Run, pieces: list[dict[str, Any]]) -> None:
    """The first image in every setting, and per setting the images whose margin fell most, beside the originals."""
    images, captions = [run.material.fetch(0).image], ["unedited"]
    for plan in run.plans:
        said = pieces[0]["settings"][plan.name]
        if not isinstance(said, str):
            images.append(run.again(0, plan, said[3]).image)
            captions.append(plan.name)
    report.figures["one image in every setting.png"] = image_grid(images, captions, columns=7)
    pictures, words = [], []
    for plan in run.plans[1:]:
        fallen = []
        for i, piece in enumerate(pieces):
            said = piece["settings"][plan.name]
            if not isinstance(said, str) and piece["original"][0] and not said[0]:
                fallen.append((said[1] - piece["original"][1], i, said))
        for _, i, said in sorted(fallen, key=lambda f: (f[0], f[1]))[:WORST]:
            pictures += [run.material.fetch(i).image, run.again(i, plan, said[3]).image]
            words += [
                f"{_class(run.subject, pieces[i]['original'][2])}",
                f"{plan.name}: {_class(run.subject, said[2])}",
            ]
    if pictures:
        report.figures["worst cases beside their originals.png"] = image_grid(pictures, words, columns=2 * WORST)


def _class(subject: Subject, answer: int) -> str:
    return subject.classes[answer] if subject.classes and answer < len(subject.classes) else str(answer)
