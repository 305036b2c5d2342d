"""Within one process: a queue per topic, and what each consumer holds."""

from __future__ import annotations

import itertools
import threading
from collections import deque
from typing import Any

from lynceus.serve.brokers import Delivery, FullError


class _Topic:
    def __init__(self) -> None:
        self.waiting: deque[Delivery] = deque()
        self.held: dict[int, tuple[str, Delivery]] = {}
        self.change = threading.Condition()


class MemoryBroker:
    """slots: messages that a topic holds at most, waiting and held."""

    def __init__(self, *, slots: int = 1024):
        self.slots = slots
        self.address = ""
        self._topics: dict[str, _Topic] = {}
        self._lock = threading.Lock()
        self._numbers = itertools.count()

    def _topic(self, name: str) -> _Topic:
        topic = self._topics.get(name)
        if topic is None:
            with self._lock:
                topic = self._topics.setdefault(name, _Topic())
        return topic

    def publish(self, topic: str, bodies: list[bytes]) -> None:
        t = self._topic(topic)
        with t.change:
            if len(t.waiting) + len(t.held) + len(bodies) > self.slots:
                raise FullError(f"{topic} holds {self.slots} messages.")
            t.waiting.extend(Delivery(next(self._numbers), body, 1) for body in bodies)
            t.change.notify(len(bodies))

    def consume(
        self, topic: str, consumer: str, *, count: int = 1, wait_s: float = 0.1, share: int = 1
    ) -> list[Delivery]:
        t = self._topic(topic)
        with t.change:
            if not t.waiting:
                t.change.wait(wait_s)
            taken = [t.waiting.popleft() for _ in range(min(count, -(-len(t.waiting) // share)))]
            for d in taken:
                t.held[d.key] = (consumer, d)
            return taken

    def ack(self, topic: str, keys: list[Any]) -> None:
        t = self._topic(topic)
        with t.change:
            for key in keys:
                t.held.pop(key, None)

    def release(self, topic: str, consumer: str) -> int:
        t = self._topic(topic)
        with t.change:
            lost = [d for who, d in t.held.values() if who == consumer]
            for d in lost:
                del t.held[d.key]
            t.waiting.extendleft(Delivery(d.key, d.body, d.attempt + 1) for d in reversed(lost))
            t.change.notify(len(lost))
        return len(lost)

    def touch(self, topic: str, consumer: str) -> None:
        pass

    def depth(self, topic: str) -> tuple[int, int]:
        t = self._topic(topic)
        return len(t.waiting), len(t.held)

    def close(self) -> None:
        self._topics.clear()
