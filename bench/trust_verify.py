"""Verification: agreement with brute force, soundness, and time beside plain Z3 and auto_LiRPA.

    python -m bench.trust_verify [curve] [z3] [mlp] [twelve] [cnn] [budget] [lirpa] [campaign] [--instances 1200]

One JSON line per part, with machine and versions; parts that are not named are all run. auto_LiRPA is compared where it
can be imported (its source folder on PYTHONPATH will do).
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import statistics
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from bench._trust import curve_net, curve_points, digits8, digits_cnn, digits_mlp
from lynceus.core.report import environment
from lynceus.core.subject import Subject
from lynceus.trust.attacks import pgd
from lynceus.trust.bounds import METHODS, Ball, bounds
from lynceus.trust.bounds_graph import trace
from lynceus.trust.smt import solve_box
from lynceus.trust.verify import Budget, Verdict, largest, verify
from lynceus.trust.verify_query import SLACK, ask

CIRCLE = (0.0, 2 * math.pi)
LIMIT = 60.0  # seconds for plain Z3 on a whole network


@torch.no_grad()
def brute(net: nn.Module, x: Tensor, dims: list[int], step: float, count: int, clip: tuple[float, float]) -> bool:
    """True when every grid point keeps the class; ties lose it. Written apart from the library."""
    flat, label = x.flatten(), int(net(x[None]).argmax())
    ranges = [
        (flat[d].double() + step * torch.arange(-count, count + 1).double()).clamp(*clip).float().unique() for d in dims
    ]
    for part in torch.cartesian_prod(*ranges).reshape(-1, len(dims)).split(50_000):
        whole = flat.repeat(len(part), 1)
        whole[:, dims] = part
        logits = net(whole.reshape(-1, *x.shape))
        other = logits.clone()
        other[:, label] = -math.inf
        if bool((other.amax(1) >= logits[:, label]).any()):
            return False
    return True


@torch.no_grad()
def replays(net: nn.Module, x: Tensor, verdict: Verdict, reach: float) -> bool:
    """The witness is inside the region, and gets another class in float32 and in float64."""
    w = verdict.witness
    assert w is not None
    inside = float((w.double() - x.double()).abs().max()) <= reach and float(w.min()) >= 0 and float(w.max()) <= 1
    wrong = []
    for logits in (net(w[None])[0], trace(net, x.shape)(w[None].double())[0]):
        other = logits.clone()
        other[verdict.label] = -math.inf
        wrong.append(float(other.max()) >= float(logits[verdict.label]))
    return inside and all(wrong)


def curve() -> dict[str, Any]:
    """200 points of the 2-D net on an 11 x 11 grid."""
    net, (points, truth) = curve_net(0), curve_points(200, 7)
    network = trace(net, (2,))
    out: dict[str, Any] = {"accuracy": float((net(points).argmax(1) == truth).float().mean())}
    for half in (0.1, 0.3, 0.5):
        start = time.perf_counter()
        verdicts = [verify(net, x, step=half / 5, count=5, clip=CIRCLE, network=network) for x in points]
        seconds = time.perf_counter() - start
        agree = sum((v.kind == "safe") == brute(net, x, [0, 1], half / 5, 5, CIRCLE) for v, x in zip(verdicts, points))
        out[f"half {half}"] = {
            "agree": agree,
            "safe": sum(v.kind == "safe" for v in verdicts),
            "by one call": sum(v.kind == "safe" and v.boxes == 1 for v in verdicts),
            "boxes per point": sum(v.boxes for v in verdicts) / len(verdicts),
            "ms per point": 1000 * seconds / len(verdicts),
        }
    return out


def z3() -> dict[str, Any]:
    """24 boxes of that net: our verdict, Z3 with pruning, and plain Z3 on the whole network."""
    net, (points, _) = curve_net(0), curve_points(200, 7)
    network = trace(net, (2,))
    ours, pruned, plain, unstable, same, answered = [], [], [], [], 0, 0
    hard = 0
    for i, x in enumerate(points[:24]):
        half = (0.1, 0.3, 0.5)[i % 3]
        query = ask(net, x, dims=None, step=half, count=1, clip=None, label=None, network=network)
        box = query.box(query.lower[None], query.upper[None])
        known = bounds(network, box, label=query.label)
        unstable.append(int(known.unstable))
        hard += not bool(known.safe)
        times = []
        start = time.perf_counter()
        a = verify(net, x, step=half, clip=None, goal="region", network=network).kind
        times.append(time.perf_counter() - start)
        start = time.perf_counter()
        b, _ = solve_box(network, box, query.rows, tolerance=query.tolerance, seconds=LIMIT)
        times.append(time.perf_counter() - start)
        start = time.perf_counter()
        c, _ = solve_box(network, box, query.rows, tolerance=query.tolerance, prune=False, seconds=LIMIT)
        times.append(time.perf_counter() - start)
        for store, value in zip((ours, pruned, plain), times):
            store.append(value)
        answered += c != "unknown"
        same += (a == b) and c in (b, "unknown")
    return {
        "boxes": 24,
        "same verdict": same,
        "not proven by bounds alone": hard,
        "undecided ReLUs": [min(unstable), max(unstable)],
        "seconds, verify": [min(ours), statistics.median(ours), max(ours)],
        "seconds, Z3 pruned": [min(pruned), statistics.median(pruned), max(pruned)],
        "seconds, plain Z3": [min(plain), statistics.median(plain), max(plain)],
        "median speed-up of pruning": statistics.median(p / q for p, q in zip(plain, pruned)),
        "plain Z3 answered within a minute": answered / 24,
    }


def z3_digits() -> dict[str, Any]:
    """Ten digits, eight pixels by +-.5 over the reals, on the MLP 64-32-32-10: verify beside plain Z3."""
    net, (_, _, x, _) = digits_mlp(0), digits8()
    network = trace(net, (1, 8, 8))
    out: dict[str, Any] = {
        "verify": [],
        "plain Z3": [],
        "verify answered": 0,
        "plain Z3 answered": 0,
        "contradictions": 0,
    }
    for image in x[:6]:
        dims = largest(image, 8)
        start = time.perf_counter()
        got = verify(net, image, dims=dims, step=0.5, goal="region", network=network, budget=Budget(seconds=LIMIT))
        out["verify"].append(round(time.perf_counter() - start, 3))
        query = ask(net, image, dims=dims, step=0.5, count=1, clip=(0.0, 1.0), label=None, network=network)
        box = query.box(query.lower[None], query.upper[None])
        start = time.perf_counter()
        answer, _ = solve_box(network, box, query.rows, prune=False, tolerance=query.tolerance, seconds=LIMIT)
        out["plain Z3"].append(round(time.perf_counter() - start, 3))
        out["verify answered"] += got.kind != "unknown"
        out["plain Z3 answered"] += answer != "unknown"
        out["contradictions"] += "unknown" not in (answer, got.kind) and answer != got.kind
    return out


def digits(net: nn.Module, images: int, pixels: int, against: bool) -> dict[str, Any]:
    """Digits, the strongest pixels by +-.25 and +-.5."""
    _, _, x, _ = digits8()
    network = trace(net, (1, 8, 8))
    kinds: Counter[str] = Counter()
    boxes, seconds, agree, one, good = [], [], 0, 0, 0
    for image in x[:images]:
        dims = largest(image, pixels).tolist()
        start = time.perf_counter()
        verdict = verify(net, image, dims=dims, step=0.25, count=2, network=network)
        seconds.append(time.perf_counter() - start)
        kinds[f"{verdict.kind}, {verdict.strength}"] += 1
        boxes.append(verdict.boxes)
        one += verdict.kind == "safe" and verdict.boxes == 1
        if verdict.kind == "unsafe":
            good += replays(net, image, verdict, 0.5)
        if against:
            agree += (verdict.kind == "safe") == brute(net, image, dims, 0.25, 2, (0.0, 1.0))
    return {
        "images": images,
        "verdicts": dict(kinds),
        "agree with brute force": agree if against else None,
        "points each": 5**pixels,
        "by one call of CROWN": one,
        "replayed": good,
        "boxes": [sum(boxes) / images, max(boxes)],
        "seconds": [sum(seconds) / images, max(seconds)],
    }


def budget() -> dict[str, Any]:
    """How long a question that cannot be settled takes, against what it was given."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(60, 200), nn.ReLU(), nn.Linear(200, 200), nn.ReLU(), nn.Linear(200, 2)).eval()
    x, out = torch.full((60,), 0.5), {}
    with torch.no_grad():
        logits = net(x[None])[0]
        net[4].bias[int(logits.argmax())] += 0.25
    for given in (1.0, 3.0, 10.0):
        for goal in ("grid", "region"):
            start = time.perf_counter()
            got = verify(net, x, step=0.2, count=1, goal=goal, budget=Budget(seconds=given))  # type: ignore[arg-type]
            out[f"{goal}, {given:g} s"] = [got.kind, round(time.perf_counter() - start, 3)]
    return out


def lirpa() -> dict[str, Any]:
    """Bounds of 32 digits at once, beside auto_LiRPA: median of 5 runs, and the largest difference."""
    if importlib.util.find_spec("auto_LiRPA") is None:
        return {"auto_LiRPA": "not importable here"}
    from auto_LiRPA import BoundedModule, BoundedTensor, PerturbationLpNorm

    _, _, x, _ = digits8()
    out: dict[str, Any] = {}
    nets = digits_mlp(0), digits_cnn(0)
    torch.set_default_dtype(torch.float64)  # its max-pooling makes tensors of the default type
    for name, net, count in (("mlp", nets[0], 32), ("cnn", nets[1], 4)):
        images = x[:count].double()
        plain = trace(net, (1, 8, 8))
        import copy

        theirs = BoundedModule(copy.deepcopy(net).double(), images[:1])
        for method in METHODS:

            def ours_run(method: Any = method, images: Tensor = images, plain: Any = plain) -> Any:
                return bounds(plain, Ball(images, 0.03), method=method, intersect=False)

            def theirs_run(method: Any = method, images: Tensor = images, theirs: Any = theirs) -> Any:
                ball = BoundedTensor(images, PerturbationLpNorm(norm=math.inf, eps=0.03))
                return theirs.compute_bounds(x=(ball,), method=method.upper())

            a, b = ours_run(), theirs_run()
            gap = max(float((a.lower - b[0]).abs().max()), float((a.upper - b[1]).abs().max()))
            out[f"{name}, {count} images, {method}"] = {
                "ms ours": _median(ours_run),
                "ms auto_LiRPA": _median(theirs_run),
                "largest difference": gap,
                "width ours": float((a.upper - a.lower).mean()),
                "width auto_LiRPA": float((b[1] - b[0]).detach().mean()),
            }
    torch.set_default_dtype(torch.float32)
    return out


def _median(run: Callable[[], Any]) -> float:
    times = []
    for _ in range(5):
        start = time.perf_counter()
        run()
        times.append(1000 * (time.perf_counter() - start))
    return statistics.median(times)


class _Skip(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Conv2d(1, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1), nn.Linear(27, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.a(x))
        return self.head((x + torch.relu(self.b(x))).flatten(1))


def small_net(seed: int) -> nn.Module:
    """Random networks on images (1, 3, 3): perceptrons, leaky ones, convolutions with pooling, residual ones."""
    torch.manual_seed(seed)
    kind = seed % 4
    if kind == 0:
        net: nn.Module = nn.Sequential(
            nn.Flatten(), nn.Linear(9, 12), nn.ReLU(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 3)
        )
    elif kind == 1:
        net = nn.Sequential(nn.Flatten(), nn.Linear(9, 16), nn.LeakyReLU(0.1), nn.Linear(16, 4))
    elif kind == 2:
        net = nn.Sequential(nn.Conv2d(1, 4, 2), nn.ReLU(), nn.MaxPool2d(2, 1), nn.Flatten(), nn.Linear(4, 3))
    else:
        net = _Skip()
    return net.eval()


def campaign(instances: int, first: int) -> dict[str, Any]:
    """Many small questions; nothing that was called safe may be contradicted, every counterexample must replay."""
    _, _, pictures, _ = digits8()
    counts: Counter[str] = Counter()
    wrong: list[str] = []
    start = time.perf_counter()
    for i in range(first, first + instances):
        trained = i % 5 == 4
        net = digits_mlp(0) if trained else small_net(i)
        x = pictures[i % 360] if trained else torch.rand(1, 3, 3, generator=torch.Generator().manual_seed(i))
        kind = ("grid", "region", "l2")[i % 3]
        step = (0.02, 0.06, 0.12, 0.25)[i // 3 % 4]
        subject = Subject(net, mean=(0.0,), std=(1.0,))
        if kind == "grid":
            draw = torch.Generator().manual_seed(i)
            dims = largest(x, 4).tolist() if trained else torch.randperm(9, generator=draw)[:4].sort().values.tolist()
            verdict = verify(net, x, dims=dims, step=step, count=2, seed=i)
            if (verdict.kind == "safe") != brute(net, x, dims, step, 2, (0.0, 1.0)):
                wrong.append(f"{i} grid")
            if verdict.kind == "unsafe":
                steps = (verdict.witness - x).double().flatten()[dims] / step
                level = verdict.witness.flatten()[dims]
                on = ((steps - steps.round()).abs() < 1e-5) | (level == 0) | (level == 1)
                if not bool(on.all()):
                    wrong.append(f"{i} off the grid")
            counts[f"grid {verdict.kind} {verdict.strength}"] += 1
        elif kind == "region":
            allowed = Budget(seconds=5, boxes=300)
            verdict = verify(net, x, step=step / 4 if trained else step, goal="region", seed=i, budget=allowed)
            counts[f"region {verdict.kind}"] += 1
            step = step / 4 if trained else step
        else:
            with torch.no_grad():
                logits = net(x[None])
            label = int(logits.argmax())
            found = bounds(trace(net, x.shape), Ball(x[None], step, norm=2, clip=(0.0, 1.0)), label=label)
            safe = bool((found.margin > SLACK * float(logits.abs().max())).all())
            verdict = Verdict(kind="safe" if safe else "unknown", strength="region" if safe else "none", label=label)
            counts[f"L2 ball {verdict.kind}"] += 1
        reach = step * 2 if kind == "grid" else step
        if verdict.kind == "unsafe" and not replays(net, x, verdict, reach):
            wrong.append(f"{i} does not replay")
        if verdict.kind == "safe" and kind != "grid":
            # falsification tries 32 starts of 13 steps: a hundred times as many model calls
            norm = "l2" if kind == "l2" else "linf"
            many = x[None].expand(700, -1, -1, -1)
            labels = torch.full((700,), verdict.label)
            attacked = pgd(subject, many, labels, epsilon=step, norm=norm, steps=60, seed=i)  # type: ignore[arg-type]
            if bool(attacked.success.any()):
                wrong.append(f"{i} attacked")
        if i % 50 == 49:
            print(f"  up to {i + 1}, {len(wrong)} contradictions, {time.perf_counter() - start:.0f} s", flush=True)
    return {
        "instances": instances,
        "contradictions": wrong,
        "verdicts": dict(counts),
        "seconds": time.perf_counter() - start,
    }


def main() -> None:
    """Runs the named parts and prints a JSON line for each."""
    parts: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
        "curve": lambda _: curve(),
        "z3": lambda _: z3(),
        "z3-digits": lambda _: z3_digits(),
        "mlp": lambda _: digits(digits_mlp(0), 60, 8, True),
        "twelve": lambda _: digits(digits_mlp(0), 60, 12, False),
        "cnn": lambda _: digits(digits_cnn(0), 40, 6, True),
        "budget": lambda _: budget(),
        "lirpa": lambda _: lirpa(),
        "campaign": lambda options: campaign(options.instances, options.first),
    }
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", choices=[*parts, []], help="default: all")
    parser.add_argument("--instances", type=int, default=1200)
    parser.add_argument("--first", type=int, default=0, help="the campaign's first instance, to run it in pieces")
    options = parser.parse_args()
    print(json.dumps(environment()))
    for name in options.parts or parts:
        print(json.dumps({name: parts[name](options)}), flush=True)


if __name__ == "__main__":
    main()
