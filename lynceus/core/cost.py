"""What a model costs: parameters, multiply-adds (MACs), activations, and time.

`cost` runs the model on shapes alone (torch's meta device), so that counting takes neither its memory nor its time; a
model that must see numbers is run on the example itself. Fused attention, FFT and their kin are counted; what was not
counted is named. `latency` measures.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lynceus.core.counter import Counting, named
from lynceus.core.errors import AdviceError
from lynceus.core.report import Report, environment
from lynceus.core.subject import Subject
from lynceus.core.types import Sample


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Counts of one forward pass.

    params, trainable: numbers in parameters. macs: multiply-adds of convolutions, matrix products, attention and
    transforms. flops: two per multiply-add. activations: numbers written by those operators. peak_bytes: most bytes of
    intermediate results alive at once (weights and input not counted). modules: one dict per module that has parameters
    or MACs: name, type, params, macs, share of all MACs. skipped: operators that compute something and were not
    counted, with how often they ran. shape: of the input. ran: "meta" (shapes only) or "real".
    """

    params: int
    trainable: int
    macs: int
    flops: int
    activations: int
    peak_bytes: int
    modules: list[dict[str, Any]] = field(repr=False)
    skipped: dict[str, int]
    shape: tuple[int, ...]
    ran: str

    def report(self, name: str = "cost", *, depth: int = 2) -> Report:
        """The counts as a Report; modules down to `depth` dots."""
        rows = [r for r in self.modules if r["module"].count(".") < depth]
        notes = [f"Counted for an input of shape {'x'.join(map(str, self.shape))}."]
        if self.skipped:
            notes.append(f"Not counted: {', '.join(f'{k} ({v})' for k, v in self.skipped.items())}.")
        return Report(name=name, rows=rows, summary=self.summary(), notes=notes)

    def summary(self) -> dict[str, float]:
        return {
            "parameters": self.params,
            "trainable": self.trainable,
            "macs": self.macs,
            "activations": self.activations,
            "peak_activation_mb": self.peak_bytes / 1e6,
        }

    def table(self) -> str:
        return self.report().table()


def cost(model: nn.Module, example: Tensor) -> Cost:
    """Counts one forward pass of `model` on `example` (any device, also meta: only its shape matters).

    The model is left as it is: a copy without weights is counted, in eval mode. Only a model that cannot run on shapes
    alone (its path depends on values) runs itself on `example`; AdviceError when that is on the meta device.
    """
    try:
        counting, skeleton = _on_meta(model, example), "meta"
    except Exception as error:
        if example.is_meta:
            raise AdviceError(
                f"{type(model).__name__} cannot be counted on shapes alone ({error}); give a real example."
            ) from None
        counting, skeleton = _really(model, example), "real"
    total = counting.flops[""]
    modules = []
    for name, module in model.named_modules():
        params, flops = sum(p.numel() for p in module.parameters()), counting.flops[name]
        if name and (params or flops):
            row = {"module": name, "type": type(module).__name__, "params": params, "macs": flops // 2}
            modules.append({**row, "share": flops / total if total else 0.0})
    return Cost(
        params=sum(p.numel() for p in model.parameters()),
        trainable=sum(p.numel() for p in model.parameters() if p.requires_grad),
        macs=total // 2,
        flops=total,
        activations=counting.written,
        peak_bytes=counting.peak,
        modules=modules,
        skipped=dict(sorted(counting.skipped.items(), key=lambda item: (-item[1], item[0]))),
        shape=tuple(example.shape),
        ran=skeleton,
    )


def _on_meta(model: nn.Module, example: Tensor) -> Counting:
    memo: dict[int, Any] = {}
    for p in model.parameters():
        memo[id(p)] = nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=p.requires_grad)
    for b in model.buffers():
        memo[id(b)] = torch.empty_like(b, device="meta")
    return _counted(copy.deepcopy(model, memo).eval(), torch.empty_like(example, device="meta"))


def _really(model: nn.Module, example: Tensor) -> Counting:
    with evaluating(model):
        return _counted(model, example)


def _counted(model: nn.Module, example: Tensor) -> Counting:
    counting = Counting()
    counting.ignore(model, example)
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # one opaque operator otherwise
    try:
        with torch.no_grad(), named(model, counting), counting:
            model(example)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    return counting


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode inside; afterwards every module is in the mode that it was in."""
    modes = [(m, m.training) for m in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@dataclass(frozen=True, kw_only=True)
class Latency:
    """Milliseconds of one forward pass: median, p10 and p90 over `repeats` runs. throughput: images per second at the
    median. peak_bytes: most memory taken on a GPU; on a CPU the counted peak of intermediate results."""

    median: float
    p10: float
    p90: float
    throughput: float
    peak_bytes: int | None
    batch: int
    repeats: int
    threads: int
    device: str

    def summary(self) -> dict[str, float]:
        return {
            "latency_ms": self.median,
            "latency_p10_ms": self.p10,
            "latency_p90_ms": self.p90,
            "images_per_second": self.throughput,
        }


def latency(
    model: nn.Module | Subject, example: Tensor, *, repeats: int = 20, warmup: int = 3, threads: int | None = None
) -> Latency:
    """Measures forward passes on `example` (b, c, h, w), in eval and inference mode, `repeats` times after `warmup`.

    threads: CPU threads while measuring; None leaves torch's. A model on a GPU is waited for after each pass.
    """
    if repeats < 1 or warmup < 0:
        raise AdviceError(f"latency needs repeats >= 1 and warmup >= 0, not {repeats} and {warmup}.")
    module = model.model if isinstance(model, Subject) else model
    device = example.device
    cuda = device.type == "cuda"
    before = torch.get_num_threads()
    times = []
    peak: int | None = None
    with evaluating(module if isinstance(module, nn.Module) else nn.Module()), torch.inference_mode():
        try:
            if threads is not None:
                torch.set_num_threads(threads)
            used = torch.get_num_threads()
            for _ in range(warmup):
                model(example)
            if cuda:
                torch.cuda.synchronize(device)
                torch.cuda.reset_peak_memory_stats(device)
            for _ in range(repeats):
                start = time.perf_counter()
                model(example)
                if cuda:
                    torch.cuda.synchronize(device)
                times.append(1e3 * (time.perf_counter() - start))
        finally:
            torch.set_num_threads(before)
    if cuda:
        peak = int(torch.cuda.max_memory_allocated(device))
    elif isinstance(module, nn.Module) and not isinstance(model, Subject):
        peak = cost(module, example).peak_bytes
    median = statistics.median(times)
    tenths = statistics.quantiles(times, n=10, method="inclusive") if len(times) > 1 else times * 9
    return Latency(
        median=median,
        p10=tenths[0],
        p90=tenths[-1],
        throughput=1e3 * len(example) / median,
        peak_bytes=peak,
        batch=len(example),
        repeats=repeats,
        threads=used,
        device=str(device),
    )


@dataclass(frozen=True, kw_only=True)
class CostCheck:
    """Check: what a subject costs. Parameters, MACs, activation memory, latency, and what was not counted.

    size: side or (h, w) of the image; None: the subject's own size, else the first image's, else the model's.
    batch: images per pass. repeats, warmup, threads: of the measurement; repeats=0 measures nothing. depth: levels of
    modules in the table.
    """

    needs: ClassVar[frozenset[str]] = frozenset()

    size: int | tuple[int, int] | None = None
    batch: int = 1
    repeats: int = 20
    warmup: int = 3
    threads: int | None = None
    depth: int = 2

    def __call__(self, subject: Subject, data: Iterable[Sample], *, seed: int = 0) -> Report:
        """Of `data` only the size of the first image is read; it may be empty. All figures are of one pass."""
        height, width = self._size(subject, data)
        channels = getattr(getattr(getattr(subject.model, "backbone", subject.model), "config", None), "in_chans", 3)
        pixels = torch.rand(
            self.batch, channels if channels == 1 else 3, height, width, generator=torch.Generator().manual_seed(seed)
        )
        if isinstance(subject.model, nn.Module):
            counted = cost(subject.model, subject.prepare(pixels))
            report = counted.report(f"Cost of {subject.name}", depth=self.depth)
        else:
            report = Report(name=f"Cost of {subject.name}")
            report.notes.append(f"{subject.name} is a plain function: only its time can be measured.")
        if self.repeats:
            timed = latency(
                subject,
                pixels.to(subject.device),
                repeats=self.repeats,
                warmup=self.warmup,
                threads=self.threads,
            )
            report.summary |= timed.summary()
            report.notes.append(
                f"Latency: median of {timed.repeats} passes of {timed.batch} x {height} x {width}, "
                f"{timed.threads} threads, on {timed.device}; resizing and normalising are inside."
            )
        report.environment = environment(seed=seed, device=str(subject.device))
        return report

    def _size(self, subject: Subject, data: Iterable[Sample]) -> tuple[int, int]:
        size: Any = self.size
        if size is None:
            size = subject.size
        if size is None and (first := next(iter(data), None)) is not None:
            size = tuple(first.image.shape[-2:])
        if size is None:
            inner = getattr(subject.model, "backbone", subject.model)
            size = getattr(subject.model, "image_size", None) or getattr(inner, "input_size", (224, 224))
        height, width = (size, size) if isinstance(size, int) else size
        return int(height), int(width)
