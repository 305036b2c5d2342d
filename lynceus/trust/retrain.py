"""Does it help to teach a model what fooled it? Rounds of evolving fooling images and learning them as one more class.

Nguyen, Yosinski & Clune, Deep Neural Networks are Easily Fooled, CVPR 2015, arXiv 1412.1897: networks for digits learn
the class, and fresh evolution fools them again, round after round.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int64, UInt8
from torch import Tensor, nn

from lynceus.core import rng
from lynceus.core.environment import environment
from lynceus.core.errors import AdviceError
from lynceus.core.plots import image_grid, lines
from lynceus.core.report import Report
from lynceus.core.subject import Subject
from lynceus.core.types import Sample, as_float
from lynceus.recipes.supervised import Supervised, SupervisedConfig
from lynceus.tasks.classify import Classify
from lynceus.train.fit import FitConfig, fit
from lynceus.trust.cppn import PatternConfig
from lynceus.trust.encodings import encoding_of
from lynceus.trust.evolution import Run, search
from lynceus.trust.pixels import PixelConfig, check_shape

# images uint8 (n, c, h, w), labels (n,), number of classes, seed -> a model of pixels in [0, 1]
Learner = Callable[[Tensor, Tensor, int, int], Any]


def learner(
    make: Callable[[], nn.Module], config: FitConfig | None = None, augment: SupervisedConfig | None = None
) -> Learner:
    """Learns with `fit` and the supervised recipe: `make()` gives a fresh backbone."""

    def learn(images: Tensor, labels: Tensor, classes: int, seed: int) -> nn.Module:
        with rng.borrowed(seed, "new backbone"):
            recipe = Supervised(Classify(num_classes=classes), make(), augment)
        colour = images.expand(-1, 3, -1, -1)
        data = [Sample(image=x, label=int(y)) for x, y in zip(colour, labels)]
        fit(recipe, data, config=replace(config or FitConfig(), seed=seed, quiet=True))
        return recipe.export()

    return learn


def retrain(
    learn: Learner,
    images: UInt8[Tensor, "n c h w"],
    labels: Int64[Tensor, " n"],
    held_images: UInt8[Tensor, "m c h w"],
    held_labels: Int64[Tensor, " m"],
    *,
    rounds: int = 3,
    encoding: str | PixelConfig | PatternConfig = "pixels",
    grey: bool = False,
    generations: int = 30,
    population: int = 200,
    per_round: int = 1000,
    searches: int = 5,
    keep: str | Path | None = None,
    seconds: float | None = None,
    seed: int = 0,
    quiet: bool = True,
) -> Report:
    """Learns the classes, then in every round evolves images that fool the newest model, and learns anew with all
    fooling images so far as one more class.

    learn: (images, labels, classes, seed) -> model; `learner(make)` is one that uses `fit`. held_images, held_labels:
      real images that are never learnt from. per_round: fooling images of a round, from `searches` independent ones;
      one more search gives those that recall is measured on. keep: folder in which searches are kept.
    generations: of every search. Long ones narrow down to a few images each, from which less is learnt.
    seconds: no further round begins after that.

    Returns a Report, a row per model: recall of the fooling class on images evolved against the model before it, by a
    search whose images nobody learnt; accuracy on real images; confidence that a fresh evolution reaches in the real
    classes. arrays: "fooling" uint8 and "round" of all images that were learnt.
    """
    began = time.monotonic()
    count = int(labels.max()) + 1
    if rounds < 1 or searches < 1 or per_round < searches:
        raise AdviceError("Retraining takes at least one round, one search, and one image per search.")
    if len(images) != len(labels) or len(held_images) != len(held_labels) or not len(images) or not len(held_images):
        raise AdviceError("Give as many labels as images, and some of both to learn from and to hold out.")
    if held_images.shape[1:] != images.shape[1:] or int(held_labels.max()) >= count or int(labels.min()) < 0:
        raise AdviceError(f"Images held out must have the shape {tuple(images.shape[1:])} and labels 0 to {count - 1}.")
    made = encoding_of(encoding, check_shape((images.shape[1], images.shape[2], images.shape[3])), grey)
    report = Report(name="retraining against fooling images", environment=environment(seed))
    fooling, rounds_of = images[:0], torch.zeros(0, dtype=torch.long)
    newest = _subject(learn(images, labels, count, rng.derive(seed, "round", 0)))

    def evolved(subject: Subject, turn: int, number: int) -> Run:
        own = rng.derive(seed, "search", turn, number)
        each = -(-per_round // searches // count)
        return search(
            subject, made, generations=generations, population=population, seed=own, classes=range(count),
            harvest=each, keep=keep, quiet=quiet,
        )  # fmt: skip

    def row(turn: int, runs: list[Run], recall: float | None) -> dict[str, Any]:
        confidence = torch.stack([r.archive.confidence for r in runs])
        return {
            "round": turn,
            "fooling images learnt": len(fooling),
            "recall of the fooling class": recall,
            "accuracy": _accuracy(newest, held_images, held_labels),
            "median confidence of new images": float(confidence.quantile(0.5)),
            "lowest": float(confidence.min()),
        }

    runs = [evolved(newest, 0, i) for i in range(searches + 1)]
    report.rows.append(row(0, runs, None))
    _picture(report, 0, runs[0], made)
    for turn in range(1, rounds + 1):
        if seconds is not None and time.monotonic() - began > seconds:
            report.notes.append(f"The budget of {seconds:g} s ended after {turn - 1} of {rounds} rounds.")
            break
        new = torch.cat([_latest(r, -(-per_round // searches)) for r in runs[:-1]])[:per_round]
        if len(new) < per_round:
            report.notes.append(f"Round {turn}: the searches gave {len(new)} of {per_round} images.")
        unseen = _latest(runs[-1], per_round)
        fooling = torch.cat([fooling, new])
        rounds_of = torch.cat([rounds_of, torch.full((len(new),), turn)])
        everything = torch.cat([images, fooling])
        classes = torch.cat([labels, torch.full((len(fooling),), count)])
        newest = _subject(learn(everything, classes, count + 1, rng.derive(seed, "round", turn)))
        recall = _accuracy(newest, unseen, torch.full((len(unseen),), count))
        runs = [evolved(newest, turn, i) for i in range(searches + 1)]
        report.rows.append(row(turn, runs, recall))
        _picture(report, turn, runs[0], made)
    _sum_up(report, count)
    report.arrays = {"fooling": fooling.numpy(), "round": rounds_of.numpy()}
    report.summary["seconds"] = time.monotonic() - began
    return report


def _sum_up(report: Report, count: int) -> None:
    first, later = report.rows[0], report.rows[1:]
    across = [r["round"] for r in report.rows]
    if later:
        report.summary = {
            "lowest_recall": min(r["recall of the fooling class"] for r in later),
            "lowest_median_confidence_of_new_images": min(r["median confidence of new images"] for r in later),
            "accuracy_before": first["accuracy"],
            "largest_loss_of_accuracy": max(first["accuracy"] - r["accuracy"] for r in later),
        }
        low = report.summary["lowest_median_confidence_of_new_images"]
        report.answer = (
            f"Models learn the fooling class (recall at least {report.summary['lowest_recall']:.3f} on unseen images), "
            + (f"and fresh evolution fools every one of them again (median confidence at least {low:.4f}): it does not "
               "help against new images." if low > 0.9 else
               f"and fresh evolution reaches a median confidence of only {low:.3f} against one of them: it helps "
               "against searches of this length.")
        )  # fmt: skip
    report.figures["rounds.plotly"] = lines(
        {
            "accuracy on real images": (across, [r["accuracy"] for r in report.rows]),
            "confidence of new fooling images": (across, [r["median confidence of new images"] for r in report.rows]),
            "recall of the fooling class": (across[1:], [r["recall of the fooling class"] for r in later]),
        },
        x_title="round",
        y_title="share",
    )


def _subject(model: Any) -> Subject:
    return model if isinstance(model, Subject) else Subject(model)


def _latest(run: Run, most: int) -> Tensor:
    """The newest champions of every class in turn, at most `most`."""
    turns = itertools.zip_longest(*(reversed(part) for part in run.harvest))
    picked = [torch.from_numpy(x) for turn in turns for x in turn if x is not None]
    return torch.stack(picked[:most])


def _accuracy(subject: Subject, images: Tensor, labels: Tensor) -> float:
    with torch.inference_mode():
        answers = torch.cat([subject(as_float(x)).argmax(1).cpu() for x in images.split(256)])
    return float((answers == labels).double().mean())


def _picture(report: Report, turn: int, run: Run, encoding: Any) -> None:
    cells = run.archive.cells
    images = encoding.render(encoding.select([run.archive.elites], cells[cells >= 0]))[:40]
    confidence = run.archive.confidence[cells >= 0]
    captions = [f"{c} {100 * float(p):.2f}%" for c, p in enumerate(confidence[:40])]
    report.figures[f"fooling_the_model_of_round_{turn}.png"] = image_grid(images, captions)
