"""Attribution: closed forms, captum's numbers, completeness, bounded memory, and modules that break hooks elsewhere."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import lynceus
from lynceus import data
from lynceus.core.errors import AdviceError
from lynceus.core.subject import Subject
from lynceus.core.types import Sample
from lynceus.explain.attribution import (
    as_module,
    captum_attribution,
    flat,
    integrated_gradients,
    nodes,
    occlusion,
    saliency,
)
from lynceus.explain.grad_cam import grad_cam, last_map
from lynceus.explain.worst_cases import Attribution, deletion, overlay, worst

BAND = (slice(2, 6), slice(4, 8))  # where the planted net looks


class Small(nn.Module):
    owns_pixels = True

    def __init__(self, *, inplace=False, shared=False):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.act = nn.ReLU(inplace=inplace)
        self.other = self.act if shared else nn.ReLU(inplace=inplace)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        x = self.act(self.conv1(x))
        return self.head(self.other(self.conv2(x)).mean((-2, -1)))


class Planted(nn.Module):
    """Two classes by the brightness of a band alone."""

    owns_pixels = True

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(4.0))

    def forward(self, x):
        value = x[..., BAND[0], BAND[1]].mean((1, 2, 3)) * self.scale
        return torch.stack([value, 1 - value], 1)


@pytest.fixture(scope="module")
def images():
    return torch.rand(5, 3, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    return Small().eval()


def test_a_linear_model_has_its_weights_as_saliency_and_its_terms_as_shares(images):
    torch.manual_seed(0)
    linear = nn.Sequential(nn.Flatten(), nn.Linear(192, 4))
    subject = Subject(linear, mean=(0,) * 3, std=(1,) * 3)
    target = torch.tensor([0, 1, 2, 3, 0])
    weight = linear[1].weight[target].view(5, 3, 8, 8)
    torch.testing.assert_close(saliency(subject, images, target, batch=2), weight)
    maps, delta = integrated_gradients(subject, images, target, steps=1, batch=3)
    torch.testing.assert_close(maps, weight * images)
    assert delta.abs().max() < 1e-5


@settings(max_examples=25, deadline=None)
@given(rule=st.sampled_from(["gausslegendre", "left", "right", "middle", "trapezoid"]), steps=st.integers(2, 40))
def test_rules_are_those_of_the_books(rule, steps):
    weights, places = nodes(rule, steps)
    assert float(weights.sum()) == pytest.approx(1)
    assert 0 <= float(places.min()) <= float(places.max()) <= 1
    exact = {"gausslegendre": 2 * steps - 1, "trapezoid": 1, "middle": 1, "left": 0, "right": 0}[rule]
    power = min(exact, 7)
    assert float((weights * places**power).sum()) == pytest.approx(1 / (power + 1), abs=1e-12)


@pytest.mark.parametrize("rule", ["gausslegendre", "left", "right", "middle", "trapezoid"])
@pytest.mark.parametrize("name", ["small", "resnet_nano"])
def test_integrated_gradients_are_captums(net, images, rule, name):
    captum = pytest.importorskip("captum.attr")
    torch.manual_seed(0)
    subject = Subject(net) if name == "small" else Subject(lynceus.create_model(name, num_classes=4))
    x = images if name == "small" else torch.rand(3, 3, 32, 32)
    if rule == "trapezoid":  # points that differ in the last digit of float32 fall on different sides of a ReLU's kink
        subject, x = Subject(copy.deepcopy(subject.model).double()), x.double()
    target = torch.arange(len(x)) % 4
    method = rule if rule == "gausslegendre" else f"riemann_{rule}"
    theirs, gap = captum.IntegratedGradients(as_module(subject)).attribute(
        x, torch.full_like(x, 0.25), target, n_steps=20, method=method, return_convergence_delta=True
    )
    ours, delta = integrated_gradients(subject, x, target, baseline=0.25, steps=20, rule=rule, batch=7)
    if rule == "trapezoid":  # captum's weights sum to 19 / 20
        torch.testing.assert_close(ours * 19 / 20, theirs, atol=1e-5, rtol=0)
    else:
        torch.testing.assert_close(ours, theirs.float(), atol=1e-5, rtol=0)
        torch.testing.assert_close(delta, gap.float(), atol=1e-5, rtol=0)


def test_occlusion_and_saliency_are_captums(net, images):
    captum = pytest.importorskip("captum.attr")
    subject, target = Subject(net), torch.tensor([0, 1, 2, 3, 0])
    theirs = captum.Occlusion(as_module(subject)).attribute(
        images, (3, 3, 3), strides=(3, 2, 2), baselines=0.5, target=target
    )
    ours = occlusion(subject, images, target, window=3, stride=2, batch=11)
    torch.testing.assert_close(ours, theirs[:, 0].float(), atol=1e-5, rtol=0)
    torch.testing.assert_close(
        captum_attribution(subject, images, target, method="Saliency"), saliency(subject, images, target)
    )
    for method in ("DeepLift", "InputXGradient", "IntegratedGradients"):
        assert captum_attribution(subject, images, target, method=method).shape == images.shape


def test_shares_add_up_and_the_rest_falls_with_steps(images):
    torch.manual_seed(0)
    subject = Subject(lynceus.create_model("resnet_nano", num_classes=10))
    x = torch.rand(2, 3, 16, 16)
    miss = []
    for steps in (4, 50, 200):
        maps, delta = integrated_gradients(subject, x, steps=steps)
        with torch.no_grad():
            target = subject(x).argmax(1, keepdim=True)
            change = (subject(x) - subject(torch.zeros_like(x))).gather(1, target)[:, 0]
        torch.testing.assert_close(maps.flatten(1).sum(1), change + delta, atol=1e-4, rtol=1e-4)
        miss.append(float((delta.abs() / change.abs()).max()))
    assert miss[-1] < miss[0]
    assert miss[-1] < 0.01


def test_no_pass_is_larger_than_asked_for(images):
    seen = []

    class Watched(Small):
        def forward(self, x):
            seen.append(len(x))
            return super().forward(x)

    torch.manual_seed(0)
    subject = Subject(Watched().eval())
    whole, _ = integrated_gradients(subject, images, steps=30, batch=1000)
    assert max(seen) == 150
    seen.clear()
    small, _ = integrated_gradients(subject, images, steps=30, batch=4)
    assert max(seen) == 4
    torch.testing.assert_close(small, whole, atol=1e-6, rtol=1e-4)
    seen.clear()
    occlusion(subject, images, batch=4)
    grad_cam(subject, images, batch=4)
    assert max(seen) <= 4


@pytest.mark.parametrize("shared", [False, True])
def test_in_place_and_reused_modules_change_nothing(net, images, shared):
    odd = Small(inplace=True, shared=shared).eval()
    odd.load_state_dict(net.state_dict())
    plain, subject = Subject(net), Subject(odd)
    before = images.clone()
    torch.testing.assert_close(saliency(subject, images), saliency(plain, images))
    torch.testing.assert_close(integrated_gradients(subject, images)[0], integrated_gradients(plain, images)[0])
    torch.testing.assert_close(occlusion(subject, images), occlusion(plain, images))
    torch.testing.assert_close(grad_cam(subject, images, layer="conv2"), grad_cam(plain, images, layer="conv2"))
    assert images.equal(before)


def test_a_model_that_works_in_place_on_its_input(images):
    class Rude(Small):
        def forward(self, x):
            return super().forward(x.mul_(2))

    torch.manual_seed(0)
    rude, before = Subject(Rude().eval()), images.clone()
    saliency(rude, images, torch.zeros(5, dtype=torch.long))
    assert images.equal(before)
    with pytest.raises(AdviceError, match="writes on the images"):
        Attribution()(rude, [Sample(image=x, label=0) for x in images])


def test_grad_cam_in_closed_form(images):
    """One convolution and a mean: the weight of a channel is the head's by 1 / cells."""
    torch.manual_seed(0)
    conv, head = nn.Conv2d(3, 6, 1), nn.Linear(6, 4)
    model = nn.Sequential(conv, nn.AdaptiveAvgPool2d(1), nn.Flatten(), head)
    subject = Subject(model, mean=(0,) * 3, std=(1,) * 3)
    target = torch.tensor([3, 2, 1, 0, 1])
    expected = torch.einsum("bk,bkhw->bhw", head.weight[target] / 64, conv(images)).relu()
    assert last_map(subject, images) == "0"
    torch.testing.assert_close(grad_cam(subject, images, target, batch=2), expected)


@pytest.mark.parametrize(
    "name", ["resnet_nano", "convnext_nano", "swin_nano", "vit_nano", "volo_nano", "plain_mamba_nano"]
)
def test_grad_cam_reads_every_kind_of_backbone(name):
    torch.manual_seed(0)
    x = torch.rand(2, 3, 64, 48)
    heat = grad_cam(Subject(lynceus.create_model(name, num_classes=5)), x)
    assert heat.shape == (2, 64, 48)
    assert (heat >= 0).all()
    assert heat.max() > 0


@pytest.mark.parametrize(
    ("name", "options", "layer"),
    [
        ("resnet10t", {}, "layer4"),
        ("vit_tiny_patch16_224", {"img_size": 64, "depth": 2}, "blocks.1.norm1"),  # the last before attention
        ("convnext_atto", {}, "norm_pre"),
    ],
)
def test_grad_cam_finds_the_last_map_of_timms_models(name, options, layer):
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    subject = Subject(timm.create_model(name, num_classes=5, **options))
    x = torch.rand(2, 3, 64, 64)
    assert last_map(subject, x) == layer
    assert grad_cam(subject, x).shape == (2, 64, 64)


def test_every_method_points_at_the_planted_band(images):
    subject = Subject(Planted())
    where = torch.zeros(8, 8, dtype=torch.bool)
    where[BAND] = True
    for heat in (
        flat(saliency(subject, images), signed=False),
        flat(integrated_gradients(subject, images)[0]).abs(),
        occlusion(subject, images, window=1).abs(),
    ):
        assert (heat[:, ~where] == 0).all()
        assert (heat[:, where] > 0).float().mean() > 0.9
    bright = torch.where(where, images * 0.2 + 0.8, images * 0.2)
    falls = deletion(subject, bright, torch.zeros(5, dtype=torch.long), where.float().expand(5, 8, 8), share=16 / 64)
    assert (falls[0] > 2 * falls[1]).all()


def test_a_function_is_explained_by_occlusion_alone(images):
    planted = Planted()
    subject = Subject(lambda x: planted(x).detach(), name="service")
    report = Attribution(count=3)(subject, [Sample(image=x, label=0, id=str(i)) for i, x in enumerate(images)])
    assert {r["method"] for r in report.rows} == {"occlusion"}
    assert report.summary["occlusion_fall"] >= report.summary["occlusion_fall_random"]
    with pytest.raises(AdviceError, match="gradients"):
        Attribution(method="grad_cam")(subject, [Sample(image=images[0], label=0)])


def test_the_worst_come_first_wrong_before_unsure(net, images):
    from lynceus.core.guard import collect

    subject = Subject(net)
    logits = subject(images).detach()
    labels = logits.argmax(1)
    labels[2] = logits[2].argmin()
    found = collect(subject, [Sample(image=x, label=int(y), id=str(i)) for i, (x, y) in enumerate(zip(images, labels))])
    order, kept = worst(subject, found, 3)
    assert order[0] == 2
    assert kept.shape == (3, 4)
    top = logits[order[1:]].topk(2).values
    assert (top[0, 0] - top[0, 1]) <= (top[1, 0] - top[1, 1])


def test_the_report_names_cases_and_says_whether_maps_matter():
    torch.manual_seed(0)
    net = Small()
    net.head = nn.Linear(8, 10)
    digits = data.open("digits").take(60)
    report = Attribution(count=4)(Subject(net), digits)
    assert len(report.rows) == 8
    assert {r["method"] for r in report.rows} == {"integrated_gradients", "grad_cam"}
    assert report.arrays["maps grad_cam"].shape == (4, 8, 8)
    assert report.summary["completeness_miss"] < 0.01 or any("still miss" in n for n in report.notes)
    assert report.figures["worst_cases.png"].startswith(b"\x89PNG")
    mask = torch.ones(1, 8, 8, dtype=torch.bool)
    masked = [Sample(image=s.image, label=s.label, masks=mask) for s in digits.take(5)]
    rows = Attribution(count=2)(Subject(net), masked).rows
    np.testing.assert_allclose([r["share on the object"] for r in rows if r["method"] == "integrated_gradients"], 1)


def test_overlays_are_pictures(images):
    shown = overlay(images[0], torch.randn(8, 8))
    assert shown.shape == (3, 8, 8)
    assert 0 <= float(shown.min()) <= float(shown.max()) <= 1
    assert overlay(images[0], torch.zeros(8, 8)).isfinite().all()


@pytest.mark.parametrize(
    "call",
    [
        lambda s, x: integrated_gradients(s, x, steps=0),
        lambda s, x: integrated_gradients(s, x, rule="simpson"),
        lambda s, x: integrated_gradients(s, x, baseline=x[:1]),
        lambda s, x: saliency(s, x, torch.full((5,), 9)),
        lambda s, x: saliency(s, x, torch.zeros(2, dtype=torch.long)),
        lambda s, x: occlusion(s, x, window=9),
        lambda s, x: occlusion(s, x, window=2, stride=3),
        lambda s, x: grad_cam(s, x, layer="conv3"),
        lambda s, x: grad_cam(s, x, layer="head"),
        lambda s, x: captum_attribution(s, x, method="Magic"),
        lambda s, x: Attribution(count=0)(s, [Sample(image=x[0])]),
        lambda s, x: Attribution(method="magic")(s, [Sample(image=x[0])]),
    ],
)
def test_mistakes_advise(net, images, call):
    with pytest.raises(AdviceError):
        call(Subject(net), images)
