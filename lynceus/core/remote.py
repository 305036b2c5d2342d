"""A model behind an address: pictures go out as PNG, logits or probabilities come back as JSON.

The service answers POST with the PNG as body (content type image/png) by a list of numbers, or by an object that holds
one under "logits", "scores" or "probabilities" (also inside a list of one). What is sent lies on the grid k / 255.
"""

from __future__ import annotations

import http.client
import io
import json
import math
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

import torch
from jaxtyping import Float
from torch import Tensor

from lynceus.core.errors import AdviceError
from lynceus.core.plots import to_picture
from lynceus.core.subject import Subject

LARGEST = 4 << 20  # bytes of one answer
KEYS = ("logits", "scores", "probabilities")


class Remote:
    """Pixels (b, 3, h, w) in [0, 1] -> logits (b, k): the numbers that the service gives, or their logarithm.

    url: http:// or https://. timeout: seconds for one picture. workers: pictures that are asked about at once.
    probabilities: whether the numbers are probabilities, whose logarithm is given; None: seen from the first answer
      (called "probabilities", or non-negative with a sum of 1). headers: sent with every request, such as
      {"Authorization": "Bearer ..."}.
    Raises AdviceError, with the address and the cure, when the service cannot be reached, is too slow, answers with
    another status than 200, with more than 4 MB, or with something that is no row of numbers.
    """

    def __init__(
        self,
        url: str,
        *,
        timeout: float = 10.0,
        workers: int = 4,
        probabilities: bool | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise AdviceError(f"{url!r} is no address of a service; give one like http://localhost:8000/predict.")
        self.url, self.timeout, self.workers = url, timeout, max(1, workers)
        self.headers = {"Content-Type": "image/png", "Accept": "application/json", **(headers or {})}
        self.host, self.port, self.secure = parts.hostname, parts.port, parts.scheme == "https"
        self.path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        self.probabilities = probabilities
        self._local = threading.local()

    def __call__(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b k"]:
        pictures = [_png(x) for x in images.detach().cpu()]
        with ThreadPoolExecutor(min(self.workers, max(1, len(pictures)))) as pool:
            rows = list(pool.map(self._ask, pictures))
        lengths = sorted({len(r) for r in rows})
        if len(lengths) > 1:
            raise AdviceError(
                f"{self.url} gives rows of different lengths ({lengths}); a classifier gives one number per class for "
                "every picture."
            )
        out = torch.tensor(rows, dtype=torch.float64)
        if self.probabilities is None:
            self.probabilities = bool((out >= 0).all()) and bool(((out.sum(1) - 1).abs() < 1e-3).all())
        return (out.clamp_min(torch.finfo(torch.float32).tiny).log() if self.probabilities else out).float()

    def _ask(self, png: bytes) -> list[float]:
        for attempt in (0, 1):  # a kept connection may have been closed by the other side
            try:
                return self._row(*self._exchange(png))
            except (http.client.RemoteDisconnected, BrokenPipeError, ConnectionResetError) as error:
                self._forget()
                if attempt:
                    raise AdviceError(f"{self.url} closed the connection ({error}); look at its log.") from None
            except TimeoutError:
                self._forget()
                raise AdviceError(
                    f"{self.url} did not answer one picture within {self.timeout:g} seconds; look at its log."
                ) from None
            except (OSError, http.client.HTTPException) as error:
                self._forget()
                raise AdviceError(
                    f"{self.url} cannot be asked ({error or type(error).__name__}). Is the service running there?"
                ) from None
        raise AssertionError("unreachable")

    def _exchange(self, png: bytes) -> tuple[int, bytes]:
        connection: http.client.HTTPConnection | None = getattr(self._local, "connection", None)
        if connection is None:
            kind = http.client.HTTPSConnection if self.secure else http.client.HTTPConnection
            connection = self._local.connection = kind(self.host, self.port, timeout=self.timeout)
        connection.request("POST", self.path, body=png, headers=self.headers)
        response = connection.getresponse()
        body = response.read(LARGEST + 1)
        if len(body) > LARGEST:
            self._forget()
            raise AdviceError(f"{self.url} answers with more than {LARGEST >> 20} MB; a row of numbers is expected.")
        return response.status, body

    def _forget(self) -> None:
        connection: http.client.HTTPConnection | None = getattr(self._local, "connection", None)
        if connection is not None:
            connection.close()
            self._local.connection = None

    def _row(self, status: int, body: bytes) -> list[float]:
        shown = body[:120].decode("utf-8", "replace").strip()
        if status != 200:
            raise AdviceError(f"{self.url} answers with status {status}: {shown!r}. It must take a PNG by POST.")
        try:
            value = json.loads(body)
        except (ValueError, RecursionError):
            raise AdviceError(f"{self.url} answers with something that is no JSON: {shown!r}.") from None
        if isinstance(value, list) and len(value) == 1 and isinstance(value[0], (dict, list)):
            value = value[0]
        if isinstance(value, dict):
            key = next((k for k in KEYS if k in value), None)
            if key is None:
                raise AdviceError(
                    f"{self.url} answers with the keys {sorted(value)[:6]}; one of {', '.join(KEYS)} is needed."
                )
            if self.probabilities is None and key != "scores":  # which may be either; their sum tells
                self.probabilities = key == "probabilities"
            value = value[key]
            if isinstance(value, list) and len(value) == 1 and isinstance(value[0], list):
                value = value[0]
        if isinstance(value, list) and any(isinstance(v, float) and not math.isfinite(v) for v in value):
            raise AdviceError(
                f"{self.url} answers a picture with numbers that are not finite (NaN or infinity): {shown!r}. Look at "
                "what the service computes for it; nothing is known of a class without a number."
            )
        if not _is_row(value):
            raise AdviceError(f"{self.url} gives no row of at least two numbers: {shown!r}.")
        return [float(v) for v in value]


def served(
    url: str,
    *,
    classes: Sequence[str] | None = None,
    probabilities: bool | None = None,
    timeout: float = 10.0,
    workers: int = 4,
    headers: Mapping[str, str] | None = None,
) -> Subject:
    """A subject that is known by its answers over HTTP alone; see Remote. Nothing is sent before the first question."""
    remote = Remote(url, timeout=timeout, workers=workers, probabilities=probabilities, headers=headers)
    return Subject(remote, name=url, classes=classes, needs_grad=False)


def _png(image: Tensor) -> bytes:
    out = io.BytesIO()
    to_picture(image).save(out, "PNG", compress_level=1)
    return out.getvalue()


def _is_row(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) > 1
        and all(isinstance(v, (int, float)) and not isinstance(v, bool) and not math.isnan(v) for v in value)
    )
