"""One protocol for what carries messages between stages: in memory, shared memory, Redis streams, a log on disk.

A message is delivered to one consumer, and stays its own until it is acknowledged. `release` gives back what a consumer
that is known to be dead still holds; a message is therefore delivered at least once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from lynceus.core.errors import unknown

KINDS = ("memory", "shared", "redis", "file")


class FullError(Exception):
    """There is no room for another message."""


class DownError(Exception):
    """The broker cannot be reached now; what it acknowledged is kept, and a later try may succeed."""


@dataclass(slots=True)
class Delivery:
    """One message as it is handed out. attempt: 1 the first time, more after a consumer was lost."""

    key: Any
    body: bytes
    attempt: int


@runtime_checkable
class Broker(Protocol):
    """Safe from any thread. Topics come into being when they are first used."""

    def publish(self, topic: str, bodies: list[bytes]) -> None:
        """All of them, in order; when it returns, they are as safe as this broker keeps anything. Raises FullError or
        DownError, and then some may have been taken: who publishes again must expect them twice."""
        ...

    def consume(
        self, topic: str, consumer: str, *, count: int = 1, wait_s: float = 0.1, share: int = 1
    ) -> list[Delivery]:
        """Up to `count` messages, oldest first; [] when none came within wait_s seconds. share: the number of consumers
        that a backlog is to be divided among. Raises DownError."""
        ...

    def ack(self, topic: str, keys: list[Any]) -> None:
        """The messages are done, and forgotten. Unknown keys are passed over. Raises DownError."""
        ...

    def release(self, topic: str, consumer: str) -> int:
        """Gives back what a dead consumer holds, to be delivered again first; how many these were."""
        ...

    def touch(self, topic: str, consumer: str) -> None:
        """The consumer lives: what it holds stays its own."""
        ...

    def depth(self, topic: str) -> tuple[int, int]:
        """(messages waiting, messages held)."""
        ...

    @property
    def address(self) -> str:
        """What `open_broker` takes in another process; "" where it cannot be reached from one."""
        ...

    def close(self) -> None: ...


def open_broker(address: str, *, capacity_mb: float = 256.0, slots: int = 1024) -> Broker:
    """memory, shared, shared:..., redis://HOST:PORT/DB (also rediss:, unix:), file:FOLDER.

    capacity_mb, slots: bytes and messages that a topic in memory or shared memory holds at most."""
    kind, _, rest = address.partition(":")
    if kind == "memory":
        from lynceus.serve.brokers.memory import MemoryBroker

        return MemoryBroker(slots=slots)
    if kind == "shared":
        from lynceus.serve.brokers.shared import SharedBroker

        return SharedBroker(rest, capacity_mb=capacity_mb, slots=slots)
    if kind in ("redis", "rediss", "unix"):
        from lynceus.serve.brokers.redis_streams import RedisBroker

        return RedisBroker(address)
    if kind == "file":
        from lynceus.serve.brokers.file_log import FileBroker

        return FileBroker(rest)
    raise unknown("broker", address, ("memory", "shared", "redis://HOST:PORT/DB", "file:FOLDER"))
