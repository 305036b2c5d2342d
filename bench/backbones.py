"""Our backbones beside timm, torchvision and the authors: equal weights, outputs compared, interleaved timing.

python -m bench.backbones                                 # every goal, fp32 eager, batch 8 and 1, 224 px
python -m bench.backbones --family swin vit               # some families
python -m bench.backbones --train --memory --growth       # a training step, peak memory, 128 to 1024 px
python -m bench.backbones --models resnet50 --batch 1 --all --bf16 --out figures.json

A family adds lines to PEERS. Code of authors comes from $LYNCEUS_PEERS (bench/authors.py) and is skipped if absent.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from bench.peers import Absent, Peer, forward_of, interleaved, median_ratio, pair, peak_memory, step_of
from lynceus.core.errors import AdviceError
from lynceus.layers.halo import HaloOptions

# one line per comparison; goal=False: not in the geometric means, run by --all
PEERS: tuple[Peer, ...] = (
    Peer("convnext_tiny", "timm:convnext_tiny"),
    Peer("swin_tiny_patch4_window7_224", "timm:swin_tiny_patch4_window7_224"),
    Peer("vit_small_patch16_224", "timm:vit_small_patch16_224"),
    Peer("resnet50", "timm:resnet50"),
    Peer("hyena_vit_tiny", "authors:hyena_deit"),
    Peer("hornet_tiny_7x7", "authors:hornet"),
    Peer("hornet_tiny_gf", "authors:hornet", options={"variant": "hornet_tiny_gf"}),
    Peer("spartan_tiny", "authors:spartan"),
    Peer("vim_tiny", "authors:vim"),
    Peer("plain_mamba_l1", "authors:plain_mamba", changes={"out_indices": (23,)}),
    Peer("convit_tiny", "timm:convit_tiny"),
    Peer("volo_d1", "timm:volo_d1_224"),
    Peer("halonet26t", "timm:halonet26t", size=256),
    Peer("halonet50ts", "timm:halonet50ts", size=256),
    Peer("sehalonet33ts", "timm:sehalonet33ts", size=256),
    Peer("soft_tiny", "authors:soft_tiny"),
    Peer("soft_norm_tiny", "authors:soft_norm_tiny"),
    Peer("swinv2_tiny_window8_256", "timm:swinv2_tiny_window8_256", size=256),
    Peer("halonet_h1", "timm:halonet_h1", size=256, changes={"attention": (HaloOptions(heads=8),)}, goal=False),
    Peer("eca_halonext26ts", "timm:eca_halonext26ts", size=256, goal=False),
    Peer("swinv2_tiny_window16_256", "timm:swinv2_tiny_window16_256", size=256),
    Peer("cvt_13", "authors:cvt"),
    Peer("lsnet_t", "authors:lsnet"),
    Peer("lsnet_b", "authors:lsnet", options={"variant": "lsnet_b"}),
    Peer("vit_res_tiny", "authors:vit_res"),
    Peer("resnas_tiny", "authors:resnas_tiny"),
    Peer("vit_base_patch16_224", "timm:vit_base_patch16_224", goal=False),
    Peer("resnet18", "timm:resnet18", goal=False),
    Peer("resnet50", "torchvision:resnet50", goal=False),
    Peer("resnet18", "torchvision:resnet18", goal=False),
    Peer("vit_base_patch16_224", "torchvision:vit_b_16", goal=False),
    Peer("swin_tiny_patch4_window7_224", "torchvision:swin_t", goal=False),
    Peer("convnext_tiny", "torchvision:convnext_tiny", goal=False),
)
SIZES = (128, 256, 512, 1024)  # of --growth
ALIKE = {torch.float32: 1e-3, torch.bfloat16: 0.5}  # largest difference of the logits, in their standard deviations


@dataclass
class Row:
    family: str
    model: str
    peer: str
    what: str  # forward, train, memory forward, memory train, growth
    dtype: str
    batch: int
    size: int
    unit: str  # ms or MB
    ours: float
    theirs: float
    ratio: float  # theirs / ours: above 1 ours is faster, or needs less
    difference: float  # largest difference of the logits, in units of their standard deviation
    goal: bool
    note: str = ""  # why there is no figure, or why it counts in no mean

    @property
    def counts(self) -> bool:
        return self.goal and not self.note


@dataclass(frozen=True)
class Case:
    what: str
    dtype: torch.dtype
    batch: int
    size: int

    def __str__(self) -> str:
        return f"{self.what}, {str(self.dtype).removeprefix('torch.')}, batch {self.batch}, {self.size} px"


def blank(peer: Peer, case: Case, **found: Any) -> Row:
    """A row without figures yet."""
    nan = math.nan
    dtype = str(case.dtype).removeprefix("torch.")
    start: dict[str, Any] = {"unit": "ms", "ours": nan, "theirs": nan, "ratio": nan, "difference": nan}
    start |= {"family": peer.family, "model": peer.ours, "peer": peer.peer, "goal": peer.goal}
    return Row(**{**start, "what": case.what, "dtype": dtype, "batch": case.batch, "size": case.size, **found})


def timed(peer: Peer, case: Case, *, seconds: float, cpu: bool, workdir: str) -> Row:
    mine, theirs = pair(peer, workdir, any_size=case.what == "growth")
    mine, theirs = mine.to(case.dtype), theirs.to(case.dtype)
    generator = torch.Generator().manual_seed(1)
    image = torch.randn(case.batch, 3, case.size, case.size, generator=generator).to(case.dtype)
    try:
        b = forward_of(theirs, image)().float()
    except Exception as error:
        return blank(peer, case, note=f"the peer refuses this: {type(error).__name__}: {str(error)[:120]}")
    a = forward_of(mine, image)().float()
    difference = float((a - b).abs().max() / b.std())
    runs: dict[str, Callable[[], Any]] = {"ours": forward_of(mine, image), "peer": forward_of(theirs, image)}
    if case.what == "train":
        label = torch.arange(case.batch) % 1000
        runs = {"ours": step_of(mine, image, label), "peer": step_of(theirs, image, label)}
    least = 3 if case.what == "growth" else 7
    times = interleaved(runs, seconds, least, clock=time.process_time if cpu else time.perf_counter)
    note = "" if difference <= ALIKE[case.dtype] else "the outputs differ"
    found = {"ours": 1e3 * statistics.median(times["ours"]), "theirs": 1e3 * statistics.median(times["peer"])}
    return blank(peer, case, **found, ratio=median_ratio(times), difference=difference, note=note)


def weighed(peer: Peer, case: Case, threads: int) -> Row:
    options: dict[str, Any] = {"train": case.what.endswith("train"), "batch": case.batch, "size": case.size}
    ours, theirs = (peak_memory(peer, i, threads=threads, **options) for i in (0, 1))
    return blank(peer, case, unit="MB", ours=ours, theirs=theirs, ratio=theirs / ours, difference=0.0)


def slope(rows: Sequence[Row], whose: str) -> float:
    """Exponent of time against pixels over a log-log line: 1 is linear in the area, 2 quadratic."""
    points = [(math.log(r.size**2), math.log(getattr(r, whose))) for r in rows if getattr(r, whose) > 0]
    if len(points) < 2:
        return math.nan
    return statistics.linear_regression(*zip(*points)).slope


def means(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Geometric means of the ratios: of every case over all, and family by family."""
    out = []
    for case in dict.fromkeys(kind(r) for r in rows):
        mine = [r for r in rows if kind(r) == case and r.counts]
        for family in ("all", *dict.fromkeys(r.family for r in mine)):
            ratios = [r.ratio for r in mine if family in ("all", r.family)]
            if ratios:
                head = dict(zip(("what", "dtype", "batch", "size"), case))
                mean = statistics.geometric_mean(ratios)
                out.append({**head, "family": family, "count": len(ratios), "mean": mean, "lowest": min(ratios)})
    return out


def kind(row: Row) -> tuple[str, str, int, int]:
    """What rows must share to be averaged; the size only where it is what is looked at."""
    return row.what, row.dtype, row.batch, row.size if row.what == "growth" else 0


def chosen(args: argparse.Namespace, parser: argparse.ArgumentParser) -> list[Peer]:
    table = [p for p in PEERS if args.all or args.models or p.goal]
    if args.models:
        table = [p for p in table if p.ours in args.models]
    if args.family:
        table = [p for p in table if p.family in args.family]
    if args.peer:
        table = [p for p in table if p.peer.partition(":")[0] in args.peer]
    if not table:
        parser.error("no comparison fits; PEERS in bench/backbones.py lists them")
    return table


def cases(args: argparse.Namespace) -> list[Case]:
    dtypes = [torch.float32, *([torch.bfloat16] if args.bf16 else [])]
    out = [Case("forward", d, b, args.size) for d in dtypes for b in args.batch]
    first = args.batch[0]
    if args.train:
        out.append(Case("train", torch.float32, first, args.size))
    if args.memory:
        out.append(Case("memory forward", torch.float32, first, args.size))
        if args.train:
            out.append(Case("memory train", torch.float32, first, args.size))
    if args.growth:
        out += [Case("growth", torch.float32, 1, s) for s in args.sizes]
    return out


def show(row: Row) -> None:
    figures = f"{row.ours:10.1f}{row.theirs:10.1f} {row.unit}{row.ratio:8.3f}{row.difference:10.1e}  {row.note}"
    print(f"{row.model:34}{row.peer:38}{figures}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="*", help="names of ours")
    parser.add_argument("--family", nargs="*", help="families of ours")
    parser.add_argument("--peer", nargs="*", help="libraries: timm, torchvision, hf, authors")
    parser.add_argument("--all", action="store_true", help="the comparisons that are no goal too")
    parser.add_argument("--batch", type=int, nargs="*", default=[8, 1])
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--bf16", action="store_true", help="bfloat16 too")
    parser.add_argument("--train", action="store_true", help="a training step too")
    parser.add_argument("--memory", action="store_true", help="peak memory too, in fresh child processes")
    parser.add_argument("--growth", action="store_true", help="batch 1 at growing sizes too")
    parser.add_argument("--sizes", type=int, nargs="*", default=SIZES, help="of --growth")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=15.0, help="per figure")
    parser.add_argument("--cpu-time", action="store_true", help="count CPU time instead of wall time; one thread only")
    parser.add_argument("--out", help="JSON file for the figures")
    args = parser.parse_args()
    if args.cpu_time and args.threads != 1:
        parser.error("--cpu-time is fair on one thread only: add --threads 1")
    torch.set_num_threads(args.threads)
    table, rows = chosen(args, parser), []
    import timm
    import torchvision

    print(f"{platform.machine()}, {args.threads} threads, torch {torch.__version__}, timm {timm.__version__}")
    print(f"{'model':34}{'peer':38}{'ours':>10}{'theirs':>10} {'':2}{'ratio':>8}{'diff/std':>10}")
    with tempfile.TemporaryDirectory() as workdir:
        for asked in cases(args):
            print(f"-- {asked}")
            for peer in table:
                case = asked if asked.what == "growth" else replace(asked, size=peer.size or asked.size)
                try:
                    if case.what.startswith("memory"):
                        row = weighed(peer, case, args.threads)
                    else:
                        row = timed(peer, case, seconds=args.seconds, cpu=args.cpu_time, workdir=workdir)
                except Absent as error:
                    row = blank(peer, case, note=f"skipped: {error}")
                except AdviceError as error:
                    row = blank(peer, case, note=f"failed: {str(error).splitlines()[0]}")
                show(row)
                rows.append(row)
    found = means(rows)
    for m in found:
        px = f", {m['size']} px" if m["size"] else ""
        what = f"{m['what']}, {m['dtype']}, batch {m['batch']}{px}"
        print(f"{what:44}{m['family']:14}geometric mean of {m['count']:2}: {m['mean']:.3f}, lowest {m['lowest']:.3f}")
    growth = []
    for peer in table if args.growth else ():
        mine = [r for r in rows if r.what == "growth" and (r.model, r.peer) == (peer.ours, peer.peer)]
        growth.append({"model": peer.ours, "peer": peer.peer, "ours": slope(mine, "ours")})
        growth[-1]["theirs"] = slope(mine, "theirs")
        print(f"{peer.ours:34}{peer.peer:38}time ~ pixels^{growth[-1]['ours']:.2f}, theirs ^{growth[-1]['theirs']:.2f}")
    if args.out:
        environment = {"torch": torch.__version__, "timm": timm.__version__, "threads": args.threads}
        environment["clock"] = "CPU time" if args.cpu_time else "wall time"
        environment |= {"torchvision": torchvision.__version__, "machine": platform.platform()}
        done = {"environment": environment, "rows": [asdict(r) for r in rows], "means": found, "growth": growth}
        with open(args.out, "w") as file:
            json.dump(done, file, indent=1)


if __name__ == "__main__":
    main()
