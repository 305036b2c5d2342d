"""Frames between a cluster and its devices: a fixed header, then safetensors or JSON; never anything that runs code.

Header, big-endian, 17 bytes: b"LYN1", kind (1 byte), number of the request (8), length of the payload (4). A frame is
refused before its payload is read when it is longer than `most`, and a frame that has begun must arrive whole within
`stall` seconds.
"""

from __future__ import annotations

import json
import math
import select
import socket
import struct
import time
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lynceus.core.errors import AdviceError

MAGIC = b"LYN1"
HEADER = struct.Struct("!4sBQI")
MOST = 64 * 2**20  # bytes of a payload
STALL = 10.0  # seconds
DONTWAIT = getattr(socket, "MSG_DONTWAIT", 0) if hasattr(socket.socket, "sendmsg") else 0
HELLO, ASK, ANSWER, TRY, BEAT, ERROR = range(1, 7)  # TRY: an ASK whose answer leaves at once on a shaped link too


class WireError(ConnectionError):
    """What came is no frame, too long, or did not come whole."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Frame:
    kind: int
    number: int = 0
    payload: bytes = b""

    def __len__(self) -> int:
        return HEADER.size + len(self.payload)


@dataclass(frozen=True, kw_only=True, slots=True)
class Link:
    """A shaped link: each message takes delay + bytes / rate seconds before it leaves."""

    rate: float = math.inf  # bytes per second
    delay: float = 0.0

    @property
    def shaped(self) -> bool:
        return self.delay > 0 or self.rate < math.inf

    def wait(self, count: int) -> None:
        seconds = self.delay + count / self.rate
        if seconds > 0:
            time.sleep(seconds)


def send(sock: socket.socket, frame: Frame, link: Link | None = None, *, most: int = MOST) -> None:
    """Writes a frame; over a shaped link after the time that it takes there."""
    if link is not None:
        link.wait(len(frame))
    left = begun(sock, frame, most=most)
    if left:
        sock.sendall(left)


def begun(sock: socket.socket, frame: Frame, *, most: int = MOST) -> bytes:
    """Writes as much of a frame as leaves without waiting, and returns the rest."""
    if len(frame.payload) > most:
        raise WireError(f"a message of {len(frame.payload):,} bytes is above the limit of {most:,}")
    head = HEADER.pack(MAGIC, frame.kind, frame.number, len(frame.payload))
    if not DONTWAIT:
        return head + frame.payload
    try:
        sent = sock.sendmsg([head, frame.payload], [], DONTWAIT)
    except BlockingIOError:
        sent = 0
    return head[sent:] + frame.payload if sent < len(head) else frame.payload[sent - len(head) :]


def receive(sock: socket.socket, *, wait: float | None = None, most: int = MOST, stall: float = STALL) -> Frame:
    """The next frame. wait: seconds until it begins, None for ever. WireError when it does not come, is no frame, too
    long or broken off. The socket must be a blocking one; it stays so, since others write to it meanwhile."""
    if wait is not None and not _ready(sock, wait):
        raise WireError(f"nothing came within {wait:g} s")
    head = sock.recv(HEADER.size)  # mostly all of it; waits for the first byte only
    if not head:
        raise WireError("the other side closed the connection")
    until = time.monotonic() + stall
    magic, kind, number, length = HEADER.unpack(head + _exactly(sock, HEADER.size - len(head), until))
    if magic != MAGIC or not HELLO <= kind <= ERROR:
        raise WireError("what came is no frame of lynceus")
    if length > most:
        raise WireError(f"a message of {length:,} bytes is above the limit of {most:,}")
    return Frame(kind=kind, number=number, payload=_exactly(sock, length, until))


def _exactly(sock: socket.socket, count: int, until: float) -> bytes:
    out = bytearray(count)
    view, got = memoryview(out), 0
    while got < count:
        try:
            if not DONTWAIT and not _ready(sock, until - time.monotonic()):
                raise BlockingIOError
            n = sock.recv_into(view[got:], 0, DONTWAIT)
        except BlockingIOError:
            if not _ready(sock, until - time.monotonic()):
                raise WireError(f"a message broke off after {got} of {count} bytes") from None
            continue
        if not n:
            raise WireError(f"the connection was closed after {got} of {count} bytes")
        got += n
    return bytes(out)


def _ready(sock: socket.socket, seconds: float) -> bool:
    """Whether there is something to read within that time."""
    if seconds <= 0:
        return False
    if not hasattr(select, "poll"):
        return bool(select.select([sock], [], [], seconds)[0])
    poll = select.poll()
    poll.register(sock, select.POLLIN)
    return bool(poll.poll(seconds * 1e3))


def pack(tensors: dict[str, Tensor]) -> bytes:
    """Tensors as safetensors."""
    from safetensors.torch import save

    made: bytes = save({k: v.detach().cpu().contiguous() for k, v in tensors.items()})
    return made


def unpack(payload: bytes) -> dict[str, Tensor]:
    """The tensors of a payload; WireError when it is not safetensors."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        return load(payload)
    except (SafetensorError, ValueError, KeyError, RuntimeError) as error:
        raise WireError(f"the payload is no safetensors: {error}") from None


def said(payload: bytes) -> dict[str, Any]:
    """The JSON object of a payload; WireError when it is none."""
    try:
        value = json.loads(payload)
    except ValueError as error:
        raise WireError(f"the payload is no JSON: {error}") from None
    if not isinstance(value, dict):
        raise WireError("the payload is no JSON object")
    return value


def quiet(sock: socket.socket) -> socket.socket:
    """Small messages leave at once."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock


def checked_image(tensors: dict[str, Tensor], shape: tuple[int, ...], most: int) -> Tensor:
    """The images of a request; AdviceError when they are not what the plan was made for."""
    import torch

    image = tensors.get("image")
    if image is None or len(tensors) != 1:
        raise AdviceError(f"a request holds one tensor, image; this one holds {sorted(tensors) or 'none'}.")
    if image.ndim != 4 or tuple(image.shape[1:]) != shape or not 1 <= len(image) <= most:
        raise AdviceError(
            f"images are (1 to {most}, {', '.join(map(str, shape))}) for this plan, not {tuple(image.shape)}."
        )
    if image.dtype not in (torch.uint8, torch.float32, torch.float64, torch.float16, torch.bfloat16):
        raise AdviceError(f"images are uint8 or floats, not {image.dtype}.")
    return image
