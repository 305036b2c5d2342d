"""MAP-Elites: one archive cell per class, so that one run finds an image for every class at once.

Mouret & Clune, Illuminating search spaces by mapping elites, arXiv 1504.04909; as used by Nguyen, Yosinski & Clune,
Deep Neural Networks are Easily Fooled, CVPR 2015, arXiv 1412.1897. Reference code: Evolving-AI-Lab/fooling, GPL of its
sferes part; written anew from the papers. Simulated binary crossover and polynomial mutation: Deb & Agrawal, Complex
Systems 9 (1995) 115-148.
"""

from __future__ import annotations

import hashlib
import math
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Float64, Int64, UInt8
from torch import Tensor

from lynceus.core import rng
from lynceus.core.errors import AdviceError
from lynceus.core.identity import model_key
from lynceus.core.progress import progress
from lynceus.core.subject import Subject

FORMAT = 1  # of the kept file


# the operators on genes in [0, 1] ----------------------------------------------------------------------------------
def polynomial_mutation(
    genes: Float[Tensor, "*n"], draws: Float[Tensor, "*n"], *, eta: float = 15.0, low: float = 0.0, high: float = 1.0
) -> Float[Tensor, "*n"]:
    """Every gene moved by a step of the polynomial distribution; `draws` are uniform in [0, 1).

    eta: the larger, the smaller the steps. low, high: the range of a gene; steps are in its units, and stay inside."""
    power = 1 / (eta + 1)
    down = (2 * draws).pow(power) - 1
    up = 1 - (2 * (1 - draws)).pow(power)
    return (genes + torch.where(draws < 0.5, down, up) * (high - low)).clamp(low, high)


def simulated_binary(
    first: Float[Tensor, "*n"],
    second: Float[Tensor, "*n"],
    draws: Float[Tensor, "*n"],
    *,
    eta: float = 10.0,
    low: float = 0.0,
    high: float = 1.0,
) -> tuple[Float[Tensor, "*n"], Float[Tensor, "*n"]]:
    """Two children of each pair of genes, the lower and the higher one, at one uniform draw each.

    The larger `eta`, the closer children are to their parents. Equal genes are handed on as they are."""
    less, more = torch.minimum(first, second), torch.maximum(first, second)
    gap = more - less
    apart = gap > torch.finfo(torch.float32).eps * (high - low)
    gap = torch.where(apart, gap, torch.ones_like(gap))
    power = 1 / (eta + 1)

    def spread(room: Tensor) -> Tensor:
        alpha = 2 - (1 + 2 * room / gap).pow(-(eta + 1))
        inside = draws <= 1 / alpha
        return torch.where(inside, draws * alpha, 1 / (2 - draws * alpha)).pow(power)

    lower = 0.5 * ((less + more) - spread(less - low) * gap)
    higher = 0.5 * ((less + more) + spread(high - more) * gap)
    return torch.where(apart, lower.clamp(low, high), less), torch.where(apart, higher.clamp(low, high), more)


# what a model says of images ---------------------------------------------------------------------------------------
def log_odds(logits: Float[Tensor, "b k"]) -> Float64[Tensor, "b k"]:
    """log p - log(1 - p) of the softmax, in float64: grows with p, and does not stop where p rounds to 1."""
    certain, doubt = _logs(logits)
    return certain - doubt


def _logs(logits: Tensor) -> tuple[Tensor, Tensor]:
    """log p and log(1 - p), both exact near their ends."""
    z = logits.double()
    total = torch.logsumexp(z, 1, keepdim=True)
    certain = z - total
    top = z.argmax(1, keepdim=True)
    others = torch.logsumexp(z.scatter(1, top, -math.inf), 1, keepdim=True)
    certain = certain.scatter(1, top, -torch.nn.functional.softplus(others - z.gather(1, top)))
    doubt = torch.log(-torch.expm1(certain)).scatter(1, top, others - total)
    return certain, doubt


def judge(
    subject: Subject, images: UInt8[Tensor, "b c h w"], *, batch_size: int | None = None, crops: int = 0
) -> Float64[Tensor, "b k"]:
    """Log odds of every class for 8-bit images. `crops`: side of ten crops (corners, centre, mirrored) whose
    probabilities are averaged; 0 shows the whole image. Raises AdviceError for answers that are no finite logits."""
    size = batch_size or len(images)
    out = []
    with torch.inference_mode():
        for start in range(0, len(images), size):
            part = images[start : start + size].float() / 255
            if not crops:
                out.append(log_odds(logits_of(subject, part, start)))
                continue
            logs = [_logs(logits_of(subject, view, start)) for view in ten_crops(part, crops)]
            certain, doubt = (torch.stack(side).logsumexp(0) for side in zip(*logs))
            out.append(certain - doubt)
    return torch.cat(out).clone()


def logits_of(subject: Subject, pixels: Tensor, start: int) -> Tensor:
    logits = subject(pixels)
    if logits.ndim != 2 or len(logits) != len(pixels) or logits.shape[1] < 2:
        raise AdviceError(
            f"{subject.name} answers {tuple(logits.shape)} for {len(pixels)} images; fooling needs logits (images, "
            "classes) of at least two classes."
        )
    wrong = logits.isnan().any(1) | logits.isposinf().any(1) | logits.isneginf().all(1)
    if bool(wrong.any()):
        first = int(wrong.nonzero()[0])
        raise AdviceError(
            f"{subject.name} answers {logits[first, :3].tolist()} ... for generated image {start + first}, whose "
            f"pixels are between {float(pixels[first].min()):.3g} and {float(pixels[first].max()):.3g}. `lynceus "
            "doctor` finds the layer where that begins; a model must give finite logits for every image in [0, 1]."
        )
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits


def ten_crops(images: Tensor, side: int) -> list[Tensor]:
    """Corners and centre of (b, c, h, w), and the same of the mirror image: ten tensors (b, c, side, side)."""
    h, w = int(images.shape[-2]), int(images.shape[-1])
    if side > min(h, w):
        raise AdviceError(f"Crops of {side} pixels do not fit into images of {h} x {w}; take crops <= {min(h, w)}.")
    places = [(0, 0), (0, w - side), (h - side, 0), (h - side, w - side), ((h - side) // 2, (w - side) // 2)]
    return [x[..., t : t + side, s : s + side] for x in (images, images.flip(-1)) for t, s in places]


# genomes -----------------------------------------------------------------------------------------------------------
@runtime_checkable
class Encoding(Protocol):
    """How an image is written as genes. A population is any value that the encoding itself understands."""

    @property
    def shape(self) -> tuple[int, int, int]: ...
    def describe(self) -> str:
        """All that decides its images, as text."""
        ...

    def initial(self, count: int, seed: int) -> Any: ...
    def offspring(self, parents: Any, pairs: Int64[Tensor, "n 2"], generation: int, seed: int) -> Any:
        """Two children of each pair of members of `parents`, in order."""
        ...

    def render(self, population: Any) -> UInt8[Tensor, "b c h w"]: ...
    def select(self, populations: Sequence[Any], index: Int64[Tensor, " n"]) -> Any:
        """Members of several populations, counted through, as one population."""
        ...

    def pack(self, population: Any) -> dict[str, np.ndarray]: ...
    def unpack(self, packed: dict[str, np.ndarray]) -> Any: ...


@dataclass
class Archive:
    """One cell per class. `odds` of the occupants (-inf: empty), `cells` -> index into `elites`, a population."""

    odds: Float64[Tensor, " k"]
    cells: Int64[Tensor, " k"]
    elites: Any
    kept: int = 0  # members of elites
    goal: float = math.inf  # log odds at which an occupant is left alone

    @classmethod
    def empty(cls, classes: int, goal: float = math.inf) -> Archive:
        odds = torch.full((classes,), -math.inf, dtype=torch.float64)
        return cls(odds, torch.full((classes,), -1), None, goal=goal)

    @property
    def confidence(self) -> Float64[Tensor, " k"]:
        return self.odds.sigmoid()

    def offer(self, odds: Float64[Tensor, "b k"], children: Any, encoding: Encoding) -> Int64[Tensor, " k"]:
        """Every child beside every cell, one after the other: it moves in where its probability is strictly higher.

        Returns the child that now lives in each cell, -1 where the occupant stayed."""
        best, who = odds.max(0).values, odds.argmax(0)  # argmax: the first of equal ones, as one by one would keep
        moves = (best > self.odds) & (self.odds < self.goal)
        if bool(moves.any()):
            cells = torch.where(moves, self.kept + who, self.cells)
            index, cells_now = torch.unique(cells, return_inverse=True)
            empty = int((index < 0).sum())
            populations = [children] if self.elites is None else [self.elites, children]
            self.elites = encoding.select(populations, index[empty:])
            self.cells, self.kept = cells_now - empty, len(index) - empty
            self.odds = torch.where(moves, best, self.odds)
        return torch.where(moves, who, torch.full_like(who, -1))

    def parents(self, pairs: int, draw: torch.Generator) -> Int64[Tensor, "n 2"]:
        """Members of `elites`, by occupied cells drawn uniformly with replacement."""
        occupied = self.cells[self.cells >= 0]
        return occupied[torch.randint(len(occupied), (pairs, 2), generator=draw)]


@dataclass
class Run:
    """A search as far as it went: `curve` (generations done + 1, classes) log odds, newest last."""

    archive: Archive
    curve: list[np.ndarray] = field(default_factory=list)
    queries: int = 0
    harvest: list[list[np.ndarray]] = field(default_factory=list)  # per class: latest champions, newest last
    resumed: int = 0  # generations that an earlier run did
    stopped: str = ""  # why it ended early

    @property
    def generations(self) -> int:
        return len(self.curve) - 1


def search(
    subject: Subject,
    encoding: Encoding,
    *,
    generations: int,
    population: int = 200,
    seed: int = 0,
    classes: Sequence[int] | None = None,
    crops: int = 0,
    batch_size: int | None = None,
    goal: float | None = None,
    harvest: int = 0,
    seconds: float | None = None,
    queries: int | None = None,
    keep: str | Path | None = None,
    keep_every: int = 25,
    quiet: bool = False,
) -> Run:
    """Evolves images for every class of `subject`, or for `classes` alone: the first population is random, then every
    generation brings `population` children of parents drawn from the occupied cells.

    goal: confidence at which a cell is left alone; the search ends when all have it. None: evolves on, ever surer.
    harvest: champions (images that took a cell) to remember per class. seconds, queries: ends at the generation that
      would go beyond. keep: folder whose file, written every `keep_every` generations, lets a second run go on.
    Each generation draws from its own seed, so an interrupted run that goes on is the unbroken one.
    """
    if population < 2 or population % 2:
        raise AdviceError(f"A population is an even number of at least 2 (children come in pairs), not {population}.")
    if generations < 0:
        raise AdviceError(f"generations is at least 0 (the random population alone), not {generations}.")
    cost = population * (10 if crops else 1)
    if queries is not None and queries < cost:
        raise AdviceError(
            f"The first population alone asks for {cost} answers, and of the queries {max(0, queries)} are left after "
            f"a look at the model and the real images. Give at least {cost - queries} more, or a smaller population."
        )
    if goal is not None and not 0 < goal < 1:
        raise AdviceError(f"goal is a confidence between 0 and 1, such as 0.9999, not {goal}.")
    line = math.inf if goal is None else math.log(goal) - math.log1p(-goal)
    file = _Kept(keep, subject, encoding, population, seed, classes, crops, harvest, goal)
    began = time.monotonic()
    run: Run | None = file.read(encoding, line)
    first = run.generations + 1 if run is not None else 0
    if run is not None and run.generations > generations:
        raise AdviceError(
            f"{file.path} already went on for {run.generations} generations; ask for at least as many, or give "
            "another folder."
        )
    picked = None if classes is None else torch.tensor(list(classes))
    with progress("evolution", total=generations + 1, unit="generations", done=first, quiet=quiet) as bar:
        try:
            for generation in range(first, generations + 1):
                if run is not None and bool((run.archive.odds >= line).all()):
                    break
                if run is not None and queries is not None and run.queries + cost > queries:
                    run.stopped = f"{queries:,} queries"
                elif run is not None and seconds is not None and time.monotonic() - began > seconds:
                    run.stopped = f"{seconds:g} s"
                if run is not None and run.stopped:
                    break
                own = rng.derive(seed, "generation", generation)
                if run is None:
                    children = encoding.initial(population, own)
                else:
                    pairs = run.archive.parents(population // 2, rng.generator(own, "parents"))
                    children = encoding.offspring(run.archive.elites, pairs, generation, own)
                images = encoding.render(children)
                odds = judge(subject, images, batch_size=batch_size, crops=crops).cpu()
                if run is None:
                    picked = _checked(picked, odds.shape[1])
                    count = len(picked) if picked is not None else odds.shape[1]
                    old = Run(Archive.empty(count, line), harvest=[[] for _ in range(count)])
                else:
                    old = run
                archive, champions = replace(old.archive), list(old.harvest)
                moved = archive.offer(odds if picked is None else odds[:, picked], children, encoding)
                if harvest:
                    for cell in (moved >= 0).nonzero().flatten().tolist():
                        champions[cell] = [*champions[cell], images[moved[cell]].numpy()][-harvest:]
                # one assignment, so that a generation is done or not, whenever a signal comes
                run = Run(archive, [*old.curve, archive.odds.numpy().copy()], old.queries + cost, champions)
                if generation % keep_every == 0:
                    file.write(run, encoding)
                bar.advance(1, median=float(run.archive.confidence.median()), least=float(run.archive.confidence.min()))
        finally:
            if run is not None:
                file.write(run, encoding)
    assert run is not None
    run.resumed = first
    return run


def _checked(classes: Tensor | None, count: int) -> Tensor | None:
    if classes is None:
        return None
    wrong = [int(c) for c in classes if not 0 <= c < count]
    if wrong or not len(classes):
        raise AdviceError(f"The model has classes 0 to {count - 1}, not {wrong or 'none'}.")
    return classes


class _Kept:
    """The file of an unfinished search, replaced as a whole so that a kill leaves the last good one."""

    def __init__(self, folder: str | Path | None, subject: Subject, encoding: Encoding, *rest: object):
        self.path: Path | None = None
        self.last = -1
        if folder is None:
            return
        what = (FORMAT, known(subject, encoding.shape), encoding.describe(), *rest)
        digest = hashlib.blake2b(repr(what).encode(), digest_size=6).hexdigest()
        self.path = Path(folder) / f"evolution-{digest}.npz"
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise AdviceError(f"The search cannot be kept in {self.path}: {error.strerror}.") from None

    def read(self, encoding: Encoding, goal: float) -> Run | None:
        if self.path is None or not self.path.is_file():
            return None
        try:
            with np.load(self.path, allow_pickle=False) as file:
                data = {name: file[name] for name in file.files}
            cells = torch.from_numpy(data["cells"])
            elites = encoding.unpack({k.removeprefix("elites."): v for k, v in data.items() if k.startswith("elites.")})
            kept = int(cells.max()) + 1
            archive = Archive(torch.from_numpy(data["odds"]), cells, elites, kept, goal)
            ends = np.cumsum(data["harvested"])
            harvest = [list(part) for part in np.split(data["harvest"], ends[:-1])]
            run = Run(archive, list(data["curve"]), int(data["queries"]), harvest)
        except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
            raise AdviceError(f"{self.path} is no kept search ({error}); delete it to start anew.") from None
        self.last = run.generations
        return run

    def write(self, run: Run, encoding: Encoding) -> None:
        if self.path is None or run.generations == self.last:
            return
        part = self.path.with_suffix(f".{os.getpid()}.part")
        images = [np.stack(h) for h in run.harvest if h]
        with part.open("wb") as file:
            arrays: dict[str, Any] = {
                "odds": run.archive.odds.numpy(),
                "cells": run.archive.cells.numpy(),
                "curve": np.stack(run.curve),
                "queries": np.array(run.queries),
                "harvested": np.array([len(h) for h in run.harvest]),
                "harvest": np.concatenate(images) if images else np.zeros((0, *encoding.shape), np.uint8),
            }
            np.savez_compressed(file, **arrays, **_elites(run, encoding))
        os.replace(part, self.path)
        self.last = run.generations


def _elites(run: Run, encoding: Encoding) -> dict[str, Any]:
    return {f"elites.{k}": v for k, v in encoding.pack(run.archive.elites).items()}


def known(subject: Subject, shape: tuple[int, int, int]) -> str:
    """What a kept search is found by: the weights, or, for a plain function, its answers to 16 fixed images."""
    key = model_key(subject)
    if not key.startswith("object-"):
        return key
    probe = torch.rand(16, *shape, generator=rng.generator(0, "who answers"))
    with torch.inference_mode():
        answers = logits_of(subject, probe, 0).double().cpu().numpy().round(3) + 0.0
    return "answers-" + hashlib.blake2b(answers.tobytes(), digest_size=12).hexdigest()
