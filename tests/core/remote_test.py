"""A model over HTTP: the same answers, and every way in which a service can be wrong is one clear error."""

import io
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
from PIL import Image

from lynceus.core.errors import AdviceError
from lynceus.core.guard import examine
from lynceus.core.remote import Remote, served

WRONG = {
    "/broken": (500, b"out of memory"),
    "/text": (200, b"<html>hello</html>"),
    "/keys": (200, b'{"label": "cat"}'),
    "/one": (200, b"[0.3]"),
    "/words": (200, b'["a", "b"]'),
    "/nan": (200, b"[NaN, 1.0]"),
    "/large": (200, b"[" + b"1," * 3_000_000 + b"1]"),
}


def model(x):
    return np.stack([x.mean((0, 1))[0], x[:4].mean(), x[:, :3].mean()]) * 4


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path == "/slow":
            time.sleep(3)
        status, out = WRONG.get(self.path, (200, b""))
        if not out:
            logits = model(np.asarray(Image.open(io.BytesIO(body)).convert("RGB"), dtype=np.float64) / 255)
            if self.path == "/list":
                value = [logits.tolist()]
            elif self.path == "/probabilities":
                value = {"probabilities": (np.exp(logits) / np.exp(logits).sum()).tolist()}
            elif self.path == "/ragged":
                value = [0.0] * (2 + body[-20] % 2 + len(body) % 3)
            else:
                value = {"logits": logits.tolist()}
            out = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(out)))
        self.end_headers()
        self.wfile.write(out)

    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def address():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.handle_error = lambda request, client: None  # those who hang up are part of the tests
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def images():
    return (torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 255).round() / 255


def expected(images):
    return torch.stack([torch.from_numpy(model(x.permute(1, 2, 0).double().numpy())) for x in images]).float()


@pytest.mark.parametrize("path", ["/predict", "/list"])
def test_its_answers_are_the_models_in_order(address, images, path):
    subject = served(address + path, classes=["a", "b", "c"])
    torch.testing.assert_close(subject(images), expected(images), atol=1e-5, rtol=1e-5)
    assert examine(subject, images) == []
    with pytest.raises(AdviceError, match="gradients"):
        subject.require(frozenset({"gradients"}))


def test_probabilities_become_logits(address, images):
    for given in (None, True):
        subject = served(address + "/probabilities", probabilities=given)
        torch.testing.assert_close(subject(images), expected(images).log_softmax(1), atol=1e-5, rtol=1e-5)
    assert examine(subject, images) == []


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("/broken", "status 500.*out of memory"),
        ("/text", "no JSON"),
        ("/keys", "keys.*label"),
        ("/one", "at least two numbers"),
        ("/words", "no row"),
        ("/nan", "not finite"),
        ("/large", "more than 4 MB"),
    ],
)
def test_what_is_wrong_is_said_with_the_address(address, images, path, words):
    with pytest.raises(AdviceError, match=words) as caught:
        served(address + path)(images)
    assert address in str(caught.value)


def test_a_service_that_is_slow_or_not_there(address, images):
    with pytest.raises(AdviceError, match=r"within 0.3 seconds"):
        served(address + "/slow", timeout=0.3)(images)
    with pytest.raises(AdviceError, match="Is the service running"):
        served("http://127.0.0.1:9/predict", timeout=2)(images)
    with pytest.raises(AdviceError, match="no address"):
        Remote("localhost:8000/predict")
