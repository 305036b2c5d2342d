"""Line: the cluster's end of a connection to a device. Whoever asks also sends: a thread more would have to wake."""

from __future__ import annotations

import queue
import socket
import threading
from collections.abc import Callable

from lynceus.serve.edge.wire import Frame, Link, begun, send


class Line:
    """A connection that many threads say something on.

    A frame leaves in the thread that says it when nothing waits, the link is not shaped and the system's buffer takes
    it; what is left goes through a thread, so that a slow or silent device holds nobody up."""

    def __init__(self, sock: socket.socket, link: Link | None, lost: Callable[[socket.socket, str], None]):
        """link: None for one that is not shaped. lost: called with the socket and the reason when it breaks."""
        self.sock, self.link, self._lost = sock, link, lost
        self._outbox: queue.Queue[Frame | bytes | None] = queue.Queue()
        self._turn = threading.Lock()
        self._waiting = 0
        threading.Thread(target=self._write, daemon=True).start()

    def say(self, frame: Frame, *, shaped: bool = True) -> None:
        """shaped: False lets it leave at once on a shaped link too, unless others wait."""
        left: Frame | bytes = frame
        with self._turn:
            if not self._waiting and (self.link is None or not shaped):
                try:
                    left = begun(self.sock, frame)
                except OSError as error:
                    reason = str(error)
                else:
                    reason = ""
                    if not left:
                        return
            else:
                reason = ""
            if not reason:
                self._waiting += 1
                self._outbox.put(left)  # under the lock: the rest of a frame comes before any other
        if reason:
            self._lost(self.sock, reason)

    def close(self) -> None:
        self._outbox.put(None)

    def _write(self) -> None:
        try:
            while (left := self._outbox.get()) is not None:
                if isinstance(left, Frame):
                    send(self.sock, left, self.link)
                else:
                    self.sock.sendall(left)
                with self._turn:
                    self._waiting -= 1
        except OSError as error:
            self._lost(self.sock, str(error))
