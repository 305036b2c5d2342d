"""Operators, archive, the search and its resumption; the direct encoding."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lynceus import Subject
from lynceus.core.errors import AdviceError
from lynceus.reengineer.keys import evolution as parity_keys
from lynceus.trust import evolution
from lynceus.trust.cppn import Patterns
from lynceus.trust.evolution import Archive, judge, log_odds, polynomial_mutation, search, simulated_binary, ten_crops
from lynceus.trust.pixels import PixelConfig, Pixels, hls_to_rgb

RECORD = Path(__file__).parents[1] / "parity" / "trust" / "evolution_operators.json"
unit = st.floats(0, 1, allow_nan=False, width=32)


# operators -------------------------------------------------------------------------------------------
def test_operators_agree_with_the_authors_to_1e_5():
    rows = parity_keys.check(json.loads(RECORD.read_text()))
    assert {r.output for r in rows} == {"child_low", "child_high", "mutated_first_parent"}
    assert all(r.agrees and r.tolerance <= 1e-5 for r in rows)


def test_a_wrong_operator_is_noticed(monkeypatch):
    monkeypatch.setattr(evolution, "polynomial_mutation", lambda genes, draws, **k: genes + 1e-4 * draws)
    assert not all(r.agrees for r in parity_keys.check(json.loads(RECORD.read_text())))


def crossed_by_hand(a, b, r, eta):
    """Card, gene by gene."""
    y1, y2 = min(a, b), max(a, b)

    def spread(beta):
        alpha = 2 - beta ** -(eta + 1)
        return (r * alpha) ** (1 / (eta + 1)) if r <= 1 / alpha else (1 / (2 - r * alpha)) ** (1 / (eta + 1))

    low = 0.5 * ((y1 + y2) - spread(1 + 2 * y1 / (y2 - y1)) * (y2 - y1))
    high = 0.5 * ((y1 + y2) + spread(1 + 2 * (1 - y2) / (y2 - y1)) * (y2 - y1))
    return min(max(low, 0), 1), min(max(high, 0), 1)


@settings(deadline=None)
@given(a=unit, b=unit, r=st.floats(0, 0.999999), eta=st.sampled_from([1.0, 2.0, 10.0, 15.0, 40.0]))
def test_crossover_is_the_formula_and_stays_inside(a, b, r, eta):
    args = (torch.tensor([v], dtype=torch.float64) for v in (a, b, r))
    low, high = (float(v) for v in simulated_binary(*args, eta=eta))
    assert 0 <= low <= high <= 1
    if abs(a - b) > 1e-5:
        np.testing.assert_allclose((low, high), crossed_by_hand(a, b, r, eta), atol=1e-9)
    elif a == b:
        assert (low, high) == (a, a)


def test_an_individual_mated_with_itself_is_copied():
    genes = torch.rand(5, 40)
    low, high = simulated_binary(genes, genes, torch.rand(5, 40))
    assert torch.equal(low, genes)
    assert torch.equal(high, genes)


@settings(deadline=None)
@given(v=unit, u=st.floats(0, 0.999999), eta=st.sampled_from([1.0, 15.0, 30.0]))
def test_mutation_is_the_formula_and_stays_inside(v, u, eta):
    step = (2 * u) ** (1 / (eta + 1)) - 1 if u < 0.5 else 1 - (2 * (1 - u)) ** (1 / (eta + 1))
    args = (torch.tensor([x], dtype=torch.float64) for x in (v, u))
    assert float(polynomial_mutation(*args, eta=eta)) == pytest.approx(min(max(v + step, 0), 1), abs=1e-12)


# log odds --------------------------------------------------------------------------------------------
def test_log_odds_are_those_of_the_softmax_and_never_stop():
    z = torch.randn(50, 7) * 4
    p = z.double().softmax(1)
    torch.testing.assert_close(log_odds(z), p.log() - (1 - p).log(), rtol=1e-9, atol=1e-9)
    sure = torch.tensor([[60.0, 0, 0], [80.0, 0, 0], [500.0, 0, 0]])  # softmax is 1.0 for all of them
    assert torch.equal(sure.softmax(1)[:, 0], torch.ones(3))
    np.testing.assert_allclose(log_odds(sure)[:, 0], [60 - math.log(2), 80 - math.log(2), 500 - math.log(2)])
    assert log_odds(sure)[:, 1].tolist() == pytest.approx([-60, -80, -500])


def test_ten_crops_are_averaged_as_probabilities():
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 5 * 5, 4))
    subject = Subject(net, mean=(0.0,) * 3, std=(1.0,) * 3)
    images = torch.randint(0, 256, (6, 3, 8, 8), dtype=torch.uint8)
    views = ten_crops(images.float() / 255, 5)
    assert len(views) == 10
    assert torch.equal(views[5], (images.float() / 255).flip(-1)[..., :5, :5])
    with torch.no_grad():
        mean = torch.stack([net(v).double().softmax(1) for v in views]).mean(0)
    torch.testing.assert_close(judge(subject, images, crops=5).sigmoid(), mean)
    with pytest.raises(AdviceError, match="do not fit"):
        judge(subject, images, crops=9)


# archive ---------------------------------------------------------------------------------------------
@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), cells=st.integers(2, 6), rounds=st.integers(1, 5), goal=st.booleans())
def test_offering_a_batch_is_offering_one_by_one(seed, cells, rounds, goal):
    draw = torch.Generator().manual_seed(seed)
    encoding = Pixels((1, 1, 2))
    line = 2.0 if goal else math.inf
    archive = Archive.empty(cells, line)
    best, owner = [-math.inf] * cells, [None] * cells
    for _ in range(rounds):
        children = torch.rand(6, 2, generator=draw)
        odds = torch.randint(-3, 4, (6, cells), generator=draw).double()  # many ties
        if not goal:
            for child, values in zip(children, odds.tolist()):
                for c, v in enumerate(values):
                    if v > best[c]:
                        best[c], owner[c] = v, child
        before = archive.odds.clone()
        archive.offer(odds, children, encoding)
        if goal:
            assert torch.equal(archive.odds[before >= line], before[before >= line])
            assert bool((archive.odds >= before).all())
    assert archive.kept == len(archive.elites) == len(archive.cells.unique())
    if not goal:
        assert archive.odds.tolist() == best
        for c in range(cells):
            assert torch.equal(archive.elites[archive.cells[c]], owner[c])


def test_parents_are_drawn_from_occupied_cells_alike():
    encoding = Pixels((1, 1, 1))
    archive = Archive.empty(4)
    never = -math.inf
    odds = torch.tensor([[3.0, never, 3.0, 0.0], [0.0, never, 0.0, 5.0]], dtype=torch.float64)
    archive.offer(odds, torch.tensor([[0.1], [0.9]]), encoding)
    assert archive.cells.tolist() == [0, -1, 0, 1]
    drawn = archive.parents(5000, torch.Generator().manual_seed(0))
    assert float((drawn == 0).double().mean()) == pytest.approx(2 / 3, abs=0.03)  # it owns two of three cells


# the direct encoding ---------------------------------------------------------------------------------
def test_pixels_are_cut_off_and_grey_is_shown_in_all_channels():
    genes = torch.tensor([[0.0, 0.999, 1.0, 0.5]])
    image = Pixels((3, 2, 2), grey=True).render(genes)
    assert image[0, 0].flatten().tolist() == [0, 254, 255, 127]
    assert torch.equal(image[:, 0], image[:, 2])


def test_colours_are_opencvs_with_hue_that_wraps():
    cv2 = pytest.importorskip("cv2")
    hls = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    ours = hls_to_rgb(torch.from_numpy(hls).permute(2, 0, 1)[None])[0].permute(1, 2, 0).numpy().astype(int)
    assert np.abs(ours - cv2.cvtColor(hls, cv2.COLOR_HLS2RGB).astype(int)).max() <= 1
    turned = torch.from_numpy(hls).permute(2, 0, 1)[None].clone()
    turned[:, 0] %= 180
    assert torch.equal(hls_to_rgb(turned)[0].permute(1, 2, 0), torch.from_numpy(ours).to(torch.uint8))
    quarters = torch.tensor([[h, 128, 255] for h in (0, 64, 128, 192)], dtype=torch.uint8).view(4, 3, 1, 1)
    whole = hls_to_rgb(quarters, hue="whole")
    assert len(whole.flatten(1).unique(dim=0)) == 4


def test_mutation_counts_genes_and_its_rate_is_halved():
    encoding = Pixels((1, 100, 100), PixelConfig(crossover=0))
    parents = torch.full((1, 10_000), 0.5)
    pairs = torch.zeros(4, 2, dtype=torch.long)
    for generation, rate in ((0, 0.1), (999, 0.1), (1000, 0.05), (3000, 0.0125)):
        changed = (encoding.offspring(parents, pairs, generation, 0) != 0.5).double().mean()
        assert float(changed) == pytest.approx(rate, rel=0.05)


def test_half_of_the_pairs_mate_and_children_swap_fairly():
    encoding = Pixels((1, 10, 20), PixelConfig(rate=0))
    parents = torch.stack([torch.full((200,), 0.25), torch.full((200,), 0.75)])
    pairs = torch.tensor([[0, 1]]).repeat(400, 1)
    children = encoding.offspring(parents, pairs, 0, 0).view(400, 2, 200)
    copied = ((children == 0.25) | (children == 0.75)).all(2).all(1)
    assert float(copied.double().mean()) == pytest.approx(0.5, abs=0.08)
    assert float((children[copied][:, 0, 0] == 0.25).double().mean()) == pytest.approx(0.5, abs=0.12)
    mated = children[~copied]
    assert float((mated[:, 0] < 0.5).double().mean()) == pytest.approx(0.5, abs=0.02)
    torch.testing.assert_close(mated.sum(1), torch.ones(len(mated), 200), atol=1e-5, rtol=0)  # symmetric bounds


# the search ------------------------------------------------------------------------------------------
def linear(seed=0, classes=4):
    torch.manual_seed(seed)
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, classes))
    net[1].weight.data *= 8
    return Subject(net, mean=(0.0,), std=(1.0,))


ENCODINGS = {"pixels": lambda: Pixels((1, 8, 8)), "cppn": lambda: Patterns((1, 8, 8))}


def same(a, b, encoding):
    assert torch.equal(a.archive.odds, b.archive.odds)
    assert np.array_equal(np.stack(a.curve), np.stack(b.curve))
    assert torch.equal(a.archive.cells, b.archive.cells)
    for x, y in zip(encoding.pack(a.archive.elites).values(), encoding.pack(b.archive.elites).values()):
        assert np.array_equal(x, y)
    assert [len(h) for h in a.harvest] == [len(h) for h in b.harvest]
    assert all(np.array_equal(x, y) for p, q in zip(a.harvest, b.harvest) for x, y in zip(p, q))


@pytest.mark.parametrize("kind", ENCODINGS)
def test_a_search_never_gets_worse_and_is_its_seed(kind):
    encoding = ENCODINGS[kind]()
    first, second, other = (search(linear(), encoding, generations=6, population=20, seed=s) for s in (1, 1, 2))
    same(first, second, encoding)
    assert not torch.equal(first.archive.odds, other.archive.odds)
    assert (np.diff(np.stack(first.curve), axis=0) >= 0).all()
    assert first.queries == 7 * 20
    images = encoding.render(encoding.select([first.archive.elites], first.archive.cells))
    torch.testing.assert_close(judge(linear(), images).diagonal(), first.archive.odds)  # of the 8-bit image


@pytest.mark.parametrize("kind", ENCODINGS)
def test_an_interrupted_search_goes_on_as_if_it_had_not_been(kind, tmp_path):
    encoding = ENCODINGS[kind]()
    whole = search(linear(), encoding, generations=9, population=20, seed=3, harvest=4)
    part = search(linear(), encoding, generations=9, population=20, seed=3, harvest=4, queries=100, keep=tmp_path)
    assert part.stopped
    assert part.generations == 4
    rest = search(linear(), encoding, generations=9, population=20, seed=3, harvest=4, keep=tmp_path)
    assert rest.resumed == 5
    same(whole, rest, encoding)
    again = search(linear(), encoding, generations=9, population=20, seed=3, harvest=4, keep=tmp_path)
    same(whole, again, encoding)


@pytest.mark.parametrize("when", [4, 7])
def test_a_search_that_is_killed_in_a_generation_loses_only_that_one(when, tmp_path, monkeypatch):
    encoding = Pixels((1, 8, 8))
    whole = search(linear(), encoding, generations=9, population=20)
    calls, real = [], Archive.offer

    def offer(self, *args):
        calls.append(1)
        out = real(self, *args)
        if len(calls) == when:
            raise KeyboardInterrupt
        return out

    with monkeypatch.context() as patch:
        patch.setattr(Archive, "offer", offer)
        with pytest.raises(KeyboardInterrupt):
            search(linear(), encoding, generations=9, population=20, keep=tmp_path, keep_every=2)
    rest = search(linear(), encoding, generations=9, population=20, keep=tmp_path)
    assert rest.resumed == when - 1
    same(whole, rest, encoding)


def test_a_kept_search_is_found_by_what_it_depends_on(tmp_path):
    def run(subject, seed=0, **options):
        return search(subject, Pixels((1, 8, 8)), generations=3, population=20, seed=seed, keep=tmp_path, **options)

    run(linear(0))
    assert run(linear(0)).resumed == 4
    assert run(linear(1)).resumed == 0
    assert run(linear(0), seed=1).resumed == 0
    assert run(linear(0), classes=[1, 2]).resumed == 0
    weights = linear(2).model[1].weight.detach()
    for _ in range(2):  # a plain function is known by its answers
        answered = run(Subject(lambda x: x.flatten(1) @ weights.T))
    assert answered.resumed == 4
    assert run(Subject(lambda x: x.flatten(1) @ weights.T * 1.1)).resumed == 0


def test_a_file_that_is_no_search_is_named(tmp_path):
    search(linear(), Pixels((1, 8, 8)), generations=1, population=20, keep=tmp_path)
    (file,) = tmp_path.iterdir()
    file.write_bytes(b"nothing")
    with pytest.raises(AdviceError, match=r"evolution-.*delete it"):
        search(linear(), Pixels((1, 8, 8)), generations=2, population=20, keep=tmp_path)


def test_a_goal_ends_the_search_and_leaves_cells_alone():
    run = search(linear(), Pixels((1, 8, 8)), generations=400, population=50, goal=0.95)
    assert run.generations < 400
    assert not run.stopped
    assert float(run.archive.confidence.min()) >= 0.95
    first = (np.stack(run.curve) >= math.log(19)).argmax(0)
    for cell, generation in enumerate(first):
        assert (np.stack(run.curve)[generation:, cell] == run.curve[generation][cell]).all()


def test_only_some_classes_can_be_asked_for():
    run = search(linear(), Pixels((1, 8, 8)), generations=2, population=20, classes=[3, 1])
    every = search(linear(), Pixels((1, 8, 8)), generations=0, population=20)
    assert run.archive.odds.shape == (2,)
    assert run.curve[0].tolist() == [every.curve[0][3], every.curve[0][1]]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"population": 7}, "even"),
        ({"generations": -1}, "at least 0"),
        ({"queries": 10}, "asks for 20 answers, and of the queries 10 are left"),
        ({"classes": [4]}, "classes 0 to 3"),
        ({"goal": 1.0}, "between 0 and 1"),
    ],
)
def test_what_cannot_be_searched_is_said_at_once(change, words):
    with pytest.raises(AdviceError, match=words):
        search(linear(), Pixels((1, 8, 8)), **{"generations": 2, "population": 20, **change})


def test_answers_that_are_no_numbers_name_the_image():
    def model(x):
        out = x.flatten(1)[:, :3].clone()
        out[4] = float("nan")
        return out

    with pytest.raises(AdviceError, match="generated image 4"):
        search(Subject(model), Pixels((1, 8, 8)), generations=1, population=20)
