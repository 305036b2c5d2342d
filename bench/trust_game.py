"""The game on features beside random search, exhaustive search and decision attacks, at counted queries.

    python -m bench.trust_game [--only digits cifar batching peers] [--seeds 0 1 2 3 4] [--out figures.json]

digits: 16 test digits of 8x8 per seed (another network each), 2,500 queries. cifar: 20 pictures, at most 60 pixels,
20,000 queries, plays by saliency and uniform. batching: the same plays one by one. peers: foolbox, pip install foolbox.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import platform
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bench._trust import cifar, cifar_cnn, digits8, digits_cnn
from lynceus.core.rng import numpy_generator
from lynceus.core.subject import Subject
from lynceus.trust.game import search
from lynceus.trust.oracle import NOTHING, Oracle, painted
from lynceus.trust.plays import Play, Pool, known, scrutinise

QUERIES = 2_500


def grey(net: nn.Module) -> Subject:
    """A subject of a network on grey pixels; pictures have one channel here."""
    return Subject(lambda x: net(x), name="digits CNN", needs_grad=False)


def random_pixels(net: nn.Module, image: Tensor, *, seed: int, queries: int = QUERIES) -> float:
    """Random pixels one after the other until the class changes, again and again; nothing is pruned or remembered."""
    oracle = Oracle(subject=grey(net), image=image)
    draw = numpy_generator(seed, "random pixels")
    movable = np.flatnonzero(oracle.movable)
    paint = painted(image).flatten(1)
    spent, best = 1, math.inf
    with torch.no_grad():
        while spent < queries:
            order = draw.permutation(movable).tolist()[: queries - spent]
            rank = torch.full((image[0].numel(),), len(order))
            rank[order] = torch.arange(len(order))
            on = rank <= torch.arange(len(order))[:, None]  # (steps, pixels)
            x = torch.where(on[:, None], paint, image.flatten(1))
            changed = (net(x.view(-1, *image.shape)).argmax(1) != oracle.original).nonzero()[:, 0]
            length = int(changed[0]) + 1 if len(changed) else len(order)
            spent += length  # what a search one by one would have sent
            if len(changed):
                best = min(best, length)
    return best


def random_search(oracle: Oracle, *, seed: int, mend: bool) -> None:
    """Random pixels until the class changes or the best is reached; nothing is asked twice: a strong baseline.

    mend: scrutinises what it finds, as the game does."""
    draw = numpy_generator(seed, "random pixels")
    movable = np.flatnonzero(oracle.movable)

    def one() -> Play[None]:
        state = NOTHING
        for p in draw.permutation(movable).tolist():
            state = state | {p}
            if oracle.size(state) >= oracle.severity or oracle.size(state) > oracle.distance:
                return
            if (yield from known(oracle, state)).changed:
                if mend:
                    yield from scrutinise(oracle, state)
                return

    pool = Pool(oracle, lambda: (one(), lambda _: None), width=1)
    idle = 0
    while not oracle.ended and idle < 5:
        before = oracle.spent
        pool.round()
        idle = 0 if oracle.spent > before else idle + 1


@torch.no_grad()
def smallest(net: nn.Module, image: Tensor, upto: int, batch: int = 8192) -> int | None:
    """The least number of toggled pixels that changes the class, by trying all sets; None above `upto`."""
    flat, paint = image.flatten(1), painted(image).flatten(1)
    movable = (flat != paint).any(0).nonzero()[:, 0]
    first = int(net(image[None]).argmax(1))
    for k in range(1, upto + 1):
        sets = itertools.combinations(movable.tolist(), k)
        while part := list(itertools.islice(sets, batch)):
            x = flat.expand(len(part), -1, -1).clone()
            at = torch.tensor(part)
            which = torch.arange(len(part))[:, None].expand_as(at)
            x[which, :, at] = paint.T[at]
            if bool((net(x.view(-1, *image.shape)).argmax(1) != first).any()):
                return k
    return None


def digits(o: argparse.Namespace) -> list[dict[str, Any]]:
    rows = []
    _, _, x, _ = digits8()
    for seed in o.seeds:
        net = digits_cnn(seed)
        ways: dict[str, list[float]] = {
            k: [] for k in ("game", "one player", "random", "random, pruned", "random, scrutinised")
        }
        first, least, clock = [], [], dict.fromkeys(ways, 0.0)
        for image in x[: o.images]:
            for way in ways:
                began = time.perf_counter()
                if way == "random":
                    ways[way].append(random_pixels(net, image, seed=seed))
                elif way.startswith("random"):
                    oracle = Oracle(subject=grey(net), image=image, queries=QUERIES)
                    random_search(oracle, seed=seed, mend="scrutinised" in way)
                    ways[way].append(oracle.severity)
                else:
                    mode: Any = "cooperative" if way == "game" else "single"
                    found = search(grey(net), image, budget_queries=QUERIES, mode=mode, seed=seed).summary
                    ways[way].append(found["severity"])
                    if way == "game":
                        first.append(found["queries to the first example"])
                clock[way] += time.perf_counter() - began
            least.append(smallest(net, image, o.exhaustive))
        gaps = [s - m for s, m in zip(ways["game"], least, strict=True) if m is not None]
        rows.append(
            {
                "seed": seed,
                "success": float(np.isfinite(ways["game"]).mean()),
                "minimum (mean)": float(np.mean([m for m in least if m is not None])),
                "proven minima": len(gaps),
                "equal": sum(g == 0 for g in gaps),
                "gap <= 1": float(np.mean([g <= 1 for g in gaps])),
                **{f"L0 {k}": float(np.mean(v)) for k, v in ways.items()},
                "below random": 1 - float(np.mean(ways["game"])) / float(np.mean(ways["random"])),
                "first (median)": float(np.median(first)),
                "seconds game": clock["game"],
                "seconds random": clock["random"],
            }
        )
        print(json.dumps(rows[-1]), flush=True)
    mean = {k: float(np.mean([r[k] for r in rows])) for k in rows[0] if k != "seed"}
    return [*rows, {"seed": "mean", **mean}]


def cifar_first(o: argparse.Namespace) -> list[dict[str, Any]]:
    net = cifar_cnn()
    x, y = cifar(200, 45_000)
    x = x.float() / 255
    with torch.no_grad():
        right = (net(x).argmax(1) == y).nonzero()[:, 0][: o.pictures]
    accuracy = float((net(x).argmax(1) == y).double().mean())
    subject = Subject(lambda t: net(t), name="CIFAR CNN", needs_grad=False)
    rows: list[dict[str, Any]] = []
    got: dict[str, list[tuple[float, ...]]] = {}
    for plays in ("saliency", "uniform"):
        got[plays] = []
        for i in right.tolist():
            report = search(
                subject, x[i], budget_queries=o.queries, distance=60, plays=plays, stop_at_first=not o.whole, seed=0
            )
            s = report.summary
            got[plays].append((s["severity"], s["queries to the first example"], s["seconds"], s["queries"]))
        severity, first, seconds, spent = (np.array(v) for v in zip(*got[plays], strict=True))
        ok = np.isfinite(severity)
        rows.append(
            {
                "plays": plays,
                "pictures": len(right),
                "accuracy": accuracy,
                "success": float(ok.mean()),
                "L0 (mean of found)": float(severity[ok].mean()) if ok.any() else math.nan,
                "first (median)": float(np.median(first)),
                "queries per second": float(spent.sum() / seconds.sum()),
            }
        )
        print(json.dumps(rows[-1]), flush=True)
    a, b = (np.array([g[1] for g in got[k]]) for k in ("saliency", "uniform"))
    both = np.isfinite(a) & np.isfinite(b)
    rows.append(
        {
            "paired": int(both.sum()),
            "saliency first": int((a < b).sum()),
            "uniform first": int((b < a).sum()),
            "median ratio saliency / uniform": float(np.median(a[both] / b[both])) if both.any() else math.nan,
        }
    )
    return rows


def batching(o: argparse.Namespace) -> list[dict[str, Any]]:
    rows = []
    cases = {
        "digits CNN 8x8": (digits_cnn(0), digits8()[2][0], 2_000),
        "CIFAR CNN 32x32": (cifar_cnn(), cifar(1, 45_000)[0][0].float() / 255, 1_000),
    }
    for name, (net, image, queries) in cases.items():
        subject = Subject(lambda t, net=net: net(t), needs_grad=False)  # type: ignore[misc]
        row: dict[str, Any] = {"net": name}
        for way, width, batch in (("batched", 64, 256), ("one by one", 1, 1)):
            best = math.inf
            for _ in range(3):
                s = search(
                    subject, image, budget_queries=queries, width=width, batch=batch, tighten=False, seed=0
                ).summary
                best = min(best, s["seconds"] / s["queries"])
            row |= {f"{way}, queries/s": 1 / best, f"{way}, images per batch": s["images per batch"]}
        row["speed-up"] = row["batched, queries/s"] / row["one by one, queries/s"]
        rows.append(row)
    return rows


def peers(o: argparse.Namespace) -> list[dict[str, Any]]:
    """foolbox's decision attacks on the same digits: queries used, and pixels changed."""
    import foolbox as fb

    _, _, x, _ = digits8()
    net, images = digits_cnn(0), x[: o.images]
    rows = []

    class Counted(nn.Module):
        count = 0

        def forward(self, image: Tensor) -> Tensor:
            self.count += len(image)
            return net(image)

    label = net(images).argmax(1)
    makers = {
        "SaltAndPepper": lambda: fb.attacks.SaltAndPepperNoiseAttack(steps=100),
        "Boundary": lambda: fb.attacks.BoundaryAttack(steps=QUERIES),
        "HopSkipJump": lambda: fb.attacks.HopSkipJumpAttack(steps=16, max_gradient_eval_steps=200),
        "Pointwise": lambda: fb.attacks.PointwiseAttack(),
    }
    for name, make in makers.items():
        pixels: list[float] = []
        queries: list[float] = []
        l2: list[float] = []
        torch.manual_seed(0)
        for image, k in zip(images, label, strict=True):
            counted = Counted().eval()
            model = fb.PyTorchModel(counted, bounds=(0, 1), device="cpu")
            counted.count = 0
            try:
                _, out, ok = make()(model, image[None], k[None], epsilons=None)
            except Exception as error:
                rows.append({"attack": name, "failed": f"{type(error).__name__}: {error}"[:100]})
                break
            if bool(ok):
                pixels.append(int((out[0] - image).abs().gt(1e-6).sum()))
                l2.append(float((out[0] - image).norm()))
            queries.append(counted.count)
        else:
            rows.append(_peer(name, pixels, l2, queries, len(images)))
    for mode in ("cooperative", "single"):
        found = [search(grey(net), image, budget_queries=QUERIES, mode=mode).summary for image in images]
        pixels, l2 = [f["l0"] for f in found], [f["l2"] for f in found]
        rows.append(_peer(f"game, {mode}", pixels, l2, [f["queries"] for f in found], len(images)))
    return rows


def _peer(name: str, pixels: list[Any], l2: list[float], queries: list[Any], count: int) -> dict[str, Any]:
    return {
        "attack": name,
        "success": len(pixels) / count,
        "L0 (mean)": float(np.mean(pixels)) if pixels else math.nan,
        "L2 (mean)": float(np.mean(l2)) if l2 else math.nan,
        "queries (mean)": float(np.mean(queries)),
    }


PARTS = {"digits": digits, "cifar": cifar_first, "batching": batching, "peers": peers}


def options(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--pictures", type=int, default=20)
    parser.add_argument("--queries", type=int, default=20_000)
    parser.add_argument("--whole", action="store_true", help="cifar: spend all queries, not only those to the first")
    parser.add_argument("--exhaustive", type=int, default=3)
    parser.add_argument("--out", type=Path)
    return parser.parse_args(argv)


def main() -> None:
    o = options()
    figures: dict[str, Any] = {
        "machine": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    for name in o.only:
        figures[name] = PARTS[name](o)
        print(name, *(json.dumps(r) for r in figures[name]), sep="\n  ", flush=True)
    if o.out:
        o.out.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
