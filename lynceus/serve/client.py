"""A client of the server in plain Python: pictures, tensors, lists; waits and asks again when the server is full.

with Client("http://127.0.0.1:8000") as client:
    client.predict("dog.jpg")["label"]
"""

from __future__ import annotations

import http.client
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

from lynceus.core.errors import AdviceError, MissingError
from lynceus.serve.load import target

MOST_WAIT = 30.0  # seconds between two tries, whatever Retry-After says


class ServeError(AdviceError):
    """An answer that is no 200. `status` is HTTP's, `kind` the server's word for it."""

    def __init__(self, text: str, *, status: int, kind: str):
        super().__init__(text)
        self.status, self.kind = status, kind


class Client:
    """One kept connection to a server; not for several threads at once.

    url: http://HOST:PORT. key: API key. timeout: seconds for one answer. tries: how often a request is sent that finds
    the server full (503) or its connection closed.
    """

    def __init__(self, url: str, *, key: str | None = None, timeout: float = 60.0, tries: int = 5):
        if tries < 1:
            raise AdviceError(f"tries is at least 1, not {tries}.")
        self.host, self.port, _ = target(url)
        self.timeout, self.tries = timeout, tries
        self._headers = {"x-api-key": key} if key else {}
        self._connection: http.client.HTTPConnection | None = None

    def predict(
        self,
        picture: Any,
        *,
        model: str | None = None,
        version: str | None = None,
        trace: bool = False,
        scores: bool = False,
        deadline_s: float | None = None,
    ) -> dict[str, Any]:
        """What a model says of one picture: a path, the bytes of a file, a PIL image, or pixels (3, h, w) or (h, w, 3),
        uint8 or float32 in [0, 1], sent as they are.

        trace: the answer holds where its time went. scores: those of all classes. Raises ServeError."""
        kind, body = encoded(picture)
        found = self._ask("POST", self._path(model, version, trace, scores, deadline_s), body, kind)
        return dict(found)

    def predict_many(
        self, pictures: Sequence[Any], *, model: str | None = None, version: str | None = None, scores: bool = False
    ) -> list[dict[str, Any]]:
        """One answer per picture, in one request. A picture that failed has "error", "kind" and "status"."""
        import base64

        texts = [base64.b64encode(encoded(p)[1]).decode() for p in pictures]
        body = json.dumps({"images": texts}).encode()
        found = self._ask("POST", self._path(model, version, False, scores, None), body, "application/json")
        return list(found["results"])

    def trace(self, identity: str, *, chrome: bool = False) -> dict[str, Any]:
        """The spans of a recent request by its id, or in Chrome's trace format."""
        return dict(self._ask("GET", f"/trace/{quote(identity)}?format={'chrome' if chrome else 'spans'}"))

    def ready(self) -> bool:
        """Whether new requests are taken."""
        try:
            return bool(self._ask("GET", "/ready", tries=1)["ready"])
        except ServeError:
            return False

    def models(self) -> list[dict[str, Any]]:
        return list(self._ask("GET", "/models")["models"])

    def stats(self) -> dict[str, Any]:
        return dict(self._ask("GET", "/stats"))

    def metrics(self) -> str:
        """Prometheus text."""
        return str(self._ask("GET", "/metrics"))

    def settings(self, **changes: float | bool) -> dict[str, Any]:
        """The hot settings, after the changes: settings(max_batch=8)."""
        if not changes:
            return dict(self._ask("GET", "/settings"))
        return dict(self._ask("PATCH", "/settings", json.dumps(changes).encode(), "application/json"))

    def reload(self, model: str) -> dict[str, Any]:
        """Makes the server read a model's weights again."""
        return dict(self._ask("POST", f"/models/{quote(model)}/reload"))

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _path(self, model: str | None, version: str | None, trace: bool, scores: bool, deadline_s: float | None) -> str:
        query: dict[str, Any] = {k: 1 for k, on in (("trace", trace), ("scores", scores)) if on}
        query |= {k: v for k, v in (("version", version), ("deadline_s", deadline_s)) if v is not None}
        path = f"/models/{quote(model, safe='')}/predict" if model else "/predict"
        return path + (f"?{urlencode(query)}" if query else "")

    def _ask(self, method: str, path: str, body: bytes = b"", kind: str = "", *, tries: int | None = None) -> Any:
        left = tries or self.tries
        while True:
            left -= 1
            try:
                status, headers, raw = self._once(method, path, body, kind)
            except (OSError, http.client.HTTPException) as error:
                self.close()
                if left > 0 and not isinstance(error, TimeoutError):
                    time.sleep(0.05)
                    continue
                text = f"No answer from http://{self.host}:{self.port} ({error or type(error).__name__})"
                raise ServeError(f"{text}: is the server up?", status=0, kind="no_answer") from None
            if status == 503 and left > 0:
                wait = headers.get("retry-after", "1")
                time.sleep(min(MOST_WAIT, float(wait) if wait.replace(".", "", 1).isdigit() else 1.0))
                continue
            break
        is_json = headers.get("content-type", "").startswith("application/json")
        value = json.loads(raw) if is_json else raw.decode("utf-8", "replace")
        if status != 200:
            said = value if isinstance(value, dict) else {}
            text = said.get("error") or said.get("detail") or f"HTTP status {status}"
            raise ServeError(str(text), status=status, kind=str(said.get("kind", "")))
        return value

    def _once(self, method: str, path: str, body: bytes, kind: str) -> tuple[int, dict[str, str], bytes]:
        if self._connection is None:
            self._connection = http.client.HTTPConnection(self.host, self.port, timeout=self.timeout)
        headers = {**self._headers, **({"content-type": kind} if kind else {})}
        self._connection.request(method, path, body=body or None, headers=headers)
        answer = self._connection.getresponse()
        raw = answer.read()
        if answer.will_close:
            self.close()
        return answer.status, {k.lower(): v for k, v in answer.getheaders()}, raw


def encoded(picture: Any) -> tuple[str, bytes]:
    """(content type, body) of a picture: files as they are, PIL images as PNG, pixels as a .npy tensor."""
    if isinstance(picture, bytes | bytearray | memoryview):
        return "application/octet-stream", bytes(picture)
    if isinstance(picture, str | os.PathLike):
        path = Path(picture)
        if not path.is_file():
            raise MissingError(f"There is no picture at {path.resolve()}.")
        return "application/octet-stream", path.read_bytes()
    if hasattr(picture, "save") and hasattr(picture, "convert"):
        import io

        out = io.BytesIO()
        picture.convert("RGB").save(out, "PNG", compress_level=1)
        return "image/png", out.getvalue()
    if hasattr(picture, "shape") and hasattr(picture, "dtype"):
        from lynceus.serve.decode import npy

        return "application/x-npy", npy(picture)
    raise AdviceError(
        f"A {type(picture).__name__} is no picture; give a path, bytes, a PIL image, a tensor or an array."
    )
