"""Views: windows, flips and colours from a generator; boxes and maps move with the picture."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lynceus import data
from lynceus.core.errors import AdviceError
from lynceus.core.types import Sample
from lynceus.data.geometry import flipped, resized, resized_crop
from lynceus.data.views import rand_augment, random_window


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def test_crop_flip_is_a_shift_and_a_mirror_of_each_picture():
    images = torch.randint(0, 256, (64, 3, 9, 11), dtype=torch.uint8, generator=gen())
    out = data.crop_flip(images, 2, gen(1))
    assert torch.equal(out, data.crop_flip(images, 2, gen(1)))
    assert out.dtype == torch.uint8
    padded = torch.nn.functional.pad(images, (2, 2, 2, 2))
    kinds = set()
    for one, big in zip(out, padded):
        found = [
            (y, x, m)
            for y in range(5)
            for x in range(5)
            for m in (False, True)
            if torch.equal(one, big[:, y : y + 9, x : x + 11].flip(-1) if m else big[:, y : y + 9, x : x + 11])
        ]
        assert len(found) == 1
        kinds.add(found[0])
    assert len(kinds) > 30
    assert torch.equal(data.crop_flip(images, 0, gen(), flip=0.0), images)
    assert torch.equal(data.crop_flip(images, 0, gen(), flip=1.0), images.flip(-1))
    floats = torch.rand(4, 3, 8, 8)
    assert data.crop_flip(floats, 1, gen()).dtype == torch.float32


@settings(max_examples=60, deadline=None)
@given(h=st.integers(1, 300), w=st.integers(1, 300), seed=st.integers(0, 10**6))
def test_a_random_window_lies_inside(h, w, seed):
    top, left, height, width = random_window(h, w, (0.08, 1.0), (3 / 4, 4 / 3), gen(seed))
    assert top >= 0
    assert top + height <= h
    assert left >= 0
    assert left + width <= w
    assert min(height, width) >= 1


def test_windows_have_the_promised_area_and_shape():
    areas, ratios = [], []
    for seed in range(400):
        _, _, h, w = random_window(400, 400, (0.2, 0.9), (3 / 4, 4 / 3), gen(seed))
        areas.append(h * w / 160000)
        ratios.append(w / h)
    assert min(areas) > 0.19
    assert max(areas) < 0.91
    assert 0.73 < min(ratios) < max(ratios) < 1.36
    assert 0.45 < sum(areas) / 400 < 0.6


def test_the_train_view_is_torchvisions_random_resized_crop_of_that_window():
    from torchvision.transforms.v2 import functional as F

    sample = data.sample("china")
    view = data.TrainView(size=96, flip=0.0)
    out = view(sample, gen(4)).image
    window = random_window(427, 640, view.scale, view.ratio, gen(4))
    assert torch.equal(out, F.resized_crop(sample.image, *window, [96, 96], antialias=True))
    assert torch.equal(out, view(sample, gen(4)).image)
    assert not torch.equal(out, view(sample, gen(5)).image)
    assert torch.equal(view(sample).image, data.EvalView(size=96)(sample).image), "no generator means evaluation"


@pytest.mark.parametrize("shape", [(100, 150), (150, 100), (96, 96), (30, 40), (500, 37)])
def test_the_eval_view_is_resize_and_centre_crop(shape):
    from torchvision.transforms.v2 import functional as F

    image = F.resize(data.sample("flower").image, list(shape), antialias=True)
    out = data.EvalView(size=64, crop=0.875)(Sample(image=image)).image
    assert out.shape == (3, 64, 64)
    expected = F.center_crop(F.resize(image, [73], antialias=True), [64, 64])
    assert torch.equal(out, expected)


def test_the_eval_view_of_a_wide_picture_covers_it():
    out = data.EvalView(size=(32, 64), crop=1.0)(data.sample("flower")).image
    assert out.shape == (3, 32, 64)


def scene(seed=3):
    return next(s for s in data.synth.shapes(50, size=64, objects=(2, 4), seed=seed) if len(s.boxes) >= 2)


def test_boxes_masks_and_maps_move_with_the_picture():
    s = scene()
    f = flipped(s)
    assert torch.equal(flipped(f).image, s.image)
    assert torch.equal(flipped(f).boxes, s.boxes)
    for before, after in ((s, f), (s, resized(s, (128, 96))), (s, resized_crop(s, 8, 4, 48, 56, (96, 112)))):
        for k, mask in enumerate(after.masks):
            ys, xs = mask.nonzero(as_tuple=True)
            tight = torch.tensor([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]).float()
            assert (after.boxes[k] - tight).abs().max() <= 2.1
        ids = {c + 1 for c in after.classes.tolist()}
        assert ids <= set(after.segments.unique().tolist())
        assert len(before.boxes) >= len(after.boxes)


def test_boxes_that_a_crop_leaves_too_little_of_are_dropped_and_the_picture_is_kept():
    boxes = torch.tensor([[0.0, 0, 10, 10], [9, 0, 19, 10], [30, 30, 40, 40]])
    s = Sample(image=torch.zeros(3, 50, 50, dtype=torch.uint8), boxes=boxes, classes=torch.arange(3))
    s.extra["iscrowd"] = torch.tensor([0, 1, 0])
    out = resized_crop(s, 0, 9, 20, 20, (20, 20))
    assert out.classes.tolist() == [0, 1]
    assert out.boxes.tolist() == [[0, 0, 1, 10], [0, 0, 10, 10]]
    assert out.extra["iscrowd"].tolist() == [0, 1]
    none = resized_crop(s, 45, 45, 5, 5, (10, 10))
    assert none.boxes.shape == (0, 4)
    assert none.image.shape == (3, 10, 10)
    assert s.boxes.shape == (3, 4), "the sample itself stays as it was"


def test_outside_the_picture_maps_are_unknown():
    s = Sample(
        image=torch.full((3, 8, 8), 9, dtype=torch.uint8),
        segments=torch.ones(8, 8, dtype=torch.long),
        depth=torch.full((8, 8), 2.0),
    )
    out = resized_crop(s, -4, -4, 16, 16, (16, 16))
    assert out.segments.unique().tolist() == [1, 255]
    assert int((out.segments == 1).sum()) == 64
    assert out.depth.isnan().sum() == 256 - 64
    assert out.image[:, 0, 0].tolist() == [0, 0, 0]


def test_flow_turns_and_scales():
    flow = torch.stack([torch.full((8, 8), 2.0), torch.full((8, 8), 3.0)])
    s = Sample(image=torch.zeros(3, 8, 8, dtype=torch.uint8), flow=flow)
    assert flipped(s).flow[:, 0, 0].tolist() == [-2, 3]
    assert resized(s, (16, 24)).flow[:, 0, 0].tolist() == [6, 6]


def test_rand_augment_draws_from_the_generator_only():
    image = data.sample("astronaut").image[:, :64, :64].contiguous()
    state = torch.get_rng_state()
    outs = [rand_augment(image, 2, 9, generator=gen(s)) for s in range(30)]
    assert torch.equal(torch.get_rng_state(), state)
    assert all(o.shape == image.shape and o.dtype == torch.uint8 for o in outs)
    assert torch.equal(outs[7], rand_augment(image, 2, 9, generator=gen(7)))
    assert len({o.sum().item() for o in outs}) > 20
    marked = torch.zeros(3, 32, 32, dtype=torch.uint8)
    marked[:, 10:20, 10:20] = 200
    for s in range(40):
        out = rand_augment(marked, 1, 20, generator=gen(s), still=True).float().mean(0)
        assert out[12:18, 12:18].std() < 1, "an operation that moves nothing keeps the square where it is"


def test_views_advise():
    with pytest.raises(AdviceError, match="share of the area"):
        data.TrainView(scale=(0.0, 1.0))
    with pytest.raises(AdviceError, match=r"0\.\.30"):
        data.TrainView(magnitude=31)
