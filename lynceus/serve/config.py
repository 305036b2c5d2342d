"""What a server is told: one frozen configuration, whose hot part can be changed while it runs."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

from lynceus.core.config import from_dict, load_yaml
from lynceus.core.errors import AdviceError, unknown

HOT = ("max_batch", "max_wait_ms", "eager", "workers", "preprocess_workers", "deadline_s", "queue")


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """How a server or pipeline works."""

    models: tuple[str, ...] = ()  # NAME, PATH, python:MODULE:NAME; ALIAS=..., ALIAS@VERSION=... name them
    host: str = "127.0.0.1"  # address to listen on
    port: int = 8000  # 0 takes a free one
    api_key: str | None = None  # asked for in x-api-key or Authorization: Bearer; None: open to all
    max_batch: int = 16  # images at once in the model
    max_wait_ms: float = 5.0  # a batch is closed this long after its oldest member came
    eager: bool = True  # close a batch at once when no other request is on its way
    workers: int = 0  # processes that run the models; 0: threads of the server itself
    preprocess_workers: int = 0  # threads that decode, per process; 0: as many as there are cores, for each worker one
    postprocess_workers: int = 1  # threads that make answers of outputs, per process
    model_threads: int = 1  # threads that run the model on batches of their own, per process; for CPUs
    threads: int = 0  # torch threads of each of these; 0: torch's own, or one where there are workers or several
    device: str | None = None  # cpu, cuda; default: what there is
    way: str = "eager"  # a way of `lynceus rewrite deploy` to run the model in
    placement: Literal["client", "image", "batch", "device"] = "image"  # where pictures are brought to the model's size
    exact: bool = True  # pixels as in `lynceus predict`; False: JPEG decoded small and resized in 8 bits, much faster
    strict: bool = True  # JPEG files that need guessing are corrupt
    size: int | None = None  # side the model is given; default: its own
    engine: Literal["local", "ray"] = "local"  # ray: replicas on Ray Serve, `workers` of them
    broker: str = "shared"  # link to the workers: shared, redis://HOST:PORT/DB, file:FOLDER
    queue: int = 256  # requests on the way at most; more are answered with 503
    deadline_s: float = 30.0  # a request older than this is answered with 504
    attempts: int = 3  # a job that was lost with its worker is tried so often
    max_body_mb: float = 32.0  # largest request
    max_pixels_mp: float = 64.0  # largest picture, in millions of pixels
    max_images: int = 64  # pictures in one request
    max_buffer_mb: float = 512.0  # of all requests on the way together
    connections: int = 1024  # open at once
    header_timeout_s: float = 10.0  # for the head of a request
    body_timeout_s: float = 30.0  # for its body
    drain_s: float = 30.0  # for what is on the way when the server is told to stop
    traces: int = 512  # last traces that are kept for GET /trace/ID

    def __post_init__(self) -> None:
        low = {"max_batch": 1, "queue": 1, "max_images": 1, "connections": 1, "attempts": 1}
        low |= {"postprocess_workers": 1, "model_threads": 1}
        for name in ("workers", "preprocess_workers", "threads", "traces", "max_wait_ms", "port", "drain_s"):
            low[name] = 0
        for name, least in low.items():
            if getattr(self, name) < least:
                raise AdviceError(f"{name} is at least {least}, not {getattr(self, name)}.")
        for name in (
            "deadline_s",
            "max_body_mb",
            "max_pixels_mp",
            "max_buffer_mb",
            "header_timeout_s",
            "body_timeout_s",
        ):
            if not getattr(self, name) > 0:
                raise AdviceError(f"{name} is above 0, not {getattr(self, name)}.")
        if self.engine not in ("local", "ray"):
            raise unknown("engine", str(self.engine), ("local", "ray"))
        if self.queue < self.max_batch:
            raise AdviceError(
                f"Batches of {self.max_batch} never fill when only {self.queue} requests may be on the way; raise "
                "queue or lower max_batch."
            )
        if self.port > 65535:
            raise AdviceError(f"port is at most 65535, not {self.port}.")
        if self.placement not in ("client", "image", "batch", "device"):
            raise unknown("placement", self.placement, ("client", "image", "batch", "device"))
        if self.size is not None and self.size < 1:
            raise AdviceError(f"size is at least 1, not {self.size}.")
        if self.api_key is not None and (not self.api_key or not self.api_key.isascii()):
            raise AdviceError("api_key is ASCII text of at least one character; leave it out to ask for none.")
        kind = self.broker.partition(":")[0]
        if kind not in ("memory", "shared", "redis", "rediss", "unix", "file"):
            raise unknown("broker", self.broker, ("memory", "shared", "redis://HOST:PORT/DB", "file:FOLDER"))

    @property
    def hot(self) -> dict[str, Any]:
        """What may be changed while the server runs."""
        return {name: getattr(self, name) for name in HOT}


def check_hot(changes: dict[str, Any]) -> dict[str, Any]:
    """Changes of hot settings, as they came from a client, in their types. Raises AdviceError."""
    if not isinstance(changes, dict) or not changes:
        raise AdviceError(f"Settings are an object of some of {', '.join(HOT)}.")
    kinds = {f.name: str(f.type) for f in fields(ServeConfig)}
    made: dict[str, Any] = {}
    for name, value in changes.items():
        if name not in HOT:
            raise unknown("hot setting", str(name), HOT)
        kind = kinds[name]
        right = (
            isinstance(value, bool)
            if kind == "bool"
            else isinstance(value, int | float) and not isinstance(value, bool)
        )
        if not right or (kind == "int" and int(value) != value) or value != value:
            raise AdviceError(f"{name} is of type {kind}, not {value!r}.")
        if kind != "bool" and not 0 <= value <= 1_000_000:
            raise AdviceError(f"{name} is between 0 and 1000000, not {value}.")
        made[name] = int(value) if kind == "int" else value
    if made.get("workers", 0) > 256 or made.get("preprocess_workers", 0) > 256:
        raise AdviceError("workers and preprocess_workers are at most 256.")
    return made


@dataclass(frozen=True, kw_only=True)
class Step:
    """One model of a chain. What is None is the server's own setting."""

    model: Any  # a source as in ServeConfig.models; in Python also a module or a function of pixels
    name: str = ""  # default: by the model
    size: int | None = None
    max_batch: int | None = None
    max_wait_ms: float | None = None
    workers: int = 0  # processes of a later step; the first one runs in the server
    exact: bool | None = None

    def config(self, base: ServeConfig, **changes: Any) -> ServeConfig:
        """The server's settings with this step's own."""
        own = {n: getattr(self, n) for n in ("size", "max_batch", "max_wait_ms", "exact")}
        given = {n: v for n, v in own.items() if v is not None}
        return replace(base, models=(), workers=self.workers, **given, **changes)


@dataclass(frozen=True, kw_only=True)
class Chain:
    """A detector, and a model that says something of every box that it finds.

    steps: two; the first gives Predictions with boxes, xyxy in pixels.
    link: how crops go from the first to the second. fused: within the first one's own thread, frame by frame; memory:
      a queue in this process; shared, redis://HOST:PORT/DB, file:FOLDER: a broker. Behind all but fused, crops of
      several frames share batches.
    max_objects: boxes of one picture that are looked at, the best ones. min_score: boxes below are left out.
    """

    steps: tuple[Step, ...]
    name: str = "chain"
    link: str = "memory"
    max_objects: int = 25
    min_score: float = 0.0

    def __post_init__(self) -> None:
        if len(self.steps) != 2:
            raise AdviceError(
                f"A chain has two steps, a detector and what looks at its boxes; here are {len(self.steps)}."
            )
        kind = self.link.partition(":")[0]
        if kind not in LINKS:
            raise unknown("link", self.link, ("fused", "memory", "shared", "redis://HOST:PORT/DB", "file:FOLDER"))
        if self.max_objects < 1:
            raise AdviceError(f"max_objects is at least 1, not {self.max_objects}.")
        if self.steps[0].workers:
            raise AdviceError("The first step of a chain runs in the server itself; only the second one has workers.")
        if self.steps[1].workers and kind in ("fused", "memory"):
            raise AdviceError(f"Workers of the second step cannot be reached by link {self.link!r}; take link: shared.")


LINKS = ("fused", "memory", "shared", "redis", "rediss", "unix", "file")


def read_chain(path: str | Path) -> Chain:
    """A chain from a YAML file with the fields of Chain, its steps as a list of those of Step. Raises AdviceError."""
    values = load_yaml(path)
    steps = values.get("steps")
    if not isinstance(steps, list) or not all(isinstance(s, dict) for s in steps):
        raise AdviceError(f"{path} has no list of steps; write steps:, and under it - model: SOURCE twice.")
    if not all("model" in s for s in steps):
        raise AdviceError(f"Every step of {path} needs its model: a run folder, a name, or python:MODULE:NAME.")
    made = tuple(from_dict(Step, s, where=f"step {i + 1} of {path}") for i, s in enumerate(steps))
    return from_dict(Chain, {k: v for k, v in values.items() if k != "steps"}, where=str(path), given={"steps": made})
