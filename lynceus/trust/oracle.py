"""The classifier as a black box: states of one image are asked in batches, counted to the query and remembered.

A state is a set of pixels that are painted, as a frozenset of flat indices. Every state is sent at most once; queries
are numbered in the order in which they are sent, within a batch too. The original image is query 1.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from lynceus.core.errors import AdviceError, unknown
from lynceus.core.subject import Subject

Norm = Literal["l0", "l1", "l2"]
Paint = Literal["toggle", "white", "black"]
State = frozenset[int]
NOTHING: State = frozenset()


def painted(image: Float[Tensor, "c h w"], paint: Paint = "toggle") -> Float[Tensor, "c h w"]:
    """What each pixel becomes when it is manipulated, always seen from the original image.

    toggle: every channel goes to the least value of the image where the value v is nearer to the greatest
    (max - v < v), else to the greatest; an image of one value is toggled between 0 and 1. white, black: 1, 0.
    """
    if paint == "white":
        return torch.ones_like(image)
    if paint == "black":
        return torch.zeros_like(image)
    if paint != "toggle":
        raise unknown("manipulation", str(paint), ("toggle", "white", "black"))
    low, high = image.min(), image.max()
    if low == high:
        low, high = torch.zeros_like(low), torch.ones_like(high)
    return torch.where(high - image < image, low, high)


@dataclass(frozen=True, slots=True)
class Answer:
    """What one query said: whether the class changed (confidently enough), to which, and what is left of the first."""

    changed: bool
    label: int
    remaining: float  # probability of the original class


@dataclass(kw_only=True)
class Oracle:
    """Asks `subject` about states of `image`, never beyond `queries` images nor, between batches, beyond `seconds`.

    image: (c, h, w) in [0, 1]. paint: see `painted`. norm: of severities: changed pixels, or the sum or root of the
    sum of squares of all channels' changes. distance: severities above do not count as found. confidence: probability
    that a new class must exceed.
    """

    subject: Subject
    image: Tensor
    paint: Paint = "toggle"
    norm: Norm = "l0"
    distance: float = math.inf
    confidence: float = 0.0
    queries: int | None = None
    seconds: float | None = None
    batch: int = 256
    spent: int = 0
    batches: list[int] = field(default_factory=list)
    answers: dict[State, Answer] = field(default_factory=dict)
    best: State | None = None
    severity: float = math.inf
    curve: list[tuple[int, float]] = field(default_factory=list)
    late: bool = False  # the seconds ended it

    def __post_init__(self) -> None:
        if self.norm not in ("l0", "l1", "l2"):
            raise unknown("norm", str(self.norm), ("l0", "l1", "l2"))
        if self.queries is not None and self.queries < 1:
            raise AdviceError(f"A search needs at least one query, for the image itself; the budget is {self.queries}.")
        self.began = time.monotonic()
        self.image = self.image.detach().cpu().float().contiguous()
        self._flat = self.image.flatten(1)
        self._painted = painted(self.image, self.paint).flatten(1)
        change = (self._painted - self._flat).double().numpy()
        self.movable = (change != 0).any(0)
        if self.norm == "l0":
            cost = self.movable.astype(np.float64)
        else:
            cost = np.abs(change).sum(0) if self.norm == "l1" else (change**2).sum(0)
        self.cost: list[float] = cost.tolist()
        self.original = -1
        self.ask([NOTHING])

    @property
    def ended(self) -> bool:
        """Whether the budget is used up."""
        if self.queries is not None and self.spent >= self.queries:
            return True
        if self.seconds is not None and self.elapsed >= self.seconds:
            self.late = True
        return self.late

    @property
    def elapsed(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.began

    def size(self, state: State) -> float:
        """The severity of a state, whatever its class."""
        total = sum(self.cost[p] for p in state)
        return math.sqrt(total) if self.norm == "l2" else total

    def picture(self, state: State) -> Tensor:
        """The image (c, h, w) of a state."""
        return self._pictures([state])[0]

    def ask(self, states: Sequence[State]) -> None:
        """Learns the answers to those of the states that are new, in their order, as far as the budget goes."""
        new = [s for s in dict.fromkeys(states) if s not in self.answers]
        if self.queries is not None:
            new = new[: self.queries - self.spent]
        for start in range(0, len(new), self.batch):
            if start and self.ended:
                return
            self._send(new[start : start + self.batch])

    def _send(self, states: list[State]) -> None:
        with torch.no_grad():
            logits = self.subject(self._pictures(states)).detach().cpu().double()
        if logits.ndim != 2 or len(logits) != len(states) or logits.shape[1] < 2:
            raise AdviceError(
                f"{self.subject.name} answers {len(states)} images with {tuple(logits.shape)}; a search needs one row "
                "of at least two logits per image."
            )
        odd = ~logits.isfinite().all(1)
        if bool(odd.any()):
            raise AdviceError(
                f"{self.subject.name} answers query {self.spent + 1 + int(odd.nonzero()[0])} with numbers that are not "
                "finite (NaN or infinity); look at its weights, or leave this image out."
            )
        share = logits.softmax(1)
        labels = share.argmax(1)
        if self.original < 0:
            self.original = int(labels[0])
        sure = share.gather(1, labels[:, None])[:, 0]
        away = (labels != self.original) & (sure > self.confidence)
        self.batches.append(len(states))
        for state, label, changed, left in zip(
            states, labels.tolist(), away.tolist(), share[:, self.original].tolist(), strict=True
        ):
            self.spent += 1
            self.answers[state] = Answer(changed, label, left)
            if changed and (severity := self.size(state)) < self.severity and severity <= self.distance:
                self.best, self.severity = state, severity
                self.curve.append((self.spent, severity))

    def _pictures(self, states: Sequence[State]) -> Tensor:
        out = self._flat.expand(len(states), -1, -1).clone()
        sizes = [len(s) for s in states]
        if sum(sizes):
            at = torch.tensor([p for s in states for p in s])
            which = torch.repeat_interleave(torch.arange(len(states)), torch.tensor(sizes))
            out[which, :, at] = self._painted.T[at]
        return out.view(len(states), *self.image.shape)


def as_subject(subject: Subject | nn.Module | Callable[[Tensor], Any]) -> Subject:
    """A subject of anything callable on (b, 3, h, w) pixels in [0, 1]; functions may answer with numpy arrays."""
    if isinstance(subject, Subject):
        return subject
    if isinstance(subject, nn.Module) or not callable(subject):
        return Subject(subject)

    def answer(image: Tensor) -> Any:
        out = subject(image)
        return torch.from_numpy(np.ascontiguousarray(out)) if isinstance(out, np.ndarray) else out

    return Subject(answer, needs_grad=False, name=getattr(subject, "__name__", type(subject).__name__))
