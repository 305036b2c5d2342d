"""Certified <= true <= attacked: what one half of the wing proves, no search of the other half contradicts."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from bench._trust import digits8, digits_cnn, digits_mlp
from lynceus.core.subject import Subject
from lynceus.trust.attacks import apgd, fgsm, fmn, pgd
from lynceus.trust.game import search
from lynceus.trust.level_sets import traverse
from lynceus.trust.verify import Budget, radius, verify

EPSILONS = (0.01, 0.03, 0.1)


class Owner(nn.Module):
    """A module that takes pixels as they are, grey or colour."""

    owns_pixels = True

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return self.net(x)


def attacked(subject, x, y, eps):
    """Every attack inside the ball of `eps`: (name, images, success)."""
    yield "fgsm", fgsm(subject, x, y, epsilon=eps)
    yield "pgd", pgd(subject, x, y, epsilon=eps, steps=30, restarts=2)
    yield "apgd", apgd(subject, x, y, epsilon=eps, steps=30)
    if int(subject(x).shape[1]) > 2:
        yield "apgd-dlr", apgd(subject, x, y, epsilon=eps, steps=30, loss="dlr")


@st.composite
def nets(draw):
    """(a small random net of 2 x 2 pixels, a picture)."""
    seed = draw(st.integers(0, 10**6))
    width, depth = draw(st.integers(2, 7)), draw(st.integers(1, 3))
    classes, scale = draw(st.integers(2, 4)), draw(st.sampled_from([0.5, 1.0, 3.0]))
    generator = torch.Generator().manual_seed(seed)
    sizes = [4, *[width] * depth, classes]
    layers = [nn.Flatten()]
    for i, (a, b) in enumerate(pairwise(sizes)):
        layer = nn.Linear(a, b)
        with torch.no_grad():
            layer.weight.copy_(torch.randn(b, a, generator=generator) * scale)
            layer.bias.copy_(torch.randn(b, generator=generator) * 0.3)
        layers += [layer, nn.ReLU()] if i < len(sizes) - 2 else [layer]
    return Owner(nn.Sequential(*layers)).eval(), torch.rand(1, 1, 2, 2, generator=generator)


@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@given(made=nets())
def test_certified_is_at_most_true_is_at_most_attacked(made):
    net, x = made
    subject = Subject(net)
    label = subject(x).argmax(1)
    found = radius(subject, x[0], largest=1.0, precision=1 / 128, budget=Budget(seconds=None, boxes=40))
    proven = found.proven
    # the truth from above: the nearest of many points with another class, on a grid and on rays from the picture
    steps = torch.linspace(0, 1, 9)
    grid = torch.cartesian_prod(steps, steps, steps, steps).view(-1, 1, 2, 2)
    away = (grid - x).flatten(1).abs().amax(1)
    other = subject(grid).argmax(1) != label
    nearest = float(away[other].min()) if bool(other.any()) else math.inf
    assert proven <= nearest
    inside = x + (torch.rand(2000, 1, 2, 2, generator=torch.Generator().manual_seed(0)) * 2 - 1) * proven
    assert (subject(inside.clamp(0, 1)).argmax(1) == label).all()
    least = fmn(subject, x, label, norm="linf", steps=60)
    if bool(least.success):
        assert proven <= float((least.image - x).abs().max()) + 1e-7
    for eps in (proven, 0.05, 0.2):
        if eps <= 0:
            continue
        safe = verify(subject, x[0], step=eps, goal="region", budget=Budget(seconds=None, boxes=40)).kind == "safe"
        for name, result in attacked(subject, x, label, eps):
            if bool(result.success):
                assert not safe, name
                assert float((result.image - x).abs().max()) >= proven - 1e-7, name


@pytest.fixture(scope="module", params=["mlp", pytest.param("cnn", marks=pytest.mark.slow)])
def digits(request):
    """(subject, pictures that it answers rightly, labels)."""
    _, _, x, y = digits8()
    subject = Subject(Owner(digits_mlp(0) if request.param == "mlp" else digits_cnn(0)).eval())
    right = (subject(x).argmax(1) == y).nonzero()[:, 0][: 4 if request.param == "mlp" else 20]
    return subject, x[right], y[right]


@pytest.fixture(scope="module")
def proven(digits):
    subject, x, _ = digits
    found = [radius(subject, a, largest=0.3, precision=1 / 256, budget=Budget(seconds=2, boxes=60)) for a in x]
    return torch.tensor([f.proven for f in found])


def test_what_is_proven_safe_no_attack_breaks(digits, proven):
    subject, x, y = digits
    assert proven.max() > 0
    for eps in EPSILONS:
        safe = torch.tensor(
            [verify(subject, a, step=eps, goal="region", budget=Budget(seconds=2, boxes=60)).kind == "safe" for a in x]
        )
        for name, result in attacked(subject, x, y, eps):
            assert not (result.success & safe).any(), f"{name} at {eps}"
            broken = result.success
            assert ((result.image - x).flatten(1).abs().amax(1)[broken] > proven[broken]).all(), name


def test_the_smallest_changes_found_are_larger_than_what_is_proven(digits, proven):
    subject, x, y = digits
    for norm in ("linf", "l2"):
        least = fmn(subject, x, y, norm=norm, steps=60)
        assert least.success.any()
        assert ((least.image - x).flatten(1).abs().amax(1)[least.success] > proven[least.success]).all()


def test_walks_that_lose_the_class_have_left_what_is_proven(digits, proven):
    subject, x, y = digits
    targets = x.roll(1, 0)
    keep = y != y.roll(1)
    # steps this long leave the level set; short ones hold it too well, and lose the convolutional net's class nowhere
    report = traverse(
        subject, x[keep], targets[keep], y[keep], drop=1.0, steps=20, step_size=0.4, contrast=False, seed=0
    )
    ends = torch.from_numpy(report.arrays["images"]).flatten(0, 1)
    kept = torch.from_numpy(report.arrays["kept"]).long()
    kept = kept.nonzero()[:, 0] if len(kept) == int(keep.sum()) and int(kept.max()) <= 1 else kept
    start, label, sure = x[keep][kept], y[keep][kept], proven[keep][kept]
    lost = subject(ends).argmax(1) != label
    assert lost.any()
    assert ((ends - start).flatten(1).abs().amax(1)[lost] > sure[lost]).all()


def test_pixels_that_the_game_painted_are_never_proven_harmless(digits):
    subject, x, y = digits
    found = 0
    for image, label in list(zip(x, y))[:3]:
        report = search(subject, image, budget_queries=300, detector="gaussians")
        example = torch.from_numpy(report.arrays["image"]).float()
        if int(subject(example[None]).argmax(1)) == int(label):
            continue
        found += 1
        dims = (example != image).flatten().nonzero()[:, 0]
        verdict = verify(subject, image, step=1.0, dims=dims, goal="region", budget=Budget(seconds=2, boxes=60))
        assert verdict.kind != "safe"
    assert found
