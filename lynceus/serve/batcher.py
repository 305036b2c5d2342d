"""Dynamic batching: a group of equal members is closed when it is full, or when its oldest has waited long enough."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Hashable
from typing import Generic, Protocol, TypeVar


class Member(Protocol):
    """What is batched: `key` says with whom (model and shape), `ready` is when it came, in monotonic nanoseconds."""

    key: Hashable
    ready: int


M = TypeVar("M", bound=Member)


class Batcher(Generic[M]):
    """Members come in by `put`, groups of one key go out by `take`; any number of threads on both sides.

    A group is closed at `max_batch` members, or `max_wait` seconds after its oldest came in. eager: also as soon as
    nothing that was announced with `expect` is still on its way, since nobody would be waited for.
    """

    def __init__(self, max_batch: int, max_wait: float, *, eager: bool = True):
        self.max_batch, self.max_wait, self.eager = max_batch, max_wait, eager
        self._groups: dict[Hashable, deque[M]] = {}
        self._change = threading.Condition()
        self._expected = self._count = 0
        self._closed = False

    def __len__(self) -> int:
        return self._count

    def expect(self, count: int = 1) -> None:
        """Announces members that will come, or will be given up with `forget`."""
        with self._change:
            self._expected += count

    def forget(self, count: int = 1) -> None:
        with self._change:
            self._expected -= count
            if self._expected <= 0 and self._count:
                self._change.notify()

    def put(self, member: M) -> None:
        """Takes one announced member."""
        with self._change:
            self._expected -= 1
            self._count += 1
            group = self._groups.get(member.key)
            if group is None:
                group = self._groups[member.key] = deque()
            group.append(member)
            if len(group) == 1 or len(group) >= self.max_batch or self._expected <= 0:
                self._change.notify()

    def take(self) -> list[M] | None:
        """The next group, oldest first; waits for it. None when the batcher is closed and empty."""
        with self._change:
            while True:
                key, wait = self._next()
                if key is not None:
                    group = self._groups[key]
                    taken = [group.popleft() for _ in range(min(len(group), self.max_batch))]
                    if not group:
                        del self._groups[key]
                    self._count -= len(taken)
                    if self._count:
                        self._change.notify()
                    return taken
                if self._closed and not self._count:
                    self._change.notify_all()
                    return None
                self._change.wait(wait)

    def _next(self) -> tuple[Hashable | None, float | None]:
        """(the group to take now, seconds until one must be)."""
        best: Hashable | None = None
        oldest: int | None = None
        first: int | None = None
        now = time.monotonic_ns()
        idle = self._closed or (self.eager and self._expected <= 0)
        limit = int(self.max_wait * 1e9)
        for key, group in self._groups.items():
            head = group[0].ready
            first = head if first is None or head < first else first
            ready = idle or len(group) >= self.max_batch or now - head >= limit
            if ready and (oldest is None or head < oldest):
                best, oldest = key, head
        return best, None if first is None else max(0.0, (first + limit - now) / 1e9)

    def change(self, max_batch: int, max_wait: float, eager: bool) -> None:
        """New limits, for what waits already too."""
        with self._change:
            self.max_batch, self.max_wait, self.eager = max_batch, max_wait, eager
            self._change.notify_all()

    def close(self) -> None:
        """No more members; what is there still goes out."""
        with self._change:
            self._closed = True
            self._change.notify_all()
