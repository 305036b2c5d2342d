"""How good a student becomes: a short distillation of the teacher's logits, and its accuracy on images held out.

N2N Learning, ICLR 2018, arXiv 1709.06030, section 3.4: mean squared error between the logits (Ba & Caruana), Adam.
"""

from __future__ import annotations

import copy
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from lynceus.core.errors import AdviceError
from lynceus.core.rng import generator
from lynceus.core.workers import begin
from lynceus.rewrite.restructure import Restructure


@dataclass(frozen=True, kw_only=True)
class DistilConfig:
    """How students are taught. epochs: of every student that is scored. final_epochs: of the one that is kept.
    lr, weight_decay: of Adam; the last training lets lr fall to 0 along a cosine. batch: images per step. labels: learn
    the labels instead of the teacher's logits, as the paper does on large images."""

    epochs: int = 5
    final_epochs: int = 60
    lr: float = 5e-4
    weight_decay: float = 5e-4
    batch: int = 64
    labels: bool = False

    def __post_init__(self) -> None:
        if min(self.epochs, self.final_epochs, self.batch) < 1 or not (self.lr > 0 and self.weight_decay >= 0):
            raise AdviceError(
                f"epochs={self.epochs}, final_epochs={self.final_epochs}, batch={self.batch} are at least 1, "
                f"lr={self.lr} is above 0 and weight_decay={self.weight_decay} not below."
            )


@dataclass(frozen=True, kw_only=True)
class Lessons:
    """What students learn from and are judged on: inputs as the network takes them, the teacher's logits, labels."""

    inputs: Float[Tensor, "n c h w"]
    logits: Float[Tensor, "n k"]
    labels: Int[Tensor, " n"]
    held_inputs: Float[Tensor, "m c h w"]
    held_labels: Int[Tensor, " m"]

    def accuracy(self, model: nn.Module) -> float:
        """Share of the held-out images that `model` answers right; puts it in eval mode."""
        model.eval()
        with torch.no_grad():
            right = sum(
                int((model(x).argmax(-1) == y).sum())
                for x, y in zip(self.held_inputs.split(256), self.held_labels.split(256))
            )
        return right / len(self.held_labels)


def bare(model: nn.Module, softmax: tuple[str, ...]) -> nn.Module:
    """A copy that gives logits: the named softmax layers do nothing."""
    made = copy.deepcopy(model)
    for name in softmax:
        made.set_submodule(name, nn.Identity())
    return made


def teach(
    student: nn.Module,
    lessons: Lessons,
    config: DistilConfig,
    *,
    epochs: int,
    seed: int,
    falling: bool = False,
    softmax: tuple[str, ...] = (),
) -> nn.Module:
    """Trains `student` in place for `epochs`; the order of the images is drawn from `seed`. Leaves it in eval mode."""
    draw = generator(seed, "order of images")
    kept = {name: student.get_submodule(name) for name in softmax}
    for name in kept:
        student.set_submodule(name, nn.Identity())
    optimizer = torch.optim.Adam(student.parameters(), config.lr, weight_decay=config.weight_decay)
    count, batch = len(lessons.inputs), min(config.batch, len(lessons.inputs))
    steps = epochs * (count // batch)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps) if falling else None
    student.train()
    for _ in range(epochs):
        for part in torch.randperm(count, generator=draw)[: count // batch * batch].split(batch):
            answers = student(lessons.inputs[part])
            if config.labels:
                loss = F.cross_entropy(answers, lessons.labels[part])
            else:
                loss = F.mse_loss(answers, lessons.logits[part])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if cosine is not None:
                cosine.step()
    for name, module in kept.items():
        student.set_submodule(name, module)
    return student.eval()


class Scorer:
    """Plan -> accuracy of its student after the short training, in this process or in `workers` of their own.

    One thread each, so that a score depends on the plan alone and neither on the machine's cores nor on the order."""

    def __init__(
        self,
        teacher: nn.Module,
        lessons: Lessons,
        config: DistilConfig,
        *,
        softmax: tuple[str, ...] = (),
        workers: int = 1,
    ):
        self.work = (teacher, lessons, config, softmax)
        self.pool: ProcessPoolExecutor | None = None
        if workers > 1:
            context: Any = torch.multiprocessing.get_context("spawn")
            self.pool = ProcessPoolExecutor(workers, context, _start, (self.work,))

    def __call__(self, plans: list[Restructure]) -> list[float]:
        if self.pool is None:
            return [score(*self.work, plan) for plan in plans]
        return list(self.pool.map(_score, plans))

    def close(self) -> None:
        if self.pool is not None:
            self.pool.shutdown(wait=False, cancel_futures=True)


def score(
    teacher: nn.Module, lessons: Lessons, config: DistilConfig, softmax: tuple[str, ...], plan: Restructure
) -> float:
    """Accuracy of the student of `plan` after `config.epochs`. A student whose training diverges scores 0."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        student = teach(plan(teacher), lessons, config, epochs=config.epochs, seed=plan.seed, softmax=softmax)
        return lessons.accuracy(student)
    finally:
        torch.set_num_threads(threads)


_work: tuple[Any, ...] = ()  # of a worker process, which serves one search


def _start(work: tuple[Any, ...]) -> None:
    global _work
    begin()
    _work = work


def _score(plan: Restructure) -> float:
    return score(_work[0], _work[1], _work[2], _work[3], plan)
