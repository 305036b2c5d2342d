"""The fastest way to run a model on this machine that still gives its answers: tried, timed and compared.

    fast = Deploy()(model, example, images=pixels)
    fast.report.table(); fast(image)

Every way of `rewrite.ways` that this machine has is built from a copy of the model, timed in turns with the plain model
on `example`, and compared with it on `images`. The fastest of those that keep the answers is what comes back.
"""

from __future__ import annotations

import copy
import ctypes
import gc
import math
import os
import statistics
import time
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lynceus.core.errors import AdviceError, unknown
from lynceus.core.plots import bars
from lynceus.core.progress import progress
from lynceus.core.report import Report, environment
from lynceus.core.types import as_float
from lynceus.rewrite.ways import WAYS, Run, with_threads

CLOSE = 0.01  # of the reference's standard deviation: what counts as the same where outputs have no first answer


@dataclass(frozen=True, kw_only=True)
class Deploy:
    """Rewrite: the model run in the fastest way that this machine has, inputs and outputs as before.

    tolerance: least share of images whose first answer stays (where there are no classes: of images whose outputs stay
    within 1% of a standard deviation). difference: given, also the largest difference of any output, in standard
    deviations of the plain model's. ways: names of `lynceus.rewrite.ways.WAYS` to try; None: all that suit the machine,
    without 8 bits and compiling by trial. seconds: of timing, per way. threads: CPU threads to try for the best way;
    None: those of torch, half and the double of them, and one. fallback: the way for shapes that a compiled model was
    not made for.
    """

    tolerance: float = 0.995
    difference: float | None = None
    ways: tuple[str, ...] | None = None
    seconds: float = 2.0
    threads: tuple[int, ...] | None = None
    fallback: str = "eager"

    def __post_init__(self) -> None:
        for name in (*(self.ways or ()), self.fallback):
            if name not in WAYS:
                raise unknown("way to run a model", name, WAYS)
        if self.ways is not None and not self.ways:
            raise AdviceError(f"There is no way to try: leave ways out, or name some of {', '.join(WAYS)}.")
        if WAYS[self.fallback].fixed:
            raise AdviceError(f"fallback takes any shape, {self.fallback!r} does not; take 'eager'.")
        if not 0 <= self.tolerance <= 1:
            raise AdviceError(f"tolerance is a share of images from 0 to 1, not {self.tolerance}.")
        if self.difference is not None and not self.difference >= 0:
            raise AdviceError(f"difference is at least 0, not {self.difference}.")
        if self.seconds < 0:
            raise AdviceError(f"seconds is at least 0, not {self.seconds}.")
        if self.threads is not None and (not self.threads or min(self.threads) < 1):
            raise AdviceError(f"threads are counts from 1 on, not {self.threads}.")

    def __call__(
        self,
        model: nn.Module,
        example: Tensor | None,
        images: Tensor | Iterable[Tensor] | None = None,
        *,
        quiet: bool = False,
    ) -> Deployed:
        """The fastest way as a module, its `report` with everything tried; `model` stays as it is.

        example: a batch (b, c, h, w) as the model takes it; its shape is what is timed. None, with exactly one way:
        nothing is measured, and the way is built at the first call. images: batches to judge the answers on, as the
        model takes them; None: the example alone.
        """
        if not isinstance(model, nn.Module):
            raise AdviceError(f"Deploy takes a module, not {type(model).__name__}.")
        if example is None:
            if self.ways is None or len(self.ways) != 1:
                raise AdviceError("Without an example nothing can be measured: give one, or name one way.")
            return Deployed(model, self)
        if example.ndim != 4 or not len(example):
            raise AdviceError(f"The example is a batch of images (b, c, h, w), not {tuple(example.shape)}.")
        return _Trial(self, model, example.detach(), images, quiet).best()


class Deployed(nn.Module):
    """What `Deploy` makes: the same images in, the same outputs, run in one way.

    `model` holds the weights, in the original's dtype; what runs is made from them at the first call, and again when
    they changed. Where gradients are asked for (of the image, or of a parameter that was unfrozen), inside
    torch.compile and torch.export, under a counter of operations, in float64 and on another device, it is the plain
    model that runs. Other names are the plain model's.
    """

    def __init__(self, model: nn.Module, config: Deploy, report: Report | None = None):
        super().__init__()
        assert config.ways is not None
        self.model = _own_copy(model)
        self.rewrite = config
        self.way = config.ways[0]
        self.name = f"{getattr(model, 'name', type(model).__name__)}, {self.way}"
        self.report = report
        self.owns_pixels = bool(getattr(model, "owns_pixels", False))
        self._made: dict[str, tuple[Any, Run | None]] = {}
        self.eval()

    @property
    def original(self) -> nn.Module:
        return self.model

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("_") or name == "model":
                raise
            return getattr(self.model, name)

    def __deepcopy__(self, memo: Any) -> Deployed:
        made = Deployed(self.model, self.rewrite, self.report)
        made.name = self.name
        return made

    def __reduce__(self) -> Any:
        return Deployed, (self.model, self.rewrite, self.report)

    def train(self, mode: bool = True) -> Deployed:
        if mode:
            raise AdviceError("A deployed model is for inference; train the model that it was made from.")
        return super().train(False)

    def forward(self, image: Tensor) -> Any:
        first = next(self.model.parameters(), None)
        foreign = (
            image.dtype == torch.float64
            or image.device.type == "meta"
            or (first is not None and image.device != first.device)
            or torch._C._len_torch_dispatch_stack() > 0  # e.g. a counter of operations, which knows ordinary ones
        )
        wanted = torch.is_grad_enabled() and (image.requires_grad or any(p.requires_grad for p in self.parameters()))
        if wanted or foreign or torch.compiler.is_compiling() or torch.compiler.is_exporting():
            return self.model(image)
        threads = (self.rewrite.threads or (torch.get_num_threads(),))[0]
        with with_threads(threads), torch.no_grad():
            for way in (self.way, self.rewrite.fallback):
                run = self._run(way, image)
                if run is not None:
                    return run(image)
            return self.model(image)

    def _run(self, way: str, image: Tensor) -> Run | None:
        """The way, made for the weights as they are; None when it is made for another shape, or cannot be made."""
        stamp = (image.dtype, tuple((t.data_ptr(), t._version) for t in _tensors(self.model)))
        fixed = WAYS[way].fixed
        kept = self._made.get(way)
        if kept is not None and kept[0][1] == stamp:
            return kept[1] if not fixed or kept[0][0] == image.shape else None
        try:
            run: Run | None = build(way, self.model, image)
        except Exception as error:
            warnings.warn(f"{way!r} does not work here ({_short(error)}); the plain model runs instead.", stacklevel=3)
            run = None
        self._made[way] = ((image.shape, stamp), run)
        return run

    def keep(self, way: str, run: Run, image: Tensor) -> None:
        """Takes over a way that was already built from these weights for images of this shape and dtype."""
        stamp = (image.dtype, tuple((t.data_ptr(), t._version) for t in _tensors(self.model)))
        self._made[way] = ((image.shape, stamp), run)


def build(way: str, model: nn.Module, example: Tensor) -> Run:
    """The model run in that way, made from a copy of it."""
    with torch.no_grad():
        return WAYS[way].build(_own_copy(model), example.detach())


# measuring ------------------------------------------------------------------------------------------
class _Trial:
    """One measurement of all ways."""

    def __init__(self, config: Deploy, model: nn.Module, example: Tensor, images: Any, quiet: bool):
        self.config, self.model, self.example, self.quiet = config, _own_copy(model), example, quiet
        self.name = str(getattr(model, "name", type(model).__name__))
        self.current = torch.get_num_threads()
        self.plain = build("plain", self.model, example)
        self.images = [example] if images is None else _batches(images, example)
        self.own = images is not None
        with torch.no_grad():
            self.wanted = [_outputs(self.plain(x)) for x in self.images]
        self.rows: list[dict[str, Any]] = []
        self.runs: dict[tuple[str, int], Run] = {}

    def best(self) -> Deployed:
        names = list(self.config.ways or [n for n, w in WAYS.items() if w.default])
        names = list(dict.fromkeys(["plain", self.config.fallback, *names]))
        asked = self.config.ways is not None
        counts = [n for n in self._thread_counts() if n != self.current]
        first = self.current if self.config.threads is None else self.config.threads[0]
        with progress("deploying", total=len(names) + len(counts), unit="ways", quiet=self.quiet) as bar:
            for name in names:
                reason = WAYS[name].refuse(self.model, self.example)
                if reason and not asked:
                    self._row(name, first, verdict=f"skipped: {reason}")
                else:
                    self._try(name, first)
                bar.advance(way=name)
            best = self._fastest()
            for count in counts:
                if count != first:
                    self._try(best["way"], count, faster_than=best["speed"])
                bar.advance(way=f"{best['way']}, {count} threads")
        best = self._fastest()
        best["verdict"] = "fastest"
        return self._made(best)

    def _thread_counts(self) -> list[int]:
        if self.config.threads is not None:
            return list(self.config.threads)
        if self.example.device.type != "cpu":
            return []
        cores = _cores()
        tried = (1, self.current // 2, self.current * 2, cores)
        return sorted({n for n in tried if 1 <= n <= cores})

    def _try(self, name: str, threads: int, *, faster_than: float = 0.0) -> None:
        """Builds, times and compares one way; whatever goes wrong becomes its reason. What is no faster than
        `faster_than` is not compared."""
        begun = time.perf_counter()
        try:
            with with_threads(threads), torch.no_grad():
                run = self.plain if name == "plain" else build(name, self.model, self.example)
                run(self.example)
                built = time.perf_counter() - begun
                found: dict[str, Any] = self._time(run, threads)
                found["memory_mb"] = peak_memory(run, self.example)
                slow = found["speed"] <= faster_than
                found |= {"verdict": "slower"} if slow else self._compare(name, run)
        except Exception as error:
            self._row(name, threads, verdict=f"failed: {_short(error)}", build_s=time.perf_counter() - begun)
            return
        self._row(name, threads, build_s=built, **found)
        row = self.rows[-1]
        if row["verdict"] == "ok" and row is self._fastest():  # one is kept: each holds a copy of the weights
            self.runs = {(name, threads): run}

    def _compare(self, name: str, run: Run) -> dict[str, Any]:
        """Agreement and largest difference on the images; a way for one shape sees full batches of that shape."""
        same = positions = count = 0
        worst, classes = 0.0, True
        for image, wanted in zip(self.images, self.wanted):
            if WAYS[name].fixed and image.shape[1:] != self.example.shape[1:]:
                continue
            given = _outputs(run(_filled(image, len(self.example)) if WAYS[name].fixed else image))
            given = [g[: len(image)] if g.ndim else g for g in given]
            if [g.shape for g in given] != [w.shape for w in wanted]:
                raise AdviceError("the outputs have other shapes")
            gaps = []
            for g, w in zip(given, wanted):
                spread = float(w.double().std()) if w.numel() > 1 else float(w.double().abs().max())
                gap = (g.double() - w.double()).abs().flatten(1 if w.ndim > 1 else 0) / max(spread, 1e-12)
                gaps.append(gap.reshape(len(image), -1).amax(1) if w.ndim and len(w) == len(image) else gap.max())
                worst = max(worst, float(torch.nan_to_num(gap.detach(), nan=math.inf).max()))
            if wanted[0].ndim >= 2 and wanted[0].shape[1] > 1:
                agree = given[0].argmax(1) == wanted[0].argmax(1)
                same, positions = same + int(agree.sum()), positions + agree.numel()
            else:
                classes = False
                near = torch.stack([g.expand(len(image)) for g in gaps]).amax(0) <= CLOSE
                same, positions = same + int(near.sum()), positions + len(image)
            count += len(image)
        if not count:
            raise AdviceError("no image has the shape that it is made for")
        agreement = same / positions
        verdict = "ok"
        if agreement < self.config.tolerance:
            what = "first answer" if classes else "output"
            verdict = f"too different: {agreement:.2%} keep their {what}, {self.config.tolerance:.2%} must"
        elif self.config.difference is not None and not worst <= self.config.difference:
            verdict = f"too different: by {worst:.1e} standard deviations, at most {self.config.difference:.1e} may be"
        return {"agreement": agreement, "difference": worst, "images": count, "verdict": verdict}

    def _time(self, run: Run, threads: int) -> dict[str, float]:
        """Medians of the plain model at the current threads and of this way, taken in turns."""
        times: tuple[list[float], list[float]] = ([], [])
        begun = time.perf_counter()
        while len(times[0]) < 3 or (time.perf_counter() - begun < self.config.seconds and len(times[0]) < 200):
            for i, (each, count) in enumerate(((self.plain, self.current), (run, threads))):
                with with_threads(count):
                    start = time.perf_counter()
                    each(self.example)
                    if self.example.device.type == "cuda":
                        torch.cuda.synchronize(self.example.device)
                    times[i].append(time.perf_counter() - start)
        ms = 1e3 * statistics.median(times[1])
        speed = statistics.median(a / b for a, b in zip(*times))
        return {"ms": ms, "per_second": 1e3 * len(self.example) / ms, "speed": speed}

    def _row(self, name: str, threads: int, *, verdict: str, **found: Any) -> None:
        empty = dict.fromkeys(
            ("ms", "per_second", "speed", "agreement", "difference", "memory_mb", "build_s"), math.nan
        )
        row = {"way": name, "what": WAYS[name].text, "threads": threads, **empty, "images": 0, **found}
        self.rows.append({**row, "verdict": verdict})

    def _fastest(self) -> dict[str, Any]:
        good = [r for r in self.rows if r["verdict"] == "ok"]
        if not good:  # the plain model itself could not be run
            raise AdviceError(f"{self.name} cannot be run on the example: {self.rows[0]['verdict']}.")
        return max(good, key=lambda r: r["speed"])

    def _made(self, best: dict[str, Any]) -> Deployed:
        config = replace(self.config, ways=(best["way"],), threads=(best["threads"],))
        made = Deployed(self.model, config, self._report(best))
        run = self.runs.get((best["way"], best["threads"]))
        if run is not None:
            made.keep(best["way"], run, self.example)
        return made

    def _report(self, best: dict[str, Any]) -> Report:
        shape = "x".join(map(str, self.example.shape))
        seen = best["images"]
        judged = f"{seen} of the user's images" if self.own else f"the example's {seen} images alone"
        notes = [
            f"Judged on {judged}; with {seen} images, a share cannot be known finer than {1 / max(seen, 1):.2%}.",
            f"Times: medians at {shape}, in turns with the plain model at {self.current} threads; speed is the median "
            "of plain / way. memory_mb: the highest resident size of a run less that before it.",
        ]
        timed = [r for r in self.rows if r["ms"] == r["ms"]]
        names = [f"{r['way']}, {r['threads']} threads" for r in timed]
        groups = {
            kind: [r["speed"] if (r["verdict"] in ("ok", "fastest")) == good else math.nan for r in timed]
            for kind, good in (("keeps the answers", True), ("does not", False))
        }
        groups = {k: v for k, v in groups.items() if any(x == x for x in v)}
        answer = (
            f"{best['way']} at {best['threads']} threads: {best['speed']:.2f} times the plain model, "
            f"{best['agreement']:.2%} of {seen} images keep their answer."
        )
        return Report(
            name=f"Deploy of {self.name}",
            answer=answer,
            rows=self.rows,
            summary={k: best[k] for k in ("speed", "ms", "agreement", "difference", "images")},
            figures={"speed.plotly": bars(names, groups, title="times as fast as the plain model")},
            notes=notes,
            environment=environment(threads=str(self.current), device=str(self.example.device)),
        )


def peak_memory(run: Run, example: Tensor) -> float:
    """MB that one run takes above what there is before; nan where the system does not tell."""
    if example.device.type == "cuda":
        torch.cuda.synchronize(example.device)
        before = torch.cuda.memory_allocated(example.device)
        torch.cuda.reset_peak_memory_stats(example.device)
        run(example)
        return (torch.cuda.max_memory_allocated(example.device) - before) / 1e6
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)  # what is free already would hide what the run takes
        Path("/proc/self/clear_refs").write_text("5")
        before = _resident("VmRSS")
        run(example)
        return (_resident("VmHWM") - before) / 1e3
    except (OSError, AttributeError, TypeError, StopIteration):
        return math.nan


def _resident(key: str) -> int:
    """kB of /proc/self/status."""
    line = next(s for s in Path("/proc/self/status").read_text().splitlines() if s.startswith(key))
    return int(line.split()[1])


def _own_copy(model: nn.Module) -> nn.Module:
    """A copy in eval mode whose parameters take no gradients."""
    made = copy.deepcopy(model)
    made.eval()
    return made.requires_grad_(False)


def _tensors(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]


def _outputs(value: Any) -> list[Tensor]:
    found = [t.float() if t.is_floating_point() else t for t in tree_leaves(value) if isinstance(t, Tensor)]
    if not found:
        raise AdviceError(f"The model gives a {type(value).__name__} without tensors; there is nothing to compare.")
    return found


def _batches(images: Tensor | Iterable[Tensor], example: Tensor) -> list[Tensor]:
    """The images in pieces of the example's batch size, on its device and in its dtype."""
    given = [images] if isinstance(images, Tensor) else list(images)
    out: list[Tensor] = []
    for batch in given:
        if not isinstance(batch, Tensor) or batch.ndim != 4:
            what = tuple(batch.shape) if isinstance(batch, Tensor) else type(batch).__name__
            raise AdviceError(f"images are batches (b, c, h, w) as the model takes them, not {what}.")
        batch = batch if batch.dtype == example.dtype else as_float(batch).to(example.dtype)
        out += [p for p in batch.detach().to(example.device).split(len(example)) if len(p)]
    if not out:
        raise AdviceError("There is no image to judge on: images is empty; leave it out to judge on the example.")
    return out


def _filled(image: Tensor, count: int) -> Tensor:
    """The batch brought to `count` images by repeating its last."""
    return image if len(image) == count else torch.cat([image, image[-1:].expand(count - len(image), -1, -1, -1)])


def _cores() -> int:
    """That this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _short(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {(lines or ['no message'])[0][:200]}"
