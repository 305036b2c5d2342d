"""Plays: random games from a state to its end, written as coroutines so that many share the classifier's batches.

A play yields the states whose answers it needs and goes on when they are there (`Pool` collects them); what is already
known costs nothing.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterator
from typing import Any, TypeVar

import numpy as np

from lynceus.trust.oracle import Answer, Oracle, State

WIDTH = 64  # states per batch, at least, while there are plays
T = TypeVar("T")
Play = Generator[list[State], None, T]  # yields states to be asked, returns its outcome


def known(oracle: Oracle, state: State) -> Play[Answer]:
    """The answer to one state, asked only if it is new."""
    if state not in oracle.answers:
        yield [state]
    return oracle.answers[state]


def first_change(oracle: Oracle, start: State, moves: list[int], *, each: bool = False) -> Play[State | None]:
    """The state where the class changes when `moves` are played from `start` in turn, None where it never does.

    each: looks after every move, one query at a time, as the paper's plays do. Otherwise it looks after 0, 1, 2, 4,
    8 ... moves and at the end, all at once, then halves the interval in which the class changed: a handful of queries
    for a long play. A change that is taken back between two looks is not seen.
    """
    if each:
        for k in range(len(moves) + 1):
            if (yield from known(oracle, start.union(moves[:k]))).changed:
                return start.union(moves[:k])
        return None
    looks = [0, *(2**i for i in range(len(moves).bit_length()) if 2**i < len(moves)), len(moves)]
    states = [start.union(moves[:k]) for k in looks]
    if new := [s for s in states if s not in oracle.answers]:
        yield new
    high = next((k for k, s in zip(looks, states, strict=True) if oracle.answers[s].changed), None)
    if not high:
        return None if high is None else start
    low = looks[looks.index(high) - 1]
    while high - low > 1:
        middle = (low + high) // 2
        if (yield from known(oracle, start.union(moves[:middle]))).changed:
            high = middle
        else:
            low = middle
    return start.union(moves[:high])


def scrutinise(oracle: Oracle, state: State) -> Play[State]:
    """Drops every manipulation that is not needed, to a fixed point: no single pixel can then be given back.

    Whole halves, quarters ... are tried first where the state is large; dear pixels are tried before cheap ones.
    """
    size = len(state)
    chunk = max(1, size // 2) if size > 4 else 1
    while True:
        order = sorted(state, key=lambda p: (-oracle.cost[p], p))
        dropped = False
        for i in range(0, len(order), chunk):
            less = state.difference(order[i : i + chunk])
            if less and (yield from known(oracle, less)).changed:
                state, dropped = less, True
        if chunk > 1:
            chunk = max(1, min(chunk // 2, len(state) // 2))
        elif not dropped:
            return state


class Pool:
    """Runs plays side by side; every round sends the states that all of them wait for in one go.

    oracle: who is asked. refill: gives further plays with what to do at their end, None when there is none just now.
    width: states that wait to be asked at a time, as far as `refill` gives plays.
    """

    def __init__(
        self,
        oracle: Oracle,
        refill: Callable[[], tuple[Play[Any], Callable[[Any], None]] | None],
        *,
        width: int = WIDTH,
    ):
        self.oracle, self.refill, self.width = oracle, refill, width
        self.running: deque[tuple[Play[Any], Callable[[Any], None], list[State]]] = deque()

    def round(self) -> bool:
        """One batch of queries. False when nothing is left to run."""
        free, waiting_for = 0, sum(len(states) for _, _, states in self.running)
        while waiting_for < self.width and free < 4 * max(self.width, WIDTH):
            given = self.refill()
            if given is None:
                break
            if self._advance(*given):
                waiting_for += len(self.running[-1][2])
            else:
                free += 1
        wanted = [s for _, _, states in self.running for s in states]
        if wanted:
            self.oracle.ask(wanted)
        waiting, self.running = self.running, deque()
        for play, end, states in waiting:
            if all(s in self.oracle.answers for s in states):
                self._advance(play, end)
            else:  # the budget ended before its answer
                play.close()
        return bool(wanted) or free > 0

    def _advance(self, play: Play[Any], end: Callable[[Any], None]) -> bool:
        """Goes on to the next question, and keeps the play; or to the end. False: it has ended."""
        try:
            states = next(play)
        except StopIteration as stop:
            end(stop.value)
            return False
        self.running.append((play, end, states))
        return True


def drawn_moves(
    features: list[np.ndarray],
    logs: list[np.ndarray],
    share: np.ndarray,
    taken: State,
    *,
    first: int | None,
    count: int,
    draw: np.random.Generator,
) -> list[int]:
    """Up to `count` pixels as a play takes them: alternately a feature (by `share`) and an unused pixel of it.

    features: the pixels of each, logs: the logarithms of their weights. first: the feature of the first, if chosen.
    """
    turns = draw.choice(len(features), size=count + len(taken) + 4, p=share)
    if first is not None:
        turns[0] = first
    queues: dict[int, Iterator[int]] = {}
    moves: list[int] = []
    for k in turns.tolist():
        if k not in queues:
            # the order of log w + Gumbel noise is that of draws without replacement
            key = logs[k] + draw.gumbel(size=len(logs[k]))
            queues[k] = iter(features[k][np.argsort(-key)].tolist())
        pixel = next((p for p in queues[k] if p not in taken), None)
        if pixel is not None:
            moves.append(pixel)
            if len(moves) == count:
                return moves
    used = taken.union(moves)
    rest = [p for pixels in features for p in pixels.tolist() if p not in used]  # of features that were never drawn
    draw.shuffle(rest)
    return moves + rest[: count - len(moves)]
