"""Our backbones beside timm's and torchvision's: equal weights, outputs compared, interleaved timing on one machine.

python -m bench.backbones                         # the four of the goal, fp32 eager, batch 8, 224 px
python -m bench.backbones --all --bf16 --train    # more networks, bfloat16, and a training step
python -m bench.backbones --models vit_small_patch16_224 --batch 1 --out figures.json
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import timm
import torch
import torchvision
from torch import Tensor, nn

import lynceus

# ours -> the peer's library and name
GOAL = {
    "convnext_tiny": "timm:convnext_tiny",
    "swin_tiny_patch4_window7_224": "timm:swin_tiny_patch4_window7_224",
    "vit_small_patch16_224": "timm:vit_small_patch16_224",
    "resnet50": "timm:resnet50",
}
MORE = {
    "vit_base_patch16_224": "timm:vit_base_patch16_224",
    "resnet18": "timm:resnet18",
    "resnet50+tv": "torchvision:resnet50",
    "resnet18+tv": "torchvision:resnet18",
    "vit_base_patch16_224+tv": "torchvision:vit_b_16",
}


@dataclass
class Row:
    model: str
    peer: str
    what: str
    dtype: str
    batch: int
    ours_ms: float
    peer_ms: float
    ratio: float  # peer / ours: above 1 we are faster
    difference: float  # largest difference of the logits, in units of their standard deviation


def peer_model(name: str) -> nn.Module:
    library, _, model = name.partition(":")
    if library == "timm":
        return timm.create_model(model)
    return torchvision.models.get_model(model, weights=None)


def fill(model: nn.Module) -> None:
    """Weights and statistics that leave no branch silent (fresh ones have layer scales near 0)."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if not value.is_floating_point():
                continue
            noise = torch.randn(value.shape, generator=generator)
            if name.endswith("running_var"):
                value.copy_(1 + 0.1 * noise.abs())
            elif value.ndim >= 2:
                value.copy_(noise * (0.2 if value.shape[0] == 1 else value[0].numel() ** -0.5))
            else:
                value.copy_((1 if name.endswith(("weight", "gamma")) else 0) + 0.1 * noise)


def pair(ours: str, peer: str, workdir: str) -> tuple[nn.Module, nn.Module]:
    """Both models in eval mode with the peer's weights, brought over by a checkpoint file."""
    theirs = peer_model(peer).eval()
    fill(theirs)
    file = f"{workdir}/weights.pt"
    torch.save(theirs.state_dict(), file)
    mine = lynceus.create_model(ours.removesuffix("+tv"), weights=file)
    return mine, theirs


def interleaved(
    functions: dict[str, Callable[[], Any]],
    seconds: float,
    least: int = 7,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Times of each function, taken in turn so that a busy machine slows both.

    clock: `time.process_time` counts this process alone, which on one thread is fair on a machine shared with others.
    """
    times: dict[str, list[float]] = {name: [] for name in functions}
    for f in functions.values():
        f()
        f()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(next(iter(times.values()))) < least:
        for name, f in functions.items():
            start = clock()
            f()
            times[name].append(clock() - start)
    return times


def forward_of(model: nn.Module, image: Tensor) -> Callable[[], Tensor]:
    def run() -> Tensor:
        with torch.inference_mode():
            return model(image)

    return run


def step_of(model: nn.Module, image: Tensor, label: Tensor) -> Callable[[], None]:
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6, momentum=0.9)

    def run() -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(image), label).backward()
        optimizer.step()

    return run


def measure(
    ours: str,
    peer: str,
    *,
    what: str,
    dtype: torch.dtype,
    batch: int,
    size: int,
    seconds: float,
    workdir: str,
    cpu: bool = False,
) -> Row:
    mine, theirs = pair(ours, peer, workdir)
    mine, theirs = mine.to(dtype), theirs.to(dtype)
    image = torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1)).to(dtype)
    a, b = forward_of(mine, image)().float(), forward_of(theirs, image)().float()
    difference = float((a - b).abs().max() / b.std())
    if what == "train":
        label = torch.arange(batch) % 1000
        runs: dict[str, Callable[[], Any]] = {
            "ours": step_of(mine, image, label),
            "peer": step_of(theirs, image, label),
        }
    else:
        runs = {"ours": forward_of(mine, image), "peer": forward_of(theirs, image)}
    times = interleaved(runs, seconds, clock=time.process_time if cpu else time.perf_counter)
    ratio = statistics.median(p / o for o, p in zip(times["ours"], times["peer"]))
    ours_ms, peer_ms = (1e3 * statistics.median(times[k]) for k in ("ours", "peer"))
    return Row(
        ours.removesuffix("+tv"),
        peer,
        what,
        str(dtype).removeprefix("torch."),
        batch,
        ours_ms,
        peer_ms,
        ratio,
        difference,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="*", help="names of ours; default: the four of the goal")
    parser.add_argument("--all", action="store_true", help="ViT-B, ResNet-18 and torchvision's peers too")
    parser.add_argument("--batch", type=int, nargs="*", default=[8])
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--bf16", action="store_true", help="bfloat16 too")
    parser.add_argument("--train", action="store_true", help="a training step too")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=15.0, help="per figure")
    parser.add_argument("--cpu-time", action="store_true", help="count CPU time instead of wall time; one thread only")
    parser.add_argument("--out", help="JSON file for the figures")
    args = parser.parse_args()
    if args.cpu_time and args.threads != 1:
        parser.error("--cpu-time is fair on one thread only: add --threads 1")
    torch.set_num_threads(args.threads)
    table = {**GOAL, **MORE} if args.all or args.models else GOAL
    if args.models:
        table = {k: v for k, v in table.items() if k.removesuffix("+tv") in args.models or k in args.models}
    cases = [("forward", torch.float32, b) for b in args.batch]
    if args.bf16:
        cases += [("forward", torch.bfloat16, b) for b in args.batch]
    if args.train:
        cases += [("train", torch.float32, b) for b in args.batch]
    rows: list[Row] = []
    print(f"{platform.machine()}, {args.threads} threads, torch {torch.__version__}, timm {timm.__version__}")
    heads = f"{'model':32}{'peer':36}{'what':9}{'dtype':10}{'batch':>5}"
    print(f"{heads}{'ours ms':>10}{'peer ms':>10}{'ratio':>7}{'diff/std':>10}")
    with tempfile.TemporaryDirectory() as workdir:
        for what, dtype, batch in cases:
            mine = []
            for ours, peer in table.items():
                options: dict[str, Any] = {"dtype": dtype, "batch": batch, "size": args.size, "seconds": args.seconds}
                options["cpu"] = args.cpu_time
                r = measure(ours, peer, what=what, workdir=workdir, **options)
                print(
                    f"{r.model:32}{r.peer:36}{r.what:9}{r.dtype:10}{r.batch:5}{r.ours_ms:10.1f}{r.peer_ms:10.1f}"
                    f"{r.ratio:7.3f}{r.difference:10.1e}",
                    flush=True,
                )
                rows.append(r)
                if ours in GOAL:
                    mine.append(r.ratio)
            if len(mine) > 1:
                mean = statistics.geometric_mean(mine)
                print(f"    geometric mean of {len(mine)}: {mean:.3f}x, lowest {min(mine):.3f}x")
    if args.out:
        environment = {"torch": torch.__version__, "timm": timm.__version__, "threads": args.threads}
        environment["clock"] = "CPU time" if args.cpu_time else "wall time"
        environment |= {"torchvision": torchvision.__version__, "machine": platform.platform()}
        with open(args.out, "w") as file:
            json.dump({"environment": environment, "rows": [asdict(r) for r in rows]}, file, indent=1)


if __name__ == "__main__":
    main()
