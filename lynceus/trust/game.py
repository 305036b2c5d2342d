"""Few pixels that change a classifier's answer, found by a two-player game on its features, from its outputs alone.

Feature-Guided Black-Box Safety Testing of Deep Neural Networks, TACAS 2018, arXiv 1710.07859. Reference code:
VeriDeep/DLV-experimental-package (two players) and matthewwicker/SafeCV (one); written from the paper.

    report = search(model, image, budget_queries=2_000)
    report.arrays["image"], report.arrays["pixels"]

Keypoints of the image become features, each with the pixels that it owns. Player I chooses a feature, player II paints
a pixel of it; Monte-Carlo tree search plays until the class changes, drops every pixel that was not needed, and keeps
the smallest example. The longer it plays, the smaller the example; no gradient is ever asked for.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from lynceus.core.errors import AdviceError, unknown
from lynceus.core.guard import sensible
from lynceus.core.identity import image_key, model_key
from lynceus.core.ledger import Ledger
from lynceus.core.progress import progress
from lynceus.core.report import Report, environment
from lynceus.core.rng import numpy_generator
from lynceus.core.subject import Subject
from lynceus.core.types import Sample, as_float
from lynceus.trust import guard
from lynceus.trust.game_report import feature_rows, figures, findings, gathered
from lynceus.trust.keypoints import Detector, detect, owners, partition, saliency
from lynceus.trust.oracle import Norm, Oracle, Paint, as_subject
from lynceus.trust.plays import WIDTH, Pool
from lynceus.trust.single_player import sample_pixels
from lynceus.trust.tree import Mode, Tree

Weights = Literal["saliency", "uniform"]
MODES = ("cooperative", "adversarial", "nature", "single")
LARGE = 200  # from this side on, a feature keeps PIXELS of its pixels
PIXELS = 100
LEVELS = 6  # moves of the root per search, of equal shares of the budget
IDLE = 200  # rounds without a single new question, after which nothing new is expected


def search(
    subject: Subject | nn.Module | Callable[[Tensor], Any],
    image: Float[Tensor, "c h w"] | UInt8[Tensor, "c h w"],
    *,
    budget_queries: int | None = 2_500,
    seconds: float | None = None,
    norm: Norm = "l0",
    mode: Mode | Literal["single"] = "cooperative",
    distance: float = math.inf,
    paint: Paint = "toggle",
    confidence: float = 0.0,
    plays: Weights = "saliency",
    keypoints: Float[np.ndarray, "n 4"] | None = None,
    detector: Detector = "auto",
    levels: int = LEVELS,
    width: int = WIDTH,
    batch: int = 256,
    tighten: bool = True,
    looks: Literal["doubling", "each"] = "doubling",
    stop_at_first: bool = False,
    seed: int = 0,
) -> Report:
    """The smallest change of pixels found within the budget that changes the class which `subject` gives to `image`.

    subject: any model, or any function of pixels (b, c, h, w) in [0, 1] that gives logits, as tensors or numpy arrays.
    budget_queries: images that may be sent, the original among them; never exceeded. seconds: looked at between
      batches.
    norm: severity of an example: pixels changed ("l0"), or the sum ("l1") or root of the sum of squares ("l2") of the
      changes of all their channels. distance: examples above it do not count.
    mode: player I, who chooses features, works with player II ("cooperative"), against it ("adversarial": how few
      pixels still do it on the worst features), or at random ("nature"); "single" is SafeCV's one player.
    paint, confidence: see `lynceus.trust.oracle.Oracle`. plays: random games follow the "saliency", or are "uniform".
    keypoints: rows (row, column, size, response); None: `detector` finds them.
    levels: how often the root moves. width: images that wait before they are sent. batch: images per pass at most.
    tighten: states that cannot beat the best example are not asked (cooperative player I; the value is the same).
    looks: a play asks after 1, 2, 4, 8 ... pixels and halves the last interval, or after "each" pixel, as the paper's.
    stop_at_first: ends with the batch that holds the first example.

    rows: one per feature. arrays: image (c, h, w), pixels (k, 2) rows and columns, curve (m, 2) queries and severity
    after each improvement, saliency and owners (h, w), keypoints. The report's numbers are those of this image alone.
    """
    if mode not in MODES:
        raise unknown("mode of the game", str(mode), MODES)
    if plays not in ("saliency", "uniform"):
        raise unknown("weighting of plays", str(plays), ("saliency", "uniform"))
    if looks not in ("doubling", "each"):
        raise unknown("rule for looks", str(looks), ("doubling", "each"))
    if budget_queries is None and seconds is None:
        raise AdviceError("A search needs an end: give budget_queries=2500 or seconds=30.")
    if levels < 1 or width < 1 or batch < 1 or not distance > 0:
        raise AdviceError("levels, width and batch must be at least 1, and distance above 0.")
    if image.ndim != 3 or image.shape[0] not in (1, 3):
        raise AdviceError(f"search takes one image (3, h, w), not {tuple(image.shape)}; take one of a batch: x[0].")
    picture = as_float(image)
    if not bool(picture.isfinite().all()) or float(picture.min()) < 0 or float(picture.max()) > 1:
        raise AdviceError(
            f"The image has pixels from {float(picture.min()):.3g} to {float(picture.max()):.3g}; a search takes RGB "
            "in [0, 1]. Divide by 255, or leave the normalisation to the subject."
        )
    subject = as_subject(subject)
    size = (int(picture.shape[1]), int(picture.shape[2]))
    how = "given"
    if keypoints is None:
        found = detect(picture, detector=detector)
        keypoints, how = found.points, found.how
    map_ = saliency(keypoints, size)
    oracle = Oracle(
        subject=subject,
        image=picture,
        paint=paint,
        norm=norm,
        distance=distance,
        confidence=confidence,
        queries=budget_queries,
        seconds=seconds,
        batch=batch,
    )
    own, pixels = partition(keypoints, size, limit=PIXELS if max(size) >= LARGE else None, seed=seed)
    features = [p[oracle.movable[p]] for p in pixels]
    kept = [i for i, f in enumerate(features) if len(f)]
    report = Report(name="feature-guided search", environment=environment(seed))
    report.notes.append(f"Keypoints: {how}.")
    tree: Tree | None = None
    if not kept:
        report.notes.append("No pixel of this image is changed by the manipulation; nothing could be searched.")
    elif mode == "single":
        sample_pixels(oracle, keypoints, seed=seed, stop_at_first=stop_at_first)
    else:
        tree = _tree(oracle, [features[i] for i in kept], map_, plays, mode, tighten, seed)
        tree.each = looks == "each"
        _grow(tree, levels=levels, width=width, stop_at_first=stop_at_first)
    feature_rows(report, keypoints, [own[i] for i in kept], [features[i] for i in kept], tree)
    findings(report, oracle, tree, mode)
    report.arrays |= {"saliency": map_, "owners": owners(keypoints, size), "keypoints": np.asarray(keypoints)}
    figures(report, oracle, map_)
    return report


@dataclass(frozen=True, kw_only=True)
class Game:
    """Check: how few painted pixels change the answer, found from outputs alone by the two-player game on features.

    queries: images that may be sent per picture, None: as many as the seconds allow. seconds: for all pictures
      together; each gets an equal share of what is left.
    norm: "l0" counts painted pixels; "l1", "l2" measure how much all channels change. distance: examples above this
      severity do not count.
    mode: player I, who chooses the feature, is "cooperative", "adversarial", or random ("nature"); "single" is
      SafeCV's one player.
    paint: a manipulated pixel goes to the image's other extreme ("toggle"), to "white" or to "black".
    confidence: probability that the new class must exceed.
    plays: random games follow the "saliency" of pixels, or are "uniform".
    detector: keypoints from OpenCV's "sift" or from differences of "gaussians"; "auto" takes SIFT where it is there.
    limit: at most this many pictures. batch_size: images per pass.
    keep: folder in which finished pictures are kept, so that a second run goes on.
    """

    needs: ClassVar[frozenset[str]] = frozenset()

    queries: int | None = 2_500
    seconds: float | None = None
    norm: Norm = "l0"
    distance: float | None = None
    mode: Literal["cooperative", "adversarial", "nature", "single"] = "cooperative"
    paint: Paint = "toggle"
    confidence: float = 0.0
    plays: Weights = "saliency"
    detector: Detector = "auto"
    limit: int | None = 16
    batch_size: int = 256
    keep: Path | None = None

    def __call__(self, subject: Subject, data: Iterable[Sample], *, seed: int = 0) -> Report:
        """One row per picture. arrays: "severity" (images,), inf where none was found; "examples" (found, c, h, w)."""
        sensible(self)
        material = guard.collect(subject, data, needs=self.needs, limit=self.limit)
        given = first_answers(subject, material.images, self.batch_size)
        wrong = (material.labels >= 0) & (given != material.labels)
        options = replace(self, keep=None, limit=None, seconds=None)
        ledger = Ledger(self.keep, "game", (options, model_key(subject), seed))
        began, done = time.monotonic(), {}
        todo = (~wrong).nonzero()[:, 0].tolist()
        with progress("game", total=len(todo), unit="images") as bar:
            for j, i in enumerate(todo):
                key = f"{i} {image_key(material.images[i]).hex()}"
                piece = ledger.get(key)
                if piece is None:
                    left = None if self.seconds is None else self.seconds - (time.monotonic() - began)
                    if left is not None and left <= 0:
                        continue
                    piece = self._one(
                        subject, material.images[i], None if left is None else left / (len(todo) - j), seed
                    )
                    if not piece["cut"]:
                        piece = ledger.put(key, piece)
                done[i] = piece
                bar.advance(1, severity=float(piece["severity"]))
        report = gathered(material, wrong.tolist(), given.tolist(), done, norm=self.norm, queries=self.queries)
        report.environment = environment(seed)
        report.summary["seconds"] = time.monotonic() - began
        return report

    def _one(self, subject: Subject, image: Tensor, seconds: float | None, seed: int) -> dict[str, Any]:
        found = search(
            subject,
            image,
            budget_queries=self.queries,
            seconds=seconds,
            norm=self.norm,
            mode=self.mode,
            distance=math.inf if self.distance is None else self.distance,
            paint=self.paint,
            confidence=self.confidence,
            plays=self.plays,
            detector=self.detector,
            batch=self.batch_size,
            seed=seed,
        )
        piece: dict[str, Any] = {k: v for k, v in found.summary.items() if k != "seconds"}
        return (
            piece
            | {k: found.arrays[k] for k in ("image", "saliency", "curve", "pixels")}
            | {"keypoints": len(found.arrays["keypoints"])}
        )


def first_answers(subject: Subject, images: Tensor, batch: int) -> Tensor:
    """The class that the subject gives to each image as it is."""
    with torch.no_grad():
        return torch.cat([subject(x).argmax(1).cpu() for x in images.split(batch)])


def _tree(
    oracle: Oracle, features: list[np.ndarray], map_: np.ndarray, plays: Weights, mode: Mode, tighten: bool, seed: int
) -> Tree:
    flat = map_.reshape(-1)
    if plays == "saliency":
        tiny = np.finfo(float).tiny
        logs = [np.log(np.maximum(flat[f], tiny)) for f in features]
        share = np.array([flat[f].sum() for f in features]) + tiny
    else:
        logs = [np.zeros(len(f)) for f in features]
        share = np.ones(len(features))
    draw = numpy_generator(seed, "game")
    return Tree(
        oracle=oracle,
        features=features,
        share=share / share.sum(),
        logs=logs,
        draw=draw,
        mode=mode,
        tighten=tighten,
    )


def _grow(tree: Tree, *, levels: int, width: int, stop_at_first: bool) -> None:
    """Plays until the budget ends or the game is solved; the root moves after equal shares of the budget."""
    oracle = tree.oracle
    pool = Pool(oracle, tree.refill, width=width)
    moved = idle = 0
    while not oracle.ended and not tree.finished and idle < IDLE:
        before = oracle.spent
        going = pool.round()
        idle = 0 if oracle.spent > before else idle + 1
        if stop_at_first and oracle.best is not None:
            break
        if not going and not pool.running and tree.finished:
            break
        if oracle.queries is not None:
            used = oracle.spent / oracle.queries
        else:
            used = oracle.elapsed / (oracle.seconds or math.inf)
        if used * levels >= moved + 1:
            moved += 1
            tree.move()
    tree.settle()
