"""The bundled pictures and the generated ones: no network, the same everywhere."""

import socket

import numpy as np
import pytest
import torch

from lynceus import data
from lynceus.core.errors import OptionError
from lynceus.core.types import Sample
from lynceus.data.samples import faces


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*args, **options):
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)


def test_bundled_pictures(no_network):
    pytest.importorskip("skimage")
    pytest.importorskip("matplotlib")
    found = data.samples()
    assert len(found) >= 25
    sizes = {s.name: s.size for s in found}
    assert sizes["astronaut"] == (512, 512)
    assert sizes["chelsea"] == (300, 451)
    assert sizes["china"] == sizes["flower"] == (427, 640)
    assert sizes["retina"] == (1411, 1411)
    assert all(s.licence and s.package for s in found)
    for info in found:
        sample = data.sample(info.name)
        assert isinstance(sample, Sample)
        assert sample.image.shape == (3, *info.size)
        assert sample.image.dtype == torch.uint8
        assert sample.image.float().std() > 1, f"{info.name} is blank"
    left = data.sample("motorcycle_left")
    finite = torch.isfinite(left.extra["disparity"])
    assert 0.92 < finite.float().mean() < 0.935
    assert faces()[0].shape == (200, 3, 25, 25)
    with pytest.raises(OptionError, match="astronaut"):
        data.sample("astronaut2")


def test_nothing_else_asks_for_a_network(no_network, tmp_path):
    data.open("digits")
    data.synth.digits_on_photos(2)[1]
    with pytest.raises(ValueError, match="nothing is downloaded"):
        data.open("hf://datasets/x")


MAKERS = {
    "shapes": data.synth.shapes,
    "sprites": data.synth.sprites,
    "digits_on_photos": data.synth.digits_on_photos,
    "depth_planes": data.synth.depth_planes,
    "moving_shapes": data.synth.moving_shapes,
}


@pytest.mark.parametrize("name", MAKERS)
def test_generated_samples_depend_on_seed_and_index_only(name):
    make = MAKERS[name]
    few, many = make(4, seed=5), make(9, seed=5)
    assert torch.equal(few[3].image, many[3].image)
    assert not torch.equal(few[3].image, make(4, seed=6)[3].image)
    assert not torch.equal(few[3].image, few[2].image)
    here = [(b.image, b.boxes, b.depth, b.extra) for b in data.loader(many, 4)]
    for workers in (1, 2):
        there = [(b.image, b.boxes, b.depth, b.extra) for b in data.loader(many, 4, workers=workers)]
        for a, b in zip(here, there, strict=True):
            assert torch.equal(a[0], b[0])
            for x, y in zip((a[1] or []) + (a[2] or []), (b[1] or []) + (b[2] or []), strict=True):
                assert torch.equal(x, y)
            assert all(p.keys() == q.keys() for p, q in zip(a[3], b[3], strict=True))


def test_shapes_are_what_they_say():
    d = data.synth.shapes(60, size=64, seed=0)
    for s in d:
        assert s.boxes.shape == (len(s.classes), 4)
        assert s.masks.sum(0).max() <= 1, "masks of visible parts are disjoint"
        for mask, box, cls in zip(s.masks, s.boxes.tolist(), s.classes.tolist()):
            ys, xs = mask.nonzero(as_tuple=True)
            assert box == [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]
            assert s.segments[mask].unique().tolist() == [cls + 1]
        assert (s.segments > 0).sum() == s.masks.sum()
    counts = np.bincount(torch.cat([s.classes for s in d]).numpy(), minlength=3)
    assert counts.min() > 15
    assert any(len(s.boxes) == 0 for s in d)
    assert d.check().summary["problems"] == 0


def test_sprites_have_their_factors():
    for s in data.synth.sprites(20, seed=1):
        k = len(s.classes)
        assert s.extra["position"].shape == (k, 2)
        assert torch.equal(
            s.masks.long().argmax(0) + 1, torch.where(s.segments > 0, s.segments, torch.ones_like(s.segments))
        )
        for i in range(k):
            if s.masks[i].any():
                colour = s.image[:, s.masks[i]].float().unique(dim=1)[:, 0] / 255
                assert torch.allclose(colour, s.extra["colour"][i], atol=1e-3)


def test_digits_on_photos_say_their_number():
    for s in data.synth.digits_on_photos(20, seed=1):
        assert s.text == "".join(map(str, s.classes.tolist()))
        assert (s.boxes[1:, 0] > s.boxes[:-1, 0]).all()
        assert 1 <= len(s.text) <= 5


def test_depth_planes_have_exact_depth():
    for s in data.synth.depth_planes(10, seed=1):
        assert s.depth.isfinite().all()
        assert 1 <= float(s.depth.min()) < float(s.depth.max()) <= 20.001
        inverse = 1 / s.depth.double()
        bend = (inverse[:, 2:] - 2 * inverse[:, 1:-1] + inverse[:, :-2]).abs()
        assert (bend < 1e-6).double().mean() > 0.7, "inverse depth is linear inside a plane"
    holes = data.synth.depth_planes(3, holes=0.2, seed=1)[0].depth.isnan().float().mean()
    assert 0.15 < holes < 0.25


def test_moving_shapes_flow_leads_to_the_next_frame():
    for s in data.synth.moving_shapes(8, size=64, frames=5, objects=(1, 1), seed=2):
        video, owner = s.extra["video"], s.extra["owner"]
        assert video.shape == (5, 3, 64, 64)
        assert torch.equal(video[0], s.image)
        y, x = torch.meshgrid(torch.arange(64), torch.arange(64), indexing="ij")
        to_x, to_y = (x + s.flow[0]).round().long(), (y + s.flow[1]).round().long()
        inside = (to_x >= 0) & (to_x < 64) & (to_y >= 0) & (to_y < 64)
        inside &= torch.nn.functional.avg_pool2d((owner[0] > 0).float()[None], 3, 1, 1)[0] == 1  # not on its border
        assert inside.any()
        hit = owner[1][to_y[inside], to_x[inside]] == owner[0][inside]
        assert hit.all()
        assert (s.flow[:, owner[0] == 0] == 0).all()
