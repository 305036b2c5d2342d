"""Fooling images of digits and CIFAR-10: what the card asks of evolution, ascent, retraining, and the check."""

import itertools
import json
import urllib.request
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread

import numpy as np
import pytest
import torch
from torch import nn

import lynceus
from bench._trust import cifar, cifar_cnn, digits8
from bench.trust_fooling import DIGIT, grey, learn_digits, pixels_in, share, sure_cnn
from lynceus import Subject, data
from lynceus.core.errors import AdviceError
from lynceus.core.report import Report
from lynceus.core.types import Sample
from lynceus.train.fit import FitConfig
from lynceus.trust.fooling import AscentConfig, Fooling, ascend, evolve, expressions, learner, retrain, to_bits
from lynceus.trust.real import auroc, scores


@pytest.fixture(scope="module")
def net():
    made = sure_cnn(0)
    assert share(made) >= 0.98
    return grey(made)


@pytest.fixture(scope="module")
def pixels(net):
    x, y, _, _ = digits8()
    return [evolve(net, DIGIT, "pixels", 30, 200, seed, real=x[:400], labels=y[:400], quiet=True) for seed in range(5)]


def test_pixels_reach_999_in_every_class_by_generation_30(pixels):
    for report in pixels:
        assert report.summary["minimum_confidence"] >= 0.999
        assert len(report.rows) == 10


@pytest.mark.parametrize("seed", [0, *(pytest.param(s, marks=pytest.mark.slow) for s in range(1, 5))])
def test_patterns_reach_999_in_the_median_by_generation_50(net, seed):
    summary = evolve(net, DIGIT, "cppn", 50, 200, seed, quiet=True).summary
    assert summary["median_confidence"] >= 0.999
    assert summary["minimum_confidence"] >= 0.95


def test_confidence_is_that_of_the_8_bit_images(net, pixels):
    images = torch.from_numpy(pixels[0].arrays["images"])
    assert images.dtype == torch.uint8
    with torch.no_grad():
        p = net(images).double().softmax(1).diagonal()
    np.testing.assert_allclose(p, pixels[0].arrays["confidence"], atol=1e-6)


def test_images_that_stop_at_their_goal_are_unrecognisable(net):
    """At most .6 with any digit of the class, against .9 and more for real ones."""
    x, y, tx, ty = digits8()
    for seed in range(3):
        report = evolve(net, DIGIT, "pixels", 60, 200, seed, real=x, labels=y, goal=0.999, quiet=True)
        assert report.summary["minimum_confidence"] >= 0.999
        assert all(row["correlation"] <= 0.6 for row in report.rows)
        assert report.summary["highest_correlation"] == max(row["correlation"] for row in report.rows)
    row, label = tx[0].flatten().double(), int(ty[0])
    own = x[y == label].flatten(1).double()
    assert max(float(torch.corrcoef(torch.stack([row, o]))[0, 1]) for o in own) > 0.85


def test_likeness_is_that_of_numpy(pixels):
    x, y, _, _ = digits8()
    x, y = x[:400].flatten(1).numpy().astype(float), y[:400].numpy()
    for i, row in enumerate(pixels[0].rows):
        mine = pixels[0].arrays["images"][i].ravel() / 255
        assert row["correlation"] == pytest.approx(max(np.corrcoef(mine, o)[0, 1] for o in x[y == i]), abs=1e-6)
        assert row["nearest real image"] == str(y[((x - mine) ** 2).sum(1).argmin()])


def test_ascent_without_decay_reaches_9999_and_decay_costs_confidence(net):
    config = AscentConfig(mean=float(digits8()[0].mean()))
    report = ascend(net, None, (0.0, 0.01, 0.05), shape=DIGIT, config=config, quiet=True)
    by = {d: [r for r in report.rows if r["decay"] == d] for d in (0.0, 0.01, 0.05)}
    assert [len(rows) for rows in by.values()] == [10, 10, 10]
    assert all(r["> 0.9999 at step"] is not None and r["> 0.9999 at step"] <= 200 for r in by[0.0])
    assert all(r["on top at step"] <= r["> 0.99 at step"] <= r["> 0.999 at step"] for r in by[0.0])
    last = [float(np.median([r["last"] for r in rows])) for rows in by.values()]
    assert last[0] > last[1] > last[2]  # the trade-off
    assert report.figures["confidence_over_steps.plotly"]
    images = torch.from_numpy(report.arrays["images"])
    size = [float((images[i : i + 10].float() - 255 * config.mean).abs().mean()) for i in (0, 10, 20)]
    assert size[0] > size[1] > size[2]


def test_the_promised_gain_comes_true_to_first_order():
    """A linear pair of logits: p rises by about min(.03, .1 (1 - p)) at a step."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 2))
    torch.manual_seed(0)
    nn.init.normal_(net[1].weight, std=1.0)
    report = ascend(
        Subject(net, mean=(0.0,) * 3, std=(1.0,) * 3), 1, 0.0, shape=(3, 2, 2), config=AscentConfig(steps=8), quiet=True
    )
    p = 1 / (1 + np.exp(-report.arrays["curve"][0]))
    np.testing.assert_allclose(np.diff(p), np.minimum(0.03, 0.1 * (1 - p[:-1])), rtol=0.1)


@pytest.mark.parametrize(
    "options",
    [
        {"start": "uniform"},
        {"start": "zero", "blur_every": 4, "blur": 0.5},
        {"small": 20.0},
        {"small_norm": 20.0},
        {"small_benefit": 20.0},
        {"rate": 1000.0},
    ],
)
def test_options_of_the_ascent(net, options):
    report = ascend(net, [3, 4], 0.0, shape=DIGIT, config=AscentConfig(steps=30, **options), quiet=True)
    assert len(report.rows) == 2
    curve = report.arrays["curve"]
    assert (curve.max(1) > curve[:, 0]).all()


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda s: ascend(s, 10, shape=DIGIT), "classes 0 to 9"),
        (lambda s: ascend(s, 1, 1.0, shape=DIGIT), "share in"),
        (lambda s: ascend(Subject(lambda x: x.mean((2, 3))), 1, shape=DIGIT), "gradients"),
        (lambda s: AscentConfig(blur_every=1, blur=0.1), "at least 0.3"),
        (lambda s: AscentConfig(start="ones"), "start"),
        (lambda s: evolve(s, (2, 8, 8)), "1 or 3 channels"),
        (lambda s: evolve(s, (1, 12, 12)), "cannot answer images of 12 x 12 pixels"),
        (lambda s: evolve(s, DIGIT, "neat"), "encoding"),
        (lambda s: evolve(s, DIGIT, real=torch.rand(3, 1, 7, 7)), "equal shapes"),
        (lambda s: evolve(s, DIGIT, real=torch.rand(3, *DIGIT) * 255), r"\[0, 1\]"),
        (lambda s: evolve(s, DIGIT, real=torch.rand(3, *DIGIT), labels=torch.tensor([1, 2, 10])), "label 10"),
        (lambda s: evolve(s, DIGIT, labels=torch.tensor([1])), "labels belong"),
        (lambda s: evolve(Subject(lambda x: x.flatten(1)[:, :10] * torch.nan), DIGIT), "not finite"),
        (lambda s: evolve(Subject(lambda x: x.flatten(1)[:, :1]), DIGIT), "one number"),
        (lambda s: expressions(Report(name="none")), "no patterns"),
    ],
)
def test_bad_input_is_told_before_any_work(call, words, net):
    with pytest.raises(AdviceError, match=words):
        call(net)


def test_a_model_that_has_learnt_nothing_is_refused():
    torch.manual_seed(0)
    fresh = Subject(lynceus.create_model("resnet_nano", num_classes=10))
    with pytest.raises(AdviceError, match="learnt nothing"):
        evolve(fresh, (3, 32, 32), "cppn", 2, 20, quiet=True)
    x, y, _, _ = digits8()
    with pytest.raises(AdviceError, match="hardly better than chance"):
        evolve(fresh, (3, 8, 8), "cppn", 2, 20, real=x.expand(-1, 3, -1, -1), labels=y, quiet=True)
    assert evolve(fresh, (3, 32, 32), "cppn", 1, 20, untrained=True, quiet=True).rows


def test_a_trained_backbone_with_an_untrained_head_is_refused(net):
    x, y, _, _ = digits8()
    for seed in range(5):
        torch.manual_seed(seed)
        body = nn.Sequential(*list(net.model.children())[:-1], nn.Linear(64, 10))
        with pytest.raises(AdviceError, match="hardly better than chance"):
            evolve(grey(body), DIGIT, "cppn", 2, 20, real=x[:300], labels=y[:300], quiet=True)


def test_budgets_are_kept_and_told(net, tmp_path):
    asked = []

    def model(x):
        asked.append(len(x))
        return net(x)

    report = evolve(Subject(model), DIGIT, "cppn", 50, 40, queries=400, quiet=True)
    assert "400" not in report.answer
    assert any("budget" in n for n in report.notes)
    assert report.summary["queries"] <= 400
    assert sum(asked) == report.summary["queries"]
    report = evolve(net, DIGIT, "pixels", 10_000, 200, seconds=0.5, keep=tmp_path, quiet=True)
    assert any("0.5 s" in n or "budget" in n for n in report.notes)
    assert report.summary["generations"] < 10_000


def test_evolution_goes_on_from_its_folder(net, tmp_path):
    x, y, _, _ = digits8()
    options = {"real": x[:50], "labels": y[:50], "quiet": True}
    whole = evolve(net, DIGIT, "cppn", 12, 40, 5, **options)
    evolve(net, DIGIT, "cppn", 12, 40, 5, queries=64 + 16 + 50 + 60 + 40 * 7, keep=tmp_path, **options)
    rest = evolve(net, DIGIT, "cppn", 12, 40, 5, keep=tmp_path, **options)
    assert rest.rows == whole.rows
    for name, value in whole.arrays.items():
        np.testing.assert_array_equal(rest.arrays[name], value)
    timed = {"seconds", "images_per_second"}
    assert {k: v for k, v in rest.summary.items() if k not in timed} == {
        k: v for k, v in whole.summary.items() if k not in timed
    }
    assert rest.figures == whole.figures


def test_patterns_come_as_expressions_that_draw_at_any_size(net):
    report = evolve(net, DIGIT, "cppn", 5, 100, quiet=True)
    for image, expression in zip(report.arrays["images"], expressions(Report.from_json(report.json()))):
        assert np.array_equal(expression.render().numpy(), image)
        assert expression.render(300, 200).shape == (1, 300, 200)
    assert report.figures["the_same_patterns_drawn_larger.png"].startswith(b"\x89PNG")


def test_the_report_sets_real_beside_fooling_images(net, pixels):
    report = pixels[0]
    assert {"max_softmax_of_real_and_fooling_images.plotly", "energy_of_real_and_fooling_images.plotly"} <= set(
        report.figures
    )
    a, b = report.arrays["fooling_energy"], report.arrays["real_energy"]
    pairs = np.mean([(-r > -f) + 0.5 * (r == f) for f, r in itertools.product(a, b)])
    assert report.summary["auroc_energy"] == pytest.approx(pairs)
    x, _, _, _ = digits8()
    with torch.no_grad():
        logits = net(x[:400]).double()
    np.testing.assert_allclose(scores(net, x[:400])["energy"], -logits.logsumexp(1), rtol=1e-5)
    np.testing.assert_allclose(b, -logits.logsumexp(1), rtol=1e-5)


def test_auroc_is_sklearns():
    from sklearn.metrics import roc_auc_score

    draw = np.random.default_rng(0)
    low, high = draw.integers(0, 9, 50).astype(float), draw.integers(2, 12, 70).astype(float)
    truth = np.r_[np.zeros(50), np.ones(70)]
    assert auroc(torch.from_numpy(low), torch.from_numpy(high)) == pytest.approx(roc_auc_score(truth, np.r_[low, high]))


class FirstChannel(nn.Module):
    def forward(self, x):
        return x[:, :1]


# the check -------------------------------------------------------------------------------------------
def test_the_check_runs_on_a_plain_function_behind_http(net):
    class Answer(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with torch.no_grad():
                out = net(torch.tensor(body)[:, :1]).tolist()
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps(out).encode())

        def log_message(self, *args):
            pass

    server = HTTPServer(("127.0.0.1", 0), Answer)
    Thread(target=server.serve_forever, daemon=True).start()

    def ask(x):
        url = f"http://127.0.0.1:{server.server_port}"
        with urllib.request.urlopen(url, json.dumps(x.tolist()).encode()) as reply:
            return torch.tensor(json.loads(reply.read()))

    try:
        report = Fooling(generations=4, population=40, limit=60)(Subject(ask, name="served"), data.open("digits"))
    finally:
        server.shutdown()
    assert report.summary["median_confidence"] > 0.9
    assert "correlation" in report.rows[0]


def test_the_check_reads_grey_from_the_data_and_can_ascend(net):
    x, y, _, _ = digits8()
    samples = [Sample(image=v.expand(3, -1, -1), label=int(n)) for v, n in zip(x[:60], y[:60])]
    model = Subject(lambda v: net(v[:, :1]))
    report = Fooling(encoding="pixels", generations=3, population=40, size=8)(model, samples)
    images = report.arrays["images"]
    assert images.shape == (10, 3, 8, 8)
    assert np.array_equal(images[:, 0], images[:, 1])
    coloured = Fooling(encoding="pixels", generations=3, population=40, grey=False)(model, samples)
    assert not np.array_equal(coloured.arrays["images"][:, 0], coloured.arrays["images"][:, 1])
    seen = Subject(nn.Sequential(FirstChannel(), net.model), mean=(0.0,) * 3, std=(1.0,) * 3)
    climbed = Fooling(encoding="ascent", steps=20, limit=60)(seen, samples)
    assert len(climbed.rows) == 30
    with pytest.raises(AdviceError, match="queries"):
        Fooling(encoding="ascent", queries=5)(seen, samples)


# retraining ------------------------------------------------------------------------------------------
def test_a_round_of_retraining(tmp_path):
    x, y, tx, ty = (to_bits(v) if v.is_floating_point() else v for v in digits8())
    report = retrain(
        learn_digits, x, y, tx, ty, rounds=1, generations=10, population=40, per_round=100, searches=2, keep=tmp_path
    )
    assert [r["round"] for r in report.rows] == [0, 1]
    assert report.arrays["fooling"].shape == (100, 1, 8, 8)
    assert report.rows[1]["recall of the fooling class"] > 0.5
    assert len(list(tmp_path.iterdir())) == 6
    with pytest.raises(AdviceError, match="at least one round"):
        retrain(learn_digits, x, y, tx, ty, rounds=0)


def test_a_learner_that_uses_fit():
    x, y, _, _ = (to_bits(v) if v.is_floating_point() else v for v in digits8())
    learn = learner(lambda: lynceus.create_model("resnet_nano"), FitConfig(steps=5))
    first, second = (learn(x[:100], y[:100], 11, 0) for _ in range(2))
    with torch.no_grad():
        assert first(x[:4]).shape == (4, 11)
        assert torch.equal(first(x[:4]), second(x[:4]))


@pytest.mark.slow
def test_three_rounds_teach_the_fooling_class_and_do_not_help():
    x, y, tx, ty = (to_bits(v) if v.is_floating_point() else v for v in digits8())
    report = retrain(learn_digits, x, y, tx, ty)
    assert [r["round"] for r in report.rows] == [0, 1, 2, 3]
    assert all(r["recall of the fooling class"] >= 0.9 for r in report.rows[1:])
    assert all(r["median confidence of new images"] >= 0.99 for r in report.rows[1:])
    assert abs(report.summary["largest_loss_of_accuracy"]) <= 0.01


@pytest.mark.slow
def test_patterns_in_colour_fool_a_cifar_network(cifar10_parquet):
    net = cifar_cnn()
    x, y = cifar(500, 45_000)
    report = evolve(pixels_in(net), (3, 32, 32), "cppn", 200, 200, real=x, labels=y, quiet=True)
    assert report.summary["median_confidence"] >= 0.95
    torch.manual_seed(0)
    net[1].head = nn.Linear(128, 10)
    with pytest.raises(AdviceError, match="hardly better than chance"):
        evolve(pixels_in(net), (3, 32, 32), "cppn", 200, 200, real=x, labels=y, quiet=True)
