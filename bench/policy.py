"""N2N learning: what its policies learn, beside random search, and what they find on digits.

`python -m bench.policy proxy`     removal on 20 layers of which 6 are needed: own and shared advantage, 5 seeds
`python -m bench.policy transfer`  a policy of a 6-layer teacher on a 12-layer one, 5 seeds
`python -m bench.policy digits`    a CNN of 8 convolutions on 8x8 digits: search beside random search, 3 seeds
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time

import torch
from torch import Tensor, nn

from bench._trust import digits8, trained
from lynceus.core.environment import environment
from lynceus.core.rng import borrowed, generator
from lynceus.core.types import Sample
from lynceus.rewrite.structure import Layer
from lynceus.search.policy import DistilConfig, PolicyConfig, ReinforceConfig, RemovalPolicy, compress
from lynceus.search.policy.reinforce import Reinforce
from lynceus.search.policy.sequences import raw


def layered(seed: int, count: int = 20) -> list[Layer]:
    """Convolutions of random kernels and widths."""
    draw, out = generator(seed, "layers"), []
    for i in range(count):
        kernel = 2 * int(torch.randint(1, 3, (), generator=draw)) - 1
        width = 2 ** int(torch.randint(4, 10, (), generator=draw))
        size = kernel * kernel * width * 64
        out.append(
            Layer(name=str(i), kind="Conv2d", kernel=kernel, stride=1, width=width, padding=kernel // 2, size=size)
        )
    return out


Puzzle = tuple[list[Layer], Tensor]


def needy(seed: int, count: int = 20, needed: int = 6) -> Puzzle:
    """Layers, and which of them are needed: drawn at random."""
    which = torch.zeros(count, dtype=torch.bool)
    which[torch.randperm(count, generator=generator(seed, "needed"))[:needed]] = True
    return layered(seed, count), which


def by_kind(seed: int, count: int) -> Puzzle:
    """Layers, and which are needed: the 3x3 ones of at most 128 channels, so that a policy can carry it over."""
    for attempt in range(1000):
        layers = layered(1000 * seed + attempt, count)
        needed = torch.tensor([l.kernel == 3 and l.width <= 128 for l in layers])
        if count // 3 <= int(needed.sum()) <= 2 * count // 3:
            break
    return layers, needed


def reward(puzzle: Puzzle, keep: Tensor) -> float:
    """R_c times the accuracy, which falls to .4 as the needed layers go: by .1 for each where there are six."""
    layers, needed = puzzle
    sizes = torch.tensor([l.size for l in layers], dtype=torch.float64)
    c = 1 - float((sizes * keep).sum() / sizes.sum())
    return c * (2 - c) * (1 - 0.6 * float(((1 - keep) * needed).sum()) / int(needed.sum()))


def learn_to_remove(
    seed: int,
    puzzle: Puzzle,
    *,
    iterations: int,
    learning: ReinforceConfig | None = None,
    policy: RemovalPolicy | None = None,
) -> tuple[float, float, list[float]]:
    """Mean reward of the last 10 iterations, that of 500 random architectures, and of every iteration."""
    rows, draw = raw(puzzle[0]), generator(seed, "rollouts")
    free = torch.ones(len(rows), dtype=torch.bool)
    if policy is None:
        with borrowed(seed, "policy"):
            policy = RemovalPolicy()
    learner = Reinforce(policy, learning or ReinforceConfig())
    means = []
    for _ in range(iterations):
        actions = policy.sample(rows, free, 5, draw)
        means.append(learner.step(rows, free, actions, [reward(puzzle, a) for a in actions]))
    blind = [reward(puzzle, (torch.rand(len(rows), generator=draw) < 0.5).long()) for _ in range(500)]
    return statistics.mean(means[-10:]), statistics.mean(blind), means


def proxy() -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    kinds = {
        "own": ReinforceConfig(),
        "shared": ReinforceConfig(advantage="shared"),
        "own, a step per rollout": ReinforceConfig(steps="rollout"),
    }
    for name, learning in kinds.items():
        runs = [learn_to_remove(s, needy(s), iterations=400, learning=learning) for s in range(5)]
        rows.append(
            {
                "advantage": name,
                "last 10": [round(r[0], 3) for r in runs],
                "mean": round(statistics.mean(r[0] for r in runs), 3),
                "random": round(statistics.mean(r[1] for r in runs), 3),
                "best possible": round(statistics.mean(best_of(needy(s)) for s in range(5)), 3),
            }
        )
    return rows


def best_of(puzzle: Puzzle) -> float:
    """The highest reward there is: among the needed, the largest go one by one."""
    layers, needed = puzzle
    keep = needed.long()
    found = [reward(puzzle, keep)]
    for i in sorted((i for i, n in enumerate(needed) if n), key=lambda i: -layers[i].size):
        keep = keep.clone()
        keep[i] = 0
        found.append(reward(puzzle, keep))
    return max(found)


def transfer(iterations: int = 100, seeds: int = 5) -> list[dict[str, object]]:
    rows = []
    for seed in range(seeds):
        with borrowed(seed, "policy"):
            learned = RemovalPolicy()
        learn_to_remove(seed, by_kind(seed, 6), iterations=iterations, policy=learned)
        deep = by_kind(100 + seed, 12)
        _, _, moved = learn_to_remove(seed, deep, iterations=10, policy=learned)
        _, _, fresh = learn_to_remove(seed, deep, iterations=10)
        rows.append(
            {"seed": seed, "transferred": round(statistics.mean(moved), 3), "fresh": round(statistics.mean(fresh), 3)}
        )
    return rows


def teacher(seed: int) -> nn.Module:
    """Eight convolutions, 464 thousand parameters."""
    parts: list[nn.Module] = []
    inside = 3
    for i, width in enumerate((32, 32, 64, 64, 96, 96, 128, 128)):
        parts += [nn.Conv2d(inside, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
        if i in (1, 3):
            parts.append(nn.MaxPool2d(2))
        inside = width
    x, y, _, _ = digits8()
    with borrowed(seed, "teacher"):
        net = nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inside, 10))
        trained(net, x.expand(-1, 3, -1, -1), y, seed=seed, epochs=10)
    net.owns_pixels = True  # type: ignore[assignment]
    return net


def digits(iterations: int, workers: int, seeds: int) -> list[dict[str, object]]:
    x, y, test, truth = digits8()
    data = [Sample(image=a.expand(3, -1, -1), label=int(b)) for a, b in zip(x, y)]
    rows: list[dict[str, object]] = []

    def right(net: nn.Module) -> float:
        with torch.no_grad():
            return float((net(test.expand(-1, 3, -1, -1)).argmax(1) == truth).float().mean())

    for seed in range(seeds):
        big = teacher(seed)
        for strategy in ("reinforce", "random"):
            start = time.monotonic()
            config = PolicyConfig(iterations=iterations, workers=workers, seed=seed, strategy=strategy)  # type: ignore[arg-type]
            out = compress(big, data, config=config, distil=DistilConfig())
            rewards = [e["R"] for e in out.log]
            rows.append(
                {
                    "seed": seed,
                    "search": strategy,
                    "times smaller": round(out.report.summary["times smaller"], 1),
                    "teacher": round(100 * right(big), 1),
                    "student": round(100 * right(out.student), 1),
                    "best reward": round(max(rewards), 3),
                    "mean reward": round(statistics.mean(rewards), 3),
                    "last tenth": round(statistics.mean(rewards[-len(rewards) // 10 :]), 3),
                    "students": out.report.summary["students taught"],
                    "s per student": round(out.report.summary["seconds per student"], 2),
                    "minutes": round((time.monotonic() - start) / 60, 1),
                }
            )
            print(json.dumps(rows[-1]), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", default=["proxy", "transfer", "digits"])
    parser.add_argument("--iterations", type=int, default=30, help="of each search on digits")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    print(json.dumps(environment(0)))
    torch.set_num_threads(1)
    for what in args.what:
        rows = {"proxy": proxy, "transfer": transfer}.get(what, lambda: [])()
        if what == "digits":
            digits(args.iterations, args.workers, args.seeds)
        for row in rows:
            print(json.dumps(row))


if __name__ == "__main__":
    main()
