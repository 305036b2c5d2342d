"""Assignment keeps every limit and says "infeasible" exactly when it is; groups hold each class once."""

import itertools
import math
import random

import pytest
import torch

from lynceus.core.errors import AdviceError
from lynceus.rewrite.split import Budget, Device, InfeasibleError
from lynceus.rewrite.split.assign import Load, assign, devices_of, energy, greedy, searched, seconds
from lynceus.rewrite.split.classes import groups, inside


def kept(loads, devices, where, budget):
    """Whether an assignment keeps every limit; sums of energies up to rounding."""
    for j, d in enumerate(devices):
        mine = [x for x, w in zip(loads, where) if w == j]
        if sum(x.bytes for x in mine) > d.memory:
            return False
        if sum(energy(x, d, budget) for x in mine) > d.energy * (1 + 1e-9):
            return False
    return sum(x.bytes for x in loads) <= budget.bytes


def exhaustive(loads, devices, budget):
    return any(kept(loads, devices, w, budget) for w in itertools.product(range(len(devices)), repeat=len(loads)))


def problem(draw: random.Random):
    """1 to 5 sub-models on 1 to 3 devices with limits about as large as what is asked."""
    count, n, unit = draw.randint(1, 5), draw.randint(1, 3), draw.randint(1, 5)
    tables = []
    for _ in range(count):
        size, work = draw.randint(50, 1000), draw.uniform(1e7, 1e9)
        shares = [((unit - k) / unit) ** 2 for k in range(unit)]
        tables.append([Load(bytes=max(1, int(size * s)), flops=work * s) for s in shares])
    least = sum(t[-1].bytes for t in tables)
    power = sum(t[-1].flops for t in tables) / 1e9
    budget = Budget(bytes=draw.choice([math.inf, least * draw.uniform(0.8, 4)]), samples=draw.randint(1, 50))
    devices = []
    for j in range(n):
        cost = draw.choice([0.5, draw.uniform(0.1, 2)])
        devices.append(
            Device(
                name=f"d{j}",
                memory=draw.choice([math.inf, *[int(least * draw.uniform(0.2, 1)) for _ in range(3)]]),
                energy=draw.choice(
                    [math.inf, *[power * cost * budget.samples * draw.uniform(0.2, 1) for _ in range(3)]]
                ),
                joules_per_gflop=cost,
            )
        )
    return tables, devices, budget


def test_limits_hold_and_infeasible_is_true():
    """1,000 random sets of devices, beside exhaustive search at maximal pruning."""
    draw, infeasible, raised, beyond = random.Random(0), 0, 0, 0
    for _ in range(1000):
        tables, devices, budget = problem(draw)
        start = draw.randint(0, len(tables[0]) - 1)
        smallest = [t[-1] for t in tables]
        possible = exhaustive(smallest, devices, budget)
        beyond += possible and greedy(smallest, devices, budget) is None
        if not possible:
            with pytest.raises(InfeasibleError) as error:
                assign(tables, devices, budget, start=start)
            assert error.value.proved
            infeasible += 1
            continue
        pruned, where = assign(tables, devices, budget, start=start)
        assert all(start <= n < len(t) for n, t in zip(pruned, tables))
        assert kept([t[n] for t, n in zip(tables, pruned)], devices, where, budget)
        raised += max(pruned) > start
    assert infeasible > 100
    assert raised > 100
    assert beyond > 5  # greed alone would have said no, wrongly


def test_the_largest_is_pruned_first_and_goes_to_the_most_energy():
    table = [[Load(bytes=100, flops=1e9), Load(bytes=25, flops=2.5e8)]] * 2
    small = [[Load(bytes=60, flops=5e8), Load(bytes=15, flops=1e8)]]
    devices = [Device(name="a", energy=900), Device(name="b", energy=1000)]
    pruned, where = assign(table[:1] + small, devices, Budget(samples=1), start=0)
    assert (pruned, where) == ((0, 0), (1, 1))  # b has more left after the first: 999.5 against 900
    pruned, _ = assign(table + small, devices, Budget(bytes=200, samples=1), start=0)
    assert pruned == (1, 0, 0)


def test_searching_gives_up_honestly():
    loads = [Load(bytes=7 + i, flops=1) for i in range(14)]
    devices = [Device(name=str(j), memory=sum(x.bytes for x in loads) / 4) for j in range(4)]
    with pytest.raises(InfeasibleError, match="not all were made") as error:
        searched(loads, devices, Budget(), most=5)
    assert not error.value.proved


@pytest.mark.parametrize(
    ("devices", "budget", "said"),
    [
        ([Device(name="pi")], Budget(bytes=10), "the budget is 10"),
        ([Device(name="pi", memory=50)], Budget(), "the largest device, pi, has 50"),
        ([Device(name="pi", memory=150)], Budget(), "all devices have 150"),
        ([Device(name="pi", energy=0.25)], Budget(samples=10), r"Budget\(samples=5\)"),
        ([Device(name="a", memory=120), Device(name="b", memory=110)], Budget(), "Add a device"),
    ],
)
def test_infeasible_says_what_is_short(devices, budget, said):
    table = [[Load(bytes=100 if len(devices) == 1 else 75, flops=5e7)]] * (2 if len(devices) == 1 else 3)
    with pytest.raises(InfeasibleError, match=said):
        assign(table, devices, budget, start=0)


def test_latency_is_flops_bytes_and_delay():
    device = Device(name="pi", speed=1e9, rate=250e3, delay=0.01)
    assert seconds(2e9, 1000, 250, device) == pytest.approx(2 + 1250 / 250e3 + 0.02)


def test_devices_are_told_apart():
    assert [d.name for d in devices_of(2)] == ["device0", "device1"]
    with pytest.raises(AdviceError, match="a name of its own"):
        devices_of([Device(name="pi"), Device(name="pi")])
    with pytest.raises(AdviceError, match="speed cannot be 0"):
        Device(name="pi", speed=0)


# groups ------------------------------------------------------------------------------------------
@pytest.mark.parametrize("count", [1, 2, 3, 5, 10])
def test_groups_are_balanced_and_hold_every_class_once(count):
    confusion = torch.rand(10, 10)
    for how in ("random", "confusion"):
        made = groups(10, count, how, confusion=confusion, seed=3)
        assert sorted(c for g in made for c in g) == list(range(10))
        assert max(map(len, made)) - min(map(len, made)) <= 1


def test_confused_classes_come_together():
    confusion = torch.eye(6) * 50
    for a, b in ((0, 5), (1, 3), (2, 4)):
        confusion[a, b] = confusion[b, a] = 9
    assert groups(6, 3, "confusion", confusion=confusion, seed=1) == ((0, 5), (1, 3), (2, 4))
    assert inside(((0, 5), (1, 3), (2, 4)), confusion) == pytest.approx(1)
    assert groups(6, 3, seed=1) != groups(6, 3, seed=2)


def test_wrong_groups_are_told():
    with pytest.raises(AdviceError, match="11 sub-models cannot own 10 classes"):
        groups(10, 11)
    with pytest.raises(AdviceError, match="class 1 stands in two"):
        groups(3, 2, ((0, 1), (1, 2)))
    with pytest.raises(AdviceError, match=r"missing: \[2\]"):
        groups(3, 2, ((0,), (1,)))
    with pytest.raises(AdviceError, match="confusion=matrix"):
        groups(3, 2, "confusion")
    with pytest.raises(AdviceError, match="Did you mean 'random'"):
        groups(3, 2, "randon")
