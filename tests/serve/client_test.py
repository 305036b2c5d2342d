"""The Python client against a real server: every kind of picture, lists, traces, refusals, a server that is full."""

import io

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("fastapi", reason='pip install "lynceus[serve]"')

from lynceus.core.errors import AdviceError
from lynceus.serve import ServeConfig, serve
from lynceus.serve.client import Client, ServeError, encoded


class Mean(nn.Module):
    """The mean of each channel as logits."""

    owns_pixels = True
    classes = ["red", "green", "blue"]
    image_size = (17, 23)

    def forward(self, image):
        return image.mean((2, 3)) * 10


@pytest.fixture(scope="module")
def server():
    with serve({"mean": Mean(), "other": Mean()}, config=ServeConfig(port=0, api_key="k")) as running:
        yield running


@pytest.fixture
def client(server):
    with Client(server.url, key="k") as made:
        yield made


def green():
    picture = np.zeros((20, 30, 3), np.uint8)
    picture[..., 1] = 255
    return picture


def test_all_kinds_of_pictures_get_the_same_answer(client, tmp_path):
    from PIL import Image

    image = Image.fromarray(green())
    out = io.BytesIO()
    image.save(out, "PNG")
    path = tmp_path / "a.png"
    path.write_bytes(out.getvalue())
    planes = torch.from_numpy(green()).permute(2, 0, 1)
    for picture in (path, str(path), out.getvalue(), image, green(), planes, planes.float() / 255):
        said = client.predict(picture, scores=True)
        assert said["name"] == "green"
        np.testing.assert_allclose(said["scores"], torch.tensor([0.0, 10, 0]).softmax(0), rtol=1e-5)


def test_a_tensor_body_is_bit_exact(client):
    pixels = torch.rand(3, 17, 23, generator=torch.Generator().manual_seed(0))
    said = client.predict(pixels, scores=True)["scores"]
    np.testing.assert_allclose(said, (pixels.mean((1, 2)) * 10).softmax(0), rtol=1e-6)


def test_lists_traces_models_and_settings(client):
    said = client.predict_many([green(), b"no picture", green()])
    assert [s.get("name") for s in said] == ["green", None, "green"]
    assert said[1]["status"] == 415
    one = client.predict(green(), model="other", trace=True)
    spans = {s["name"] for s in one["trace"]["spans"]}
    assert {"decode", "infer"} <= spans
    assert client.trace(one["id"])["id"] == one["id"]
    assert client.trace(one["id"], chrome=True)["traceEvents"]
    assert client.ready()
    assert [m["name"] for m in client.models()] == ["mean", "other"]
    assert client.settings(max_batch=7)["max_batch"] == client.settings()["max_batch"] == 7
    assert client.stats()["answered"] >= 3
    assert "lynceus_span_seconds" in client.metrics()


def test_refusals_are_told(client, server):
    for wrong, status in ((lambda: client.predict(b"nothing"), 415), (lambda: client.predict(green(), model="x"), 404)):
        with pytest.raises(ServeError) as said:
            wrong()
        assert said.value.status == status
    with Client(server.url) as stranger, pytest.raises(ServeError, match="key"):
        stranger.predict(green())
    with pytest.raises(ServeError, match="is the server up"):
        Client("http://127.0.0.1:9", tries=1).predict(green())
    with pytest.raises(AdviceError, match="no picture"):
        encoded(3)
    with pytest.raises(AdviceError, match="no picture at"):
        client.predict("nothing.jpg")


def test_it_asks_again_when_the_server_is_full(monkeypatch):
    told = [(503, {"retry-after": "2"}, b""), (503, {}, b""), (200, {"content-type": "application/json"}, b'{"a": 1}')]
    waits = []
    client = Client("http://127.0.0.1:9")
    monkeypatch.setattr(client, "_once", lambda *_: told.pop(0))
    monkeypatch.setattr("lynceus.serve.client.time.sleep", waits.append)
    assert client.predict(b"x") == {"a": 1}
    assert waits == [2.0, 1.0]
