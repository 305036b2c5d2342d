"""uvicorn's HTTP/1.1 with the bounds that it lacks: time and size of a request's head, number of connections, and word
to a request when its client has gone."""

from __future__ import annotations

import asyncio
import time
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

CANCEL = "lynceus.cancel"  # in a scope: called when the client goes away before the answer
BEGUN = "lynceus.begun"  # in a scope: monotonic nanoseconds of the first byte
HEAD = 32 * 1024  # bytes of a request's head


class BoundedProtocol(HttpToolsProtocol):
    """Limits are class attributes, set on a subclass per server by `bounded`."""

    header_timeout = 10.0
    most = 1024

    _timer: asyncio.TimerHandle | None = None
    _head = 0  # bytes of the head that is coming
    _in_head = True

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        if len(self.connections) > self.most:
            self._refuse(b"503 Service Unavailable", b"Too many connections.", b"retry-after: 1\r\n")
            return
        self._await_head()

    def _await_head(self) -> None:
        self._in_head, self._head = True, 0
        self._timer = self.loop.call_later(self.header_timeout, self._too_slow)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _too_slow(self) -> None:
        self._timer = None
        if not self.transport.is_closing():
            self._refuse(b"408 Request Timeout", b"The head of the request did not come in time.", b"")

    def _refuse(self, status: bytes, text: bytes, more: bytes) -> None:
        self.transport.write(
            b"HTTP/1.1 " + status + b"\r\ncontent-type: text/plain; charset=utf-8\r\n" + more
            + b"content-length: %d\r\nconnection: close\r\n\r\n" % len(text) + text
        )  # fmt: skip
        self.transport.close()

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        if self._in_head:
            self._head += len(data)
            if self._head > HEAD and b"\r\n\r\n" not in data[: HEAD + 4]:
                self._stop_timer()
                self._refuse(b"431 Request Header Fields Too Large", b"The head of the request is too long.", b"")
                return
        try:
            super().data_received(data)
        except Exception:  # a head that the parser takes and uvicorn does not, such as a path that is not ASCII
            if not self.transport.is_closing():
                self._refuse(b"400 Bad Request", b"Invalid HTTP request received.", b"")

    def on_message_begin(self) -> None:
        super().on_message_begin()
        if self._timer is None:  # a further request on a kept connection
            self._await_head()
        self.scope[BEGUN] = time.monotonic_ns()  # type: ignore[literal-required]

    def on_headers_complete(self) -> None:
        self._stop_timer()
        self._in_head = False
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        super().on_message_complete()
        self._in_head, self._head = True, 0

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        for cycle in (self.cycle, *(c for c, _ in self.pipeline)):
            if cycle is not None and not cycle.response_complete:
                cancel: Any = cycle.scope.get(CANCEL)
                if cancel is not None:
                    cancel()
        self.pipeline.clear()
        super().connection_lost(exc)


def bounded(*, header_timeout: float, most: int) -> type[BoundedProtocol]:
    """The protocol with a server's own limits."""
    return type("Bounded", (BoundedProtocol,), {"header_timeout": header_timeout, "most": most})
