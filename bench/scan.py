"""The selective scan and its mixers: beside the loop over time, mambapy and attention; growth, memory, digits.

python -m bench.scan                      # the operator, the mixers, growth; CPU time of one thread
python -m bench.scan --threads 2 --wall   # as the clock shows it, on two threads
python -m bench.scan --learn              # Vim and PlainMamba's three orders on 64 tokens of digits; three seeds

mambapy (its parallel scan) is compared where it can be imported.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.peers import interleaved, median_ratio
from lynceus.layers.attention import Attention
from lynceus.layers.mamba import Mamba
from lynceus.layers.plain_scan import PlainMamba2d
from lynceus.layers.scan import scan, selective_scan

DIM, STATES = 384, 16  # channels inside Vim-tiny
SECONDS = 4.0  # of each comparison


def inputs(batch: int, channels: int, states: int, length: int, *, grad: bool = False) -> dict[str, Tensor]:
    """The operator's arguments as a fresh mixer has them."""
    draw = torch.Generator().manual_seed(0)
    made = {
        "u": torch.randn(batch, channels, length, generator=draw),
        "delta": 0.5 * torch.randn(batch, channels, length, generator=draw) - 3,
        "A": -torch.arange(1.0, states + 1).repeat(channels, 1),
        "B": torch.randn(batch, states, length, generator=draw),
        "C": torch.randn(batch, states, length, generator=draw),
        "D": torch.ones(channels),
        "z": torch.randn(batch, channels, length, generator=draw),
    }
    return {k: v.requires_grad_(grad) for k, v in made.items()}


def loop(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor) -> Tensor:
    """The plain loop over time, with everything that can be made beforehand made beforehand."""
    delta = F.softplus(delta)
    decay = torch.exp(torch.einsum("bdl,dn->lbdn", delta, A)).unbind(0)
    added = torch.einsum("bdl,bnl->lbdn", delta * u, B).unbind(0)
    h = torch.zeros_like(added[0])
    found = []
    for a, b, c in zip(decay, added, C.unbind(-1)):
        h = a * h + b
        found.append(torch.einsum("bdn,bn->bd", h, c))
    return (torch.stack(found, -1) + u * D[:, None]) * F.silu(z)


def reference_loop(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor) -> Tensor:
    """The loop as Mamba's paper code lays it out: time inside (b, d, l, n), so that every step reads across it."""
    delta = F.softplus(delta)
    decay = torch.exp(torch.einsum("bdl,dn->bdln", delta, A))
    added = torch.einsum("bdl,bnl,bdl->bdln", delta, B, u)
    h = A.new_zeros(len(u), *A.shape)
    found = []
    for i in range(u.shape[2]):
        h = decay[:, :, i] * h + added[:, :, i]
        found.append(torch.einsum("bdn,bn->bd", h, C[:, :, i]))
    return (torch.stack(found, 2) + u * D[:, None]) * F.silu(z)


def ours(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor) -> Tensor:
    y: Tensor = selective_scan(u, delta, A, B, C, D, z, delta_softplus=True)
    return y


def parallel(package: Any) -> Callable[..., Tensor]:
    """mambapy's parallel scan (log2 of the length passes over all states)."""

    def run(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor) -> Tensor:
        delta = F.softplus(delta)
        decay = torch.exp(torch.einsum("bdl,dn->bldn", delta, A))
        added = torch.einsum("bdl,bnl->bldn", delta * u, B)
        h = package(decay, added)
        y = torch.einsum("bldn,bnl->bdl", h, C)
        return (y + u * D[:, None]) * F.silu(z)

    return run


def trained(f: Callable[..., Tensor], given: Mapping[str, Tensor]) -> Callable[[], None]:
    def run() -> None:
        torch.autograd.grad(f(**given).square().sum(), list(given.values()))

    return run


def plain(f: Callable[..., Tensor], given: Mapping[str, Tensor]) -> Callable[[], Tensor]:
    def run() -> Tensor:
        with torch.inference_mode():
            return f(**given)

    return run


def show(rows: list[dict[str, Any]], **row: Any) -> None:
    rows.append(row)
    print("  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()), flush=True)


def compared(rows: list[dict[str, Any]], what: str, peer: str, mine: Any, theirs: Any, clock: Any) -> float:
    times = interleaved({"ours": mine, "peer": theirs}, SECONDS, clock=clock)
    ratio = median_ratio(times)
    ms = {k: 1e3 * statistics.median(v) for k, v in times.items()}
    show(rows, what=what, peer=peer, ours_ms=ms["ours"], peer_ms=ms["peer"], ratio=ratio)
    return ratio


def operator(rows: list[dict[str, Any]], clock: Callable[[], float]) -> None:
    peers: dict[str, Callable[..., Tensor]] = {"loop": loop, "loop over (b, d, l, n)": reference_loop}
    try:
        from mambapy.pscan import pscan

        peers["mambapy"] = parallel(pscan)
    except ImportError:
        print("mambapy cannot be imported: skipped")
    for batch, length in ((1, 196), (8, 196), (1, 1024)):
        for name, peer in peers.items():
            given = inputs(batch, DIM, STATES, length)
            a, b = ours(**given), peer(**given)
            assert (a - b).abs().max() < 1e-4 * a.std(), "the routes disagree"
            what = f"batch {batch}, {DIM} channels, {length} tokens"
            compared(rows, f"forward, {what}", name, plain(ours, given), plain(peer, given), clock)
            if batch == 1:
                given = inputs(batch, DIM, STATES, length, grad=True)
                compared(rows, f"forward and backward, {what}", name, trained(ours, given), trained(peer, given), clock)


def mixer_step(mixer: nn.Module, x: Tensor) -> Callable[[], None]:
    def run() -> None:
        mixer.zero_grad()
        mixer(x).square().sum().backward()

    return run


class LoopMamba(Mamba):
    """The mixer with the loop over time in both directions."""

    def _both(self, ahead: tuple[Tensor, ...], back: tuple[Tensor, ...]) -> Tensor:
        found = []
        for (u, delta, b, c), log, flip in ((ahead, self.A_log, False), (back, self.A_b_log, True)):
            u, delta, b, c = (v.flip(1) if flip else v for v in (u, delta, b, c))
            decay = torch.exp(F.softplus(delta)[..., None] * -log.exp()).unbind(1)
            added = ((F.softplus(delta) * u)[..., None] * b[:, :, None]).unbind(1)
            h, out = torch.zeros_like(added[0]), []
            for a, new, weights in zip(decay, added, c.unbind(1)):
                h = a * h + new
                out.append((h * weights[:, None]).sum(-1))
            y = torch.stack(out, 1)
            found.append(y.flip(1) if flip else y)
        return found[0] + found[1] + ahead[0] * self.D + back[0] * self.D_b


def mixers(rows: list[dict[str, Any]], clock: Callable[[], float]) -> None:
    torch.manual_seed(0)
    x = torch.randn(8, 197, 192)
    mine = Mamba(192)
    theirs = LoopMamba(192)
    theirs.load_state_dict(mine.state_dict())
    assert (mine(x) - theirs(x)).abs().max() < 1e-4
    compared(
        rows, "Mamba mixer, forward and backward, batch 8", "loop", mixer_step(mine, x), mixer_step(theirs, x), clock
    )

    u, delta, b, c = (torch.randn(196, s, 1, d) for s, d in ((4, DIM), (1, DIM), (4, STATES), (1, STATES)))
    delta = F.softplus(delta - 3)
    a = -torch.arange(1.0, STATES + 1)[None, :, None].expand(1, STATES, DIM).contiguous()

    def together() -> Tensor:
        with torch.inference_mode():
            return scan(u, delta, a, b[..., None], c[..., None])[0]

    def four() -> list[Tensor]:
        with torch.inference_mode():
            return [scan(u[:, i : i + 1], delta, a, b[:, i : i + 1, ..., None], c[..., None])[0] for i in range(4)]

    compared(rows, "four sweeps of PlainMamba-L1 as one scan, batch 1", "four scans", together, four, clock)


def growth(rows: list[dict[str, Any]], clock: Callable[[], float]) -> None:
    """Time against the number of tokens: the operator to 16384, and one mixer beside one attention layer."""
    times = {}
    for length in (256, 1024, 4096, 16384):
        given = inputs(1, DIM, STATES, length)
        times[length] = statistics.median(interleaved({"ours": plain(ours, given)}, SECONDS / 2, clock=clock)["ours"])
        show(rows, what=f"operator, {length} tokens", ms=1e3 * times[length], us_per_token=1e6 * times[length] / length)
    made: dict[str, nn.Module] = {
        "Mamba": Mamba(192),
        "PlainMamba2d": PlainMamba2d(192),
        "Attention": Attention(192, 3),
    }
    for name, mixer in made.items():
        found = {}
        for side in ((28, 28), (28, 56), (56, 112)):
            x = torch.randn(1, *side, 192)
            x = x if name == "PlainMamba2d" else x.flatten(1, 2)
            run = plain(lambda x, mixer=mixer: mixer(x), {"x": x})
            found[side[0] * side[1]] = statistics.median(interleaved({"ours": run}, SECONDS / 2, clock=clock)["ours"])
        show(
            rows,
            what=f"{name}, width 192, batch 1",
            ms_784=1e3 * found[784],
            ms_1568=1e3 * found[1568],
            ms_6272=1e3 * found[6272],
            growth_784_to_1568=found[1568] / found[784],
            growth_1568_to_6272=found[6272] / found[1568],
        )


def kept_per_token(rows: list[dict[str, Any]]) -> None:
    """Bytes that one mixer keeps for the backward pass, per token: constant, if memory is linear."""
    mixer = Mamba(192)
    for length in (197, 784, 3136):
        seen: dict[int, int] = {}

        def pack(x: Tensor, seen: dict[int, int] = seen) -> Tensor:
            seen[x.untyped_storage()._cdata] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            y = mixer(torch.randn(1, length, 192))
        states = 2 * 2 * 192 * 16 * 4  # of both directions, per token
        show(rows, what=f"Mamba, {length} tokens", kept_bytes_per_token=sum(seen.values()) / length, all_states=states)
        del y


# learning -------------------------------------------------------------------------------------------
def digits(side: int) -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_digits

    data = load_digits()
    x = torch.from_numpy(data.images).float()[:, None] / 16
    x = (x - x.mean()) / x.std()
    return F.interpolate(x, (side, side), mode="bilinear") if side != 8 else x, torch.from_numpy(data.target)


def accuracy(model: nn.Module, *, side: int, epochs: int, rate: float, batch: int, seed: int, decay: float) -> float:
    """Of 360 held-out digits, in per cent, after AdamW with one cycle."""
    x, y = digits(side)
    x = x.repeat(1, next(p for p in model.parameters() if p.ndim == 4).shape[1], 1, 1)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    held, train = order[:360], order[360:]
    draw = torch.Generator().manual_seed(seed)
    steps = epochs * (len(train) // batch)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=decay)
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    model.train()
    for _ in range(epochs):
        for some in torch.randperm(len(train), generator=draw)[: len(train) // batch * batch].split(batch):
            loss = F.cross_entropy(model(x[train[some]]), y[train[some]])
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 5.0)
            optimizer.step()
            cycle.step()
    model.eval()
    with torch.no_grad():
        return 100 * float((model(x[held]).argmax(1) == y[held]).float().mean())


def learn(rows: list[dict[str, Any]], seeds: int) -> None:
    from lynceus.backbones.plain_mamba import PlainMamba, PlainMambaConfig
    from lynceus.backbones.vim import Vim, VimConfig
    from lynceus.layers.scan_order import Order

    small = VimConfig(image_size=(8, 8), patch_size=1, stride=1, dim=24, depth=4, in_chans=1, num_classes=10)
    flat = {"image_size": (16, 16), "patch_size": 2, "dim": 32, "depth": 4, "in_chans": 1, "num_classes": 10, "conv": 3}
    orders: dict[str, tuple[Order, bool]] = {
        "raster": ("raster", False),
        "snake": ("snake", False),
        "snake+direction": ("snake", True),
    }
    nets: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
        "Vim, width 24, depth 4, patch 1": (
            lambda: Vim(small),
            {"side": 8, "epochs": 16, "rate": 4e-3, "batch": 48, "decay": 0.05},
        )
    }
    for name, (order, directions) in orders.items():
        config = PlainMambaConfig(**flat, order=order, directions=directions)  # type: ignore[arg-type]
        nets[f"PlainMamba, width 32, depth 4, {name}"] = (
            lambda config=config: PlainMamba(config),  # type: ignore[misc]
            {"side": 16, "epochs": 16, "rate": 2e-3, "batch": 48, "decay": 0.05},
        )
    for name, (make, how) in nets.items():
        found, seconds = [], []
        for seed in range(seeds):
            torch.manual_seed(seed)
            start = time.process_time()
            found.append(accuracy(make(), seed=seed, **how))
            seconds.append(time.process_time() - start)
        spread = statistics.stdev(found) if seeds > 1 else 0.0
        show(rows, what=name, accuracy=statistics.mean(found), spread=spread, cpu_seconds=statistics.mean(seconds))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--wall", action="store_true", help="the clock's time, not this process's")
    parser.add_argument("--learn", action="store_true")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", help="a JSON file for the figures")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    clock = time.perf_counter if options.wall else time.process_time
    print(f"{options.threads} threads, torch {torch.__version__}, {'wall' if options.wall else 'CPU'} time")
    rows: list[dict[str, Any]] = []
    if options.learn:
        learn(rows, options.seeds)
    else:
        operator(rows, clock)
        mixers(rows, clock)
        growth(rows, clock)
        kept_per_token(rows)
    if options.out:
        with open(options.out, "w", encoding="utf-8") as file:
            json.dump(rows, file, indent=1)


if __name__ == "__main__":
    main()
