"""engine="ray": the same pipeline as a Ray Serve application, for a cluster that runs Ray already.

Each replica holds the whole pipeline (decoding threads, batcher, model) and the same door: predict, models, traces,
metrics, settings. Ray Serve puts its proxy and router in front, spreads requests over the replicas and starts dead ones
again. What a replica tells of itself (metrics, stats, traces, hot settings) is of that replica.
"""

from __future__ import annotations

import socket
import tempfile
import time
from dataclasses import replace
from typing import Any

from lynceus.core.errors import AdviceError, missing_extra
from lynceus.serve.config import Chain, ServeConfig

NAME = "lynceus"


def _ray() -> tuple[Any, Any]:
    """(ray, ray.serve), or the advice that brings them."""
    try:
        import ray
    except ImportError:
        raise missing_extra("ray", "cluster", use='engine="ray"') from None
    try:
        from ray import serve
    except ImportError as error:
        raise AdviceError(
            f'engine="ray" needs Ray Serve\'s own dependencies ({error.name or error} is missing): '
            'pip install "ray[serve]". Without Ray, `workers` runs the same pipeline in processes of this machine.'
        ) from None
    return ray, serve


class Replica:
    """One copy of the pipeline and its door, inside a Ray actor."""

    def __init__(self, models: Any, config: ServeConfig):
        from lynceus.serve.api import Door
        from lynceus.serve.server import engine_of

        self.engine = engine_of(models, config)
        self.door = Door(self.engine, config)

    async def __call__(self, request: Any) -> Any:
        """One HTTP request (starlette's) through the door."""
        from starlette.responses import Response

        status, headers, parts = 499, [], []  # 499: the door says nothing to a client that has gone

        async def send(message: Any) -> None:
            nonlocal status, headers
            if message["type"] == "http.response.start":
                status, headers = message["status"], message["headers"]
            elif message["type"] == "http.response.body":
                parts.append(message.get("body", b""))

        await self.door(dict(request.scope), request.receive, send)
        answer = Response(b"".join(parts), status)
        answer.raw_headers = [(k, v) for k, v in headers if k.lower() != b"content-length"]
        answer.raw_headers.append((b"content-length", b"%d" % len(answer.body)))
        return answer

    def check_health(self) -> None:
        """Ray starts a replica again whose check raises."""
        if self.engine._closed:
            raise RuntimeError("the pipeline is closed")

    def __del__(self) -> None:
        engine = getattr(self, "engine", None)
        if engine is not None:
            engine.close()


def application(models: Any, config: ServeConfig, *, replicas: int = 1, cpus: float = 1.0, gpus: float = 0.0) -> Any:
    """The Ray Serve application, for `ray.serve.run` or a Serve configuration file of one's own.

    models: sources that every node can open, or a chain; None: of config.models. replicas: copies of the pipeline.
    cpus, gpus: that Ray sets aside for each."""
    _, serve = _ray()
    inside = replace(config, workers=0, port=0)
    deployment = serve.deployment(
        name="pipeline",
        num_replicas=replicas,
        max_ongoing_requests=config.queue,
        graceful_shutdown_timeout_s=config.drain_s,
        ray_actor_options={"num_cpus": cpus, "num_gpus": gpus},
        logging_config={"enable_access_log": False},
    )(Replica)
    return deployment.bind(models, inside)


class RayServer:
    """As `Server`, on Ray Serve: `url`, `stop`, and a context manager. A Ray that runs is used, else one is started.

    config.workers: replicas, at least one. Objects given as models go to the replicas as files where they can be saved,
    so that a replica on another node needs to see `folder` (default: a folder of this machine)."""

    def __init__(self, models: Any, config: ServeConfig, *, folder: str | None = None):
        self._ray, self._serve = _ray()
        self.config = config
        self._keep: Any = None
        if isinstance(models, Chain):
            chosen: Any = models
        else:
            from lynceus.serve.workers import sources

            if folder is None:
                self._keep = tempfile.TemporaryDirectory(prefix="lynceus-ray-")
                folder = self._keep.name
            config = replace(config, models=tuple(sources(models, config, folder)))
            chosen = None
        self._own = not self._ray.is_initialized()
        self._stopped = False
        replicas = max(1, config.workers)
        if self._own:
            import logging

            self._ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
        self.port = config.port or _free(config.host)
        try:
            free = float(self._ray.available_resources().get("CPU", 1.0))
            each = max(0.1, min(1.0, (free - 0.5) / replicas))  # Ray's own proxy takes a part of the cores
            self._serve.start(http_options={"host": config.host, "port": self.port}, proxy_location="HeadOnly")
            app = application(chosen, config, replicas=replicas, cpus=each)
            self._serve.run(app, name=NAME, route_prefix="/")
        except BaseException:
            self.stop()
            raise
        host = f"[{config.host}]" if ":" in config.host else config.host
        self.url = f"http://{host.replace('0.0.0.0', '127.0.0.1')}:{self.port}"

    @property
    def labels(self) -> list[str]:
        return [text.partition("=")[0] for text in self.config.models] or ["the models given"]

    @property
    def alive(self) -> bool:
        status = self._serve.status().applications.get(NAME)
        return status is not None and str(status.status).endswith("RUNNING")

    def stop(self, drain_s: float | None = None) -> bool:
        """Lets Ray Serve drain the replicas and ends them; Ray itself too, where it was started here."""
        if self._stopped:
            return True
        self._stopped = True
        self._serve.shutdown()
        if self._own:
            self._ray.shutdown()
        if self._keep is not None:
            self._keep.cleanup()
        return True

    def wait(self) -> None:
        """Until the application ends."""
        while self.alive:
            time.sleep(1.0)

    def __enter__(self) -> RayServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def _free(host: str) -> int:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as made:
        made.bind((host, 0))
        return int(made.getsockname()[1])
