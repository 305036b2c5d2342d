"""A detector and what looks at its boxes: the same answers by every link, spans that sum, one bad crop alone."""

import numpy as np
import pytest
import torch
from serve_kit import encode, picture

from lynceus.core.errors import AdviceError
from lynceus.data.decode import read_image
from lynceus.serve.chain import ChainEngine, crop
from lynceus.serve.config import Chain, ServeConfig, Step, read_chain
from lynceus.serve.errors import ModelFailed
from lynceus.tasks.classify import resized

pytestmark = pytest.mark.usefixtures("no_leaks")
COUNTS = [0, 1, 3, 25, 9, 0, 14]


def frames():
    out = []
    for i, n in enumerate(COUNTS):
        frame = picture(80, 100, i)
        frame[0, 0, 0] = n * 10
        out.append(encode(frame, "PNG"))
    return out


def link_of(name, request, tmp_path):
    if name == "redis":
        return request.getfixturevalue("redis_server").url
    return f"file:{tmp_path / 'log'}" if name == "file" else name


@pytest.mark.parametrize("name", ["fused", "memory", "shared", "redis", "file"])
def test_every_link_gives_the_offline_answer(name, toys, classifier, request, tmp_path):
    chain = Chain(
        steps=(Step(model=toys.boxes, name="detect"), Step(model=classifier, name="look", max_batch=8)),
        link=link_of(name, request, tmp_path),
    )
    raws = frames()
    with ChainEngine(chain, ServeConfig(max_batch=4)) as engine:
        answers = [f.result(60) for f in [engine.submit(r) for r in raws]]
        alone = engine.submit(raws[3], model="detect").result(10)
        assert len(alone.result["boxes"]) == 25
        assert engine.submit(raws[3], model="look").result(10).result["label"] >= 0
        stats = engine.stats()
    assert stats["queues"]["on_the_way"] == 0
    for raw, count, answer in zip(raws, COUNTS, answers):
        objects = answer.result["objects"]
        assert len(objects) == count
        image = read_image(raw)
        for o in objects:
            pixels = resized(crop(image, o["box"]), (32, 32))[None]
            with torch.no_grad():
                want = classifier(pixels).softmax(-1)[0]
            assert o["label"] == int(want.argmax())
            assert o["confidence"] == pytest.approx(float(want.max()), abs=1e-5)
        trace = answer.trace
        assert sum(trace.seconds().values()) == pytest.approx(trace.total, rel=0.02)
        for (_, _, end), (_, following, _) in zip(trace.spans, trace.spans[1:]):
            assert end == following
        assert len(trace.children) == (0 if name == "fused" else count)
        if name in ("shared", "redis", "file") and count:
            assert {"publish", "broker_wait", "consume"} <= set(trace.seconds())


def test_crops_of_several_frames_share_batches(toys, classifier):
    sizes = []

    class Spy(torch.nn.Module):
        owns_pixels = True

        def forward(self, image):
            sizes.append(len(image))
            return torch.zeros(len(image), 3)

    frame = picture(80, 100)
    frame[0, 0, 0] = 30  # three objects each
    raw = encode(frame, "PNG")
    chain = Chain(
        steps=(Step(model=toys.boxes, name="detect"), Step(model=Spy().eval(), name="look", size=16, max_batch=12)),
    )
    with ChainEngine(chain, ServeConfig(max_batch=4, max_wait_ms=300.0, eager=False)) as engine:
        for f in [engine.submit(raw) for _ in range(4)]:
            f.result(10)
    assert 12 in sizes


def test_one_bad_crop_is_told_and_the_rest_stays(toys):
    frame = picture(80, 100)
    frame[0, 0, 0] = 20
    frame[:10, :12] = 255  # the first box is white, of which the second model dies
    frame[0, 0, 0] = 20
    frame[0, 0, 1:] = 255
    chain = Chain(steps=(Step(model=toys.boxes, name="detect"), Step(model=picky, name="look", size=8)))
    with ChainEngine(chain, ServeConfig()) as engine:
        first, second = engine.submit(encode(frame, "PNG")).result(10).result["objects"]
        assert "RuntimeError" in first["error"]
        assert second["label"] == 0
        assert engine.submit(encode(frame, "PNG")).result(10)


def picky(image):
    if (image.mean((1, 2, 3)) > 0.95).any():
        raise RuntimeError("white")
    return torch.tensor([[1.0, 0.0]]).repeat(len(image), 1)


def test_a_first_model_without_boxes_is_told(toys):
    chain = Chain(steps=(Step(model=toys.mean, name="a"), Step(model=toys.mean, name="b")))
    with ChainEngine(chain) as engine, pytest.raises(ModelFailed, match="no boxes"):
        engine.submit(encode(picture(20, 20), "PNG")).result(10)


def test_least_and_most_objects(toys, classifier):
    frame = picture(80, 100)
    frame[0, 0, 0] = 200
    chain = Chain(
        steps=(Step(model=toys.boxes, name="detect"), Step(model=classifier, name="look")),
        max_objects=7,
        min_score=0.945,
    )
    with ChainEngine(chain) as engine:
        result = engine.submit(encode(frame, "PNG")).result(20).result
    assert result["found"] == 20
    assert result["count"] == len(result["objects"]) == 6
    assert all(o["score"] >= 0.945 for o in result["objects"])


def test_boxes_of_a_resized_input_come_back_in_pixels_of_the_picture(toys):
    from lynceus.core.types import Prediction

    def whole(image):
        h, w = image.shape[-2:]
        return [Prediction(boxes=torch.tensor([[0.0, 0.0, w / 2, h]]), scores=torch.ones(1)) for _ in image]

    chain = Chain(steps=(Step(model=whole, name="detect", size=32), Step(model=toys.mean, name="look")))
    with ChainEngine(chain) as engine:
        result = engine.submit(encode(picture(40, 100), "PNG")).result(10).result
    assert np.allclose(result["objects"][0]["box"], [0, 0, 50, 40])


def test_a_chain_is_a_yaml_file(tmp_path, toys, saved):
    file = tmp_path / "chain.yaml"
    file.write_text(
        f"name: look\nlink: memory\nmax_objects: 9\nsteps:\n  - model: python:serve_toys:boxes\n"
        f"  - {{model: {saved}, name: digits, max_batch: 4}}\n"
    )
    chain = read_chain(file)
    assert chain.max_objects == 9
    assert chain.steps[1].max_batch == 4
    with ChainEngine(chain) as engine:
        assert engine.registry.names() == ["look", "boxes", "digits"]
        assert len(engine.submit(frames()[2]).result(10).result["objects"]) == 3


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("steps: 3", "list of steps"),
        ("steps: [{model: a}]", "two steps"),
        ("steps: [{modle: a}, {model: b}]", "needs its model"),
        ("steps: [{model: a, siez: 3}, {model: b}]", "size"),
        ("link: kafka\nsteps: [{model: a}, {model: b}]", "link"),
        ("steps: [{model: a, workers: 1}, {model: b}]", "first step"),
        ("steps: [{model: a}, {model: b, workers: 1}]", "shared"),
    ],
)
def test_mistakes_in_the_file_are_answered(tmp_path, text, said):
    file = tmp_path / "chain.yaml"
    file.write_text(text)
    with pytest.raises(AdviceError, match=said):
        read_chain(file)
