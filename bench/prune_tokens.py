"""Token pruning of state-space models: accuracy on digits for every rule and score, and measured time beside FLOPs.

python -m bench.prune_tokens accuracy            # three Vims of width 24 on 8x8 digits, pruned without fine-tuning
python -m bench.prune_tokens why                 # what the scores drop, and what dropping empty pixels first would give
python -m bench.prune_tokens tune                # two epochs of fine-tuning with pruning active
python -m bench.prune_tokens speed --threads 1   # vim_tiny at 224, batch 8, cuts after blocks 5, 10 and 15
"""

from __future__ import annotations

import argparse
import inspect
import json
import platform
import statistics
from dataclasses import replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lynceus
from bench._rewrites import in_turns, kept
from bench._trust import digits8
from lynceus.backbones.vim import Vim, VimConfig
from lynceus.core.rng import borrowed, generator
from lynceus.rewrite.prune_tokens import PruneTokens
from lynceus.rewrite.prune_tokens.places import Carry, Score

SEEDS = (0, 1, 2)


def new_vim() -> Vim:
    return Vim(
        VimConfig(image_size=(8, 8), patch_size=1, stride=1, in_chans=1, dim=24, depth=4, num_classes=10, states=16)
    )


def vim_on_digits(seed: int) -> Vim:
    """Width 24, depth 4, patch 1, class token in the middle: AdamW at 4e-3, 36 epochs in two cycles; kept."""
    with borrowed(seed, "vim on digits"):
        net = new_vim()

    def learn() -> None:
        x, y, _, _ = digits8()
        net.train()
        for cycle in range(2):
            train(net, (x - 0.5) / 0.4, y, seed=2 * seed + cycle, epochs=18, rate=4e-3)

    recipe = inspect.getsource(new_vim) + inspect.getsource(vim_on_digits) + inspect.getsource(train) + repr(seed)
    kept("vim-digits", recipe, net, learn)
    return net


def train(net: nn.Module, x: Tensor, y: Tensor, *, seed: int, epochs: int, rate: float, batch: int = 64) -> None:
    """AdamW on one cycle."""
    draw, steps = generator(seed, "digits order"), epochs * (len(x) // batch)
    optimizer = torch.optim.AdamW(net.parameters(), rate, weight_decay=0.05)
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.2)
    for _ in range(epochs):
        for part in torch.randperm(len(x), generator=draw)[: len(x) // batch * batch].split(batch):
            loss = F.cross_entropy(net(x[part]), y[part])
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimizer.step()
            cycle.step()


@torch.no_grad()
def accuracy(net: nn.Module) -> float:
    """Percent of the 360 held-out digits."""
    _, _, x, y = digits8()
    answers = torch.cat([net((part - 0.5) / 0.4) for part in x.split(90)]).argmax(1)
    return 100 * float((answers == y).float().mean())


CARRIES: tuple[Carry, ...] = ("hold", "decay", "decay_prev", "none")
SCORES: tuple[Score, ...] = ("clip", "sum", "l1", "l2", "random")
DRAWS = 10  # of random scores, each of which drops the same places of all pictures


def measure_accuracy(seeds: tuple[int, ...]) -> list[dict[str, Any]]:
    """A row per ratio, rule and score: percent right of the held-out digits, without fine-tuning, for every seed."""
    nets = [vim_on_digits(seed) for seed in seeds]
    rows: list[dict[str, Any]] = [{"keep": 1.0, "carry": "-", "score": "-", "right": [accuracy(n) for n in nets]}]
    for keep in (0.8, 0.6):
        tries: list[tuple[Carry, Score, Literal["released"] | None]] = [(c, "clip", None) for c in CARRIES]
        tries += [("hold", s, None) for s in SCORES[1:]]
        for carry, score, compat in [*tries, ("none", "clip", "released")]:
            rule = PruneTokens(blocks=(1, 2), keep=keep, carry=carry, score=score, compat=compat)
            rules = [replace(rule, seed=10 * k) for k in range(DRAWS)] if score == "random" else [rule]
            right = [statistics.mean(accuracy(r(net)) for r in rules) for net in nets]
            rows.append({"keep": keep, "carry": compat or carry, "score": score, "right": right})
    return [{**r, "mean": statistics.mean(r["right"])} for r in rows]


def verdicts(rows: list[dict[str, Any]]) -> dict[str, float]:
    """What the rules are held to, in points of mean accuracy: each should be positive."""
    mean = {(r["keep"], r["carry"], r["score"]): r["mean"] for r in rows}
    found = {}
    for keep, least in ((0.8, 5), (0.6, 15)):
        for carry in CARRIES[:3]:
            found[f"{carry} - gathering - {least}, keep {keep}"] = (
                mean[keep, carry, "clip"] - mean[keep, "none", "clip"] - least
            )
    found["clip - random - 5, keep .8"] = mean[0.8, "hold", "clip"] - mean[0.8, "hold", "random"] - 5
    found["clip - sum + 1, keep .8"] = mean[0.8, "hold", "clip"] - mean[0.8, "hold", "sum"] + 1
    return found


@torch.no_grad()
def measure_reasons(seeds: tuple[int, ...]) -> list[dict[str, Any]]:
    """Per seed and ratio: which share of the dropped pixels is empty, and percent right when pixels are dropped by
    their ink alone, the emptiest or the darkest first. A score that cannot be beaten would keep the ink."""
    _, _, x, y = digits8()
    ink = x[:, 0].flatten(1)
    rows = []
    for seed in seeds:
        net = vim_on_digits(seed)
        for keep in (0.8, 0.6):
            made: Any = PruneTokens(blocks=(1, 2), keep=keep)(net)
            gone = ~made.inspect((x - 0.5) / 0.4).masks[-1].flatten(1)
            row: dict[str, Any] = {"seed": seed, "keep": keep, "clip": accuracy(made)}
            row |= {
                "empty": float((ink == 0).float().mean()),
                "empty among dropped": float((ink[gone] == 0).float().mean()),
            }
            middle = ink.shape[1] // 2  # where the class token stands
            for name, sign in (("emptiest first", 1.0), ("darkest first", -1.0)):
                score = sign * ink + 1e-3 * torch.rand(ink.shape, generator=generator(seed, "ties"))
                score = torch.cat([score[:, :middle], score.new_zeros(len(score), 1), score[:, middle:]], 1)
                right = 0
                for part in torch.arange(len(x)).split(90):
                    made._score = lambda gated, block, places, some=score[part]: some.gather(1, places.at)
                    right += int((made((x[part] - 0.5) / 0.4).argmax(1) == y[part]).sum())
                row[name] = 100 * right / len(x)
            rows.append(row)
    return rows


def measure_tuning(seeds: tuple[int, ...]) -> list[dict[str, Any]]:
    """Two epochs with the cuts in place, at the rate it was trained with; goal: within 1.5 points of the dense net."""
    x, y, _, _ = digits8()
    rows = []
    for seed in seeds:
        dense = vim_on_digits(seed)
        for keep in (0.8, 0.6):
            pruned = PruneTokens(blocks=(1, 2), keep=keep)(dense)
            before = accuracy(pruned)
            train(pruned.train(), (x - 0.5) / 0.4, y, seed=100 + seed, epochs=2, rate=4e-3, batch=32)
            after = accuracy(pruned.eval())
            rows.append({"seed": seed, "keep": keep, "dense": accuracy(dense), "pruned": before, "tuned": after})
            print(rows[-1], flush=True)
    return rows


def measure_speed(repeats: int, batch: int) -> list[dict[str, Any]]:
    """vim_tiny at 224 pixels: how many times as fast as the dense pass, in turns, beside the FLOPs counted."""
    net, x = lynceus.create_model("vim_tiny").eval(), torch.randn(batch, 3, 224, 224)
    models: dict[str, nn.Module] = {"dense": net}
    for keep in (0.8, 0.6):
        for carry in ("hold", "decay", "decay_prev"):
            models[f"keep {keep}, {carry}"] = PruneTokens(blocks=(5, 10, 15), keep=keep, carry=carry)(net)
    times, whole = in_turns(models, x, repeats), flops(net, x[:1])
    return [
        {"model": name, "flops": round(flops(model, x[:1]) / whole, 3), **times[name].faster(times["dense"])}
        for name, model in models.items()
    ]


def flops(net: nn.Module, x: Tensor) -> int:
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net(x)
    return counter.get_total_flops()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", choices=["accuracy", "why", "tune", "speed"], default=[])
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--batch", type=int, default=8)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(f"torch {torch.__version__}, {platform.processor() or platform.machine()}, {args.threads} thread(s)")
    wanted = args.what or ["accuracy", "why", "tune", "speed"]
    if "accuracy" in wanted:
        rows = measure_accuracy(tuple(args.seeds))
        for row in rows:
            print(json.dumps(row), flush=True)
        for name, value in verdicts(rows).items():
            print(f"{value:+7.2f}  {name}", flush=True)
    if "why" in wanted:
        for row in measure_reasons(tuple(args.seeds)):
            print(json.dumps(row), flush=True)
    if "tune" in wanted:
        measure_tuning(tuple(args.seeds))
    if "speed" in wanted:
        for row in measure_speed(args.repeats, args.batch):
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
