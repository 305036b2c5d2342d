"""Cluster: a plan's devices as processes on this machine, asked all at once over TCP; the fusion runs here.

A device that does not answer within the deadline counts as a feature of zeros; one whose connection closes or that no
longer answers heartbeats is reported as lost, and the others go on answering. `restart` brings it back.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import statistics
import subprocess
import tempfile
import threading
import time
import warnings
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType

import torch
from jaxtyping import Float
from torch import Tensor

from lynceus.core.errors import AdviceError, AdviceWarning, unknown
from lynceus.core.report import Report
from lynceus.rewrite.split.assign import Device
from lynceus.rewrite.split.plan import Plan, read
from lynceus.serve.edge.line import Line
from lynceus.serve.edge.process import started
from lynceus.serve.edge.wire import (
    ANSWER,
    ASK,
    ERROR,
    HELLO,
    TRY,
    Frame,
    Link,
    WireError,
    pack,
    quiet,
    receive,
    said,
    send,
    unpack,
)
from lynceus.serve.edge.worker import BATCH


@dataclass(frozen=True, kw_only=True)
class EdgeConfig:
    """How a cluster runs.

    deadline: seconds that an answer may take. heartbeat: seconds between signs of life. patience: seconds without one
    after which a device is lost. start: seconds that a process may take to be ready. shaped: messages take the time of
    the devices' links (rate, delay). pinned: each process on a core of its own, as far as there are cores."""

    deadline: float = 5.0
    heartbeat: float = 0.5
    patience: float = 5.0
    start: float = 120.0
    shaped: bool = True
    pinned: bool = True

    def __post_init__(self) -> None:
        if min(self.deadline, self.heartbeat, self.patience, self.start) <= 0:
            raise AdviceError("deadline, heartbeat, patience and start are seconds above 0.")


@dataclass(frozen=True, kw_only=True)
class Answer:
    """logits (b, classes). missing: devices whose features did not come. seconds: until the logits were there. devices:
    seconds from asking a device to its feature, and those that it computed. said: what devices complained of."""

    logits: Tensor
    missing: tuple[str, ...]
    seconds: float
    devices: dict[str, tuple[float, float]]
    said: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Timed:
    """Seconds, medians. wall: of whole answers; simulated: the devices were asked one by one, since they share cores,
    and the slowest counts. device: of each alone, with its link. predicted: by the latency model of the plan given."""

    wall: float
    simulated: bool
    device: dict[str, float]
    fusion: float
    predicted: float


class _Asked:
    """A request that devices have not all answered yet."""

    def __init__(self, waiting: set[str]):
        self.waiting = waiting
        self.done = threading.Event()
        self.start = time.perf_counter()
        self.got: dict[str, dict[str, Tensor]] = {}
        self.times: dict[str, tuple[float, float]] = {}
        self.said: dict[str, str] = {}

    def settle(self, name: str) -> None:
        """Nothing more is to come from a device; the last one wakes who asked."""
        self.waiting.discard(name)
        if not self.waiting:
            self.done.set()


class _Node:
    """One device: its process and its connection."""

    def __init__(self, device: Device, core: int | None):
        self.device, self.core = device, core
        self.state = "not started"
        self.reason = ""
        self.seen = 0.0
        self.process: subprocess.Popen[bytes] | None = None
        self.line: Line | None = None
        self.answered = 0
        self.lost = 0


class Cluster:
    """The running devices of a plan. Call it with images for logits; use it as a context, or `close` it."""

    def __init__(self, plan: Plan, folder: str | Path, config: EdgeConfig | None = None):
        """folder: where `plan` was saved. Starts all devices and waits until they are ready."""
        self.plan, self.folder, self.config = plan, Path(folder), config or EdgeConfig()
        self._closed = True  # until something runs
        there = [s["device"] for s in read(self.folder)["shares"]]
        if there != [s.device for s in plan.shares]:
            raise AdviceError(
                f"The plan in {self.folder} places its sub-models on {', '.join(there)}, this one on "
                f"{', '.join(s.device for s in plan.shares)}; plan.save(FOLDER) first, or deploy(plan) alone."
            )
        self._token = secrets.token_hex(16)
        self._lock = threading.Lock()
        self._asked: dict[int, _Asked] = {}
        self._next = 0
        self._closed = False
        self._temporary: tempfile.TemporaryDirectory[str] | None = None
        self._warned: set[str] = set()
        self.losses: list[str] = []
        self._nodes = {d.name: _Node(d, core) for d, core in zip(plan.used, self._cores(plan.used))}
        failures: dict[str, Exception] = {}

        def begin(node: _Node) -> None:
            try:
                self._begin(node)
            except Exception as error:
                failures[node.device.name] = error

        starts = [threading.Thread(target=begin, args=(n,), daemon=True) for n in self._nodes.values()]
        for thread in starts:
            thread.start()
        for thread in starts:
            thread.join()
        if failures:
            self.close()
            name, error = next(iter(failures.items()))
            raise AdviceError(f"Device {name} could not be started: {error}") from error
        threading.Thread(target=self._beat, daemon=True).start()

    # asking --------------------------------------------------------------------------------------
    def __call__(self, image: Tensor) -> Float[Tensor, "b classes"]:
        """Logits of images as the split model took them. Warns (AdviceWarning) when a device did not answer."""
        answers = [self.ask(x) for x in image.split(BATCH)]
        for name in dict.fromkeys(n for a in answers for n in a.missing):
            if name not in self._warned:
                self._warned.add(name)
                why = self._nodes[name].reason or f"no answer within {self.config.deadline:g} s"
                warnings.warn(
                    f"Device {name} did not answer ({why}); the classes that it owns suffer. "
                    f"cluster.restart({name!r}) brings it back.",
                    AdviceWarning,
                    stacklevel=2,
                )
        return torch.cat([a.logits for a in answers])

    def ask(self, image: Tensor, *, deadline: float | None = None, only: Sequence[str] | None = None) -> Answer:
        """Logits, and what each device did. image: at most 256. deadline: seconds, None for the configured. only: ask
        no other devices. AdviceError when no device answers at all."""
        self._check(image)
        limit = self.config.deadline if deadline is None else deadline
        wanted = list(self._nodes) if only is None else list(only)
        for name in wanted:
            self._node(name)
        asked = self._said(ASK, pack({"image": image}), wanted, limit)
        missing = tuple(n for n in self._nodes if n not in asked.got)
        for name in missing:
            self._nodes[name].lost += name in wanted
        if not asked.got:
            told = "; ".join(f"{n}: {self._nodes[n].reason or asked.said.get(n, 'too late')}" for n in wanted)
            raise AdviceError(
                f"No device answered within {limit:g} s ({told}). cluster.restart() starts lost ones again."
            )
        logits = self._fuse(len(image), asked.got)
        return Answer(
            logits=logits,
            missing=missing,
            seconds=time.perf_counter() - asked.start,
            devices=dict(asked.times),
            said=dict(asked.said),
        )

    def _check(self, image: Tensor) -> None:
        if image.ndim != 4 or tuple(image.shape[1:]) != self.plan.image_shape or not 1 <= len(image) <= BATCH:
            shape = ", ".join(map(str, self.plan.image_shape))
            raise AdviceError(f"This cluster takes images (1 to {BATCH}, {shape}), not {tuple(image.shape)}.")
        if self._closed:
            raise AdviceError("This cluster is closed; deploy(plan) starts another.")

    def _said(self, kind: int, payload: bytes, names: Sequence[str], limit: float, *, shaped: bool = True) -> _Asked:
        """Says the same to devices, all at once, and waits for their answers."""
        asked = _Asked(set())
        with self._lock:
            self._next += 1
            frame = Frame(kind=kind, number=self._next, payload=payload)
            lines = {n: line for n in names if (line := self._nodes[n].line) is not None}
            asked.waiting |= set(lines)
            self._asked[frame.number] = asked
        for line in lines.values():
            line.say(frame, shaped=shaped)
        if lines:
            asked.done.wait(max(asked.start + limit - time.perf_counter(), 0))
        with self._lock:
            del self._asked[frame.number]
        return asked

    def _fuse(self, count: int, got: dict[str, dict[str, Tensor]]) -> Tensor:
        fusion, found = self.plan.net.fusion, {k: v for part in got.values() for k, v in part.items()}
        like = fusion.fc1.weight
        rows = [found.get(f"feature.{i}", torch.zeros(count, width)).to(like) for i, width in enumerate(fusion.widths)]
        with torch.inference_mode():
            out: Tensor = fusion(torch.cat(rows, 1))
        return out.clone()

    # devices -------------------------------------------------------------------------------------
    @property
    def alive(self) -> list[str]:
        return [n for n, node in self._nodes.items() if node.state == "up"]

    def kill(self, name: str) -> None:
        """Ends a device's process at once, as a power cut would."""
        node = self._node(name)
        if node.process is not None:
            node.process.kill()
            node.process.wait()

    def restart(self, name: str | None = None) -> None:
        """Starts a lost device again (None: all that are lost), which then answers as before."""
        for node in [self._node(name)] if name is not None else list(self._nodes.values()):
            if node.state == "up" and node.process is not None and node.process.poll() is None:
                continue
            self._lose(node, "restarted")
            self._begin(node)
            self._warned.discard(node.device.name)

    def status(self) -> Report:
        """One row per device: state, process, core, sub-models, answers given and missed."""
        now, rows = time.monotonic(), []
        for name, node in self._nodes.items():
            up = node.state == "up"
            rows.append(
                {
                    "device": name,
                    "state": node.state if up else f"{node.state}: {node.reason}",
                    "process": node.process.pid if node.process is not None else None,
                    "core": node.core,
                    "sub-models": ", ".join(map(str, self.plan.on(name))),
                    "answered": node.answered,
                    "missed": node.lost,
                    "seen s ago": round(now - node.seen, 2) if node.seen else None,
                }
            )
        lost = [n for n in self._nodes if n not in self.alive]
        answer = f"All {len(rows)} devices answer." if not lost else f"Lost: {', '.join(lost)}. The rest answers."
        notes = [*self.losses]
        if self.shared:
            notes.append("Devices share cores: their wall-clock times together say nothing; `timed` asks one by one.")
        return Report(name="Cluster", rows=rows, answer=answer, notes=notes)

    @property
    def shared(self) -> bool:
        """True when two devices sit on one core, so that times together are no measurement."""
        cores = [n.core for n in self._nodes.values()]
        return len(set(cores)) < len(cores)

    # time ----------------------------------------------------------------------------------------
    def timed(self, image: Tensor, *, repeats: int = 20, plan: Plan | None = None) -> Timed:
        """Measures answers to `image`: each device alone, and, where every device has a core of its own, all at once.

        plan: whose latency model stands beside (this cluster's own by default; `calibrated()` has measured speeds)."""
        each = {}
        for name in self.alive:
            each[name] = statistics.median(
                self.ask(image, only=[name]).devices[name][0] for _ in range(max(repeats, 1))
            )
        fusion = self._fusing(len(image), repeats)
        if self.shared:
            wall = max(each.values()) + fusion
        else:
            wall = statistics.median(self.ask(image).seconds for _ in range(max(repeats, 1)))
        predicted = (plan or self.plan).latency(len(image))
        return Timed(wall=wall, simulated=self.shared, device=each, fusion=fusion, predicted=predicted)

    def calibrated(self, image: Tensor, *, repeats: int = 20) -> Plan:
        """The plan with measured speeds, as they are in use: all devices compute `image` at once, since they share
        memory and caches (one by one where they share cores), and each one's median of `repeats` counts. `overhead`
        is what a request took besides, the links' shapes left out. The fusion likewise."""
        turns = [[n] for n in self.alive] if self.shared else [self.alive]
        self._check(image)
        payload = pack({"image": image})
        spans: dict[str, list[tuple[float, float]]] = {}
        for names in turns * max(repeats, 1):
            for name, span in self._said(TRY, payload, names, self.config.deadline, shaped=False).times.items():
                spans.setdefault(name, []).append(span)
        devices = []
        for d in self.plan.devices:
            if d.name in spans:
                flops = len(image) * sum(self.plan.shares[i].flops for i in self.plan.on(d.name))
                computed = statistics.median(c for _, c in spans[d.name])
                overhead = statistics.median(there - c for there, c in spans[d.name])
                d = replace(d, speed=flops / computed, overhead=overhead)
            devices.append(d)
        speed = len(image) * self.plan.fusion_flops / self._fusing(len(image), repeats)
        return replace(self.plan.with_devices(devices), fusion_speed=speed)

    def _fusing(self, count: int, repeats: int) -> float:
        """Seconds that the fusion takes, median."""
        got = {"": {f"feature.{i}": torch.zeros(count, width) for i, width in enumerate(self.plan.net.fusion.widths)}}
        spans = []
        for _ in range(max(repeats, 5)):
            start = time.perf_counter()
            self._fuse(count, got)
            spans.append(time.perf_counter() - start)
        return statistics.median(spans)

    # life ----------------------------------------------------------------------------------------
    def __enter__(self) -> Cluster:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends all processes. Asking afterwards is an AdviceError."""
        self._closed = True
        for node in self._nodes.values():
            self._lose(node, "closed")
            if node.process is not None and node.process.poll() is None:
                if node.process.stdin is not None:
                    node.process.stdin.close()
                try:
                    node.process.wait(2.0)
                except subprocess.TimeoutExpired:
                    node.process.kill()
                    node.process.wait()
        if self._temporary is not None:
            self._temporary.cleanup()
            self._temporary = None

    def __del__(self) -> None:
        if not getattr(self, "_closed", True):
            self.close()

    def _node(self, name: str) -> _Node:
        if name not in self._nodes:
            raise unknown("device in this cluster", name, self._nodes)
        return self._nodes[name]

    def _cores(self, devices: Sequence[Device]) -> list[int | None]:
        if not self.config.pinned or not hasattr(os, "sched_getaffinity"):
            return [None] * len(devices)
        free = sorted(os.sched_getaffinity(0))
        for d in devices:
            if d.core is not None and d.core not in free:
                raise AdviceError(f"Device {d.name} wants core {d.core}; this process may use {free}.")
        rest = [c for c in free if c not in {d.core for d in devices}] or free
        out: list[int | None] = []
        for d in devices:
            out.append(d.core if d.core is not None else rest[sum(x is not None for x in out) % len(rest)])
        return out

    def _begin(self, node: _Node) -> None:
        """Starts the process of a device and connects to it."""
        d, name = node.device, node.device.name
        link = Link(rate=d.rate, delay=d.delay) if self.config.shaped else Link()
        node.process, port = started(
            self.folder, name, token=self._token, core=node.core, link=link, seconds=self.config.start
        )
        sock = quiet(socket.create_connection(("127.0.0.1", port), timeout=5.0))
        sock.settimeout(None)
        hello = {"token": self._token, "beat": self.config.heartbeat}
        try:
            send(sock, Frame(kind=HELLO, payload=json.dumps(hello).encode()))
            told = said(receive(sock, wait=5.0, most=4096).payload)
            if told.get("device") != name or told.get("parts") != self.plan.on(name):
                raise WireError(f"it holds {told.get('parts')} of {told.get('device')}, not {self.plan.on(name)}")
        except OSError:
            sock.close()
            node.process.kill()
            raise
        with self._lock:
            node.seen, node.reason, node.state = time.monotonic(), "", "up"
            node.line = Line(sock, link if link.shaped else None, lambda sock, why: self._lose(node, why, sock))
        threading.Thread(target=self._read, args=(node, sock), daemon=True).start()

    def _read(self, node: _Node, sock: socket.socket) -> None:
        name = node.device.name
        try:
            while True:
                frame = receive(sock)
                node.seen = time.monotonic()
                if frame.kind == ANSWER:
                    self._take(node, frame)
                elif frame.kind == ERROR:
                    with self._lock:
                        asked = self._asked.get(frame.number)
                        if asked is not None and name in asked.waiting:
                            asked.said[name] = frame.payload.decode(errors="replace")
                            asked.settle(name)
        except OSError as error:
            self._lose(node, str(error), sock)

    def _take(self, node: _Node, frame: Frame) -> None:
        name, found = node.device.name, unpack(frame.payload)
        took = float(found.pop("seconds", torch.zeros(1))[0])
        widths = self.plan.net.fusion.widths
        if set(found) != {f"feature.{i}" for i in self.plan.on(name)} or any(
            v.ndim != 2 or v.shape[1] != widths[int(k.partition(".")[2])] for k, v in found.items()
        ):
            raise WireError("its features are not those of the plan")
        with self._lock:
            asked = self._asked.get(frame.number)
            if asked is not None and name in asked.waiting:  # later than the deadline, it is dropped
                asked.got[name] = found
                asked.times[name] = (time.perf_counter() - asked.start, took)
                asked.settle(name)
                node.answered += 1

    def _lose(self, node: _Node, reason: str, sock: socket.socket | None = None) -> None:
        """Marks a device as lost; whoever waits for it waits no longer."""
        with self._lock:
            if sock is not None and (node.line is None or node.line.sock is not sock):
                return  # an older connection, or one that is lost already
            was, node.state, node.reason = node.state, "lost", reason
            if node.line is not None:
                with suppress(OSError):
                    node.line.sock.shutdown(socket.SHUT_RDWR)
                node.line.sock.close()
                node.line.close()
                node.line = None
            for asked in self._asked.values():
                asked.settle(node.device.name)
            if was == "up" and not self._closed and reason != "restarted":
                code = node.process.poll() if node.process is not None else None
                ended = f", its process ended with {code}" if code is not None else ""
                self.losses.append(f"{time.strftime('%H:%M:%S')} lost {node.device.name}: {reason}{ended}.")

    def _beat(self) -> None:
        """Devices say by themselves that they live; who has been silent for too long is lost."""
        while not self._closed:
            time.sleep(self.config.heartbeat)
            for node in list(self._nodes.values()):
                line = node.line
                if line is not None and time.monotonic() - node.seen > self.config.patience:
                    self._lose(node, f"no sign of life for {self.config.patience:g} s", line.sock)


def deploy(plan: Plan, *, folder: str | Path | None = None, config: EdgeConfig | None = None) -> Cluster:
    """Starts one process per device of the plan on this machine and returns the cluster that asks them.

    folder: where the plan is saved already; None saves it to a temporary folder. config: deadlines, heartbeat, shaping
    of links, pinning."""
    temporary = tempfile.TemporaryDirectory(prefix="lynceus-edge-") if folder is None else None
    place = plan.save(temporary.name) if temporary is not None else Path(str(folder))
    try:
        made = Cluster(plan, place, config)
    except BaseException:
        if temporary is not None:
            temporary.cleanup()
        raise
    made._temporary = temporary
    return made
