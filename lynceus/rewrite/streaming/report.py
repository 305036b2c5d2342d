"""What a stream costs beside its clip, and whether it gives the same: measured on random frames."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from lynceus.core.errors import AdviceError
from lynceus.core.report import Report, environment
from lynceus.core.rng import generator
from lynceus.rewrite.streaming.model import State, StreamingModel


def measure(
    stream: StreamingModel, like: Sequence[int], *, frames: int | None = None, repeats: int = 10, seed: int = 0
) -> Report:
    """Clip and step beside each other: FLOPs as torch counts them, milliseconds (median, in turns), memory of the
    state; and the largest difference of the two on a stream of random frames.

    like: shape (b, c, ...) of a frame. frames: of the clip; None: what the network is made for, else its reach.
    """
    if repeats < 1 or (frames is not None and frames < 1):
        raise AdviceError(f"frames is at least 1, and repeats too; not {frames} and {repeats}.")
    config = getattr(stream.model, "config", None)
    length = frames or getattr(config, "frames", None) or getattr(stream.model, "window", None)
    length = int(length or stream.rewrite.window or stream.receptive_field)
    p = next(stream.parameters(), torch.empty(0))
    draw = generator(seed, "frames")
    shape = (*like[:2], length, *like[2:]) if stream.time == 2 else (*like[:1], length, *like[1:])
    if stream.time == 0:
        shape = (length, *like)
    clip = torch.randn(shape, generator=draw).to(device=p.device, dtype=p.dtype)
    frame = torch.randn(tuple(like), generator=draw).to(device=p.device, dtype=p.dtype)
    try:
        with torch.no_grad():
            stream(clip)
    except RuntimeError as error:
        raise AdviceError(f"{stream.name} takes no clip of shape {shape} ({error}); say frames=...") from None
    state, gap = _warmed(stream, clip, draw)

    def step() -> Any:
        return stream.step(frame, state)

    def whole() -> Any:
        return stream(clip)

    counts = [_flops(f) for f in (whole, step)]
    times = _in_turns((whole, step), repeats)
    report = Report(name=f"{stream.name}: clip and step", environment=environment(seed=seed, device=str(p.device)))
    for name, seen, flops, spent in (("clip", length, counts[0], times[0]), ("step", 1, counts[1], times[1])):
        row = {
            "what": name,
            "frames": seen,
            "GFLOPs": flops / 1e9,
            "ms": statistics.median(spent),
            "ms, least": min(spent),
        }
        report.rows.append(row)
    a, b = (statistics.median(t) for t in times)
    ratio = counts[0] / max(counts[1], 1)
    report.summary = {
        "FLOPs, clip / step": ratio,
        "time, clip / step": a / b,
        "frames before the first output": float(stream.delay),
        "frames per output": float(stream.stride),
        "frames that an output sees": float(stream.receptive_field),
        "padding in time, frames": float(stream.padding),
        "memory of a state, MB": state.bytes / 2**20,
        "outputs per second": 1e3 / (b * stream.stride),
    }
    if gap is not None:
        report.summary["largest difference, relative"] = gap
    report.answer = (
        f"A frame costs 1/{ratio:.1f} of the clip's FLOPs and 1/{a / b:.1f} of its time; the first output "
        f"comes at frame {stream.delay} (counted from 0)."
    )
    if stream.padding:
        report.notes.append(
            f"The network is padded in time by {stream.padding} frames in all, so a stream equals the clip model on "
            "the whole stream, not on each window of it; for that, build it without padding in time."
        )
    if b > a / 2 and ratio > 4:
        report.notes.append("Most of a step's time is the cost of calling its layers: stream.compile_step() lowers it.")
    return report


def _warmed(stream: StreamingModel, clip: Tensor, draw: torch.Generator) -> tuple[State, float | None]:
    """A state that has seen its whole reach, and the largest difference to the clip model on the same frames."""
    count = stream.receptive_field + stream.padding + 4 * stream.stride
    shape = list(clip.shape)
    shape[stream.time] = count
    x = torch.randn(shape, generator=draw).to(clip)
    got, state = stream.steps(x, stream.start(x.select(stream.time, 0)))
    gap = None
    if got is not None and stream.time == 2:
        with torch.no_grad():
            want = stream(x)
        if isinstance(want, Tensor) and want.ndim == got.ndim and want.shape[2] >= got.shape[2]:
            want = want[:, :, : got.shape[2]]
            gap = float((got - want).abs().max() / want.abs().max().clamp(min=1e-12))
    # the next frame is one that gives an output
    while (state.frames - stream.delay) % stream.stride:
        _, state = stream.step(x.select(stream.time, 0), state)
    return state, gap


def _flops(run: Callable[[], Any]) -> int:
    counter = FlopCounterMode(display=False)
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # one operator that is not counted
    try:
        with counter, torch.no_grad():
            run()
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    return int(counter.get_total_flops())


def _in_turns(runs: Sequence[Callable[[], Any]], repeats: int) -> list[list[float]]:
    """Milliseconds of each run, one after the other in every turn."""
    times: list[list[float]] = [[] for _ in runs]
    cuda = torch.cuda.is_available()
    with torch.no_grad():
        for turn in range(repeats + 1):
            for run, spent in zip(runs, times):
                if cuda:
                    torch.cuda.synchronize()
                start = time.perf_counter()
                run()
                if cuda:
                    torch.cuda.synchronize()
                if turn:
                    spent.append(1e3 * (time.perf_counter() - start))
    return times
