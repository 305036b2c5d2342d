"""serve: a server that runs beside the caller, on uvicorn with uvloop and httptools, until it is stopped.

with serve(model, config=ServeConfig(port=0, max_batch=8)) as server:
    requests.post(server.url + "/predict", data=jpeg)
"""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from contextlib import ExitStack
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from lynceus.core.config import changed
from lynceus.core.errors import AdviceError, missing_extra
from lynceus.serve.config import Chain, ServeConfig

if TYPE_CHECKING:
    from lynceus.serve.ray_engine import RayServer


class Server:
    """A started server. `url` is where it listens; `stop` drains it; leaving the `with` block stops it."""

    def __init__(self, engine: Any, config: ServeConfig, listener: socket.socket):
        import uvicorn

        from lynceus.serve.api import Door
        from lynceus.serve.protocol import bounded

        self.engine, self.config = engine, config
        self.door = Door(engine, config)
        self.socket = listener
        self.port = int(self.socket.getsockname()[1])
        host = f"[{config.host}]" if ":" in config.host else config.host
        self.url = f"http://{host.replace('0.0.0.0', '127.0.0.1')}:{self.port}"
        settings = uvicorn.Config(
            self.door,
            http=bounded(header_timeout=config.header_timeout_s, most=config.connections),
            ws="none",
            lifespan="off",
            access_log=False,
            server_header=False,
            log_level="error",
            log_config=None,
            timeout_keep_alive=30,
            backlog=min(4096, max(128, config.connections)),
        )
        self._uvicorn = uvicorn.Server(settings)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._run, name="lynceus-http", daemon=True)
        self._error: BaseException | None = None
        self._stopped = False

    def start(self) -> Server:
        """Listens; returns when requests are answered."""
        self._thread.start()
        while not self._uvicorn.started:
            if not self._thread.is_alive():
                raise AdviceError(f"The server did not start: {self._error or 'see its log'}.")
            time.sleep(0.002)
        return self

    def _run(self) -> None:
        try:
            factory = self._uvicorn.config.get_loop_factory()
            with asyncio.Runner(loop_factory=factory) as runner:
                self._loop = runner.get_loop()
                runner.run(self._uvicorn._serve([self.socket]))
        except BaseException as error:
            self._error = error

    def stop(self, drain_s: float | None = None) -> bool:
        """Takes nothing new, answers what is on the way (at most `drain_s` seconds), ends all threads and processes.
        True when everything was answered. May be called twice."""
        if self._stopped:
            return True
        self._stopped = True
        self.door.draining = True
        limit = self.config.drain_s if drain_s is None else drain_s
        clean = self.engine.drain(limit)
        self._uvicorn.config.timeout_graceful_shutdown = max(1, round(limit))
        self._uvicorn.should_exit = True
        self._thread.join(timeout=limit + 5)
        self.engine.close()
        self.socket.close()
        return clean

    @property
    def labels(self) -> list[str]:
        """NAME@VERSION of all models."""
        return [m.label for m in self.engine.registry.all()]

    @property
    def alive(self) -> bool:
        """Whether it still listens."""
        return self._thread.is_alive()

    def wait(self) -> None:
        """Until the server ends by itself."""
        self._thread.join()

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    made = socket.socket(family, socket.SOCK_STREAM)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        made.bind((host, port))
    except (OSError, OverflowError) as error:
        made.close()
        raise AdviceError(
            f"Nothing can listen on {host}:{port} ({getattr(error, 'strerror', error)}); take another --port, or 0 for "
            "a free one."
        ) from None
    return made


def engine_of(models: Any, config: ServeConfig) -> Any:
    """What answers: threads of this process, worker processes, or a chain of both."""
    if isinstance(models, Chain):
        from lynceus.serve.chain import ChainEngine

        return ChainEngine(models, config)
    if config.workers:
        from lynceus.serve.workers import Fleet

        return Fleet(config, models)
    from lynceus.serve.pipeline import Pipeline

    return Pipeline(config, models)


def serve(models: Any = None, *, config: ServeConfig | None = None, **changes: Any) -> Server | RayServer:
    """A started server of a model, a mapping of names to models, or a chain; None: of config.models.

    changes: fields of ServeConfig, such as port=0, max_batch=8, workers=2. The server listens on loopback unless host
    says otherwise, in a thread of its own; `with serve(model) as server:` stops it at the end.
    """
    for package in ("fastapi", "uvicorn", "httptools", "simplejpeg"):  # before a model is loaded
        if find_spec(package) is None:
            raise missing_extra(package, "serve", use="Serving")
    config = changed(config or ServeConfig(port=0), changes)
    if config.engine == "ray":
        from lynceus.serve.ray_engine import RayServer

        return RayServer(models, config)
    with ExitStack() as undo:
        listener = undo.enter_context(_listen(config.host, config.port))  # before models are loaded
        engine = engine_of(models, config)
        undo.callback(engine.close)
        server = Server(engine, config, listener).start()
        undo.pop_all()
    return server
