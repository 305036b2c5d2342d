"""Devices, limits, and which sub-model goes where.

Greedily, as the paper does: sub-models by FLOPs, descending, each to the device with the most energy left that has the
memory. Where one fits nowhere, or the total is above the budget, the sub-model with the most FLOPs loses one more share
of its heads, and it starts over. When all are as small as they get and greed still fails, every assignment is searched,
so that "infeasible" is a proof. Energy is a model: joules per 10^9 FLOPs times FLOPs times images, measured by nobody.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from lynceus.core.errors import AdviceError

MOST = 2_000_000  # assignments tried before the search gives up


class InfeasibleError(AdviceError):
    """No assignment keeps the limits. `proved`: every assignment was tried."""

    def __init__(self, text: str, *, proved: bool = True):
        super().__init__(text)
        self.proved = proved


@dataclass(frozen=True, kw_only=True)
class Device:
    """A device that can hold sub-models.

    name: unique. memory: bytes for weights. energy: joules that it may spend on the budget's images.
    joules_per_gflop: of the energy model. speed: FLOPs per second. rate: bytes per second of its link to the fusion
    device, delay: seconds that a message takes on it, one way. overhead: seconds that a request takes besides, such as
    packing and waking; `Cluster.calibrated` measures it. core: the processor core that `deploy` pins it to;
    None: the next one.
    """

    name: str
    memory: float = math.inf
    energy: float = math.inf
    joules_per_gflop: float = 0.5
    speed: float = 10e9
    rate: float = math.inf
    delay: float = 0.0
    overhead: float = 0.0
    core: int | None = None

    def __post_init__(self) -> None:
        wrong = [
            n
            for n in ("memory", "energy", "joules_per_gflop", "speed", "rate", "delay", "overhead")
            if not getattr(self, n) >= 0
        ]
        wrong += [n for n in ("speed", "rate") if getattr(self, n) == 0]
        if wrong:
            raise AdviceError(f"Device {self.name!r}: {wrong[0]} cannot be {getattr(self, wrong[0])}.")


@dataclass(frozen=True, kw_only=True)
class Budget:
    """Limits of the whole plan. bytes: weights of all sub-models together. samples: images that energies are for."""

    bytes: float = math.inf
    samples: int = 1000


@dataclass(frozen=True, kw_only=True)
class Load:
    """What a sub-model asks of its device: bytes of weights, FLOPs of one image."""

    bytes: int
    flops: float


def devices_of(devices: int | Sequence[Device]) -> tuple[Device, ...]:
    """A number means so many equal devices without limits."""
    made = tuple(Device(name=f"device{i}") for i in range(devices)) if isinstance(devices, int) else tuple(devices)
    names = [d.name for d in made]
    if not made or len(set(names)) < len(names):
        raise AdviceError(
            "There must be at least one device, and each needs a name of its own; got "
            f"{', '.join(map(repr, names[:6])) or 'none'}."
        )
    return made


def energy(load: Load, device: Device, budget: Budget) -> float:
    """Joules of the energy model."""
    return device.joules_per_gflop * load.flops / 1e9 * budget.samples


def greedy(loads: Sequence[Load], devices: Sequence[Device], budget: Budget) -> tuple[int, ...] | None:
    """The device of each sub-model, or None where one fits nowhere or the total is too large."""
    if sum(x.bytes for x in loads) > budget.bytes:
        return None
    memory, power = [d.memory for d in devices], [d.energy for d in devices]
    out = [-1] * len(loads)
    used = [0.0] * len(devices)
    for i in sorted(range(len(loads)), key=lambda i: -loads[i].flops):
        able = [
            j for j, d in enumerate(devices) if loads[i].bytes <= memory[j] and energy(loads[i], d, budget) <= power[j]
        ]
        if not able:
            return None
        # equal energies (none given): the device that would be done first
        best = max(able, key=lambda j: (power[j], -(used[j] + loads[i].flops) / devices[j].speed, -j))
        out[i] = best
        memory[best] -= loads[i].bytes
        power[best] -= energy(loads[i], devices[best], budget)
        used[best] += loads[i].flops
    return tuple(out)


def searched(
    loads: Sequence[Load], devices: Sequence[Device], budget: Budget, *, most: int = MOST
) -> tuple[int, ...] | None:
    """Any assignment that keeps the limits, by trying all; None proves that there is none. InfeasibleError with
    proved=False after `most` tries."""
    if sum(x.bytes for x in loads) > budget.bytes:
        return None
    order = sorted(range(len(loads)), key=lambda i: (-loads[i].bytes, -loads[i].flops))
    memory, power = [d.memory for d in devices], [d.energy for d in devices]
    out = [-1] * len(loads)
    tries = 0

    def place(n: int) -> bool:
        nonlocal tries
        if n == len(order):
            return True
        i, seen = order[n], set()
        for j, d in enumerate(devices):
            state = (memory[j], power[j], d.joules_per_gflop)
            need = energy(loads[i], d, budget)
            if state in seen or loads[i].bytes > memory[j] or need > power[j]:
                continue
            seen.add(state)  # equal devices in an equal state: one of them is enough
            tries += 1
            if tries > most:
                raise InfeasibleError(
                    f"No assignment was found in {most:,} tries, and not all were made; give devices more memory or "
                    "energy, or ask for fewer sub-models.",
                    proved=False,
                )
            before = memory[j], power[j]
            memory[j], power[j], out[i] = memory[j] - loads[i].bytes, power[j] - need, j
            if place(n + 1):
                return True
            memory[j], power[j] = before
        return False

    return tuple(out) if place(0) else None


def assign(
    tables: Sequence[Sequence[Load]], devices: Sequence[Device], budget: Budget, *, start: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(shares pruned, device) of each sub-model. InfeasibleError when nothing keeps the limits.

    tables: of each sub-model its load with 0, 1, ... shares pruned. start: shares that go at least.
    """
    pruned = [min(start, len(t) - 1) for t in tables]
    while True:
        loads = [t[n] for t, n in zip(tables, pruned)]
        found = greedy(loads, devices, budget)
        if found is not None:
            return tuple(pruned), found
        left = [i for i, t in enumerate(tables) if pruned[i] + 1 < len(t)]
        if not left:
            break
        pruned[max(left, key=lambda i: (loads[i].flops, -i))] += 1
    found = searched(loads, devices, budget)
    if found is not None:
        return tuple(pruned), found
    raise InfeasibleError(_why(loads, devices, budget))


def _why(loads: Sequence[Load], devices: Sequence[Device], budget: Budget) -> str:
    size, most = sum(x.bytes for x in loads), max(x.bytes for x in loads)
    lead = f"The {len(loads)} sub-models do not fit the limits, though each is pruned as far as it can be"
    if size > budget.bytes:
        return f"{lead}: together they take {size:,} bytes, the budget is {budget.bytes:,.0f}. Raise Budget(bytes=)."
    if most > max(d.memory for d in devices):
        best = max(devices, key=lambda d: d.memory)
        return (
            f"{lead}: one takes {most:,} bytes, and the largest device, {best.name}, has {best.memory:,.0f}. Give it "
            "more memory, or start from a smaller model."
        )
    if size > sum(d.memory for d in devices):
        return f"{lead}: together they take {size:,} bytes, all devices have {sum(d.memory for d in devices):,.0f}."
    need = min(sum(energy(x, d, budget) for x in loads) for d in devices)
    have = sum(d.energy for d in devices)
    if need > have:
        return (
            f"{lead}: {budget.samples} images take {need:.3g} J by the energy model, all devices have {have:.3g} J. "
            f"Ask for fewer images, Budget(samples={max(int(budget.samples * have / need), 0)}), or give more energy."
        )
    return f"{lead}: every assignment breaks the memory or the energy of a device. Add a device, or raise a limit."


def seconds(flops: float, sent: int, back: int, device: Device) -> float:
    """The latency model of one device: FLOPs / speed + bytes / rate, the delay of the link both ways, overhead."""
    return flops / device.speed + (sent + back) / device.rate + 2 * device.delay + device.overhead
