"""The game on features: values against brute force, counted queries, scrutinised examples, black boxes."""

import json
import math
import threading
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bench import trust_game as bench
from bench._trust import digits8, digits_cnn
from lynceus.core.errors import AdviceError
from lynceus.core.subject import Subject
from lynceus.core.types import Sample
from lynceus.trust.game import Game, search
from lynceus.trust.oracle import NOTHING, Oracle, painted
from lynceus.trust.plays import first_change, known, scrutinise

ROWS = np.array([[0.0, 1.0, 0.5, 1.0], [1.0, 1.0, 0.5, 2.0], [2.0, 1.0, 0.5, 1.0]])  # each owns a row of 3 pixels


class Table:
    """A classifier of 3x3 images that looks up which pixels differ from `image`: any game of nine pixels."""

    def __init__(self, image, changed):
        self.image, self.changed, self.count, self.sizes = image, changed, 0, []

    def __call__(self, x):
        self.count += len(x)
        self.sizes.append(len(x))
        bits = (x != self.image).any(1).flatten(1).long() @ (2 ** torch.arange(9))
        return torch.eye(2)[self.changed[bits].long()]


def nine(seed, chance):
    draw = torch.Generator().manual_seed(seed)
    image = 0.05 + 0.9 * torch.rand(3, 3, 3, generator=draw)
    image[:, 0, 0] = 0.0  # so that the extremes are another value for every pixel
    changed = torch.rand(512, generator=draw) < chance
    changed[0] = False
    return image, Table(image, changed)


def brute_force(changed, mode, distance=math.inf):
    """The value of the whole game by recursion over states: 1 / pixels at the first change, 0 where none comes."""
    values = {}

    def at(state):
        if state not in values:
            values[state] = value(state)
        return values[state]

    def value(state):
        size = bin(state).count("1")
        if size > distance:
            return 0.0
        if changed[state]:
            return 1 / size
        rows = []
        for feature in range(3):
            free = [p for p in range(3 * feature, 3 * feature + 3) if not state >> p & 1]
            if free:
                rows.append(max(at(state | 1 << p) for p in free))
        if not rows:
            return 0.0
        return {"cooperative": max, "adversarial": min, "nature": np.mean}[mode](rows)

    return float(at(0))


@pytest.mark.parametrize("mode", ["cooperative", "adversarial", "nature"])
@pytest.mark.parametrize(
    ("seed", "chance", "distance"), [(0, 0.3, math.inf), (1, 0.1, math.inf), (2, 0.1, 3), (3, 0, 9)]
)
def test_item_3_small_games_have_their_brute_forced_value(mode, seed, chance, distance):
    image, table = nine(seed, chance)
    report = search(table, image, mode=mode, distance=distance, keypoints=ROWS, tighten=False, budget_queries=10_000)
    assert report.summary["solved"] == 1
    assert report.summary["value"] == pytest.approx(brute_force(table.changed, mode, distance), abs=1e-6)
    assert report.summary["queries"] == table.count <= 512


@pytest.mark.parametrize("seed", range(8))
def test_a_solved_game_has_proven_its_minimum(seed):
    image, table = nine(seed, 0.05)
    report = search(table, image, keypoints=ROWS, budget_queries=10_000, seed=seed)
    sizes = [bin(s).count("1") for s in range(512) if table.changed[s]]
    assert report.summary["solved"] == 1
    assert report.summary["severity"] == min(sizes, default=math.inf)
    assert any("was asked" in n for n in report.notes)


def test_plays_that_look_after_every_pixel_solve_the_same_game():
    image, table = nine(1, 0.1)
    each = search(table, image, keypoints=ROWS, looks="each", width=1, tighten=False, budget_queries=10_000)
    assert each.summary["solved"] == 1
    assert each.summary["value"] == pytest.approx(brute_force(table.changed, "cooperative"), abs=1e-6)
    with pytest.raises(AdviceError, match="looks"):
        search(table, image, looks="some")


@pytest.mark.parametrize("seed", range(4))
def test_values_come_to_the_optimum_from_below(seed):
    image, table = nine(seed, 0.08)
    want = brute_force(table.changed, "cooperative")
    values = [
        search(table, image, keypoints=ROWS, tighten=False, budget_queries=b, seed=seed).summary["value"]
        for b in (20, 100, 10_000)
    ]
    assert max(values) <= want + 1e-9
    assert values[-1] == pytest.approx(want, abs=1e-6)


def test_item_2_digits_are_solved_and_close_to_the_exhaustive_minimum():
    net, images = digits_cnn(0), digits8()[2][:8]
    found = [search(bench.grey(net), x, budget_queries=2_500).summary for x in images]
    assert all(f["success"] for f in found)
    severity = [f["severity"] for f in found]
    least = [bench.smallest(net, x, 2) or 3 for x in images]  # a lower bound where no two pixels do it
    assert all(s >= m for s, m in zip(severity, least, strict=True))
    assert np.mean([s <= m + 1 for s, m in zip(severity, least, strict=True)]) >= 0.9
    naive = [bench.random_pixels(net, x, seed=0) for x in images[:4]]
    assert np.mean(severity[:4]) < np.mean(naive)


@pytest.mark.slow
def test_item_2_five_seeds_beside_random_pixels():
    o = bench.options(["--only", "digits", "--exhaustive", "3"])
    rows = bench.digits(o)
    assert all(r["success"] == 1 and r["gap <= 1"] >= 0.9 for r in rows)
    assert rows[-1]["below random"] >= 0.15


@pytest.mark.parametrize("mode", ["cooperative", "adversarial", "nature", "single"])
@pytest.mark.parametrize("budget", [1, 2, 3, 65, 500])
def test_item_4_budget_to_the_query_monotone_and_repeatable(mode, budget):
    net, image = digits_cnn(0), digits8()[2][0]
    asked = []

    def counted(x):
        asked.append(len(x))
        return net(x)

    runs = [search(counted, image, budget_queries=budget, mode=mode, seed=5) for _ in range(2)]
    assert sum(asked) == 2 * budget
    assert runs[0].summary["queries"] == budget
    curve = runs[0].arrays["curve"]
    assert (np.diff(curve[:, 0]) > 0).all()
    assert (np.diff(curve[:, 1]) < 0).all()
    for name, value in runs[0].arrays.items():
        np.testing.assert_array_equal(value, runs[1].arrays[name])
    for key, value in runs[0].summary.items():
        if key != "seconds":
            assert value == runs[1].summary[key], key
    if budget == 500:
        assert len(curve)
        other = search(net_only(net), image, budget_queries=budget, mode=mode, seed=6)
        assert other.summary["queries"] == budget


def net_only(net):
    return lambda x: net(x)


def test_a_longer_search_is_the_shorter_one_and_then_some():
    net, image = digits_cnn(0), digits8()[2][7]
    severities = [
        search(net_only(net), image, budget_queries=b, levels=1, seed=1).summary["severity"] for b in (300, 900, 2700)
    ]
    assert severities == sorted(severities, reverse=True)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from(["l0", "l1", "l2"]), st.sampled_from(["toggle", "white", "black"]))
def test_examples_are_what_the_report_says(seed, norm, paint):
    draw = torch.Generator().manual_seed(seed)
    weight = torch.randn(3, 3 * 36, generator=draw)
    image = torch.rand(3, 6, 6, generator=draw)

    def model(x):
        return x.flatten(1) @ weight.T

    report = search(model, image, norm=norm, paint=paint, budget_queries=300, seed=seed)
    target = painted(image, paint)
    before = int(model(image[None]).argmax())
    assert report.summary["class"] == before
    out = torch.from_numpy(report.arrays["image"])
    mask = torch.zeros(6, 6, dtype=torch.bool)
    for row, column in report.arrays["pixels"]:
        mask[row, column] = True
    assert torch.equal(out, torch.where(mask, target, image))
    if not report.summary["success"]:
        assert not mask.any()
        return
    assert int(model(out[None]).argmax()) == report.summary["class found"] != before
    change = (out - image).double()
    sizes = {"l0": mask.sum().item(), "l1": change.abs().sum().item(), "l2": change.norm().item()}
    assert report.summary["severity"] == pytest.approx(sizes[norm], abs=1e-9)
    assert report.arrays["curve"][-1, 1] == report.summary["severity"]
    assert out.min() >= 0
    assert out.max() <= 1


def test_toggling_is_relative_to_the_original_and_all_channels_go_together():
    image = torch.tensor([[[0.1, 0.5], [0.8, 0.4]]]).expand(3, 2, 2) + torch.tensor([0.0, 0.05, 0.1])[:, None, None]
    low, high = image.min(), image.max()
    want = torch.where(high - image < image, low, high)
    assert torch.equal(painted(image), want)
    oracle = Oracle(subject=Subject(lambda x: torch.stack([x.sum((1, 2, 3)), 1 - x.sum((1, 2, 3))], 1)), image=image)
    one, same = oracle.picture(frozenset({2})), oracle.picture(frozenset({2}).union([2]))
    assert torch.equal(one, same)
    assert int((one != image).any(0).sum()) == 1
    flat = torch.full((3, 4, 4), 0.4)
    assert painted(flat).unique().tolist() == [1.0]


def drive(oracle, play):
    try:
        states = next(play)
        while True:
            oracle.ask(states)
            states = next(play)
    except StopIteration as stop:
        return stop.value


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 100_000), st.floats(0.02, 0.6))
def test_scrutinised_states_need_every_pixel_and_first_changes_are_changes(seed, chance):
    image, table = nine(seed, chance)
    oracle = Oracle(subject=Subject(table), image=image)
    order = np.random.default_rng(seed).permutation(9).tolist()
    hit = drive(oracle, first_change(oracle, NOTHING, order))
    bits = [sum(1 << p for p in order[:k]) for k in range(10)]
    if hit is None:
        assert not any(table.changed[bits[k]] for k in (1, 2, 4, 8, 9))
        return
    k = len(hit)
    assert hit == frozenset(order[:k])
    assert table.changed[bits[k]]
    assert not table.changed[bits[k - 1]]
    small = drive(oracle, scrutinise(oracle, hit))
    assert small <= hit
    assert drive(oracle, known(oracle, small)).changed
    for p in small:
        assert len(small) == 1 or not drive(oracle, known(oracle, small - {p})).changed
    assert oracle.spent == table.count == len(oracle.answers)


def test_confidence_and_distance_bound_what_counts():
    net, image = digits_cnn(0), digits8()[2][0]
    sure = search(net_only(net), image, budget_queries=1_500, confidence=0.9)
    if sure.summary["success"]:
        share = net(torch.from_numpy(sure.arrays["image"])[None]).detach().softmax(1)
        assert float(share.max()) > 0.9
    near = search(net_only(net), image, budget_queries=1_500, norm="l2", distance=0.5)
    assert not near.summary["success"] or near.summary["l2"] <= 0.5
    none = search(net_only(net), image, budget_queries=300, norm="l1", distance=1e-3)
    assert none.summary["success"] == 0
    assert none.summary["severity"] == math.inf
    assert "proves nothing" in none.answer


def test_item_7_a_numpy_only_subject_is_never_asked_for_gradients():
    weight = np.random.default_rng(0).standard_normal((4, 3 * 64)).astype(np.float32)

    def model(x):
        assert not x.requires_grad
        assert not torch.is_grad_enabled()
        return np.asarray(x).reshape(len(x), -1) @ weight.T  # np.asarray of a tensor with gradients would fail

    image = torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(0))
    for mode in ("cooperative", "single"):
        report = search(model, image, budget_queries=400, mode=mode)
        assert report.summary["success"]


class Served(BaseHTTPRequestHandler):
    weight = np.random.default_rng(1).standard_normal((5, 3 * 64))
    seen = 0

    def do_POST(self):
        images = np.array(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        type(self).seen += len(images)
        body = json.dumps((images.reshape(len(images), -1) @ self.weight.T).tolist()).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


def test_item_7_a_model_served_over_http_is_attacked_through_its_logits():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Served)
    threading.Thread(target=server.serve_forever, daemon=True).start()

    def remote(x):
        request = urllib.request.Request(
            f"http://127.0.0.1:{server.server_port}", data=json.dumps(x.tolist()).encode(), method="POST"
        )
        with urllib.request.urlopen(request, timeout=10) as answer:
            return torch.tensor(json.load(answer))

    try:
        image = torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(2))
        report = search(remote, image, budget_queries=400)
        assert Served.seen == report.summary["queries"] <= 400
        assert report.summary["success"]
        Served.seen = 0
        checked = Game(queries=100, limit=2)(Subject(remote), [Sample(image=image), Sample(image=1 - image)])
        assert checked.summary["searched"] == 2
        assert Served.seen >= checked.summary["queries"]
    finally:
        server.shutdown()
        server.server_close()


def test_item_8_plays_of_one_expansion_share_batches():
    """The whole image is one feature of 256 pixels: its expansion alone is more than one batch of 64."""
    sizes = []
    weight = torch.randn(2, 3 * 256, generator=torch.Generator().manual_seed(0)) * 0.01
    weight[0] += 10  # never another class: nothing is scrutinised

    def model(x):
        sizes.append(len(x))
        return x.flatten(1) @ weight.T

    image = torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(0))
    whole = np.array([[7.5, 7.5, 8.0, 1.0]])
    report = search(model, image, keypoints=whole, budget_queries=2_000)
    assert sum(sizes) == report.summary["queries"] == 2_000
    full = sizes[1:-1]
    assert np.mean([s >= 64 for s in full]) > 0.8, sizes
    assert report.summary["images per batch"] > 40
    alone = search(model, image, keypoints=whole, budget_queries=50, width=1, batch=1)
    assert alone.summary["images per batch"] == 1


@pytest.mark.parametrize(
    ("image", "kwargs", "words"),
    [
        (torch.rand(3, 8, 8) * 255, {}, "255"),
        (torch.full((3, 8, 8), math.nan), {}, "pixels"),
        (torch.rand(2, 3, 8, 8), {}, "one image"),
        (torch.rand(3, 8, 8), {"mode": "greedy"}, "mode"),
        (torch.rand(3, 8, 8), {"norm": "linf"}, "norm"),
        (torch.rand(3, 8, 8), {"paint": "red"}, "manipulation"),
        (torch.rand(3, 8, 8), {"plays": "best"}, "weighting"),
        (torch.rand(3, 8, 8), {"budget_queries": 0}, "at least one query"),
        (torch.rand(3, 8, 8), {"budget_queries": None}, "needs an end"),
        (torch.rand(3, 8, 8), {"distance": 0.0}, "distance"),
        (torch.rand(3, 8, 8), {"keypoints": np.array([[1.0, 1.0, -1.0, 1.0]])}, "Keypoint 0"),
    ],
)
def test_wrong_use_is_one_error_that_advises(image, kwargs, words):
    calls = []

    def model(x):
        calls.append(len(x))
        return x.mean((2, 3))

    with pytest.raises((AdviceError, Exception), match=words) as caught:
        search(model, image, **kwargs)
    assert isinstance(caught.value, AdviceError)
    assert not calls


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (lambda x: torch.full((len(x), 3), math.nan), "query 1"),
        (lambda x: x.mean((2, 3))[:, :1], "at least two logits"),
        (lambda x: x.mean(), "at least two logits|row"),
        (lambda x: torch.eye(3)[torch.zeros(len(x)).long()] / (len(x) == 1), "query 2 .* not finite"),
    ],
)
def test_answers_that_mean_nothing_end_the_search(answer, words):
    image = torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(0)) * 0.9
    with pytest.raises(Exception, match=words) as caught:
        search(answer, image, budget_queries=200)
    assert isinstance(caught.value, AdviceError)


def test_a_flat_image_and_one_that_cannot_be_painted_are_no_crash():
    def model(x):
        return torch.stack([x.mean((1, 2, 3)), 1 - x.mean((1, 2, 3))], 1)

    report = search(model, torch.full((3, 6, 6), 0.4), budget_queries=300)
    assert report.summary["success"]
    assert "one feature" in report.notes[0]
    white = search(model, torch.ones(3, 6, 6), paint="white", budget_queries=300)
    assert white.summary["queries"] == 1
    assert any("nothing could be searched" in n for n in white.notes)
    tiny = search(model, torch.rand(3, 1, 1), budget_queries=10)
    assert tiny.summary["queries"] <= 2


def samples(count):
    _, _, x, y = digits8()
    return [Sample(image=x[i].expand(3, 8, 8), label=int(y[i]), id=f"digit {i}") for i in range(count)]


def rgb(net):
    return Subject(lambda x: net(x[:, :1]), name="digits CNN")


class Grey(torch.nn.Module):
    owns_pixels = True

    def __init__(self, net):
        super().__init__()
        self.net = net
        self.count = 0

    def forward(self, x):
        self.count += len(x)
        return self.net(x[:, :1])


def test_the_check_goes_on_where_a_run_was_ended(tmp_path):
    model = Grey(digits_cnn(0)).eval()
    check = Game(queries=200, keep=tmp_path)
    whole = Game(queries=200)(Subject(model), samples(6), seed=1)
    half = check(Subject(model), samples(3), seed=1)
    model.count = 0
    resumed = check(Subject(model), samples(6), seed=1)
    spent = model.count
    assert resumed.summary["queries"] - half.summary["queries"] <= spent < resumed.summary["queries"]
    np.testing.assert_array_equal(resumed.arrays["severity"], whole.arrays["severity"])
    assert resumed.rows == whole.rows
    assert check(Subject(model), samples(6), seed=2).arrays["severity"].shape == (6,)


def test_the_check_leaves_out_what_is_wrong_already_and_says_when_time_ended_it():
    wrong = samples(4)
    wrong[1] = Sample(image=wrong[1].image, label=(wrong[1].label + 1) % 10, id="mislabelled")
    report = Game(queries=100)(rgb(digits_cnn(0)), wrong)
    assert report.summary["wrong already"] == 1
    assert report.summary["searched"] == 3
    assert "wrong already" in report.rows[1]["result"]
    assert math.isnan(report.arrays["severity"][1])
    short = Game(queries=None, seconds=0.3)(rgb(digits_cnn(0)), samples(4))
    assert any("seconds ended" in n for n in short.notes)
    assert {"examples.png", "found over queries.plotly"} <= set(report.figures)


@pytest.mark.slow
def test_item_6_cifar_success_within_sixty_pixels(cifar10_parquet, monkeypatch):
    monkeypatch.setattr("bench._trust.CIFAR10", cifar10_parquet)
    rows = bench.cifar_first(bench.options(["--pictures", "20"]))
    assert rows[0]["success"] >= 0.8
    # that plays by saliency come first was not measured on this network: see docs/trust_game.md
    assert rows[-1]["paired"] >= 16
