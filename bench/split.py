"""ED-ViT: a ViT split by classes over devices: accuracy beside baselines, pruning measures, latency, a dead device.

python -m bench.split accuracy --seeds 0 1 2               # digits: dense, N = 2, 5, 10, baselines; 10 min per seed
python -m bench.split accuracy --data cifar10 --seeds 0    # the ViT of bench._rewrites on $LYNCEUS_TEST_DATA
python -m bench.split pruning --seeds 0 1 2                # KL beside magnitude and random, no retraining; digits
python -m bench.split latency                              # processes on pinned cores, shaped links; seconds

The dense ViT has 6 blocks, width 192 and 6 heads. Sub-models are limited in memory to 1/6 of it at N = 5 and 1/12 at
N = 10. "ensemble" is N small ViTs of the same size, fresh, each trained on all classes for as many steps, their
probabilities averaged; "no fusion" is the class with the highest score in the sub-model that owns it.
"""

from __future__ import annotations

import argparse
import hashlib
import inspect
import itertools
import json
import os
import platform
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import lynceus
from bench._trust import KEPT, digits8
from lynceus.core.rng import borrowed, generator
from lynceus.core.types import as_float
from lynceus.rewrite.split import Budget, Device, Plan, Retrain, SplitConfig, split
from lynceus.rewrite.split.classes import groups, inside
from lynceus.rewrite.split.importance import Probe, choose
from lynceus.rewrite.split.make import size
from lynceus.rewrite.split.part import cut_head, opened
from lynceus.rewrite.split.retrain import cycle, moved, outputs
from lynceus.serve.edge import EdgeConfig, deploy
from lynceus.tasks.classify import Classify

Data = tuple[Tensor, Tensor, Tensor, Tensor]
LIMIT = {2: 1.0, 4: 1 / 6, 5: 1 / 6, 10: 1 / 12}  # memory of a device, of the dense model's


# networks ----------------------------------------------------------------------------------------
def digits() -> Data:
    x, y, test, known = digits8()
    return x.expand(-1, 3, -1, -1).contiguous(), y, test.expand(-1, 3, -1, -1).contiguous(), known


def digits_vit(seed: int, steps: int = 1400) -> nn.Module:
    """6 blocks, width 192, 6 heads on 8x8 digits in patches of 2, with a class token; kept like the other nets."""
    net: dict[str, Any] = {
        "image_size": (8, 8), "patch_size": 2, "dim": 192, "depth": 6, "heads": 6, "class_token": True, "pool": "token",
    }  # fmt: skip
    with borrowed(seed, "digits vit"):
        model = Classify(num_classes=10).build(lynceus.create_model("vit_nano", num_classes=10, **net))
    key = hashlib.blake2b((inspect.getsource(digits_vit) + repr((seed, steps))).encode(), digest_size=6).hexdigest()
    path = KEPT / f"digits-vit-{key}.safetensors"
    if path.is_file():
        model.load_state_dict(load_file(path))
        return model.eval()
    x, y, _, _ = digits()
    learn(model, x, y, steps, seed=seed, shift=1, lr=5e-4)
    KEPT.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}.part")
    save_file(model.state_dict(), part)
    os.replace(part, path)
    return model.eval()


def learn(
    model: nn.Module, x: Tensor, y: Tensor, steps: int, *, seed: int, shift: int, lr: float, flip: bool = False
) -> None:
    draw = generator(seed, "bench split")

    def loss() -> Tensor:
        rows = torch.randint(len(x), (64,), generator=draw)
        return F.cross_entropy(model(moved(as_float(x[rows]), draw, shift=shift, flip=flip)), y[rows])

    model.train()
    cycle([model], steps, loss, lr=lr, weight_decay=0.05)
    model.eval()


def accuracy(model: Any, x: Tensor, y: Tensor) -> float:
    """In per cent."""
    return 100 * float((outputs(model, x).argmax(1) == y).float().mean())


def problem(args: argparse.Namespace, seed: int) -> tuple[nn.Module, Data]:
    if args.data == "digits":
        return digits_vit(seed), digits()
    from bench._rewrites import TRAIN, cifar_vit
    from bench._trust import cifar

    model, x, y = cifar_vit(seed)
    return model, (*cifar(TRAIN), x, y)


# accuracy ----------------------------------------------------------------------------------------
def recipe(args: argparse.Namespace, seed: int, **more: Any) -> SplitConfig:
    small = args.data == "digits"
    learning = Retrain(
        steps=args.steps,
        batch=64,
        lr=1e-3,
        shift=1 if small else 4,
        flip=not small,
        distil=args.distil,
        others=args.others,
    )
    return SplitConfig(
        retrain=learning,
        rounds=args.rounds,
        fusion_steps=args.fusion_steps,
        seed=seed,
        calibration=args.calibration,
        **more,
    )


def limited(model: nn.Module, count: int) -> tuple[list[Device], int]:
    """Devices whose memory forces the sub-models below the card's size, and the dense model's bytes."""
    dense = size(opened(model)[0])
    return [Device(name=f"device{i}", memory=LIMIT[count] * dense) for i in range(count)], dense


def ensemble(plan: Plan, count: int, args: argparse.Namespace, seed: int, x: Tensor, y: Tensor, test: Tensor) -> Tensor:
    """Mean probabilities of `count` fresh networks of a sub-model's size."""
    total: Any = 0
    small = args.data == "digits"
    for i in range(count):
        part: Any = plan.net.parts[i]
        config = replace(part.backbone.config, num_classes=10)
        with borrowed(seed, "ensemble", i):
            net = Classify(num_classes=10).build(type(part.backbone)(config))
        steps = args.steps * args.rounds
        learn(net, x, y, steps, seed=seed + i, shift=1 if small else 4, lr=1e-3, flip=not small)
        total = total + outputs(net, test).softmax(1)
    return total


def run_accuracy(args: argparse.Namespace) -> list[dict[str, Any]]:
    rows = []
    for seed in args.seeds:
        model, (x, y, test, known) = problem(args, seed)
        dense = accuracy(model, test, known)
        for count in args.parts:
            start = time.process_time()
            devices, weight = limited(model, count)
            plan = split(model, devices, (x, y), config=recipe(args, seed))
            took = time.process_time() - start
            found = plan.evaluate((test, known))
            alone = [100 * r["accuracy"] for r in found.rows if r["answers of"].startswith("without")]
            row = {
                "data": args.data,
                "seed": seed,
                "N": count,
                "pruned": f"{plan.shares[0].pruned} of {plan.shares[0].unit}",
                "of dense": max(s.bytes for s in plan.shares) / weight,
                "dense": dense,
                "fused": 100 * found.summary["fused"],
                "no fusion": 100 * found.summary["no fusion"],
                "one dead, mean": statistics.mean(alone),
                "one dead, worst": min(alone),
                "cpu s": took,
            }
            if not args.no_ensemble:
                said = ensemble(plan, count, args, seed, x, y, test)
                row["ensemble"] = 100 * float((said.argmax(1) == known).float().mean())
            rows.append(row)
            print(json.dumps({k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()}), flush=True)
    return rows


# pruning -----------------------------------------------------------------------------------------
def run_pruning(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Accuracy on a sub-model's own classes, and KL to the dense model there, right after pruning."""
    rows = []
    for seed in args.seeds:
        model, (x, y, test, known) = problem(args, seed)
        part, head = opened(model)
        log_p = outputs(lambda i: head(part(i)).double().log_softmax(-1), x)  # noqa: B023
        for group in groups(10, 5, seed=seed):
            mine = torch.isin(y, torch.tensor(group)).nonzero()[:, 0][: args.calibration]
            theirs = torch.isin(known, torch.tensor(group))
            for pruned in (1, 2, 3):
                for how in (
                    ("taylor", "fast", "magnitude", "random") if args.fast else ("taylor", "magnitude", "random")
                ):
                    probe = Probe(part, head, as_float(x[mine]), log_p[mine])
                    cut = choose(probe, pruned, how, seed=seed)
                    small, last = part.cut(cut), cut_head(head, cut, part.backbone.config.dim)
                    right = accuracy(lambda i: last(small(i)), test[theirs], known[theirs])  # noqa: B023
                    rows.append(
                        {
                            "seed": seed,
                            "classes": group,
                            "pruned": pruned,
                            "measure": how,
                            "kl": probe.kl(),
                            "own": right,
                        }
                    )
    for pruned in (1, 2, 3):
        for how in dict.fromkeys(r["measure"] for r in rows):
            some = [r for r in rows if r["measure"] == how and r["pruned"] == pruned]
            each = [statistics.mean(r["own"] for r in some if r["seed"] == s) for s in args.seeds]
            print(
                f"{pruned} of 6 pruned by {how:9}: own classes {statistics.mean(each):5.1f} % "
                f"({', '.join(f'{v:.1f}' for v in each)}), KL {statistics.mean(r['kl'] for r in some):.3f}",
                flush=True,
            )
    return rows


def run_grouping(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Random groups beside groups of classes that the dense model mixes up."""
    rows = []
    for seed in args.seeds:
        model, (x, y, test, known) = problem(args, seed)
        said = outputs(model, x).argmax(1)
        confusion = torch.zeros(10, 10).index_put_((y, said), torch.ones(len(y)), True)
        for how in ("random", "confusion"):
            devices, _ = limited(model, 5)
            plan = split(model, devices, (x, y), config=recipe(args, seed, group=how))
            right = 100 * plan.evaluate((test, known)).summary["fused"]
            rows.append({"seed": seed, "group": how, "fused": right, "inside": inside(plan.net.groups, confusion)})
            print(json.dumps(rows[-1]), flush=True)
    return rows


# latency -----------------------------------------------------------------------------------------
def pinned(model: nn.Module, image: Tensor, core: int, repeats: int) -> float:
    """Median seconds of the model in this process, on one core with one thread."""
    before, threads = os.sched_getaffinity(0), torch.get_num_threads()
    os.sched_setaffinity(0, {core})
    torch.set_num_threads(1)
    try:
        with torch.inference_mode():
            for _ in range(3):
                model(image)
            spans = []
            for _ in range(repeats):
                start = time.perf_counter()
                model(image)
                spans.append(time.perf_counter() - start)
    finally:
        os.sched_setaffinity(0, before)
        torch.set_num_threads(threads)
    return statistics.median(spans)


def run_latency(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Untrained weights: time does not depend on them. Dense on one pinned core beside N devices, one core each."""
    rows = []
    cores = sorted(os.sched_getaffinity(0))
    nets: dict[str, dict[str, Any]] = {
        "CIFAR ViT, 32 px": {"image_size": (32, 32), "patch_size": 4, "dim": 192, "depth": 6, "heads": 6},
        "ViT-S/16, 224 px": {"image_size": (224, 224), "patch_size": 16, "dim": 384, "depth": 12, "heads": 6},
    }
    for name, options in nets.items():
        options |= {"class_token": True, "pool": "token"}
        model = Classify(num_classes=10).build(lynceus.create_model("vit_nano", num_classes=10, **options))
        side = options["image_size"][0]
        data = torch.randint(0, 256, (20, 3, side, side), dtype=torch.uint8), torch.arange(20) % 10
        for batch in args.batch:
            image = data[0][:batch]
            dense = pinned(model, image, cores[0], args.repeats)
            links: tuple[dict[str, Any], ...] = ({}, {"rate": 250e3 if side < 100 else 12.5e6, "delay": 0.002})
            for count, pruned in itertools.product(args.devices, args.pruned):
                for link in links:
                    devices = [Device(name=f"device{i}", **link) for i in range(count)]
                    config = SplitConfig(
                        pruned=pruned, measure="magnitude", rounds=1, retrain=Retrain(steps=0), fusion_steps=0
                    )
                    plan = split(model, devices, data, Budget(), config=config)
                    with deploy(plan, config=EdgeConfig(deadline=60)) as cluster:
                        known = cluster.calibrated(image, repeats=args.repeats)
                        timed = cluster.timed(image, repeats=args.repeats, plan=known)
                    row = {
                        "net": name,
                        "batch": batch,
                        "N": count,
                        "pruned": f"{pruned} of 6",
                        "link": f"{link['rate'] * 8e-6:g} Mbit/s, {1e3 * link['delay']:g} ms" if link else "unshaped",
                        "dense ms": 1e3 * dense,
                        "wall ms": 1e3 * timed.wall,
                        "predicted ms": 1e3 * timed.predicted,
                        "wall / predicted": timed.wall / timed.predicted,
                        "times faster": dense / timed.wall,
                        "one by one": timed.simulated,
                    }
                    rows.append(row)
                    print(
                        json.dumps({k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()}), flush=True
                    )
    return rows


def joules() -> float | None:
    """The energy counter of the processor package (RAPL), where this machine lets it be read."""
    try:
        return int(Path("/sys/class/powercap/intel-rapl:0/energy_uj").read_text()) / 1e6
    except (OSError, ValueError):
        return None


RUNS = {"accuracy": run_accuracy, "pruning": run_pruning, "grouping": run_grouping, "latency": run_latency}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("runs", nargs="*", default=[], help=f"of {', '.join(RUNS)}; default: pruning, latency")
    parser.add_argument("--data", choices=("digits", "cifar10"), default="digits")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--parts", type=int, nargs="*", default=[2, 5, 10])
    parser.add_argument("--steps", type=int, default=300, help="of retraining per round")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--distil", type=float, default=1.0)
    parser.add_argument("--others", type=float, default=1.0)
    parser.add_argument("--fusion-steps", type=int, default=1500)
    parser.add_argument("--calibration", type=int, default=128)
    parser.add_argument("--fast", action="store_true", help="pruning: also by the KL itself")
    parser.add_argument("--no-ensemble", action="store_true")
    parser.add_argument("--devices", type=int, nargs="*", default=[4])
    parser.add_argument("--pruned", type=int, nargs="*", default=[4, 5], help="latency: shares of 6 pruned")
    parser.add_argument("--batch", type=int, nargs="*", default=[1, 8])
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--out", help="JSON file for the figures")
    args = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    before = joules()
    for name in args.runs or ["pruning", "latency"]:
        if name not in RUNS:
            parser.error(f"there is no run {name!r}; there are {', '.join(RUNS)}")
        found[name] = RUNS[name](args)
    after = joules()
    found["environment"] = {
        "torch": torch.__version__,
        "machine": platform.platform(),
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        "joules (RAPL)": None if before is None or after is None else after - before,
    }
    print(json.dumps(found["environment"]))
    if args.out:
        Path(args.out).write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
