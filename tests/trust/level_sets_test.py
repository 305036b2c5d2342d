"""Walks on level sets: the card's figures on digits, the invariants of every step, triangles, budgets, bad input."""

import json
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from bench._trust import digits8
from bench.trust_level_sets import digit_pairs, nearest_class, sure_cnn
from lynceus.core.errors import AdviceError
from lynceus.core.rng import generator
from lynceus.core.subject import Subject
from lynceus.core.types import Sample
from lynceus.reengineer import parity
from lynceus.reengineer.keys import level_sets as keys
from lynceus.trust.level_sets import BlindSpots, compare, derangements, traverse
from lynceus.trust.level_shape import bootstrap, lattice, line, rmse, ssim, triangle, widths
from lynceus.trust.walks import across, confidence, walk

RECORDS = Path(__file__).parents[1] / "parity" / "trust"
QUICK = {"step_size": 0.05, "steps": 100, "drop": 0.05, "adversarial_step": 1 / 255}


@pytest.fixture(scope="module")
def sure():
    return sure_cnn()


@pytest.fixture(scope="module")
def pairs(sure):
    return digit_pairs(sure)


def curved(seed, size=4, classes=3, loudness=3.0):
    """A small smooth network in float64."""
    g = torch.Generator().manual_seed(seed)
    first = torch.randn(12, 3 * size * size, generator=g, dtype=torch.float64) / size
    second = torch.randn(classes, 12, generator=g, dtype=torch.float64)
    return lambda x: loudness * torch.tanh((x.flatten(1) - 0.5) @ first.T) @ second.T


def two(seed, count=4, size=4):
    g = torch.Generator().manual_seed(seed)
    return tuple(torch.rand(count, 3, size, size, generator=g, dtype=torch.float64) for _ in range(2))


class Grey(nn.Module):
    owns_pixels = True

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return self.net(x.mean(1, keepdim=True))


class Quieter(nn.Module):
    def forward(self, logits):
        return 0.5 * logits


def samples(count=120):
    _, _, x, y = digits8()
    return [
        Sample(image=a.expand(3, -1, -1), label=int(b), id=f"digit {i}")
        for i, (a, b) in enumerate(zip(x[:count], y[:count]))
    ]


@pytest.mark.parametrize("name", ["level_set_traversal_small", "level_set_traversal_no_adversarial"])
def test_parity_and_the_walk_that_never_moves(name):
    rows = parity.check_record(RECORDS / f"{name}.json")
    assert len(rows) == 11
    assert all(r.agrees and r.tolerance <= 1e-6 for r in rows), rows
    if name.endswith("no_adversarial"):
        record = json.loads((RECORDS / f"{name}.json").read_text())
        model, _, _ = parity.rebuild(record)
        inputs = {k: parity.make_input(v) for k, v in record["inputs"].items()}
        out = keys.compare(model, inputs, record)
        source = keys._blocks(inputs["source"], 16)
        for k in (1, 5, 20, 60):
            assert torch.equal(out[f"image_after_{k}"][2], source[2])
        assert not torch.equal(out["image_after_1"][0], source[0])


def test_digits_reach_far_and_stay_sure(sure, pairs):
    """Card: ratio .413, straight line .651, p .999 (.990), 1-NN target 82%. Asked: <= .47, all in class, >= 70%."""
    sources, targets, labels, wanted = pairs
    found = walk(sure.forward, sources, targets, labels, generator=generator(0, "jitter"), **QUICK)
    ratio = rmse(found.image, targets) / rmse(sources, targets)
    assert ratio.mean() <= 0.47
    assert torch.equal(sure(found.image).argmax(1), labels)
    assert (nearest_class(found.image) == wanted).float().mean() >= 0.70
    assert found.confidence.median() > 0.998
    p = line(sure.forward, sources, targets, labels, points=101)
    inside = found.clean[:, None] - p < 0.05
    straight = 1 - torch.where(inside, torch.linspace(0, 1, 101), torch.zeros(())).amax(1)
    assert straight.mean() > ratio.mean() + 0.15
    assert (confidence(sure.forward, found.image, labels) - found.confidence).abs().max() < 1e-5


@pytest.mark.slow
def test_digits_without_the_adversarial_term(sure, pairs):
    """Card: ratio .341, a fifth of the steps refused."""
    sources, targets, labels, _ = pairs
    found = walk(sure.forward, sources, targets, labels, step_size=0.01, steps=400, drop=0.2, adversarial=False)
    assert (rmse(found.image, targets) / rmse(sources, targets)).mean() < 0.42
    assert 0.05 < 1 - found.accepted.mean() < 0.4


@pytest.mark.slow
def test_cifar_blind_spots(cifar10_parquet, monkeypatch):
    """Asked: ratio <= .2, the drop never above delta, lines >= .9, triangles >= .85."""
    monkeypatch.setattr("bench._trust.CIFAR10", cifar10_parquet)
    from bench import trust_level_sets as bench
    from bench._trust import cifar_cnn

    report = bench._check(32, 2, 0.9)(bench.subject_of(cifar_cnn(), "CIFAR CNN"), bench.unseen())
    s = report.summary
    assert s["walks"] == 64
    assert s["share of the way left"] <= 0.2
    assert s["largest drop"] < 0.05
    assert s["lines within drop"] >= 0.9
    assert s["triangle within 0.1"] >= 0.85


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    step=st.floats(0.01, 0.5),
    drop=st.floats(0.001, 0.5),
    adversarial=st.booleans(),
    backtrack=st.booleans(),
    jitter=st.sampled_from([0.0, 4 / 255, 0.2]),
)
def test_every_accepted_image_is_in_range_and_sure(seed, step, drop, adversarial, backtrack, jitter):
    model = curved(seed)
    x, t = two(seed)
    y = model(x).argmax(1)
    found = walk(
        model,
        x,
        t,
        y,
        step_size=step,
        steps=12,
        drop=drop,
        adversarial=adversarial,
        backtrack=backtrack,
        jitter=jitter,
        record=range(13),
        generator=generator(seed),
    )
    assert torch.equal(found.clean, confidence(model, x, y))  # of the source, not of the jittered start
    assert found.steps == 12
    for before, after in zip(found.traces, found.traces[1:]):
        assert after.image.min() >= 0
        assert after.image.max() <= 1
        p = confidence(model, after.image, y)
        moved = (after.image != before.image).flatten(1).any(1)
        assert (found.clean - p < drop + 1e-12)[moved].all()
        assert torch.allclose(p, after.confidence, atol=1e-12)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), loudness=st.floats(0.1, 30))
def test_a_plain_step_is_orthogonal_to_the_gradient_of_the_cross_entropy(seed, loudness):
    model = curved(seed, loudness=loudness)
    x, t = two(seed)
    y = model(x).argmax(1)
    z = x.clone().requires_grad_(True)
    (g,) = torch.autograd.grad(nn.functional.cross_entropy(model(z), y, reduction="sum"), z)
    (trace,) = walk(model, x, t, y, steps=0, jitter=0.0, record=[0]).traces
    n, unit = trace.direction.flatten(1), g.flatten(1) / g.flatten(1).norm(dim=1, keepdim=True).clamp(min=1e-300)
    known = confidence(model, x, y) < 1 - 1e-6  # beyond, torch's p - 1 has lost the digits that its gradient needs
    assert ((n * unit).sum(1).abs() <= 1e-9 * (1 + n.norm(dim=1)))[known].all()


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), step=st.floats(0.01, 1.0))
def test_without_the_adversarial_term_the_target_only_comes_nearer(seed, step):
    model = curved(seed)
    x, t = two(seed)
    x, t = 0.3 + 0.4 * x, 0.3 + 0.4 * t
    y = model(x).argmax(1)
    found = walk(model, x, t, y, step_size=step, steps=15, drop=0.3, adversarial=False, jitter=0.0, record=range(16))
    far = torch.stack([trace.distance for trace in found.traces], 1)
    clamped = torch.stack([((r.image == 0) | (r.image == 1)).flatten(1).any(1) for r in found.traces], 1).any(1)
    assert (far[:, 1:] <= far[:, :-1] + 1e-12)[~clamped].all()


def test_the_push_adds_up_over_the_walk():
    """Its sum is bounded by the step per pixel, and only grows while the gradient keeps its sign."""
    weight = torch.tensor([[1.0, -1.0, 0.5]], dtype=torch.float64)

    def model(x):
        z = x.mean((2, 3)) @ weight.T
        return torch.cat([z, torch.zeros_like(z)], 1)

    x = torch.full((1, 3, 2, 2), 0.5, dtype=torch.float64)
    found = walk(model, x, x, torch.tensor([0]), steps=3, adversarial_step=0.01, jitter=0.0, drop=1.0, record=[1, 2, 3])
    moved = [(trace.image - x).flatten() for trace in found.traces]
    p = confidence(model, x, torch.tensor([0]))
    one = 0.005 * (1 - p) * weight[0].repeat_interleave(4) / 4  # minus the gradient, times half the step
    assert torch.allclose(moved[0], one, rtol=1e-3)
    assert torch.allclose(moved[1] - moved[0], 2 * one, rtol=2e-2)  # the second push is twice the first
    assert torch.allclose(moved[2] - moved[1], 3 * one, rtol=2e-2)


def test_a_saturated_network_walks_on(sure, pairs):
    """Probabilities that round to 1 in float32: the cross-entropy has no gradient, the direction is still known."""
    sources, targets, labels, _ = (part[:20] for part in pairs)

    def loud(x):
        return 300 * sure(x)

    x = sources.clone().requires_grad_(True)
    (g,) = torch.autograd.grad(nn.functional.cross_entropy(loud(x), labels, reduction="sum"), x)
    dead = ~g.flatten(1).any(1)
    assert dead.float().mean() > 0.5
    found = walk(loud, sources, targets, labels, **QUICK)
    assert found.image.isfinite().all()
    assert found.confidence.isfinite().all()
    assert (found.clean - found.confidence < 0.05).all()
    assert (found.accepted[dead] > 0.1).all()
    assert (rmse(found.image, targets) / rmse(sources, targets)).mean() < 0.7


def test_where_the_gradient_is_zero_the_way_is_straight():
    way = torch.randn(2, 3, 4, 4)
    slope = torch.zeros_like(way)
    slope[1, 0, 0, 0] = 1e-38
    out = across(way, slope)
    assert torch.equal(out[0], way[0])
    assert out[1, 0, 0, 0] == 0
    assert torch.equal(out[1].flatten()[1:], way[1].flatten()[1:])


def test_one_forward_and_one_backward_pass_per_iteration():
    """Asked: two forward and one backward at most. A refused step leaves the gradient as it was."""
    calls = []

    class Count(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            calls.append("forward")
            return x.clone()

        @staticmethod
        def backward(ctx, g):
            calls.append("backward")
            return g

    model = curved(1)
    x, t = two(1)
    y = model(x).argmax(1)
    walk(lambda z: model(Count.apply(z)), x, t, y, steps=20, drop=0.01)
    assert calls.count("backward") == 21
    assert calls.count("forward") == 22  # also the clean source and the start


def test_back_tracking_frees_walks_that_never_move():
    record = json.loads((RECORDS / "level_set_traversal_no_adversarial.json").read_text())
    model, _, _ = parity.rebuild(record)
    x, t = (keys._blocks(parity.make_input(record["inputs"][n]), 16) for n in ("source", "target"))
    y = model(x).argmax(1)
    options = {"step_size": 0.12, "steps": 40, "drop": 0.004, "adversarial": False, "jitter": 0.0}
    stuck, free = (walk(model, x, t, y, backtrack=b, **options) for b in (False, True))
    assert stuck.accepted[2] == 0
    assert free.accepted[2] > 0
    assert rmse(free.image, t)[2] < rmse(stuck.image, t)[2]
    assert (free.clean - free.confidence < 0.004).all()


def test_lattices_and_triangles():
    assert len(lattice("exact")) == 66
    assert len(lattice("reference")) == 64
    assert len(lattice("exact", 4)) == 15
    model = curved(2)
    a, b = two(2)
    c = two(3)[0]
    y = model(a).argmax(1)
    found = triangle(model, a, b, c, y)
    ends = [int((found.points[:, k] == 1).nonzero()) for k in (0, 1)]
    for at, corner in zip((0, *ends), (a, b, c)):
        assert torch.allclose(found.values[:, at], confidence(model, corner, y), atol=1e-12)
    middle = int(((found.points - torch.tensor([0.3, 0.5], dtype=torch.float64)).abs().sum(1) < 1e-9).nonzero())
    assert torch.allclose(found.values[:, middle], confidence(model, 0.2 * a + 0.3 * b + 0.5 * c, y), atol=1e-12)
    assert found.edges.shape == (4, 22)
    want = torch.cat([line(model, a, b, y), line(model, a, c, y)], 1)
    assert torch.allclose(found.edges.sort(1).values, want.sort(1).values, atol=1e-12)
    assert (found.fraction(0.3) >= found.fraction(0.1)).all()
    flat = triangle(lambda x: torch.stack([x.sum((1, 2, 3)) * 0 + 2, x.sum((1, 2, 3)) * 0], 1), a, b, c, y * 0)
    assert (flat.fraction(0.0) == 0).all()  # strictly above the source's
    assert (flat.fraction(0.1) == 1).all()
    assert (flat.edge_drop == 0).all()


def test_widths_are_quantiles_across_the_walk():
    """A network that only sees the first pixel: moving across a walk along that pixel changes nothing."""

    def model(x):
        z = 3 * (x[:, 0, 0, 0] - 0.5)
        return torch.stack([z, -z], 1)

    x = torch.full((2, 3, 4, 4), 0.6)
    along = torch.zeros_like(x)
    along[:, 0, 0, 0] = 1.0
    y = torch.tensor([0, 0])
    own = confidence(model, x, y)
    tube = widths(model, x, along, y, distances=(0.1, 0.5), generator=generator(0))
    assert tube.shape == (2, 2, 2)
    assert torch.allclose(tube, own[:, None, None].expand_as(tube), atol=1e-6)
    elsewhere = torch.zeros_like(x)
    elsewhere[:, 1, 1, 1] = 1.0
    other = widths(model, x, elsewhere, y, distances=(0.1, 0.5), generator=generator(0))
    assert (other[..., 0] < own[:, None] - 1e-3).all()
    assert (other[:, 1, 0] < other[:, 0, 0]).all()
    assert not widths(model, x, along, y, least=0.99).any()  # below `least`
    assert not widths(model, x, torch.zeros_like(x), y).any()  # goes nowhere


def test_ssim_is_one_for_equal_images_and_agrees_with_scikit_image():
    metrics = pytest.importorskip("skimage.metrics")
    g = torch.Generator().manual_seed(0)
    a = torch.rand(2, 3, 40, 32, generator=g, dtype=torch.float64)
    b = (a + 0.1 * torch.randn(a.shape, generator=g, dtype=torch.float64)).clamp(0, 1)
    assert torch.allclose(ssim(a, a), torch.ones(2, dtype=torch.float64))
    gaussian = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    # scikit-image crops 5 pixels and truncates its Gaussian at 3.5 sigma: an 11-pixel window, as here
    want = [
        metrics.structural_similarity(x.numpy(), z.numpy(), data_range=1, channel_axis=0, **gaussian)
        for x, z in zip(a, b)
    ]
    assert np.allclose(ssim(a, b).numpy(), want, atol=1e-9)
    assert ssim(a[..., :6, :6], b[..., :6, :6]).shape == (2,)


@settings(max_examples=20, deadline=None)
@given(n=st.integers(1, 30), classes=st.integers(1, 4), k=st.integers(1, 3), seed=st.integers(0, 1000))
def test_targets_are_other_images_of_other_classes_where_there_are_any(n, classes, k, seed):
    labels = torch.arange(max(n, 2)) % classes
    source = torch.arange(n)
    others = torch.arange(max(n, 2))
    targets = derangements(source, others, labels, k, seed=seed)
    assert targets.shape == (n, k)
    assert (targets != source[:, None]).all()
    if classes > 1 and n % classes == 0 and n >= 2 * classes:
        assert (labels[targets] != labels[source][:, None]).float().mean() > 0.95


def test_the_report_of_a_traversal(sure, pairs):
    sources, targets, labels, wanted = (part[:6] for part in pairs)
    many = torch.stack([targets, targets.roll(1, 0), targets.roll(2, 0)], 1)
    report = traverse(
        Subject(sure, mean=(0.0,), std=(1.0,)),
        sources,
        many,
        labels,
        tube=(0.5, 1.0),
        record=50,
        names=[f"digit {k}" for k in range(10)],
        target_labels=torch.stack([wanted, wanted.roll(1), wanted.roll(2)], 1),
        perceptual=lambda a, b: (a - b).abs().amax((1, 2, 3)),
        **QUICK,
    )
    a, s = report.arrays, report.summary
    assert a["images"].shape == (6, 3, 1, 8, 8)
    assert a["path"].shape == (6, 3, 3, 2)
    assert a["steps"].tolist() == [0, 50, 100]
    assert a["line"].shape == (6, 3, 11)
    assert a["triangle"].shape == (6, 3, 66)
    assert a["widths"].shape == (6, 3, 3, 2, 2)
    assert a["distances"].shape == (6, 3, 3)
    images = torch.from_numpy(a["images"])
    p = confidence(sure.forward, images.flatten(0, 1), labels.repeat_interleave(3))
    assert np.allclose(p.view(6, 3).numpy(), a["confidence"], atol=1e-6)
    assert np.allclose(a["perceptual"], 2 * a["distances"][..., 1], atol=1e-6)
    assert s["walks"] == 18
    assert s["largest drop"] < 0.05
    assert s["triangle within 0.1, low"] <= s["triangle within 0.1"] <= s["triangle within 0.1, high"]
    assert s["RMSE of the smallest flip"] < s["RMSE from source"]
    flipped = np.isfinite(a["contrast rmse"])
    assert (a["contrast answer"][flipped] != labels.numpy()[flipped]).all()
    names = set(report.figures)
    assert {"blind spots.png", "triangles.png", "confidence along the walk.plotly", "width of the tube.plotly"} <= names
    assert report.html().startswith("<!")
    assert report.rows[0]["class"] == f"digit {int(labels[0])}"


def test_wrong_sources_are_left_out_and_said(sure, pairs):
    sources, targets, labels, _ = (part[:4] for part in pairs)
    shifted = labels.clone()
    shifted[1] = (shifted[1] + 1) % 10
    report = traverse(Subject(sure, mean=(0.0,), std=(1.0,)), sources, targets, shifted, steps=2, contrast=False)
    assert report.arrays["kept"].tolist() == [0, 2, 3]
    assert "1 of 4 sources" in " ".join(report.notes)
    with pytest.raises(AdviceError, match="none of the 4"):
        traverse(Subject(sure, mean=(0.0,), std=(1.0,)), sources, targets, (labels + 1) % 10, steps=2)


def test_a_check_that_was_stopped_goes_on_and_ends_alike(sure, tmp_path):
    subject, data = Subject(Grey(sure)), samples()
    check = {"images": 6, "steps": 6, "batch_size": 4, "record": 5, "contrast": False}
    whole = BlindSpots(**check)(subject, data, seed=5)
    BlindSpots(**check, keep=tmp_path)(subject, data, seed=5)
    (file,) = tmp_path.glob("blind-spots-*.jsonl")
    lines = file.read_text().splitlines()
    assert len(lines) == 3
    file.write_text(lines[0] + "\n" + lines[1][:100])
    again = BlindSpots(**check, keep=tmp_path)(subject, data, seed=5)
    assert again.rows == whole.rows
    for key, value in whole.arrays.items():
        np.testing.assert_array_equal(again.arrays[key], value)


def test_a_budget_that_ends_early_is_said(sure):
    subject, data = Subject(Grey(sure)), samples()
    began = time.monotonic()
    report = BlindSpots(images=8, steps=100_000, batch_size=4, contrast=False, seconds=1.5)(subject, data)
    assert time.monotonic() - began < 60
    text = " ".join(report.notes)
    assert "of 16 walks" in text
    assert "of 100000 steps" in text
    assert (report.arrays["clean"][:, None] - report.arrays["confidence"] < 0.2).all()


def test_two_models_are_compared_on_the_same_walks(sure):
    report = compare(
        {"sure": Subject(Grey(sure)), "timid": Subject(Grey(nn.Sequential(sure, Quieter())))},
        samples(),
        check=BlindSpots(images=6, steps=20, step_size=0.05, contrast=False),
    )
    assert [r["model"] for r in report.rows] == ["sure", "timid"]
    for row in report.rows:
        assert row["triangle within 0.1, low"] <= row["triangle within 0.1"] <= row["triangle within 0.1, high"]
    assert report.arrays["sure/images"].shape == report.arrays["timid/images"].shape
    assert "distance to the target.plotly" in report.figures
    with pytest.raises(AdviceError, match="two models"):
        compare({"sure": Subject(Grey(sure))}, samples())


def test_the_bootstrap_interval_covers_the_mean():
    values = torch.rand(200, generator=torch.Generator().manual_seed(0))
    low, high = bootstrap(values)
    assert low < float(values.mean()) < high
    assert high - low == pytest.approx(2 * 1.96 * float(values.std()) / 200**0.5, rel=0.15)


def test_bad_input_is_one_error_before_any_walk(sure, pairs):
    sources, targets, labels, _ = (part[:3] for part in pairs)
    net = sure.forward
    with pytest.raises(AdviceError, match=r"Source 0 has pixels in 0 to 255"):
        walk(net, sources * 255 / sources[0].max(), targets, labels)
    with pytest.raises(AdviceError, match="one shape"):
        walk(net, sources, targets[..., :4], labels)
    with pytest.raises(AdviceError, match="one label per source"):
        walk(net, sources, targets, labels[:2])
    with pytest.raises(AdviceError, match="10 classes"):
        walk(net, sources, targets, labels + 10)
    with pytest.raises(AdviceError, match="NaN or infinity on image 1"):
        walk(lambda x: net(x) / torch.tensor([1.0, 0.0, 1.0])[:, None], sources, targets, labels)
    with pytest.raises(AdviceError, match="no gradient"):
        walk(lambda x: net(x).detach(), sources, targets, labels)
    with pytest.raises(AdviceError, match="gradients"):
        BlindSpots()(Subject(lambda x: net(x)), samples(10))
    with pytest.raises(AdviceError, match=r"a probability, from 0 to 1, not 1\.1"):
        BlindSpots(confident=1.1)(Subject(Grey(sure)), samples(10))
    wrong = [replace(s, label=(s.label + 1) % 10) for s in samples(10)]
    with pytest.raises(AdviceError, match="answers rightly"):
        BlindSpots(confident=0.9)(Subject(Grey(sure)), wrong)
    with pytest.raises(AdviceError, match="lattice"):
        lattice("other")
