"""Pattern networks: graphs stay sound under mutation, populations render as each would alone, expressions travel."""

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lynceus.core.errors import AdviceError
from lynceus.trust import cppn
from lynceus.trust.cppn import Expression, Pattern, PatternConfig, Patterns, grid, mutate, random_pattern, values

RICH = PatternConfig(add=0.9, split=0.9, delete=0.1, remove=0.1)


def grown(seed, count=6, outputs=1, rounds=20, config=RICH):
    draw = np.random.default_rng(seed)
    population = [random_pattern(outputs, draw) for _ in range(count)]
    for _ in range(rounds):
        population = mutate(population, config, draw)
    return population


def by_hand(p, x, y, d):
    """Node by node, by recursion: the value of every output at one pixel."""
    known = dict(enumerate((x, y, d, 1.0)))

    def value(node):
        if node not in known:
            total = sum(20 * g * value(s) - 10 * value(s) for s, t, g in zip(p.source, p.target, p.gene) if t == node)
            known[node] = (
                math.sin(total),
                2 / (1 + math.exp(-total)) - 1 if total > -700 else -1.0,
                math.exp(-total * total),
                min(max(total, -3), 3) / 3,
            )[p.function[node]]
        return known[node]

    return [value(4 + o) for o in range(p.outputs)]


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 10**6), outputs=st.sampled_from([1, 3]), rounds=st.integers(0, 40))
def test_graphs_stay_sound_under_mutation(seed, outputs, rounds):
    for p in grown(seed, count=3, outputs=outputs, rounds=rounds, config=PatternConfig()):
        cppn._check(p)  # no circle, nothing into inputs or out of outputs
        edges = list(zip(p.source.tolist(), p.target.tolist()))
        assert len(set(edges)) == len(edges)
        assert ((p.gene >= 0) & (p.gene <= 1)).all()
        assert len(p.function) >= 4 + outputs


def test_parents_are_left_as_they_were():
    parents = grown(0)
    before = [(p.function.copy(), p.source.copy(), p.target.copy(), p.gene.copy()) for p in parents]
    mutate(parents, RICH, np.random.default_rng(1))
    for p, old in zip(parents, before):
        assert all(np.array_equal(a, b) for a, b in zip((p.function, p.source, p.target, p.gene), old))


@pytest.mark.parametrize("outputs", [1, 3])
def test_a_population_is_computed_as_each_pixel_by_hand(outputs):
    population = grown(3, outputs=outputs)
    assert max(len(p.function) for p in population) > 20
    pixels = grid((5, 7))
    made = values(population, pixels)
    for p, mine in zip(population, made):
        want = torch.tensor([by_hand(p, *(float(v) for v in pixels[:3, i])) for i in range(35)], dtype=torch.float64).T
        torch.testing.assert_close(mine, want, atol=1e-9, rtol=0)


def test_a_population_renders_as_each_alone_and_in_blocks(monkeypatch):
    encoding = Patterns((3, 12, 9))
    population = grown(4, outputs=3)
    together = encoding.render(population)
    assert together.shape == (6, 3, 12, 9)
    for p, image in zip(population, together):
        assert torch.equal(encoding.expression(p).render(), image)
    monkeypatch.setattr(cppn, "BLOCK", 64)
    assert torch.equal(encoding.render(population), together)


def test_nodes_that_lead_nowhere_change_nothing():
    p = random_pattern(1, np.random.default_rng(0))
    ends = np.append(p.source, [0, 5]), np.append(p.target, [5, 6])
    dead = Pattern(1, np.append(p.function, [1, 2]), *ends, np.append(p.gene, [1, 1]))
    pixels = grid((4, 4))
    assert torch.equal(values([p], pixels), values([dead], pixels))
    bare = Pattern(1, np.array([0] * 4 + [2]), *(np.zeros(0, int),) * 2, np.zeros(0))
    assert torch.equal(values([bare], pixels), torch.ones(1, 1, 16).double())  # e^-0: a picture of one colour


def test_coordinates_are_raw_indices_and_only_the_distance_is_normalised():
    x, y, d, one = grid((3, 5)).view(4, 3, 5)
    assert x[0].tolist() == [0, 1, 2, 3, 4]
    assert y[:, 0].tolist() == [0, 1, 2]
    assert float(d[0, 0]) == pytest.approx(math.sqrt(2))
    assert float(d[1, 2]) == 0
    assert bool((one == 1).all())
    assert grid((3, 5), coordinates="unit")[0].view(3, 5)[0].tolist() == [-1, -0.5, 0, 0.5, 1]
    assert bool(grid((1, 1)).isfinite().all())


def test_a_larger_picture_shows_the_same_scene():
    for coordinates in ("raw", "unit"):
        encoding = Patterns((1, 8, 10), PatternConfig(coordinates=coordinates))
        for p in grown(5):
            expression = encoding.expression(p)
            large = expression.render(15, 19)  # every second pixel is one of the original
            difference = (large[:, ::2, ::2].int() - expression.render().int()).abs()
            assert int(difference.max()) <= 1
    assert expression.render(64).shape == (1, 64, 64)


@pytest.mark.parametrize("outputs", [1, 3])
def test_the_formula_alone_draws_the_picture(outputs):
    encoding = Patterns((3 if outputs == 3 else 1, 6, 6))
    names = ("h", "l", "s") if outputs == 3 else ("grey",)
    for p in grown(6, outputs=outputs, rounds=8):
        formula = encoding.expression(p).formula()
        made = values([p], encoding.pixels)[0]
        for i in range(36):
            x, y, d, _ = (float(v) for v in encoding.pixels[:, i])
            scope = {
                "sin": math.sin,
                "exp": lambda v: math.exp(min(v, 700)),
                "x": x,
                "y": y,
                "d": d,
                "min": min,
                "max": max,
            }
            exec(formula, {"__builtins__": {}}, scope)
            assert [scope[n] for n in names] == pytest.approx(made[:, i].tolist(), abs=1e-9)


def test_expressions_travel_as_json():
    encoding = Patterns((3, 8, 8), PatternConfig(coordinates="unit", hue="whole"))
    for p in grown(7, outputs=3):
        expression = encoding.expression(p)
        again = Expression.from_json(expression.to_json())
        assert torch.equal(again.render(33, 20), expression.render(33, 20))
        assert again.formula() == expression.formula()


def broken(change):
    data = json.loads(Patterns((1, 4, 4)).expression(grown(8)[0]).to_json())
    change(data)
    return json.dumps(data)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        broken(lambda d: d["nodes"][0]["inputs"].append([4, 0.5])),
        broken(lambda d: d["nodes"][-1]["inputs"].append([d["nodes"][-1]["node"], 0.5])),
        broken(lambda d: d["nodes"][0]["inputs"].append([9999, 0.5])),
        broken(lambda d: d["nodes"][0].update(function="cosine")),
        broken(lambda d: d["nodes"][0]["inputs"].append([0, float("nan")])),
        broken(lambda d: d["frame"].update(shape=[2, 4, 4])),
        broken(lambda d: d["frame"].update(coordinates="polar")),
        broken(lambda d: d["nodes"][0].update(node=77)),
        broken(lambda d: d["pattern"].update(outputs=2)),
    ],
)
def test_what_is_no_pattern_is_refused(text):
    with pytest.raises(AdviceError):
        Expression.from_json(text)


def test_populations_are_kept_in_arrays():
    encoding = Patterns((1, 8, 8))
    population = grown(9)
    again = encoding.unpack(encoding.pack(population))
    assert torch.equal(encoding.render(again), encoding.render(population))


def test_there_is_no_recombination_and_pairs_are_swapped_fairly():
    still = PatternConfig(rate=0, function_rate=0, add=0, delete=0, split=0, remove=0)
    encoding = Patterns((1, 4, 4), still)
    parents = grown(10, count=2)
    children = encoding.offspring(parents, torch.tensor([[0, 1]]).repeat(300, 1), 0, 0)
    first = [len(c.gene) == len(parents[0].gene) and np.array_equal(c.gene, parents[0].gene) for c in children]
    assert all(a != b for a, b in zip(first[::2], first[1::2]))
    assert np.mean(first[::2]) == pytest.approx(0.5, abs=0.1)


@pytest.mark.parametrize(
    ("name", "chance", "seen"),
    [
        ("split", 0.5, lambda p, c: len(c.function) > len(p.function)),
        ("remove", 0.2, lambda p, c: len(c.function) < len(p.function)),
        ("delete", 0.3, lambda p, c: len(c.source) < len(p.source)),
    ],
)
def test_mutations_come_as_often_as_they_should(name, chance, seen):
    off = {"rate": 0, "function_rate": 0, "add": 0, "delete": 0, "split": 0, "remove": 0}
    parent = grown(11)[0]
    children = mutate([parent] * 1000, PatternConfig(**{**off, name: chance}), np.random.default_rng(0))
    assert np.mean([seen(parent, c) for c in children]) == pytest.approx(chance, abs=0.05)


def test_weights_and_functions_mutate_at_their_rate():
    config = PatternConfig(add=0, delete=0, split=0, remove=0)
    parent = grown(12)[0]
    children = mutate([parent] * 500, config, np.random.default_rng(0))
    assert np.mean([c.gene != parent.gene for c in children]) == pytest.approx(0.1, abs=0.02)
    # one in four functions drawn anew is the old one
    assert np.mean([c.function != parent.function for c in children]) == pytest.approx(0.075, abs=0.02)


@pytest.mark.parametrize("change", [{"rate": 2}, {"coordinates": "polar"}, {"hue": "none"}])
def test_options_are_checked(change):
    with pytest.raises(AdviceError):
        PatternConfig(**change)
