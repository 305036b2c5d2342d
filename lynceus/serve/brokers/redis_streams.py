"""Redis streams with a consumer group: acknowledged messages are deleted, those of a lost consumer delivered again.

A message that was published is as safe as the server keeps it: with `appendonly yes` and `appendfsync always` it
survives a kill of the server. While Redis is away every call raises DownError; who called tries again.
"""

from __future__ import annotations

import math
import secrets
import threading
import time
from typing import Any
from urllib.parse import parse_qs, urlsplit, urlunsplit

from lynceus.core.errors import AdviceError, missing_extra
from lynceus.serve.brokers import Delivery, DownError

GROUP = "lynceus"
LEASE_MS = 30_000  # a message whose consumer gave no sign for so long goes to another
EXPIRE_S = 3600  # streams of a server that was killed go away by themselves
_BODY, _ATTEMPT = b"b", b"n"


class RedisBroker:
    """address: redis://HOST:PORT/DB?namespace=...&lease_ms=...; the namespace is made up where there is none, so that
    servers do not mix."""

    def __init__(self, address: str):
        try:
            import redis
        except ImportError:
            raise missing_extra("redis", "serve", use="The Redis broker") from None
        parts = urlsplit(address)
        query = parse_qs(parts.query)
        self.namespace = query.get("namespace", [secrets.token_hex(4)])[0]
        self.lease_ms = int(query.get("lease_ms", [str(LEASE_MS)])[0])
        plain = urlunsplit(parts._replace(query=""))
        self.address = f"{plain}?namespace={self.namespace}&lease_ms={self.lease_ms}"
        self._redis = redis
        self._down = (
            redis.exceptions.ConnectionError,
            redis.exceptions.TimeoutError,
            redis.exceptions.BusyLoadingError,
        )
        self._client = redis.Redis.from_url(plain, socket_timeout=10, socket_connect_timeout=2)
        self._known: set[str] = set()
        self._swept: dict[str, float] = {}  # when each topic was last looked through for silent consumers
        self._lock = threading.Lock()
        self._held: dict[tuple[str, str], set[Any]] = {}  # by topic and consumer: handed out here, not acknowledged
        self._unsure: set[tuple[str, str]] = set()  # whose last reading broke off: the server may have given it more
        try:
            self._client.ping()
        except self._down as error:
            raise AdviceError(
                f"There is no Redis at {plain} ({error}). Start one: redis-server --appendonly yes"
            ) from None

    def _key(self, topic: str) -> str:
        key = f"lynceus:{self.namespace}:{topic}"
        if key not in self._known:
            try:
                self._client.xgroup_create(key, GROUP, id="0", mkstream=True)
            except self._redis.exceptions.ResponseError as error:
                if "BUSYGROUP" not in str(error):
                    raise
            self._client.expire(key, EXPIRE_S)
            self._known.add(key)
        return key

    def _call(self, work: Any) -> Any:
        try:
            return work()
        except self._down as error:
            raise DownError(str(error)) from None
        except self._redis.exceptions.ResponseError as error:
            if "NOGROUP" in str(error):  # the server came back without its data
                self._known.clear()
            raise DownError(str(error)) from None

    def publish(self, topic: str, bodies: list[bytes]) -> None:
        def work() -> None:
            key = self._key(topic)
            with self._client.pipeline(transaction=False) as pipe:
                for body in bodies:
                    pipe.xadd(key, {_BODY: body, _ATTEMPT: b"1"})
                pipe.execute()

        self._call(work)

    def consume(
        self, topic: str, consumer: str, *, count: int = 1, wait_s: float = 0.1, share: int = 1
    ) -> list[Delivery]:
        own = (topic, consumer)
        try:
            found: list[Delivery] = self._call(lambda: self._consume(topic, consumer, count, wait_s))
        except DownError:
            with self._lock:
                self._unsure.add(own)
            raise
        if found:
            with self._lock:
                self._held.setdefault(own, set()).update(d.key for d in found)
        return found

    def _missed(self, key: str, own: tuple[str, str], count: int) -> list[Delivery]:
        """What the server counts as this consumer's, but never reached it: the connection broke in between."""
        rows: Any = self._client.xpending_range(key, GROUP, "-", "+", 1000, consumername=own[1])
        with self._lock:
            held = self._held.get(own, set())
            missed = [r["message_id"] for r in rows if r["message_id"] not in held]
            if len(missed) <= count:
                self._unsure.discard(own)
        found: list[Delivery] = []
        for i in missed[:count]:
            entries: Any = self._client.xrange(key, i, i)
            found += [_delivery(i, fields) for i, fields in entries]
        return found

    def _consume(self, topic: str, consumer: str, count: int, wait_s: float) -> list[Delivery]:
        key = self._key(topic)
        if (topic, consumer) in self._unsure:
            missed = self._missed(key, (topic, consumer), count)
            if missed:
                return missed
        now = time.monotonic()
        if now - self._swept.get(topic, -math.inf) > self.lease_ms / 4e3:
            self._swept[topic] = now
            late = self._late(key, consumer, count)
            if late:
                return late
        found: Any = self._client.xreadgroup(GROUP, consumer, {key: ">"}, count=count, block=max(1, int(wait_s * 1e3)))
        return [_delivery(i, fields) for _, rows in _pairs(found) for i, fields in rows]

    def _late(self, key: str, consumer: str, count: int) -> list[Delivery]:
        """Messages whose consumer has been silent for longer than the lease."""
        claimed: Any = self._client.xautoclaim(key, GROUP, consumer, self.lease_ms, count=count)
        out = []
        for i, fields in claimed[1]:
            if fields:
                waiting: Any = self._client.xpending_range(key, GROUP, i, i, 1)
                times = int(waiting[0]["times_delivered"]) if waiting else 2
                made = _delivery(i, fields)
                out.append(Delivery(made.key, made.body, made.attempt + times - 1))
        return out

    def ack(self, topic: str, keys: list[Any]) -> None:
        if not keys:
            return

        def work() -> None:
            key = self._key(topic)
            with self._client.pipeline(transaction=True) as pipe:
                pipe.xack(key, GROUP, *keys)
                pipe.xdel(key, *keys)
                pipe.execute()

        self._call(work)
        with self._lock:
            for (name, _), held in self._held.items():
                if name == topic:
                    held.difference_update(keys)

    def release(self, topic: str, consumer: str) -> int:
        return self._call(lambda: self._release(topic, consumer))

    def _release(self, topic: str, consumer: str) -> int:
        key = self._key(topic)
        count = 0
        while True:
            held: Any = self._client.xpending_range(key, GROUP, "-", "+", 100, consumername=consumer)
            if not held:
                break
            for row in held:
                i = row["message_id"]
                rows: Any = self._client.xrange(key, i, i)
                with self._client.pipeline(transaction=True) as pipe:
                    if rows:
                        fields = dict(rows[0][1])
                        fields[_ATTEMPT] = b"%d" % (int(fields[_ATTEMPT]) + int(row["times_delivered"]))
                        pipe.xadd(key, fields)
                        count += 1
                    pipe.xack(key, GROUP, i)
                    pipe.xdel(key, i)
                    pipe.execute()
        self._client.xgroup_delconsumer(key, GROUP, consumer)
        return count

    def touch(self, topic: str, consumer: str) -> None:
        with self._lock:
            held = list(self._held.get((topic, consumer), ()))

        def work() -> None:
            key = self._key(topic)
            if held:
                self._client.xclaim(key, GROUP, consumer, 0, held, justid=True)
            self._client.expire(key, EXPIRE_S)

        self._call(work)

    def depth(self, topic: str) -> tuple[int, int]:
        def work() -> tuple[int, int]:
            key = self._key(topic)
            held: Any = self._client.xpending(key, GROUP)
            return max(0, int(self._client.xlen(key)) - int(held["pending"])), int(held["pending"])

        return self._call(work)

    def close(self) -> None:
        self._client.close()

    def forget(self) -> None:
        """Deletes the streams of this namespace."""
        self._call(lambda: [self._client.delete(k) for k in self._client.scan_iter(f"lynceus:{self.namespace}:*")])


def _delivery(identity: Any, fields: Any) -> Delivery:
    return Delivery(identity, bytes(fields[_BODY]), int(fields[_ATTEMPT]))


def _pairs(found: Any) -> Any:
    """Streams of an answer: a list of pairs, or in newer protocols a mapping."""
    if not found:
        return []
    if isinstance(found, dict):
        return [(k, v[0] if v and isinstance(v[0], list) and v and _nested(v) else v) for k, v in found.items()]
    return found


def _nested(rows: Any) -> bool:
    """Whether entries stand one level deeper (RESP3)."""
    return bool(rows) and bool(rows[0]) and isinstance(rows[0][0], list | tuple)
