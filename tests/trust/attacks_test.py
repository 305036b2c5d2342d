"""Attacks: exact on networks whose robustness is known, inside their balls to the last bit, honest about masking."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from bench._trust import digits8, digits_cnn
from lynceus.core.errors import AdviceError, MissingError
from lynceus.core.subject import Subject
from lynceus.core.types import Sample
from lynceus.trust.adapters import to_art, to_foolbox
from lynceus.trust.attacked import Attacked
from lynceus.trust.attacks import apgd, apgd_checkpoints, fgsm, fmn, pgd
from lynceus.trust.balls import linf_box, project, round_down
from lynceus.trust.masking import masking

WAYS = {
    "fgsm": lambda *a, **k: fgsm(*a, **k),
    "pgd": lambda *a, **k: pgd(*a, steps=5, restarts=2, **k),
    "apgd-ce": lambda *a, **k: apgd(*a, steps=8, **k),
    "apgd-dlr": lambda *a, **k: apgd(*a, steps=8, loss="dlr", **k),
}


def linear(seed=0, classes=4, pixels=27):
    g = torch.Generator().manual_seed(seed)
    weight, bias = torch.randn(classes, pixels, generator=g), torch.randn(classes, generator=g)
    return (lambda x: x.flatten(1) @ weight.to(x.dtype).T + bias.to(x.dtype)), weight, bias


def pictures(count, seed=0, low=0.0, high=1.0):
    return low + (high - low) * torch.rand(count, 3, 3, 3, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def digits():
    _, _, x, y = digits8()
    return digits_cnn(), x[:200], y[:200]


class Grey(nn.Module):
    """A network on grey pictures, for samples that are RGB."""

    owns_pixels = True

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return self.net(x.mean(1, keepdim=True))


def subject_of(net):
    return Subject(Grey(net), name="digits cnn")


def samples(x, y):
    return [Sample(image=a.expand(3, -1, -1), label=int(b), id=f"digit {i}") for i, (a, b) in enumerate(zip(x, y))]


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    epsilon=st.sampled_from([0.0, 1e-9, 1e-4, 1 / 255, 8 / 255, 0.1, 0.3, 1 / 3, 1.0]) | st.floats(0, 1),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_the_linf_box_is_exact_to_the_last_bit(seed, epsilon, dtype):
    """Against rational arithmetic: the bounds lie inside, and the next number outwards does not."""
    g = torch.Generator().manual_seed(seed)
    x = torch.rand(2, 1, 4, 4, generator=g, dtype=dtype)
    x.view(-1)[:5] = torch.tensor([0.0, 1.0, 0.5, 1e-7, 1 - 1e-7], dtype=dtype)
    e = Fraction(round_down(epsilon, dtype))
    assert e <= Fraction(epsilon)
    low, high = linf_box(x, epsilon)
    for v, a, b in zip(x.flatten().tolist(), low.flatten(), high.flatten()):
        v = Fraction(v)
        assert 0 <= Fraction(a.item()) <= v <= Fraction(b.item()) <= 1
        assert v - Fraction(a.item()) <= e
        assert Fraction(b.item()) - v <= e
        further = torch.nextafter(b, torch.tensor(2.0, dtype=dtype)).item()
        assert further > 1 or Fraction(further) - v > e


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    epsilon=st.sampled_from([0.0, 1e-6, 1 / 255, 8 / 255, 0.3]) | st.floats(1e-6, 2),
    norm=st.sampled_from(["linf", "l2"]),
    way=st.sampled_from(sorted(WAYS)),
)
def test_results_never_leave_the_ball_nor_the_unit_range(seed, epsilon, norm, way):
    model, _, _ = linear(seed)
    x = pictures(4, seed)
    x[0] = x[0].round()  # black and white: half of the ball is outside [0, 1]
    y = model(x).argmax(1)
    found = WAYS[way](model, x, y, epsilon=epsilon, norm=norm)
    change = found.image - x
    assert found.image.dtype == torch.float32
    assert found.image.min() >= 0
    assert found.image.max() <= 1
    order = math.inf if norm == "linf" else 2
    for measured in (change, found.image.double() - x.double()):  # in float32 as in float64
        assert torch.linalg.vector_norm(measured.flatten(1), ord=order, dim=1).max().item() <= epsilon
    assert torch.equal(model(found.image).argmax(1) != y, found.success)  # every success replays


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), levels=st.integers(0, 40), norm=st.sampled_from(["linf", "l2"]))
def test_on_the_grid_balls_count_whole_levels(seed, levels, norm):
    g = torch.Generator().manual_seed(seed)
    x = torch.randint(0, 256, (3, 1, 4, 4), generator=g).float() / 255
    out = project(x, x + torch.randn(x.shape, generator=g), levels / 255, norm, grid=True)
    assert torch.equal((out * 255).round() / 255, out)
    change = (out.double() * 255).round() - (x.double() * 255).round()
    size = change.abs().amax((1, 2, 3)) if norm == "linf" else change.flatten(1).norm(dim=1)
    assert size.max() <= levels


def test_fgsm_on_a_linear_network_changes_the_margin_by_epsilon_times_the_l1_norm():
    model, weight, _ = linear(classes=2)
    x = pictures(6, low=0.4, high=0.6)
    y = model(x).argmax(1)
    before = model(x).gather(1, y[:, None]) - model(x).gather(1, 1 - y[:, None])
    found = fgsm(model, x, y, epsilon=0.05)
    want = (0.05 * (weight[0] - weight[1]).abs().sum() - before[:, 0]).double()
    assert torch.allclose(found.margin, want, atol=1e-4)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_on_a_linear_network_certified_true_and_attacked_agree(norm):
    """Distance to the boundary = margin / dual norm. Below it nothing succeeds, just above it PGD and APGD do."""
    model, weight, _ = linear(3, classes=2, pixels=27)
    x = pictures(24, 1, low=0.3, high=0.7)
    y = model(x).argmax(1)
    gap = weight[0] - weight[1]
    dual = gap.abs().sum() if norm == "linf" else gap.norm()
    true = ((model(x)[:, 0] - model(x)[:, 1]).abs() / dual).double()
    inside = true < 0.25  # the boundary is met before [0, 1] cuts the ball
    x, y, true = x[inside], y[inside], true[inside]
    assert len(x) >= 8
    found = fmn(model, x, y, norm=norm, steps=300)
    assert found.success.all()
    assert (found.distance >= true * (1 - 1e-4)).all()
    assert float((found.distance / true).max()) < 1.02
    for i in range(4):
        one = (model, x[i : i + 1], y[i : i + 1])
        for attack in (pgd, apgd):
            assert not attack(*one, epsilon=float(true[i]) * 0.999, norm=norm, loss="margin").success
            assert attack(*one, epsilon=float(true[i]) * 1.01, norm=norm, loss="margin").success


def test_apgd_halves_at_the_checkpoints_of_the_paper():
    assert apgd_checkpoints(100) == {22, 41, 57, 70, 80, 87, 93, 99}


def test_targeted_attacks_reach_their_class(digits):
    net, x, y = digits
    goal = (y[:20] + 1) % 10
    for attack in (pgd, apgd):
        found = attack(net, x[:20], goal, epsilon=0.5, targeted=True)
        assert torch.equal(net(found.image).argmax(1) == goal, found.success)
        assert found.success.float().mean() > 0.8
    found = fmn(net, x[:20], goal, targeted=True)
    assert torch.equal(net(found.image).argmax(1) == goal, found.success)
    assert found.success.all()


def test_seeds_repeat_and_restarts_only_help(digits):
    net, x, y = digits
    one, two = (pgd(net, x, y, epsilon=0.08, steps=10, seed=7) for _ in range(2))
    assert torch.equal(one.image, two.image)
    assert torch.equal(one.success, two.success)
    assert not torch.equal(one.image, pgd(net, x, y, epsilon=0.08, steps=10, seed=8).image)
    more = pgd(net, x, y, epsilon=0.08, steps=10, seed=7, restarts=4)
    assert (more.success | ~one.success).all()


@pytest.mark.parametrize(("norm", "epsilon"), [("linf", 0.1), ("l2", 0.6)])
def test_apgd_is_never_weaker_than_pgd_and_pgd_is_as_strong_as_foolbox(digits, norm, epsilon):
    foolbox = pytest.importorskip("foolbox")
    net, x, y = digits
    x, y = x[:100], y[:100]
    attack = foolbox.attacks.LinfPGD(steps=40) if norm == "linf" else foolbox.attacks.L2PGD(steps=40)
    torch.manual_seed(0)
    _, _, theirs = attack(to_foolbox(Subject(net, mean=(0.0,), std=(1.0,))), x, y, epsilons=epsilon)
    ours = pgd(net, x, y, epsilon=epsilon, norm=norm).success
    best = apgd(net, x, y, epsilon=epsilon, norm=norm).success
    dlr = apgd(net, x, y, epsilon=epsilon, norm=norm, loss="dlr").success
    assert 0.2 < theirs.float().mean() < 0.95
    assert ours.float().mean() >= theirs.float().mean() - 0.01
    assert (best | dlr).float().mean() >= ours.float().mean()


def test_dlr_sees_through_logits_whose_cross_entropy_has_no_gradient(digits):
    net, x, y = digits
    x, y = x[:60], y[:60]

    def loud(z):
        return 1e4 * net(z)

    plain = pgd(loud, x, y, epsilon=0.15, random_start=False).success
    dlr = apgd(loud, x, y, epsilon=0.15, loss="dlr").success
    assert plain.float().mean() < 0.2 < 0.6 < dlr.float().mean()


def test_half_precision_around_an_attack_does_not_weaken_it(digits):
    net, x, y = digits
    want = pgd(net, x[:50], y[:50], epsilon=0.1, steps=10)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = pgd(net, x[:50], y[:50], epsilon=0.1, steps=10)
    assert torch.equal(found.image, want.image)


def test_the_curve_counts_wrong_images_and_falls(digits):
    net, x, y = digits
    radii = (0.02, 0.05, 0.1, 0.2)
    report = Attacked(epsilons=radii, steps=10)(subject_of(net), samples(x, y))
    clean = float((net(x).argmax(1) == y).float().mean())
    assert clean < 1
    assert report.summary["accuracy"] == pytest.approx(clean)
    broken = report.arrays["broken"]
    assert (broken[:, 1:] | ~broken[:, :-1]).all()  # once broken, broken in every larger ball
    assert broken[net(x).argmax(1).numpy() != y.numpy()].all()
    for row in report.rows:
        values = [v for k, v in row.items() if k.startswith("after")]
        assert values == sorted(values, reverse=True)
    for column in [k for k in report.rows[0] if k.startswith("after")]:
        curve = [row[column] for row in report.rows]
        assert curve == sorted(curve, reverse=True)
    assert "robust accuracy.plotly" in report.figures
    assert any(name.startswith("adversarial images") for name in report.figures)
    images, index = report.arrays["adversarial"], report.arrays["index"]
    far = np.abs(images - x.numpy()[index]).reshape(len(index), -1).max(1)
    assert np.allclose(far, report.arrays["distance"][index], atol=1e-7)
    assert (Grey(net)(torch.from_numpy(images)).argmax(1) != y[index]).all()  # every counterexample replays
    for i, d in zip(index, report.arrays["distance"][index]):
        assert broken[i].tolist() == [d <= r for r in radii]


def test_a_run_that_was_stopped_goes_on_and_ends_alike(digits, tmp_path):
    net, x, y = digits
    subject, data = subject_of(net), samples(x[:60], y[:60])
    options = {"epsilons": (0.05, 0.1), "steps": 5, "batch_size": 20}
    whole = Attacked(**options)(subject, data, seed=2)
    Attacked(**options, keep=tmp_path)(subject, data[:40], seed=2)
    (file,) = tmp_path.glob("attacked-*.jsonl")
    lines = file.read_text().splitlines()
    assert len(lines) == 2
    file.write_text(lines[0] + "\n" + lines[1][:50])  # killed while writing
    again = Attacked(**options, keep=tmp_path)(subject, data, seed=2)
    assert again.rows == whole.rows
    for key, value in whole.arrays.items():
        np.testing.assert_array_equal(again.arrays[key], value)


def test_a_budget_that_ends_early_is_said_and_nothing_guessed(digits):
    net, x, y = digits
    report = Attacked(seconds=0.0)(subject_of(net), samples(x[:20], y[:20]))
    assert "Time ran out after 0 of 20" in " ".join(report.notes)
    assert "nothing is known" in report.answer
    assert not [k for k in report.summary if k.startswith("accuracy")]


class Random(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return self.net(x + 0.1 * torch.randn_like(x))


class Rounded(nn.Module):
    def __init__(self, net, through):
        super().__init__()
        self.net, self.through = net, through

    def forward(self, x):
        rounded = (x * 7).round() / 7
        return self.net(x + (rounded - x).detach() if self.through else rounded)


class Loud(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return 1e5 * self.net(x)


def test_signs_of_masking(digits):
    """Randomness, zero gradients, quantisation: each is seen where it is, and nowhere else."""
    net, x, y = digits
    x, y = x[:32], y[:32]

    def flags(model):
        return {s.name for s in masking(model, x, y) if s.flagged}

    assert flags(net) == set()
    assert "randomness" in flags(Random(net))
    assert {"lost gradient", "quantisation"} <= flags(Rounded(net, through=False))
    assert flags(Rounded(net, through=True)) == {"quantisation"}
    assert flags(Loud(net)) == {"zero gradient"}


def test_signs_are_told_in_the_report(digits):
    net, x, y = digits
    subject = subject_of(Rounded(net, through=False))
    report = Attacked(epsilons=(0.05,), steps=3, attacks=("pgd",))(subject, samples(x[:32], y[:32]))
    text = " ".join(report.notes)
    assert "lost gradient" in text
    assert "quantisation" in text
    assert "black-box" in text
    assert report.summary["sign: quantisation"] == 1.0


def test_bad_input_is_one_error_that_names_the_sample(digits):
    net, x, y = digits
    with pytest.raises(AdviceError, match=r"pixels in 0 to 255.*\[0, 1\]"):
        pgd(net, x[:4] * 255 / x[:4].max(), y[:4], epsilon=0.1)
    with pytest.raises(AdviceError, match="Label 10 of image 1"):
        pgd(net, x[:2], torch.tensor([0, 10]), epsilon=0.1)
    with pytest.raises(AdviceError, match="one label per image"):
        pgd(net, x[:2], y[:3], epsilon=0.1)
    with pytest.raises(AdviceError, match="NaN"):
        pgd(lambda z: net(z) * torch.tensor(float("nan")), x[:2], y[:2], epsilon=0.1)
    with pytest.raises(AdviceError, match="no gradient"):
        pgd(lambda z: net(z).detach(), x[:2], y[:2], epsilon=0.1)
    with pytest.raises(AdviceError, match="radius"):
        pgd(net, x[:2], y[:2], epsilon=-0.1)
    with pytest.raises(AdviceError, match="8-bit grid"):
        pgd(net, x[:2] * 0.9999, y[:2], epsilon=0.1, grid=True)
    with pytest.raises(AdviceError, match="three classes"):
        apgd(lambda z: net(z)[:, :2], x[:2], y[:2] * 0, epsilon=0.1, loss="dlr")
    with pytest.raises(AdviceError, match="apgd-ce"):
        Attacked(attacks=("apgd",))(subject_of(net), samples(x[:4], y[:4]))
    with pytest.raises(AdviceError, match="gradients"):
        Attacked()(Subject(lambda z: z.mean((2, 3))), samples(x[:4], y[:4]))
    with pytest.raises(AdviceError, match="radii above 0"):
        Attacked(epsilons=(8.0,))(subject_of(net), samples(x[:4], y[:4]))
    with pytest.raises(AdviceError, match="digit 2"):
        Attacked()(
            subject_of(net), [*samples(x[:2], y[:2]), Sample(image=x[2].expand(3, -1, -1), label=11, id="digit 2")]
        )


def test_two_classes_are_attacked_by_their_margin(digits):
    net, x, y = digits

    class Odd(nn.Module):
        def forward(self, z):
            logits = net(z)
            return torch.stack([logits[:, 0::2].logsumexp(1), logits[:, 1::2].logsumexp(1)], 1)

    report = Attacked(epsilons=(0.1,), steps=5)(subject_of(Odd()), samples(x[:20], y[:20] % 2))
    assert "after APGD-MARGIN" in report.rows[-1]
    assert any("two" in n for n in report.notes)


def test_adapters(digits):
    foolbox = pytest.importorskip("foolbox")
    net, x, _y = digits
    model = to_foolbox(subject_of(net))
    x = x.expand(-1, 3, -1, -1)
    assert isinstance(model, foolbox.PyTorchModel)
    assert model.bounds == (0, 1)
    assert torch.allclose(model(x[:4]), Grey(net)(x[:4]), atol=1e-5)
    try:
        import art  # noqa: F401
    except ImportError:
        with pytest.raises(MissingError, match="adversarial-robustness-toolbox"):
            to_art(subject_of(net), shape=(3, 8, 8), classes=10)
    else:
        wrapped = to_art(subject_of(net), shape=(3, 8, 8), classes=10)
        assert np.allclose(wrapped.predict(x[:4].numpy()), Grey(net)(x[:4]).detach().numpy(), atol=1e-5)
