"""Streams: a frame at a time beside the clip and beside the package continual-inference, in FLOPs and in time.

python -m bench.streaming --peer FOLDER    # pip install --target FOLDER --no-deps continual-inference ptflops
python -m bench.streaming --digits         # also: direction of moving digits, 3 minutes of training
python -m bench.streaming --long           # also: 100,000 steps of retroactive attention in float32
python -m bench.streaming --out figures.json

Everything runs on one thread. Of each network the clip, our step and the peer's step are timed in turns; the least of
the repeats counts, and the median of the ratios within a turn is given beside it. FLOPs are counted by torch.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from bench._streaming import peer_encoder, peer_of, warmed
from lynceus.core.rng import borrowed, generator
from lynceus.rewrite.streaming import convert, st_gcn, x3d
from lynceus.rewrite.streaming.attention import RetroactiveNode
from lynceus.rewrite.streaming.clock import Clock, Rate

AIMS = {  # network -> (least ratio of FLOPs, least ratio of times), clip to step
    "x3d_s": (11.5, 4.0),
    "st_gcn_star_ntu": (60.0, 20.0),
    "encoder, 1 layer": (40.0, 3.0),
}


def flops(run: Callable[[], Any]) -> int:
    counter = FlopCounterMode(display=False)
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # one operator that is not counted
    try:
        with counter, torch.no_grad():
            run()
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    return int(counter.get_total_flops())


def in_turns(runs: dict[str, Callable[[], Any]], repeats: int, many: int) -> dict[str, list[float]]:
    """Milliseconds of each, in turns. many: runs per turn of all but the clip, the least of which counts."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    with torch.no_grad():
        for run in runs.values():
            run()
        for _ in range(repeats):
            for name, run in runs.items():
                spent = []
                for _ in range(1 if name == "clip" else many):
                    start = time.perf_counter()
                    run()
                    spent.append(time.perf_counter() - start)
                times[name].append(1e3 * min(spent))
    return times


def networks() -> dict[str, tuple[nn.Module, Tensor, nn.Module, Tensor, int | None, int]]:
    """name -> (network of the stream, frame, network of the clip, clip, window, side of the pooled maps)."""
    with borrowed(0, "streaming"):
        x = x3d.build(x3d.VARIANTS["x3d_s"])
        star = st_gcn.build(st_gcn.VARIANTS["st_gcn_star_ntu"])
        original = st_gcn.build(st_gcn.VARIANTS["st_gcn_ntu"])
        encoders = [
            nn.TransformerEncoder(
                nn.TransformerEncoderLayer(1024, 8, 1024, batch_first=True), n, enable_nested_tensor=False
            )
            for n in (1, 2)
        ]
        for net in (x, star, original):
            for m in net.modules():
                if isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)):
                    nn.init.uniform_(m.weight, 0.5, 1.5)
    draw = generator(0, "frames")
    frame = torch.randn(1, 3, 160, 160, generator=draw)
    joints = torch.randn(1, 3, 25, 2, generator=draw)
    token = torch.randn(1, 1024, generator=draw)
    clip = torch.randn(1, 3, 13, 160, 160, generator=draw)
    skeleton = torch.randn(1, 3, 300, 25, 2, generator=draw)
    tokens = torch.randn(1, 64, 1024, generator=draw)
    return {
        "x3d_s": (x, frame, x, clip, None, 5),
        "st_gcn_star_ntu": (star, joints, original, skeleton, None, 1),
        "encoder, 1 layer": (encoders[0], token, encoders[0], tokens, 64, 1),
        "encoder, 2 layers": (encoders[1], token, encoders[1], tokens, 64, 1),
    }


def measure(name: str, spec: Any, co: Any, repeats: int) -> dict[str, Any]:
    net, frame, whole, clip, window, side = spec
    net.eval(), whole.eval()
    stream = convert(net, window=window)
    state = stream.start(frame)
    draw = generator(1, "stream")
    frames = [torch.randn(frame.shape, generator=draw) for _ in range(stream.delay + 3)]
    ours = None
    with torch.no_grad():
        for f in frames:
            ours, state = stream.step(f, state)
    runs: dict[str, Callable[[], Any]] = {"clip": lambda: whole(clip), "step": lambda: stream.step(frame, state)}
    row: dict[str, Any] = {"network": name, "state_mb": state.bytes / 2**20}
    if co is not None:
        peer = peer_encoder(net, window, co) if window else peer_of(net, co, side)
        peer.eval()
        theirs = warmed(peer, frames)
        assert ours is not None
        row["largest difference to the peer"] = float((ours - theirs.reshape(ours.shape)).abs().max())
        runs["peer"] = lambda: peer.forward_step(frame)
    row["flops_clip"], row["flops_step"] = flops(runs["clip"]), flops(runs["step"])
    if co is not None:
        row["flops_peer"] = flops(runs["peer"])
    times = in_turns(runs, repeats, 5)
    row |= {f"{n}_ms": min(t) for n, t in times.items()}
    row["flops_ratio"] = row["flops_clip"] / row["flops_step"]
    row["time_ratio"] = row["clip_ms"] / row["step_ms"]
    row["time_ratio_median"] = statistics.median(a / b for a, b in zip(times["clip"], times["step"]))
    if co is not None:
        row["peer_ratio"] = row["peer_ms"] / row["step_ms"]
        row["peer_ratio_median"] = statistics.median(a / b for a, b in zip(times["peer"], times["step"]))
        row["flops_ratio_peer"] = row["flops_clip"] / row["flops_peer"]
        row["time_ratio_peer"] = row["clip_ms"] / row["peer_ms"]
    return row


def long_stream(steps: int = 100_000, window: int = 64, dim: int = 32, heads: int = 4) -> dict[str, float]:
    """The largest difference of float32 retroactive attention to attention over the window, along a stream whose
    scores now and then jump to where exp overflows float32 (above 88)."""
    with borrowed(0, "long"):
        mha = nn.MultiheadAttention(dim, heads, batch_first=True).eval()
    node = RetroactiveNode("attention", mha, window)
    node.place(Rate())
    draw, worst, largest = generator(0, "tokens"), 0.0, 0.0
    held, _ = node.begin(torch.zeros(1, dim))
    past: list[Tensor] = []
    begin = time.perf_counter()
    with torch.no_grad():
        for t in range(steps):
            loud = 40.0 if t % 1000 < 3 else 1.0
            x = loud * torch.randn(1, dim, generator=draw)
            past = [*past[-window + 1 :], x]
            y, held = node(x, held, Clock(t))
            if y is not None and (t % 500 < 8 or t > steps - 100):
                clip = torch.stack(past, 1)
                want = mha(clip, clip, clip, need_weights=False)[0]
                worst = max(worst, float((y - want).abs().max() / want.abs().max()))
                q, k, _ = node.heads.project(clip)
                largest = max(largest, float((q @ k.transpose(-1, -2)).abs().max() * node.heads.scale))
    spent = 1e6 * (time.perf_counter() - begin) / steps
    return {"steps": steps, "largest score": largest, "largest relative difference": worst, "us_per_step": spent}


def peer(folder: Path | None) -> Any:
    if folder is not None:
        sys.path.insert(0, str(folder))
    try:
        import continual
    except ImportError:
        print("without the peer: pip install --target FOLDER --no-deps continual-inference ptflops; --peer FOLDER")
        return None
    return continual


def machine() -> dict[str, Any]:
    model = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        platform.processor(),
    ) if Path("/proc/cpuinfo").is_file() else platform.processor()  # fmt: skip
    load = Path("/proc/loadavg")
    busy = float(load.read_text().split()[0]) if load.is_file() else float("nan")
    return {"cpu": model, "torch": torch.__version__, "threads": torch.get_num_threads(), "load": busy}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", type=Path, default=None, help="folder with the package continual-inference")
    parser.add_argument("--only", nargs="*", default=None, help="networks to measure")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--digits", action="store_true")
    parser.add_argument("--seconds", type=float, default=180.0, help="of training on moving digits")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--long", action="store_true")
    parser.add_argument("--out", type=Path, default=None, help="write the figures as JSON")
    args = parser.parse_args()
    torch.set_num_threads(1)
    co = peer(args.peer)
    figures: dict[str, Any] = {"machine": machine(), "networks": []}
    print(json.dumps(figures["machine"]))
    for name, spec in networks().items():
        if args.only is not None and name not in args.only:
            continue
        row = measure(name, spec, co, args.repeats)
        figures["networks"].append(row)
        aim = AIMS.get(name)
        print(
            f"{name:18} FLOPs clip/step {row['flops_ratio']:6.1f}, time {row['clip_ms']:7.1f} / {row['step_ms']:6.2f} "
            f"ms = {row['time_ratio']:5.1f} (median of turns {row['time_ratio_median']:.1f})"
            + (f", aims {aim[0]} and {aim[1]}" if aim else "")
        )
        if co is not None:
            print(
                f"{'':18} continual-inference: FLOPs {row['flops_ratio_peer']:6.1f}, step {row['peer_ms']:.2f} ms = "
                f"{row['peer_ratio']:.2f} times ours (median {row['peer_ratio_median']:.2f}); largest difference "
                f"{row['largest difference to the peer']:.1e}",
                flush=True,
            )
    if args.long:
        figures["long"] = long_stream()
        print(f"retroactive attention, float32: {figures['long']}")
    if args.digits:
        from bench._moving_digits import trial

        figures["digits"] = [trial(seed, args.seconds) for seed in range(args.seeds)]
        for row in figures["digits"]:
            print(f"moving digits: {row}")
    if args.out is not None:
        args.out.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
