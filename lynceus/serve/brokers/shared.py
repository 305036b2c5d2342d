"""Between processes of one machine: messages in blocks of shared memory, a table of slots, a pipe that wakes.

Nothing is named in a file system: the memory is a memfd of the process that made the broker, and others open it through
/proc. The lock is the kernel's (flock), so that a process killed while it holds it locks nobody out; a message is
copied outside the lock. Linux only.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import select
import struct
import threading
import time
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from lynceus.core.errors import AdviceError
from lynceus.serve.brokers import Delivery, FullError

BLOCK = 1 << 16
FREE, WRITING, READY, TAKEN = range(4)
TOPICS = ("jobs", "replies", "suspects")
_SLOT = np.dtype(
    [
        ("seq", "u8"),
        ("state", "u4"),
        ("owner", "u4"),
        ("attempt", "u4"),
        ("length", "u4"),
        ("first", "i4"),
        ("pad", "u4"),
    ]
)
_HEAD = struct.Struct("QQ")  # next sequence number, next free block + 1 (0: none)


def _number(consumer: str) -> int:
    """The name of a consumer as it stands in the table."""
    return zlib.crc32(consumer.encode()) or 1


class _Ring:
    """One topic: its memory, table, lock and pipe. Opened from `place` (pid, memory fd, pipe's fds), or made."""

    def __init__(self, place: tuple[int, int, int, int] | None, blocks: int, slots: int):
        size = mmap.PAGESIZE + slots * _SLOT.itemsize + blocks * 4
        start = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
        if place is None:
            self.fd = os.memfd_create("lynceus", os.MFD_CLOEXEC)
            os.ftruncate(self.fd, start + blocks * BLOCK)
            self.read_end, self.write_end = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
            self.place = (os.getpid(), self.fd, self.read_end, self.write_end)
        else:
            pid, fd, read_end, write_end = place
            self.place = place
            self.fd = os.open(f"/proc/{pid}/fd/{fd}", os.O_RDWR | os.O_CLOEXEC)
            self.read_end = os.open(f"/proc/{pid}/fd/{read_end}", os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
            self.write_end = os.open(f"/proc/{pid}/fd/{write_end}", os.O_WRONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        self.memory = mmap.mmap(self.fd, start + blocks * BLOCK)
        self.table = np.frombuffer(self.memory, _SLOT, slots, mmap.PAGESIZE)
        self.state, self.seq, self.owner = self.table["state"], self.table["seq"], self.table["owner"]
        self.links = np.frombuffer(self.memory, "i4", blocks, mmap.PAGESIZE + slots * _SLOT.itemsize)
        self.start, self.blocks = start, blocks
        self.thread_lock = threading.Lock()
        if place is None:
            self.links[:] = np.arange(1, blocks + 1)  # each free block names the next
            self.links[-1] = -1
            _HEAD.pack_into(self.memory, 0, 1, 1)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        with self.thread_lock:
            fcntl.flock(self.fd, fcntl.LOCK_EX)
            try:
                yield
            finally:
                fcntl.flock(self.fd, fcntl.LOCK_UN)

    def wake(self, count: int = 1) -> None:
        with contextlib.suppress(BlockingIOError):  # full of wakes already
            os.write(self.write_end, b"x" * min(count, 4096))

    def wait(self, seconds: float) -> None:
        if select.select([self.read_end], [], [], seconds)[0]:
            with contextlib.suppress(BlockingIOError):  # another was quicker
                os.read(self.read_end, 1)

    def reserve(self, length: int, owner: int) -> int:
        """A slot with room for that many bytes; under the lock."""
        need = max(1, -(-length // BLOCK))
        free = np.flatnonzero(self.state == FREE)
        number, head = _HEAD.unpack_from(self.memory, 0)
        if not len(free):
            raise FullError("Every slot is taken.")
        first = at = int(head) - 1
        last = -1
        for _ in range(need):
            if at < 0:
                raise FullError("The shared memory is full.")
            last, at = at, int(self.links[at])
        # in this order, so that a kill between two lines loses these blocks at worst
        _HEAD.pack_into(self.memory, 0, number + 1, at + 1)
        self.links[last] = -1
        slot = int(free[0])
        self.table[slot] = (number, WRITING, owner, 1, length, first, 0)
        return slot

    def free(self, slot: int) -> None:
        """Under the lock; in the order that a kill between two lines loses blocks at worst."""
        first = last = int(self.table["first"][slot])
        for _ in range(-(-int(self.table["length"][slot]) // BLOCK) - 1):
            last = int(self.links[last])
        self.state[slot] = FREE
        number, head = _HEAD.unpack_from(self.memory, 0)
        self.links[last] = int(head) - 1
        _HEAD.pack_into(self.memory, 0, number, first + 1)

    def places(self, slot: int) -> Iterator[tuple[int, int, int]]:
        """(offset in the message, address, bytes) of its pieces."""
        left, done = int(self.table["length"][slot]), 0
        block = int(self.table["first"][slot])
        while left > 0:
            size = min(left, BLOCK)
            yield done, self.start + block * BLOCK, size
            done, left, block = done + size, left - size, int(self.links[block])

    def close(self) -> None:
        del self.table, self.state, self.seq, self.owner, self.links
        with contextlib.suppress(BufferError):
            self.memory.close()
        for fd in (self.fd, self.read_end, self.write_end):
            os.close(fd)


class SharedBroker:
    """place: what `address` of the maker says behind "shared:"; "" makes one, with its topics at once.

    Messages of a publisher that died while writing are given up by `release` of its name."""

    def __init__(self, place: str = "", *, capacity_mb: float = 256.0, slots: int = 1024, name: str = ""):
        if not hasattr(os, "memfd_create"):
            raise AdviceError("Shared memory between workers needs Linux; take broker=redis://... or file:FOLDER.")
        self._closed = False
        self._own = _number(name or f"publisher-{os.getpid()}")
        self._rings: dict[str, _Ring] = {}
        if place:
            counts, *rest = place.split(";")
            blocks, slots = map(int, counts.split(","))
            for text in rest:
                topic, _, numbers = text.partition("=")
                pid, fd, read_end, write_end = map(int, numbers.split(","))
                self._rings[topic] = _Ring((pid, fd, read_end, write_end), blocks, slots)
        else:
            blocks = max(64, int(capacity_mb * 1e6 / BLOCK))
            self._rings = {topic: _Ring(None, blocks, slots) for topic in TOPICS}
        self._counts = (blocks, slots)

    @property
    def address(self) -> str:
        rings = ";".join(f"{t}={','.join(map(str, r.place))}" for t, r in self._rings.items())
        return f"shared:{self._counts[0]},{self._counts[1]};{rings}"

    def _ring(self, topic: str) -> _Ring:
        if topic not in self._rings:
            raise AdviceError(f"Shared memory has the topics {', '.join(self._rings)}, not {topic!r}.")
        return self._rings[topic]

    def publish(self, topic: str, bodies: list[bytes]) -> None:
        ring = self._ring(topic)
        for body in bodies:
            with ring.locked():
                slot = ring.reserve(len(body), self._own)
            view = memoryview(body)
            for done, address, size in ring.places(slot):
                ring.memory[address : address + size] = view[done : done + size]
            with ring.locked():
                ring.state[slot] = READY
        ring.wake(len(bodies))

    def consume(
        self, topic: str, consumer: str, *, count: int = 1, wait_s: float = 0.1, share: int = 1
    ) -> list[Delivery]:
        ring = self._ring(topic)
        limit = time.monotonic() + wait_s
        owner = _number(consumer)
        while True:
            slots: list[int] = []
            if (ring.state == READY).any():
                with ring.locked():
                    ready = np.flatnonzero(ring.state == READY)
                    take = min(count, -(-len(ready) // share))
                    if take:
                        slots = ready[np.argsort(ring.seq[ready], kind="stable")[:take]].tolist()
                        ring.state[slots] = TAKEN
                        ring.owner[slots] = owner
            if slots:
                return [self._delivery(ring, slot) for slot in slots]
            left = limit - time.monotonic()
            if left <= 0 or self._closed:
                return []
            ring.wait(min(left, 0.25))

    def _delivery(self, ring: _Ring, slot: int) -> Delivery:
        body = b"".join(ring.memory[address : address + size] for _, address, size in ring.places(slot))
        return Delivery((slot, int(ring.seq[slot])), body, int(ring.table["attempt"][slot]))

    def ack(self, topic: str, keys: list[Any]) -> None:
        ring = self._ring(topic)
        with ring.locked():
            for slot, seq in keys:
                if int(ring.seq[slot]) == seq and int(ring.state[slot]) == TAKEN:
                    ring.free(slot)

    def release(self, topic: str, consumer: str) -> int:
        ring = self._ring(topic)
        owner = _number(consumer)
        with ring.locked():
            for slot in np.flatnonzero((ring.state == WRITING) & (ring.owner == owner)).tolist():
                ring.free(slot)
            lost = np.flatnonzero((ring.state == TAKEN) & (ring.owner == owner))
            ring.table["attempt"][lost] += 1
            ring.state[lost] = READY
        if len(lost):
            ring.wake(len(lost))
        return len(lost)

    def touch(self, topic: str, consumer: str) -> None:
        pass

    def depth(self, topic: str) -> tuple[int, int]:
        ring = self._ring(topic)
        return int((ring.state == READY).sum()), int((ring.state == TAKEN).sum())

    def close(self) -> None:
        """Only when no thread uses it any more."""
        if not self._closed:
            self._closed = True
            for ring in self._rings.values():
                with contextlib.suppress(OSError):
                    ring.close()


__all__ = ["SharedBroker"]
