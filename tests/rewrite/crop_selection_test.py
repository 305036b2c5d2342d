"""Crop selection keeps its promises: exact under rolls, as the formulas say under real shifts, certified."""

import itertools
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.io import ImageReadMode, decode_image
from torchvision.models import resnet18

from lynceus.core.errors import AdviceError
from lynceus.core.nouns import Rewrite
from lynceus.rewrite import crop_selection as cs
from lynceus.trust.shift import shift, shift_set

AXIS, ALL = shift_set(1, "4"), shift_set(1, "8")


def photos(paths, side, count):
    from torchvision.transforms.v2 import functional as T

    out = [T.resize(decode_image(str(p), ImageReadMode.RGB), [side], antialias=True) for p in paths[:count]]
    return torch.stack([T.center_crop(x, [side, side]) for x in out])


@pytest.fixture(scope="module")
def small_net():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 16, 3, 2, 1), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, 1), nn.ReLU(), nn.Flatten(1), nn.LazyLinear(10)
    )
    net(torch.zeros(1, 3, 24, 24))
    return net.eval()


def test_a_crop_selection_is_a_rewrite_that_leaves_the_model_alone(small_net):
    before = {k: v.clone() for k, v in small_net.state_dict().items()}
    small_net.train()
    rewrite = cs.CropSelection(input_size=24, view=32)
    assert isinstance(rewrite, Rewrite)
    new = rewrite(small_net, torch.rand(2, 3, 32, 32))
    assert small_net.training
    assert not new.training
    assert new.owns_pixels
    new.model[0].weight.data.zero_()
    assert all(torch.equal(v, before[k]) for k, v in small_net.state_dict().items())
    small_net.eval()


def test_it_saves_as_a_state_dict_beside_its_config(small_net, tmp_path):
    config = cs.CropSelection(input_size=24, view=32, seed=5)
    new, x = config(small_net), torch.rand(4, 3, 32, 32)
    torch.save(new.state_dict(), tmp_path / "w.pt")
    again = config(small_net)
    for p in again.parameters():
        p.data.zero_()
    again.load_state_dict(torch.load(tmp_path / "w.pt", weights_only=True))
    assert torch.equal(again(x), new(x))


@pytest.mark.parametrize("score", ["noise", "log", "laplacian_noise"])
@pytest.mark.parametrize("kernel", [None, 7, 31])
def test_filters_are_whole_zero_mean_and_exact_in_float32(score, kernel):
    weight = cs.score_filter(score, kernel)
    assert torch.equal(weight, weight.round())
    assert weight.sum() == 0
    assert weight.abs().sum() * 1020 < 2**24
    assert weight.abs().max() < 2**11
    assert weight.unique().numel() > 6


def test_scores_are_the_filter_at_each_crops_centre():
    model = cs.crop_selection(nn.Identity(), input_size=12, view=20, kernel=5)
    x = torch.rand(2, 3, 20, 20)
    grey, scores = cs.whole_grey(x)[:, 0], model.scores(x)
    assert scores.shape == (2, 9, 9)
    offset = (12 - 5) // 2
    for i, u, v in itertools.product(range(2), (0, 3, 8), (0, 5, 8)):
        window = grey[i, u + offset : u + offset + 5, v + offset : v + offset + 5]
        assert float((window * model.filter).sum()) == float(scores[i, u, v])
    u, v = model.select(x)[0].tolist()
    assert float(scores[0, u, v]) == float(scores[0].max())
    assert torch.equal(model.crops(x)[0], x[0, :, u : u + 12, v : v + 12])


def test_any_view_larger_and_rectangular(small_net):
    model = cs.CropSelection(input_size=24)(small_net)
    assert model(torch.rand(3, 3, 40, 57)).shape == (3, 10)
    fixed = cs.CropSelection(input_size=24, view=(30, 34))(small_net)
    x = torch.rand(3, 3, 50, 60)
    assert torch.equal(fixed(x), fixed(x[..., 10:40, 13:47]))
    assert torch.equal(fixed((x * 255).round().to(torch.uint8)), fixed((x * 255).round().to(torch.uint8).float() / 255))
    with pytest.raises(AdviceError, match="at least"):
        fixed(torch.rand(1, 3, 28, 60))


def test_averaging_over_local_maxima_keeps_the_best_one_first(small_net):
    x = torch.rand(5, 3, 32, 32)
    one = cs.crop_selection(small_net, input_size=24, view=32)
    four = cs.crop_selection(small_net, input_size=24, view=32, top=4)
    corners, real = four._corners(x, four.scores(x), 4)
    assert torch.equal(corners[:, 0], one.select(x))
    want = []
    for i in range(5):
        crops = [
            x[i : i + 1, :, u : u + 24, v : v + 24] for (u, v), ok in zip(corners[i].tolist(), real[i].tolist()) if ok
        ]
        want.append(torch.stack([small_net(four.normalise(c)) for c in crops]).mean(0))
    assert torch.allclose(four(x), torch.cat(want), atol=1e-6)


def test_flat_images_take_the_centre_crop_and_the_report_says_so(small_net):
    x = torch.cat([torch.full((1, 3, 34, 34), 0.3), torch.rand(1, 3, 34, 34)])
    model = cs.crop_selection(small_net, input_size=24, view=32)
    assert model.flat(x).tolist() == [True, False]
    assert model.select(x)[0].tolist() == [4, 4]
    assert "flat" in " ".join(shift(model, x).notes)
    assert "flat" in " ".join(cs.certificate(model, x, shifts=(1,)).notes)


def test_smooth_scores_are_refused_or_warned_about(small_net):
    def mean(grey):
        return F.avg_pool2d(grey, 31, 1)[:, 0]

    def roughness(grey):
        laplacian = torch.tensor([[0.0, 1, 0], [1, -4, 1], [0, 1, 0]], dtype=grey.dtype)
        return F.avg_pool2d(F.conv2d(grey, laplacian[None, None]).abs(), 31, 1)[:, 0]

    for score, kernel in ((mean, 31), (roughness, 33)):
        for view in (256, 320):
            with pytest.raises(AdviceError, match="too smooth"):
                cs.crop_selection(nn.Identity(), input_size=224, view=view, score=score, kernel=kernel)
    with pytest.warns(UserWarning, match="too smooth"):
        cs.CropSelection(input_size=224, view=256, score=mean, kernel=31, smooth="warn")(nn.Identity())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for score in ("noise", "log", "laplacian_noise"):
            cs.crop_selection(nn.Identity(), input_size=224, view=256, score=score)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"score": "nois"}, "noise"),
        ({"kernel": 4}, "odd"),
        ({"view": 20}, "smaller than input_size"),
        ({"top": 0}, "at least 1"),
        ({"score": lambda g: g[:, 0]}, "kernel="),
        ({"kernel": 25}, "larger than the crop"),
    ],
)
def test_mistakes_are_advised(change, text):
    with pytest.raises(AdviceError, match=text):
        cs.CropSelection(**{"input_size": 24, "view": 32, **change})


def test_formulas():
    assert cs.probability_axis(33, 1) == pytest.approx(1 - 2 / 34)
    assert cs.probability_shift(33, (0, 1)) == pytest.approx(cs.probability_axis(33, 1))
    assert cs.probability_all(33, 1) == pytest.approx((31 / 35) ** 2)
    assert cs.candidates_needed(0.98, 1) == 99
    assert cs.probability_axis(99, 1) >= 0.98 > cs.probability_axis(98, 1)
    assert cs.probability_all(2, 1) == 0


@pytest.mark.parametrize("count", [9, 33])
def test_white_noise_keeps_the_crop_as_often_as_the_three_formulas_say(count):
    model = cs.crop_selection(nn.Identity(), input_size=16, view=15 + count)
    moves = [(0, 1), (1, 1), (2, 1), *shift_set(1, "all")]
    x = torch.rand(2000, 3, 15 + count + 4, 15 + count + 4, generator=torch.Generator().manual_seed(count))
    same = torch.cat([cs.same_crop(model, part, moves) for part in x.split(500)])
    want = [
        cs.probability_axis(count, 1),
        cs.probability_shift(count, (1, 1)),
        cs.probability_shift(count, (2, 1)),
        cs.probability_all(count, 1),
    ]
    got = [same[:, 0], same[:, 1], same[:, 2], same[:, 3:].all(1)]
    for w, g in zip(want, got):
        assert abs(float(g.double().mean()) - w) <= 3 * (w * (1 - w) / 2000) ** 0.5


def test_certificate_is_confirmed_by_brute_force(imagenet_jpegs, small_net):
    stored = photos(imagenet_jpegs, 60, 100)
    stored = torch.cat([stored, stored.flip(-1)])
    model = cs.crop_selection(small_net, input_size=24, view=48)
    x = stored.float() / 255
    for d in (1, 2, 4):
        sure, same = cs.certified(model, x, d), cs.same_crop(model, x, shift_set(d, "all")).all(1)
        assert bool((sure == same).all())  # the certificate is exact: neither too bold nor too shy
        assert 0 < int(sure.sum()) < len(x)
        report = shift(model, stored, shift_set(d, "all"), kind="realistic", view=48)
        assert bool(torch.from_numpy(report.arrays["realistic"]).all(1)[sure].all())
    margin = cs.margins(model, x[..., 6:54, 6:54])
    assert int(margin.min()) >= 0
    assert bool((margin[cs.certified(model, x, 2)] >= 2).all())


def test_cyclic_is_exact_for_an_untrained_resnet_on_photographs(imagenet_jpegs):
    torch.manual_seed(0)
    net = resnet18()
    x = photos(imagenet_jpegs, 96, 12).float() / 255
    with torch.no_grad():
        net(
            (x - 0.45) / 0.225
        )  # the untrained batch norms get statistics, or every picture has one and the same answer
    net.eval()
    model = cs.crop_selection(net, input_size=96, cyclic=True)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        want, plain = model(x), net((x - 0.45) / 0.225).argmax(1)
        same = []
        for _ in range(6):
            move = torch.randint(1, 96, (2,), generator=generator).tolist()
            rolled = torch.roll(x, move, (-2, -1))
            assert torch.equal(model(rolled), want)
            same.append(net((rolled - 0.45) / 0.225).argmax(1) == plain)
    assert float(torch.cat(same).double().mean()) < 0.9  # and below 0.6 at 224 pixels: bench/crop_selection.py


def test_cyclic_breaks_ties_by_the_crops_own_bytes():
    generator = torch.Generator().manual_seed(0)
    tile = torch.rand(4, 3, 8, 8, generator=generator)
    periodic = tile.repeat(1, 1, 4, 4)
    odd_one = periodic.clone()
    odd_one[0, :, 3, 5] = 0.5  # breaks the period far from some of the tied maxima
    stripes = torch.rand(4, 3, 1, 8, generator=generator).expand(-1, -1, 32, -1).repeat(1, 1, 1, 4)
    flat = torch.full((4, 3, 32, 32), 0.25)
    model = cs.crop_selection(nn.Identity(), input_size=24, cyclic=True)
    for x in (periodic, odd_one, stripes, flat):
        want = model.crops(x)
        for move in ((1, 0), (0, 3), (5, 7), (31, 16)):
            assert torch.equal(model.crops(torch.roll(x, move, (-2, -1))), want)


def test_same_crop_on_photographs_meets_the_measured_rates(imagenet_jpegs):
    x = photos(imagenet_jpegs, 264, 100).float() / 255
    rates = {}
    for view in (240, 256):
        same = cs.same_crop(cs.crop_selection(nn.Identity(), input_size=224, view=view), x, AXIS)
        rates[view] = float(same.double().mean())
    assert rates[256] >= 0.85
    assert rates[256] > rates[240]


def test_exports_to_torch_and_onnx(small_net, tmp_path):
    ort = pytest.importorskip("onnxruntime")
    x, other = torch.rand(4, 3, 32, 32), torch.rand(3, 3, 37, 41)
    batch, h, w = (
        torch.export.Dim("b", min=2, max=64),
        torch.export.Dim("h", min=32, max=64),
        torch.export.Dim("w", min=32, max=64),
    )
    for top in (1, 3):
        model = cs.crop_selection(small_net, input_size=24, view=32, top=top)
        program = torch.export.export(model, (x,), dynamic_shapes={"image": {0: batch, 2: h, 3: w}})
        assert torch.allclose(program.module()(other), model(other), atol=1e-6)
        torch.onnx.export(program, (x,), dynamo=True, verbose=False).save(tmp_path / "m.onnx")
        session = ort.InferenceSession(str(tmp_path / "m.onnx"))
        (out,) = session.run(None, {session.get_inputs()[0].name: other.numpy()})
        assert torch.allclose(torch.from_numpy(out), model(other), atol=1e-5)
