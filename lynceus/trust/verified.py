"""Check: which answers are proven. Per image a verdict on a few strong pixels, and how far the whole image may move.

Verification: Safety Verification of Deep Neural Networks, CAV 2017, arXiv 1610.06940 (see `verify`). Radii: linear
bounds from below (see `bounds`), the attack FMN (arXiv 2102.12827) from above; the truth lies between the two curves.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from lynceus.core import plots
from lynceus.core.environment import environment
from lynceus.core.errors import AdviceError, unknown
from lynceus.core.guard import sensible
from lynceus.core.identity import image_key, model_key
from lynceus.core.ledger import Ledger
from lynceus.core.progress import progress
from lynceus.core.report import Report
from lynceus.core.subject import Subject
from lynceus.core.types import Sample
from lynceus.trust.attacks import fmn
from lynceus.trust.bounds import Ball, Late, Method, Propagation, margin_rows
from lynceus.trust.bounds_graph import fused, trace
from lynceus.trust.bounds_ops import Network
from lynceus.trust.guard import Material, collect
from lynceus.trust.verify import Budget, largest, verify
from lynceus.trust.verify_layers import verify_layers
from lynceus.trust.verify_query import SLACK, check_goal

NEURONS = 20_000  # ReLUs up to which every layer gets its backward pass
BATCH = 8  # images whose radii are bounded together
MethodName = Literal["auto", "ibp", "crown-ibp", "crown"]


@dataclass(frozen=True, kw_only=True)
class Verify:
    """Which answers are proven, for which are there counterexamples, and how far may an image move?

    pixels: how many values of an image may change, those farthest from its mean; 0: all of them.
    step, count: each moves by up to `count` steps of `step` either way (units of [0, 1] pixels).
    goal: grid asks about the grid points, and about the cells between them where they are safe; region about every
      real point.
    method: of the bounds: crown, crown-ibp, ibp; auto takes the tightest that the network's size allows.
    boxes: how many boxes one image may cost. layers: asks layer by layer and says where the proof closed.
    radius: radii (largest change of any value of the whole image) are looked at up to this; 0: no radii.
    steps: gradient steps of the attack that bounds radii from above.
    shown: counterexamples in the report. limit: at most this many images.
    seconds: wall time for the whole check; images not reached are left out, and the notes say so.
    keep: folder in which finished images are kept, so that a second run goes on.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"gradients"})

    pixels: int = 8
    step: float = 0.1
    count: int = 2
    goal: Literal["grid", "region"] = "grid"
    method: MethodName = "auto"
    boxes: int = 2000
    layers: bool = False
    radius: float = 0.25
    steps: int = 60
    shown: int = 8
    limit: int | None = 40
    seconds: float | None = None
    keep: Path | None = None

    def __call__(self, subject: Subject, data: Iterable[Sample], *, seed: int = 0) -> Report:
        """One row per image. arrays: "proven" and "attacked" radii (images,), "index" and "witness": which images have
        a counterexample, and it."""
        sensible(self)
        began = time.monotonic()
        check_goal(self.goal)
        if self.method not in ("auto", "ibp", "crown-ibp", "crown"):
            raise unknown("method", str(self.method), ("auto", "ibp", "crown-ibp", "crown"))
        if self.pixels < 0 or self.radius < 0 or not self.step > 0 or self.count < 1:
            raise AdviceError("Verify wants pixels >= 0, radius >= 0, step > 0 and count >= 1.")
        if self.radius > 1 or self.step > 1:
            raise AdviceError(
                f"Pixels are in [0, 1], so a step or radius above 1 says nothing more: step {self.step:g}, radius "
                f"{self.radius:g}. For levels of 255 divide by 255: step={self.step / 255:.3g}."
            )
        subject.require(self.needs)
        material = collect(subject, data, needs=self.needs, limit=self.limit)
        report = Report(name="verification", environment=environment(seed), notes=list(material.notes))
        values = material.images[0].numel()
        if self.pixels > values:
            raise AdviceError(f"An image here has {values} values, fewer than pixels={self.pixels}; 0 takes them all.")
        network = trace(subject, material.images.shape[1:])
        run = _Run(self, subject, material, network, seed)
        if self.method == "auto" and run.method != "crown":
            count = sum(network.nodes[i].size for i in network.relus)
            report.notes.append(
                f"The network has {count:,} ReLUs: bounds by {run.method}, which are looser than CROWN's."
            )
        pieces = run.go(None if self.seconds is None else began + self.seconds)
        _fill(report, self, material, pieces)
        report.summary["seconds"] = time.monotonic() - began
        return report


class _Run:
    """The images one after the other, radii some at a time; each finished image is a dict in the ledger."""

    def __init__(self, check: Verify, subject: Subject, material: Material, network: Network, seed: int):
        self.check, self.subject, self.material, self.seed = check, subject, material, seed
        self.network, self.fused = network, fused(network)
        count = sum(network.nodes[i].size for i in network.relus)
        self.method: Method = ("crown" if count <= NEURONS else "crown-ibp") if check.method == "auto" else check.method
        options = (check.pixels, check.step, check.count, check.goal, self.method, check.boxes, check.layers)
        self.ledger = Ledger(check.keep, "verify", (options, check.radius, check.steps, seed, model_key(subject)))

    def go(self, until: float | None) -> list[dict[str, Any]]:
        """Finished images, in order; stops when the time is over."""
        images, labels = self.material.images, self.material.labels
        pieces: list[dict[str, Any]] = []
        with progress("verifying", total=len(images), unit="images") as bar:
            for start in range(0, len(images), BATCH):
                stop = min(start + BATCH, len(images))
                keys = [f"{i}-{image_key(images[i]).hex()}-{int(labels[i])}" for i in range(start, stop)]
                found: dict[str, list[Any]] | None = {}
                if any(self.ledger.get(k) is None for k in keys):
                    found = self._radii(images[start:stop], labels[start:stop], until)
                if found is None:
                    return pieces
                for i, key in zip(range(start, stop), keys):
                    piece = self.ledger.get(key)
                    if piece is None:
                        left = None if until is None else until - time.monotonic()
                        if left is not None and left <= 0:
                            return pieces
                        share = None if left is None else left / (len(images) - i)
                        piece = self._image(i, {k: v[i - start] for k, v in found.items()}, share)
                        piece = self.ledger.put(key, piece)
                    pieces.append(piece)
                    bar.advance(1, safe=sum(p["kind"] == "safe" for p in pieces) / len(pieces))
        return pieces

    def _radii(self, images: Tensor, labels: Tensor, until: float | None) -> dict[str, list[Any]] | None:
        """answer, proven, attacked of some images; None when the time is over."""
        device = self.subject.device
        x = images.to(device)
        with torch.no_grad():
            logits = self.subject(x)
        answer = logits.argmax(1).cpu()
        truth = torch.where(labels >= 0, labels, answer)
        right = answer == truth
        proven = torch.zeros(len(x), dtype=torch.float64)
        attacked = torch.where(right, math.inf, 0.0).double()
        if self.check.radius and bool(right.any()):
            stop = math.inf if until is None else time.perf_counter() + until - time.monotonic()
            scale = logits.double().abs().amax(1).cpu()[right]
            found = fmn(self.subject, x[right], truth[right].to(device), norm="linf", steps=self.check.steps)
            attacked[right] = torch.where(found.success, found.distance.double(), math.inf).cpu()
            try:
                proven[right] = certified_radius(
                    self.fused,
                    images[right],
                    truth[right],
                    most=attacked[right].clamp(max=self.check.radius),
                    method=self.method,
                    tolerance=SLACK * scale,
                    until=stop,
                )
            except Late:
                return None
        return {"answer": answer.tolist(), "proven": proven.tolist(), "attacked": attacked.tolist()}

    def _image(self, i: int, known: dict[str, Any], seconds: float | None) -> dict[str, Any]:
        check, image, label = self.check, self.material.images[i], int(self.material.labels[i])
        piece: dict[str, Any] = {**known, "attacked": _plain(known["attacked"]), "label": label, "witness": None}
        piece |= {"kind": "wrong", "strength": "none", "found": -1, "boxes": 0, "unstable": 0, "layer": "", "note": ""}
        if label >= 0 and label != known["answer"]:
            return piece
        options: dict[str, Any] = {
            "step": check.step,
            "count": check.count,
            "dims": largest(image, min(check.pixels, image.numel())) if check.pixels else None,
            "goal": check.goal,
            "budget": Budget(seconds=seconds, boxes=check.boxes),
            "label": known["answer"],
            "method": self.method,
            "network": self.network,
            "seed": self.seed,
        }
        if check.layers:
            verdict, _ = verify_layers(self.subject, image, **options)
        else:
            verdict = verify(self.subject, image, **options)
        return piece | {
            "kind": verdict.kind,
            "strength": verdict.strength,
            "found": -1 if verdict.found is None else verdict.found,
            "boxes": verdict.boxes,
            "unstable": verdict.unstable,
            "layer": verdict.layer or "",
            "note": verdict.note,
            "witness": verdict.witness,
        }


@torch.no_grad()
def certified_radius(
    network: Network,
    images: Float[Tensor, "b c h w"],
    labels: Int[Tensor, " b"],
    *,
    most: Tensor | float,
    method: Method = "crown",
    norm: float = math.inf,
    clip: tuple[float, float] | None = (0.0, 1.0),
    tolerance: Tensor | float = 0.0,
    precision: float = 0.05,
    trials: int = 12,
    until: float = math.inf,
) -> Float[Tensor, " b"]:
    """The largest radius up to `most` for which one call of the bounds proves each image's label, found by trials.

    A lower bound of the true radius. most: one number, or (b,): radii at which an attack succeeded save trials.
    tolerance: margins must exceed it. precision: stops when proven and open radii are this close, relatively. The next
    trial is where the line through the margins of the last two would cross zero. Raises `Late` after `until`.
    """
    rows = margin_rows(labels, len(images), network.nodes[-1].size).to(network.device)
    batch = images.to(network.device).double()
    tolerance = torch.as_tensor(tolerance, dtype=torch.float64).expand(len(images))
    low = torch.zeros(len(images), dtype=torch.float64)
    high = torch.as_tensor(most, dtype=torch.float64).expand(len(images)).clone()
    top = high.clone()
    low_margin = (rows @ network(batch).unsqueeze(-1)).squeeze(-1).amin(1).cpu() - tolerance
    high_margin = -0.8 * low_margin  # a guess: bounds lose the label well before an attack finds another
    open_ = (low_margin > 0) & (high > 0)
    for trial in range(trials):
        if not bool(open_.any()):
            break
        at = open_.nonzero().flatten()
        share = (low_margin[at] / (low_margin[at] - high_margin[at])).clamp(0.05, 0.95)
        if trial % 3 == 2:
            share = torch.full_like(share, 0.5)
        eps = low[at] + share * (high[at] - low[at])
        region = Ball(batch[at], eps.to(network.device), norm=norm, clip=clip)
        least = Propagation(network, region, method=method, until=until).margins(rows[at]).cpu().amin(1) - tolerance[at]
        safe = least > 0
        low[at], low_margin[at] = torch.where(safe, eps, low[at]), torch.where(safe, least, low_margin[at])
        high[at], high_margin[at] = torch.where(safe, high[at], eps), torch.where(safe, high_margin[at], least)
        open_ = open_ & (high - low > precision * top.clamp_min(1e-12))
    return low


def _plain(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _fill(report: Report, check: Verify, material: Material, pieces: list[dict[str, Any]]) -> None:
    if not pieces:
        raise AdviceError(
            f"No image was finished within {check.seconds:.3g} s; give more --seconds, or fewer --boxes and --pixels."
        )
    if len(pieces) < len(material):
        report.notes.append(
            f"The budget of {check.seconds:.3g} s ended after {len(pieces)} of {len(material)} images; "
            "the others were not looked at."
        )
    kinds = Counter(p["kind"] for p in pieces)
    strong = sum(p["strength"] == "region" for p in pieces)
    for name, p in zip(material.ids, pieces):
        row = {
            "image": name,
            "class": material.name(p["label"]),
            "answer": material.name(p["answer"]),
            "verdict": p["kind"],
            "holds for": p["strength"] if p["kind"] == "safe" else "",
            "other class": material.name(p["found"]) if p["found"] >= 0 else "",
            "boxes": p["boxes"],
            "undecided ReLUs": p["unstable"],
        }
        if check.layers:
            row["closed at"] = p["layer"]
        if check.radius:
            row["proven radius"] = p["proven"]
            row["attacked radius"] = math.inf if p["attacked"] is None else p["attacked"]
        report.rows.append(row)
    count = len(pieces)
    report.summary = {
        "images": float(count),
        **{k: kinds.get(k, 0) / count for k in ("safe", "unsafe", "unknown", "wrong")},
    }
    report.summary["safe for every real point"] = strong / count
    what = f"{check.pixels} values" if check.pixels else "all values"
    reach = f"{check.step * check.count:g}"
    report.answer = (
        f"{kinds['safe']} of {count} answers are proven against changes of {what} by up to {reach}; "
        f"{kinds['unsafe']} have a counterexample, {kinds['unknown']} stayed unknown within the budget"
        + (f", {kinds['wrong']} were wrong from the start." if kinds["wrong"] else ".")
    )
    if kinds["unknown"]:
        report.notes.append("Unknown is neither: more --boxes or --seconds, or fewer --pixels, may settle it.")
    if check.radius:
        _curve(report, check, pieces)
    _pictures(report, check, material, pieces)


def _curve(report: Report, check: Verify, pieces: list[dict[str, Any]]) -> None:
    """Certified and attacked shares over the radius."""
    proven = np.array([p["proven"] for p in pieces])
    attacked = np.array([math.inf if p["attacked"] is None else p["attacked"] for p in pieces])
    right = np.array([p["kind"] != "wrong" for p in pieces])
    report.arrays |= {"proven": proven, "attacked": attacked}
    ends = np.concatenate([proven, attacked[np.isfinite(attacked)]])
    radii = np.linspace(0, min(check.radius, float(ends.max(initial=1e-3)) * 1.1), 65)
    certain = [float(((proven >= r) & right).mean()) for r in radii]
    left = [float(((attacked > r) & right).mean()) for r in radii]
    report.figures["certified radius.plotly"] = plots.lines(
        {"proven": (radii, certain), "not yet broken by FMN": (radii, left)},
        x_title="largest change of any value",
        y_title="share of images",
    )
    report.summary["median proven radius"] = float(np.median(proven))
    report.summary["median attacked radius"] = float(np.median(attacked))


def _pictures(report: Report, check: Verify, material: Material, pieces: list[dict[str, Any]]) -> None:
    """Original, counterexample and what changed, side by side."""
    hit = [i for i, p in enumerate(pieces) if p["kind"] == "unsafe" and p["witness"] is not None]
    if not hit:
        return
    report.arrays["index"] = np.array(hit)
    report.arrays["witness"] = np.stack([pieces[i]["witness"] for i in hit])
    images, captions = [], []
    for i in hit[: check.shown]:
        piece, image = pieces[i], material.images[i]
        other = torch.as_tensor(piece["witness"]).float()
        images += [image, other, (other - image).abs()]
        captions += [material.name(piece["answer"]), material.name(piece["found"]), "changed"]
    report.figures["counterexamples.png"] = plots.image_grid(images, captions, columns=6)
