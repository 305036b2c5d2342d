"""One kept HTTP/1.1 connection on an event loop, one request at a time: what a load generator needs and no more."""

from __future__ import annotations

import asyncio
import re
import time
from typing import Any

LOST = 0  # status of a request whose connection broke or could not be made
TIMED_OUT = -1  # status of a request that got no answer in time
_LENGTH = re.compile(rb"\r\ncontent-length:\s*(\d+)", re.IGNORECASE)
_CHUNKED = re.compile(rb"\r\ntransfer-encoding:\s*chunked", re.IGNORECASE)
_CLOSE = re.compile(rb"\r\nconnection:\s*close", re.IGNORECASE)


class WireError(ConnectionError):
    """The connection ended before the whole answer was there."""


class Wire(asyncio.Protocol):
    """`ask` sends a whole request and gives (status, body). `answered`: monotonic seconds of the last answer's end."""

    transport: asyncio.Transport

    def __init__(self) -> None:
        self.buffer = bytearray()
        self.waiter: asyncio.Future[tuple[int, bytes]] | None = None
        self.closing = False
        self.answered = 0.0
        self._head = -1  # bytes of the head of the answer that is coming, -1 before it is there
        self._length = 0  # of its body; -1: chunked; -2: until the connection ends

    @classmethod
    async def open(cls, host: str, port: int) -> Wire:
        _, wire = await asyncio.get_running_loop().create_connection(cls, host, port)
        return wire

    async def ask(self, request: bytes) -> tuple[int, bytes]:
        if self.closing or self.transport.is_closing():
            raise WireError("closed by the server")
        self.waiter = asyncio.get_running_loop().create_future()
        self.transport.write(request)
        return await self.waiter

    def close(self) -> None:
        self.closing = True
        self.transport.abort()

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def connection_lost(self, error: Exception | None) -> None:
        self.closing = True
        if self._head >= 0 and self._length == -2:
            self._finish(bytes(self.buffer[self._head :]))
        elif self.waiter is not None and not self.waiter.done():
            self.waiter.set_exception(WireError(str(error or "closed by the server")))

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        if self._head < 0:
            end = self.buffer.find(b"\r\n\r\n")
            if end < 0:
                return
            head = bytes(self.buffer[: end + 2])
            if head[9:10] == b"1" and head[9:12] != b"101":  # 100 Continue and its kin: the answer comes after it
                del self.buffer[: end + 4]
                return self.data_received(b"")
            self._head = end + 4
            length = _LENGTH.search(head)
            self._length = int(length[1]) if length else -1 if _CHUNKED.search(head) else -2
            self.closing = bool(_CLOSE.search(head))
        if self._length >= 0:
            if len(self.buffer) >= self._head + self._length:
                self._finish(bytes(self.buffer[self._head : self._head + self._length]))
        elif self._length == -1 and (body := _dechunked(self.buffer, self._head)) is not None:
            self._finish(body)

    def _finish(self, body: bytes) -> None:
        self.answered = time.monotonic()
        status = int(self.buffer[9:12])
        self.buffer.clear()
        self._head = -1
        if self.waiter is not None and not self.waiter.done():
            self.waiter.set_result((status, body))


def _dechunked(buffer: bytearray, at: int) -> bytes | None:
    """The body of a chunked answer that begins at `at`; None when its end is not there yet."""
    out = bytearray()
    while True:
        line = buffer.find(b"\r\n", at)
        if line < 0:
            return None
        size = int(bytes(buffer[at:line]).split(b";")[0], 16)
        if len(buffer) < line + 4 + size:
            return None
        if size == 0:
            return bytes(out)
        out += buffer[line + 2 : line + 2 + size]
        at = line + 4 + size
