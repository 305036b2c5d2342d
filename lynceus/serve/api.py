"""The door: predict by raw body, upload, base64 JSON or batch; models, versions, health, metrics, traces, settings.

POST .../predict is answered by a plain ASGI function, for speed; FastAPI answers everything else and documents all of
it under /docs and /openapi.json.
"""

import asyncio
import contextlib
import hmac
import json
import logging
import math
import os
import re
import time
from collections import OrderedDict, deque
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import parse_qs

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.exceptions import HTTPException

import lynceus
from lynceus.core.errors import AdviceError, unknown
from lynceus.serve.bodies import pictures
from lynceus.serve.config import ServeConfig, check_hot
from lynceus.serve.engine import Answer, new_id
from lynceus.serve.errors import Cancelled, ModelFailed, Overloaded, Refused, TooLarge
from lynceus.serve.protocol import BEGUN, CANCEL
from lynceus.serve.schema import PREDICT, SETTINGS
from lynceus.serve.spans import Trace

_PREDICT = re.compile(r"/predict|/models/([^/]{1,200})/predict")
_ID = re.compile(r"[A-Za-z0-9_.\-]{1,64}")
_JSON = (b"content-type", b"application/json")
OPEN = ("/health", "/ready", "/")  # without a key
PAGE = Path(__file__).with_name("page.html")
QUERY = ("trace", "scores", "version", "deadline_s")
FEW = 100  # classes: the scores of so many are always in the answer
LONG = 1 << 18  # bytes of JSON or of a form that another thread reads
log = logging.getLogger("lynceus.serve")


class Late(Refused):
    status, kind = 408, "slow_client"


class Bridge:
    """Hands outcomes from threads to futures of the event loop, many per wake."""

    def __init__(self, loop: asyncio.AbstractEventLoop):
        self._loop = loop
        self._items: deque[tuple[asyncio.Future[Any], Any]] = deque()
        self._woken = False

    def put(self, future: asyncio.Future[Any], outcome: Any) -> None:
        """From any thread."""
        self._items.append((future, outcome))
        if not self._woken:
            self._woken = True
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits
                self._loop.call_soon_threadsafe(self._flush)

    def _flush(self) -> None:
        self._woken = False
        while self._items:
            future, outcome = self._items.popleft()
            if not future.done():
                future.set_result(outcome)


class Door:
    """The ASGI application on an engine (a Pipeline, or anything with its methods)."""

    def __init__(self, engine: Any, config: ServeConfig):
        self.engine, self.config = engine, config
        self.metrics = engine.metrics
        self.traces: OrderedDict[str, Trace] = OrderedDict()
        self.buffered = 0  # bytes of bodies on the way
        self.draining = False
        self._bridge: Bridge | None = None
        self._key = config.api_key.encode() if config.api_key else None
        self.pages = _pages(self)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.pages(scope, receive, send)
            return
        headers = dict(scope["headers"])
        path = scope["path"]
        if self._key is not None and path not in OPEN and not self._allowed(headers):
            refusal = {"error": "This server asks for its key, in x-api-key.", "kind": "no_key"}
            await self._send(send, 401, _dumped(refusal))
            return
        found = _PREDICT.fullmatch(path) if scope["method"] == "POST" else None
        if found is not None:
            await self._predict(scope, headers, found[1], receive, send)
        else:
            await self.pages(scope, receive, self._counted(send))

    def _allowed(self, headers: dict[bytes, bytes]) -> bool:
        assert self._key is not None
        given = headers.get(b"x-api-key") or headers.get(b"authorization", b"").removeprefix(b"Bearer ")
        return hmac.compare_digest(given, self._key)

    def _counted(self, send: Any) -> Any:
        async def counted(message: Any) -> None:
            if message["type"] == "http.response.start":
                self.metrics.status(message["status"])
            await send(message)

        return counted

    # predict ----------------------------------------------------------------------------------------
    async def _predict(
        self, scope: Any, headers: dict[bytes, bytes], name: str | None, receive: Any, send: Any
    ) -> None:
        given = headers.get(b"x-request-id", b"").decode("latin-1")
        trace = Trace(id=given if _ID.fullmatch(given) else new_id(), begun=scope.get(BEGUN) or time.monotonic_ns())
        reserved = [0]
        more: list[tuple[bytes, bytes]] = []
        value: dict[str, Any] = {}
        body: bytes | None = None
        try:
            ask = _Ask.of(scope["query_string"], headers)
            sent = await self._body(headers, receive, reserved)
            kind = headers.get(b"content-type", b"").decode("latin-1")
            if len(sent) > LONG and kind.lstrip().lower().startswith(("application/json", "multipart/")):
                given_images, many = await asyncio.to_thread(pictures, kind, sent, max_images=self.config.max_images)
            else:
                given_images, many = pictures(kind, sent, max_images=self.config.max_images)
            del sent
            outcomes = await self._ask(scope, given_images, name, trace, receive, ask)
            if many:
                results = [self._one(outcome, ask) for outcome in outcomes]
                value = {"id": trace.id, "results": results}
                status = 200
                first = next((o for o in outcomes if isinstance(o, Answer)), None)
                trace = first.trace if first else trace
            else:
                outcome = outcomes[0]
                if isinstance(outcome, Refused):
                    raise outcome
                trace = outcome.trace
                value = {"id": trace.id, **self._one(outcome, ask)}
                status = 200
            if ask.trace:
                trace.mark("serialise")
                value["trace"] = trace.to_dict()
            body = _dumped(value)
        except Cancelled:
            self.metrics.status(499)
            return
        except _NotFinite:
            self.metrics.refuse("model_failed")
            status, value = (
                500,
                {"id": trace.id, "error": "The model gave numbers that are not finite.", "kind": "model_failed"},
            )
        except Refused as error:
            status, value = error.status, {"id": trace.id, "error": error.text, "kind": error.kind}
            if isinstance(error, Overloaded):
                more = [(b"retry-after", b"%d" % max(1, round(error.retry_after)))]
            if error.status in (408, 413) or isinstance(error, _Closing):
                more = [*more, (b"connection", b"close")]  # the rest of the body is not read
        except (ValueError, UnicodeError):
            status, value = 400, {"id": trace.id, "error": "The query cannot be read.", "kind": "bad_request"}
        except Exception as error:
            log.exception("answering failed")
            status = 500
            value = {"id": trace.id, "error": f"Answering failed: {type(error).__name__}.", "kind": "defect"}
        finally:
            self.buffered -= reserved[0]
        await self._send(send, status, body or _dumped(value), more, trace=trace)
        begun = trace.ended
        trace.mark("serialise")
        self.metrics.span("serialise", (trace.ended - begun) / 1e9)
        self._keep(trace)

    async def _body(self, headers: dict[bytes, bytes], receive: Any, reserved: list[int]) -> bytes:
        """The whole body within its bounds of bytes and time."""
        most = int(self.config.max_body_mb * 1e6)
        length = headers.get(b"content-length")
        if length is not None:
            if not length.isdigit() or len(length) > 18 or int(length) > most:
                raise TooLarge(f"A request has at most {most / 1e6:g} MB.")
            self._reserve(int(length), reserved)
        chunks: list[bytes] = []
        size = 0
        try:
            async with asyncio.timeout(self.config.body_timeout_s):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise Cancelled("The client has gone.")
                    chunk = message.get("body", b"")
                    size += len(chunk)
                    if size > most:
                        raise TooLarge(f"A request has at most {most / 1e6:g} MB.")
                    if size > reserved[0]:
                        self._reserve(size - reserved[0], reserved)
                    chunks.append(chunk)
                    if not message.get("more_body"):
                        break
        except TimeoutError:
            raise Late(f"The body did not come within {self.config.body_timeout_s:g} seconds.") from None
        return chunks[0] if len(chunks) == 1 else b"".join(chunks)

    def _reserve(self, size: int, reserved: list[int]) -> None:
        if self.draining:
            raise _Stopping("The server is stopping.")
        if self.buffered + size > self.config.max_buffer_mb * 1e6:
            raise _Full("The bodies on the way fill the memory set aside for them.", retry_after=2.0)
        self.buffered += size
        reserved[0] += size

    async def _ask(
        self,
        scope: Any,
        images: list[bytes],
        name: str | None,
        trace: Trace,
        receive: Any,
        ask: "_Ask",
    ) -> list[Any]:
        """Outcomes (Answer or Refused) of all pictures; gives them up when the client goes."""
        loop = asyncio.get_running_loop()
        if self._bridge is None or self._bridge._loop is not loop:
            self._bridge = Bridge(loop)
        bridge = self._bridge
        jobs: list[Any] = []
        futures: list[asyncio.Future[Any]] = []
        trace.mark("receive")
        for i, image in enumerate(images):
            own = trace if len(images) == 1 else Trace(id=f"{trace.id}.{i}", begun=trace.begun, spans=[*trace.spans])
            future: asyncio.Future[Any] = loop.create_future()
            try:
                jobs.append(
                    self.engine.start(
                        image,
                        _giver(bridge, future),
                        model=name,
                        version=ask.version,
                        trace=own,
                        deadline_s=ask.deadline_s,
                    )
                )
            except Refused as error:
                if len(images) == 1:
                    raise
                future.set_result(error)
            futures.append(future)

        def gone() -> None:
            for job in jobs:
                self.engine.cancel(job)
            for future in futures:
                if not future.done():
                    future.set_result(Cancelled("The client has gone."))

        scope[CANCEL] = gone
        watch = None if BEGUN in scope else asyncio.ensure_future(_watch(receive, gone))
        try:
            outcomes = [await future for future in futures]
        finally:
            scope[CANCEL] = None
            if watch is not None:
                watch.cancel()
        if all(isinstance(o, Cancelled) for o in outcomes):
            raise Cancelled("The client has gone.")
        return outcomes

    def _one(self, outcome: Any, ask: "_Ask") -> dict[str, Any]:
        if isinstance(outcome, Refused):
            return {"error": outcome.text, "kind": outcome.kind, "status": outcome.status}
        return shown(outcome.result, scores=ask.scores)

    async def _send(self, send: Any, status: int, body: bytes, more: Any = (), *, trace: Trace | None = None) -> None:
        headers = [_JSON, (b"content-length", b"%d" % len(body)), *more]
        if trace is not None:
            headers.append((b"x-request-id", trace.id.encode("latin-1")))
        self.metrics.status(status)
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    def _keep(self, trace: Trace) -> None:
        if not self.config.traces:
            return
        self.traces[trace.id] = trace
        while len(self.traces) > self.config.traces:
            self.traces.popitem(last=False)

    def gauges(self) -> dict[str, float]:
        """What Prometheus is told of now."""
        queues = self.engine.stats()["queues"]
        out = {f'lynceus_queue_length{{stage="{k}"}}': float(v) for k, v in queues.items() if k != "limit"}
        out["lynceus_buffered_bytes"] = float(self.buffered)
        out["lynceus_ready"] = float(self.engine.ready and not self.draining)
        with contextlib.suppress(OSError):
            out["lynceus_process_open_files"] = float(len(os.listdir("/proc/self/fd")))
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            out["lynceus_process_resident_bytes"] = float(pages * os.sysconf("SC_PAGE_SIZE"))
        return out


class _NotFinite(Exception):
    """An answer holds numbers that JSON has no text for."""


def _dumped(value: dict[str, Any]) -> bytes:
    try:
        return json.dumps(value, allow_nan=False, separators=(",", ":")).encode()
    except ValueError:
        raise _NotFinite from None


class _Closing(Exception):
    """Marks refusals that come before the body was read."""


class _Full(Overloaded, _Closing):
    pass


class _Stopping(Overloaded, _Closing):
    kind = "draining"


class _Ask:
    """What a client wants to see, of its query and headers."""

    __slots__ = ("deadline_s", "scores", "trace", "version")
    switches: ClassVar = {"1": True, "true": True, "0": False, "false": False}

    def __init__(self) -> None:
        self.trace = self.scores = False
        self.version: str | None = None
        self.deadline_s: float | None = None

    @classmethod
    def of(cls, query: bytes, headers: dict[bytes, bytes]) -> "_Ask":
        made = cls()
        made.trace = headers.get(b"x-trace") in (b"1", b"true")
        made.scores = headers.get(b"x-scores") in (b"1", b"true")
        if not query:
            return made
        for name, (value, *_) in parse_qs(query.decode("latin-1"), True, max_num_fields=16).items():
            if name in ("trace", "scores"):
                if value not in cls.switches:
                    raise Refused(f"{name} is 1 or 0.")
                setattr(made, name, cls.switches[value])
            elif name == "version":
                made.version = value
            elif name == "deadline_s":
                try:
                    made.deadline_s = float(value)
                except ValueError:
                    made.deadline_s = math.nan
                if not made.deadline_s >= 0:
                    raise Refused("deadline_s is a number of seconds, at least 0.")
            else:
                raise Refused(str(unknown("query option", name[:40], QUERY)))
        return made


def shown(result: dict[str, Any], *, scores: bool) -> dict[str, Any]:
    """A result as it is sent: many scores only when they are asked for, floats that JSON can hold."""
    if scores or len(result.get("scores", ())) <= FEW:
        return result
    return {k: v for k, v in result.items() if k != "scores"}


def _giver(bridge: Bridge, future: asyncio.Future[Any]) -> Any:
    return lambda outcome: bridge.put(future, outcome)


async def _watch(receive: Any, gone: Any) -> None:
    """Where the protocol does not say that a client has gone: under another server than ours."""
    while (await receive())["type"] != "http.disconnect":
        pass
    gone()


# everything else -----------------------------------------------------------------------------------
def _pages(door: Door) -> FastAPI:
    app = FastAPI(
        title="lynceus",
        version=lynceus.__version__,
        description="A vision server that shows where the milliseconds go.",
    )
    engine = door.engine

    @app.exception_handler(Refused)
    async def refuse(request: Request, error: Refused) -> JSONResponse:
        headers = {"retry-after": str(max(1, round(error.retry_after)))} if isinstance(error, Overloaded) else None
        return JSONResponse({"error": error.text, "kind": error.kind}, error.status, headers=headers)

    @app.exception_handler(AdviceError)
    async def advise(request: Request, error: AdviceError) -> JSONResponse:
        return JSONResponse({"error": str(error), "kind": "bad_request"}, 400)

    @app.exception_handler(HTTPException)
    async def nothing_there(request: Request, error: HTTPException) -> JSONResponse:
        text, kind = "There is nothing here; /docs lists what there is.", "unknown_path"
        if error.status_code == 405:
            allowed = (error.headers or {}).get("Allow", "POST")
            text, kind = f"{request.method} is not answered here, but {allowed}; see /docs.", "wrong_method"
        return JSONResponse({"error": text, "kind": kind}, error.status_code, headers=error.headers)

    @app.get("/", response_class=HTMLResponse, include_in_schema=False)
    async def page() -> Any:
        if PAGE.is_file():
            return HTMLResponse(PAGE.read_text(encoding="utf-8"))
        return HTMLResponse("<title>lynceus</title><p>lynceus serves. <a href='docs'>/docs</a> says what.")

    @app.get("/health", summary="Whether the process lives")
    async def health() -> dict[str, Any]:
        return {"status": "ok"}

    @app.get("/ready", summary="Whether new requests are taken: 200, else 503")
    async def ready() -> JSONResponse:
        good = engine.ready and not door.draining
        return JSONResponse({"ready": good}, 200 if good else 503, headers=None if good else {"retry-after": "1"})

    @app.get("/metrics", response_class=PlainTextResponse, summary="Prometheus text")
    async def metrics() -> PlainTextResponse:
        return PlainTextResponse(door.metrics.text(door.gauges()), media_type="text/plain; version=0.0.4")

    @app.get("/stats", summary="Queues, throughput, batch sizes and latencies as JSON")
    async def stats() -> dict[str, Any]:
        return {**engine.stats(), "buffered_bytes": door.buffered, "traces": list(door.traces)[-20:]}

    @app.get("/models", summary="All models and versions")
    async def models() -> dict[str, Any]:
        return {"models": [m.info() for m in engine.registry.all()]}

    @app.get("/models/{name}", summary="One model: NAME or NAME@VERSION")
    async def model(name: str) -> dict[str, Any]:
        return engine.registry.find(name).info()

    @app.post("/models/{name}/reload", summary="Read the weights again from where they came")
    async def reload(name: str) -> dict[str, Any]:
        return (await asyncio.to_thread(engine.reload, name)).info()

    @app.get("/settings", summary="Hot settings")
    async def settings() -> dict[str, Any]:
        return engine.config.hot

    @app.patch("/settings", summary="Change hot settings", openapi_extra=SETTINGS)
    async def change(request: Request) -> dict[str, Any]:
        body = b""
        async for chunk in request.stream():
            body += chunk
            if len(body) > 65536:
                raise TooLarge("Settings have at most 64 kB.")
        try:
            values = json.loads(body)
        except (ValueError, RecursionError):
            raise Refused("The body is no JSON.") from None
        return (await asyncio.to_thread(lambda: engine.change(**check_hot(values)))).hot

    @app.get("/trace/{identity}", summary="The spans of a recent request: ?format=chrome (default) or spans")
    async def trace(identity: str, format: str = "chrome") -> Any:
        found = door.traces.get(identity)
        if found is None:
            return JSONResponse({"error": "There is no trace of this id any more.", "kind": "unknown_trace"}, 404)
        return found.to_dict() if format == "spans" else found.chrome()

    @app.post("/predict", summary="What the first model says of a picture", openapi_extra=PREDICT)
    async def predict() -> Response:
        raise ModelFailed("unreachable: Door answers this")

    @app.post("/models/{name}/predict", summary="What a model says of a picture", openapi_extra=PREDICT)
    async def predict_with(name: str) -> Response:
        raise ModelFailed("unreachable: Door answers this")

    return app


__all__ = ["Door", "shown"]
