"""A log on disk: a message is published when it was written and fsynced, as a disk-backed broker would.

Per topic a file of messages, a file of events (taken, acknowledged, released), a lock (flock) and a named pipe that
wakes. Every process replays the events that it has not seen yet, so that all know the same. When all messages are
acknowledged and the log is long, it is begun anew.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import select
import struct
import tempfile
import threading
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lynceus.core.errors import AdviceError
from lynceus.serve.brokers import Delivery, DownError, FullError

LONG = 64 << 20  # bytes of log that are begun anew once all is done
_RECORD = struct.Struct("<II")  # bytes, checksum
_EVENT = struct.Struct("<BQI")  # kind, offset of the message, consumer
TAKEN, ACKED, RELEASED = b"TAR"


class _Log:
    def __init__(self, folder: Path, topic: str):
        base = str(folder / topic)
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
        self.log = os.open(base + ".log", flags | os.O_APPEND, 0o600)
        self.events = os.open(base + ".events", flags | os.O_APPEND, 0o600)
        self.lock = os.open(base + ".lock", flags, 0o600)
        with contextlib.suppress(FileExistsError):
            os.mkfifo(base + ".wake", 0o600)
        self.pipe = os.open(base + ".wake", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        self.thread_lock = threading.RLock()
        self._reset(0)

    def _reset(self, generation: int) -> None:
        self.generation = generation
        self.seen = 0  # bytes of events replayed
        self.end = 0  # where the first message stands that nobody took yet
        self.held: dict[int, tuple[int, int]] = {}  # offset -> (consumer, attempt)
        self.back: dict[int, int] = {}  # released: offset -> attempts so far

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        with self.thread_lock:
            fcntl.flock(self.lock, fcntl.LOCK_EX)
            try:
                generation = int.from_bytes(os.pread(self.lock, 8, 0), "little")
                if generation != self.generation:
                    self._reset(generation)
                self._replay()
                yield
            finally:
                fcntl.flock(self.lock, fcntl.LOCK_UN)

    def _replay(self) -> None:
        size = os.fstat(self.events).st_size
        size -= size % _EVENT.size
        if size > self.seen:
            data = os.pread(self.events, size - self.seen, self.seen)
            self.seen = size
            for kind, offset, consumer in _EVENT.iter_unpack(data):
                self._apply(kind, offset, consumer)

    def _apply(self, kind: int, offset: int, consumer: int) -> None:
        if kind == TAKEN:
            attempt = self.back.pop(offset, 0) + 1
            self.held[offset] = (consumer, attempt)
            if offset >= self.end:
                self.end = offset + _RECORD.size + self._length(offset)
        elif kind == ACKED:
            self.held.pop(offset, None)
        elif offset in self.held:
            self.back[offset] = self.held.pop(offset)[1]

    def _length(self, offset: int) -> int:
        return int(_RECORD.unpack(os.pread(self.log, _RECORD.size, offset))[0])

    def write(self, events: list[tuple[int, int, int]]) -> None:
        """Under the lock; applied when it is replayed. Raises DownError when the disk takes no more."""
        size = os.fstat(self.events).st_size
        size -= size % _EVENT.size
        try:
            _append(self.events, size, b"".join(_EVENT.pack(*e) for e in events))
        except OSError as error:
            raise DownError(f"The log cannot be written: {error.strerror}.") from None
        self._replay()

    def append(self, bodies: list[bytes]) -> None:
        """Under the lock; a record cut short by a kill is cut off first. Raises FullError when the disk is full."""
        try:
            data = b"".join(_RECORD.pack(len(b), zlib.crc32(b)) + b for b in bodies)
            _append(self.log, self._whole(), data)
            os.fsync(self.log)
        except OSError as error:
            raise FullError(f"The log cannot be written: {error.strerror}.") from None

    def _whole(self) -> int:
        """Bytes of the log up to the end of its last whole record."""
        size = os.fstat(self.log).st_size
        at = getattr(self, "checked", 0) if getattr(self, "checked", 0) <= size else 0
        if getattr(self, "checked_generation", -1) != self.generation:
            at = 0
        while at + _RECORD.size <= size:
            length = self._length(at)
            if at + _RECORD.size + length > size:
                break
            at += _RECORD.size + length
        self.checked, self.checked_generation = at, self.generation
        return at

    def waiting(self, count: int) -> list[int]:
        """Offsets of the oldest messages that nobody holds, under the lock."""
        out = sorted(self.back)[:count]
        at, size = self.end, self._whole()
        while len(out) < count and at < size:
            out.append(at)
            at += _RECORD.size + self._length(at)
        return out

    def read(self, offset: int) -> bytes | None:
        length, check = _RECORD.unpack(os.pread(self.log, _RECORD.size, offset))
        body = os.pread(self.log, length, offset + _RECORD.size)
        return body if len(body) == length and zlib.crc32(body) == check else None

    def compact(self) -> None:
        """Under the lock."""
        size = os.fstat(self.log).st_size
        if size > LONG and not self.held and not self.back and self.end >= size:
            os.ftruncate(self.log, 0)
            os.ftruncate(self.events, 0)
            os.pwrite(self.lock, (self.generation + 1).to_bytes(8, "little"), 0)
            self._reset(self.generation + 1)

    def wake(self, count: int) -> None:
        with contextlib.suppress(BlockingIOError):
            os.write(self.pipe, b"x" * min(count, 4096))

    def wait(self, seconds: float) -> None:
        if select.select([self.pipe], [], [], seconds)[0]:
            with contextlib.suppress(BlockingIOError):
                os.read(self.pipe, 1)

    def close(self) -> None:
        for fd in (self.log, self.events, self.lock, self.pipe):
            os.close(fd)


def _append(file: int, size: int, data: bytes) -> None:
    """All of it behind the first `size` bytes, or nothing."""
    if os.fstat(file).st_size != size:
        os.ftruncate(file, size)
    view = memoryview(data)
    try:
        while view:
            view = view[os.write(file, view) :]
    except OSError:
        os.ftruncate(file, size)
        raise


class FileBroker:
    """folder: where the logs stand; the same folder is the same broker, in any process and after a restart."""

    def __init__(self, folder: str):
        if not folder:
            raise AdviceError("The log broker needs a folder: file:FOLDER.")
        self.folder = Path(folder).resolve()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.folder):
                pass
        except OSError as error:
            raise AdviceError(
                f"The log broker cannot write into {self.folder} ({error.strerror}); name another: file:FOLDER."
            ) from None
        self.address = f"file:{self.folder}"
        self._logs: dict[str, _Log] = {}
        self._lock = threading.Lock()

    def _log(self, topic: str) -> _Log:
        with self._lock:
            if topic not in self._logs:
                if not re.fullmatch(r"[A-Za-z0-9_\-]{1,64}", topic):
                    raise AdviceError(f"{topic!r} is no name of a topic: letters, digits, _ and - only.")
                self._logs[topic] = _Log(self.folder, topic)
            return self._logs[topic]

    def publish(self, topic: str, bodies: list[bytes]) -> None:
        log = self._log(topic)
        with log.locked():
            log.compact()
            log.append(bodies)
        log.wake(len(bodies))

    def consume(
        self, topic: str, consumer: str, *, count: int = 1, wait_s: float = 0.1, share: int = 1
    ) -> list[Delivery]:
        log = self._log(topic)
        owner = zlib.crc32(consumer.encode())
        limit = time.monotonic() + wait_s
        while True:
            with log.locked():
                offsets = log.waiting(count)
                if offsets:
                    log.write([(TAKEN, offset, owner) for offset in offsets])
                    found = [(offset, log.read(offset), log.held[offset][1]) for offset in offsets]
                    broken = [offset for offset, body, _ in found if body is None]
                    if broken:  # a flipped bit on disk: the message is lost, the log goes on
                        log.write([(ACKED, offset, owner) for offset in broken])
                    generation = log.generation
                    return [Delivery((generation, o), b, n) for o, b, n in found if b is not None]
            left = limit - time.monotonic()
            if left <= 0:
                return []
            log.wait(min(left, 0.25))

    def ack(self, topic: str, keys: list[Any]) -> None:
        log = self._log(topic)
        with log.locked():
            events = [(ACKED, offset, 0) for generation, offset in keys if generation == log.generation]
            if events:
                log.write(events)

    def release(self, topic: str, consumer: str) -> int:
        log = self._log(topic)
        owner = zlib.crc32(consumer.encode())
        with log.locked():
            lost = [offset for offset, (who, _) in log.held.items() if who == owner]
            if lost:
                log.write([(RELEASED, offset, owner) for offset in lost])
        if lost:
            log.wake(len(lost))
        return len(lost)

    def touch(self, topic: str, consumer: str) -> None:
        pass

    def depth(self, topic: str) -> tuple[int, int]:
        log = self._log(topic)
        with log.locked():
            return len(log.waiting(1 << 30)), len(log.held)

    def close(self) -> None:
        with self._lock:
            for log in self._logs.values():
                log.close()
            self._logs.clear()
