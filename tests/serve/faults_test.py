"""What goes wrong outside and inside, with counts: malformed requests, slow and vanishing clients, overload, kills."""

import collections
import contextlib
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest
import requests
from serve_kit import encode, picture, png_bomb

from lynceus.data.decode import read_image
from lynceus.serve import ServeConfig, serve
from lynceus.serve.decode import decode
from lynceus.train.predict import predict

JPEG = encode(picture(60, 80, 5), quality=90)


# raw requests ---------------------------------------------------------------------------------------
def exchange(server, data, *, close=False, wait=20.0):
    """(status or 0 when closed without an answer) of bytes sent as they are."""
    with socket.create_connection(("127.0.0.1", server.port), wait) as s:
        with contextlib.suppress(OSError):  # the server may have answered and closed already
            s.sendall(data)
            if close:
                s.shutdown(socket.SHUT_WR)
        answer = b""
        with contextlib.suppress(OSError):
            while b"\r\n" not in answer:
                more = s.recv(4096)
                if not more:
                    break
                answer += more
    return int(answer.split(b" ", 2)[1]) if answer.startswith(b"HTTP/1.1 ") else 0


def request(body, path="/predict", kind="image/jpeg", length=None, more=""):
    head = f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: {kind}\r\n{more}"
    head += f"content-length: {len(body) if length is None else length}\r\nconnection: close\r\n\r\n"
    return head.encode("latin-1") + body


def flipped(r):
    bad = bytearray(JPEG)
    for _ in range(int(r.integers(1, 12))):
        bad[int(r.integers(2, len(bad)))] ^= 1 << int(r.integers(8))
    return bytes(bad)


TRICKS = (
    "..%2f..%2fetc%2fpasswd",
    "%2e%2e",
    "a%00b",
    "..\\..\\x",
    "x" * 190,
    "'; drop table",
    "%ff%fe",
    "{name}",
    "@",
    "@1",
    "a@b@c",
)
KINDS = (
    "text/html",
    "video/mp4",
    "application/xml",
    "application/pickle",
    "a" * 500,
    "/",
    "multipart/mixed; boundary=x",
)


def malformed(i, r):
    """(name, bytes, statuses that are right, what was sent as a picture)."""
    which = i % 12
    if which in (0, 1, 2):
        return "truncated", request(JPEG[: int(r.integers(1, len(JPEG) - 2))]), (415, 422), None
    if which in (3, 4, 5):
        bad = flipped(r)
        return "flipped", request(bad), (200, 413, 415, 422), bad
    if which == 6:
        h, w = (int(v) for v in r.integers(20_000, 2**31 - 1, 2))
        return "bomb", request(png_bomb(h, w)[:5000], kind="image/png"), (413, 422), None
    if which == 7:
        return "content type", request(JPEG, kind=KINDS[i // 12 % len(KINDS)]), (400, 415), None
    if which == 8:
        sizes = ("999999999999", "-5", "1e9", "0x10", "9" * 40, "")
        return "size", request(JPEG[:10], length=sizes[i // 12 % len(sizes)]), (400, 413), None
    if which == 9:
        path = f"/models/{TRICKS[i // 12 % len(TRICKS)]}/predict"
        return "path", request(JPEG, path=path), (400, 404), None
    if which == 10:
        bodies = (b'{"image": "', b"[]" * 50, b"\xff\xfe", b'{"images": ["aGVsbG8="]}' * 2, b'{"image": "@@"}')
        return "json", request(bodies[i // 12 % len(bodies)], kind="application/json"), (400,), None
    garbage = (r.bytes(200), b"GET\r\n\r\n", b"POST /predict HTTP/9.9\r\n\r\n", b"\r\n" * 300 + b"x y z\r\n\r\n",
               b"GET / HTTP/1.1\r\n" + b"a: " + b"b" * 40000 + b"\r\n\r\n", request(JPEG[:50], length=400))  # fmt: skip
    return "garbage", garbage[i // 12 % len(garbage)], (0, 400, 405, 408, 431), None


def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


@pytest.mark.parametrize("count", [480, pytest.param(10_000, marks=pytest.mark.slow)])
def test_malformed_requests_get_4xx_and_cost_nothing(classifier, count):
    config = ServeConfig(port=0, max_pixels_mp=4.0, header_timeout_s=1.0, body_timeout_s=1.0)
    with serve(classifier, config=config) as server:
        good = requests.post(server.url + "/predict", data=JPEG).json()
        seen = collections.Counter()

        def one(i):
            r = np.random.default_rng(i)
            name, data, right, sent = malformed(i, r)
            status = exchange(server, data, close=name == "garbage")
            assert status in right, (name, status, data[:300])
            if status == 200:  # the damage cannot be seen in the file: then the answer is the offline one
                assert decode(sent, max_pixels=4e6).equal(read_image(sent))
            seen[name, status] += 1

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(one, range(120)))
            memory, handles = resident(), len(os.listdir("/proc/self/fd"))
            list(pool.map(one, range(120, count)))
        time.sleep(0.3)
        assert sum(seen.values()) == count
        assert not [s for _, s in seen if s >= 500]
        assert sum(n for (name, s), n in seen.items() if s == 200) < 0.1 * count
        assert len(os.listdir("/proc/self/fd")) <= handles + 8
        assert resident() < memory + 60
        stats = requests.get(server.url + "/stats").json()
        assert stats["queues"]["on_the_way"] == 0
        assert stats["buffered_bytes"] == 0
        assert requests.post(server.url + "/predict", data=JPEG).json()["label"] == good["label"]
        print(sorted(seen.items()))


def test_slow_and_half_closed_clients_are_let_go(classifier):
    config = ServeConfig(port=0, header_timeout_s=0.5, body_timeout_s=0.5, connections=60)
    with serve(classifier, config=config) as server:
        handles = len(os.listdir("/proc/self/fd"))
        parts = {
            "nothing": b"",
            "half a head": b"POST /predict HTTP/1.1\r\nhost: x\r\n",
            "half a body": request(JPEG)[:-100],
            "no body": request(b"", length=1000),
        }
        opened = []
        for data in parts.values():
            for _ in range(8):
                s = socket.create_connection(("127.0.0.1", server.port), 10)
                s.sendall(data)
                opened.append(s)
        for _ in range(8):
            assert exchange(server, request(JPEG)[:-100], close=True) in (0, 408)  # half-closed
        assert requests.post(server.url + "/predict", data=JPEG).status_code == 200  # others are served meanwhile
        answers = [s.recv(4096) for s in opened]  # every one is ended by the server
        assert all(a == b"" or b" 408 " in a for a in answers)
        for s in opened:
            s.close()
        # a head that trickles in, byte by byte, has the same time in all
        with socket.create_connection(("127.0.0.1", server.port), 10) as s:
            begun = time.monotonic()
            with contextlib.suppress(OSError):
                for byte in request(JPEG)[:200]:
                    s.sendall(bytes([byte]))
                    time.sleep(0.05)
            assert time.monotonic() - begun < 5
        # more connections than are allowed
        opened = [socket.create_connection(("127.0.0.1", server.port), 10) for _ in range(60)]
        time.sleep(0.1)
        assert exchange(server, request(JPEG)) in (503, 0)
        for s in opened:
            s.close()
        time.sleep(0.2)
        assert requests.post(server.url + "/predict", data=JPEG).status_code == 200
        assert len(os.listdir("/proc/self/fd")) <= handles + 6
        assert requests.get(server.url + "/stats").json()["buffered_bytes"] == 0


def test_a_client_that_goes_frees_its_place(toys):
    raw = encode(picture(8, 8), "PNG")
    with serve({"slow": toys.slow}, config=ServeConfig(port=0, max_batch=1, queue=8)) as server:
        for _ in range(8):
            s = socket.create_connection(("127.0.0.1", server.port))
            s.sendall(request(raw, kind="image/png"))
            time.sleep(0.01)
            s.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            s.close()  # gone, hard
        time.sleep(0.35)
        begun = time.monotonic()
        assert requests.post(server.url + "/predict", data=raw).status_code == 200
        assert time.monotonic() - begun < 0.7  # eight of 0.1 s each were not done for nobody
        assert requests.get(server.url + "/stats").json()["refused"]["cancelled"] >= 5


def test_ten_times_too_much_is_503_and_bounded(toys):
    """Forty pictures a second can be answered; four hundred are asked for."""
    raw = encode(picture(8, 8), "PNG")
    config = ServeConfig(port=0, max_batch=4, max_wait_ms=20, queue=16)
    with serve({"slow": toys.slow}, config=config) as server:
        rows, lock = [], threading.Lock()
        begun = time.monotonic() + 0.2

        def one(i):
            time.sleep(max(0.0, begun + i / 400 - time.monotonic()))
            start = time.monotonic()
            got = requests.post(server.url + "/predict", data=raw, timeout=20)
            with lock:
                rows.append((got.status_code, time.monotonic() - start, got.headers.get("retry-after")))

        with ThreadPoolExecutor(64) as pool:
            list(pool.map(one, range(800)))
        taken = [t for s, t, _ in rows if s == 200]
        refused = [(t, after) for s, t, after in rows if s == 503]
        assert len(taken) + len(refused) == 800
        assert 40 <= len(taken) <= 240
        assert all(after and int(after) >= 1 for _, after in refused)
        assert max(taken) < 3.0  # 16 on the way, four at once, 0.1 s each: 0.5 s, and what the test itself takes
        assert requests.post(server.url + "/predict", data=raw).status_code == 200
        assert requests.get(server.url + "/stats").json()["refused"]["overloaded"] == len(refused)


# processes ------------------------------------------------------------------------------------------
def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def workers_of(server):
    return requests.get(server.url + "/stats").json()["workers"]


@pytest.mark.slow
def test_shared_memory_workers_answer_as_offline_and_survive_a_poisoned_picture(saved, classifier, files, toys):
    models = (f"digits={saved}", "bad=python:serve_toys:delicate")
    config = ServeConfig(models=models, port=0, workers=2, attempts=2, max_batch=4, deadline_s=120.0)
    red = np.zeros((16, 16, 3), np.uint8)
    red[..., 0] = 255
    poison = encode(red, "PNG")
    with serve(config=config) as server:
        found = predict(classifier, files, quiet=True)
        with ThreadPoolExecutor(8) as pool:
            rows = list(pool.map(lambda f: requests.post(server.url + "/predict", data=f.read_bytes()).json(), files))
            assert max(abs(np.array(r["scores"]) - p.scores.numpy()).max() for r, p in zip(rows, found)) < 1e-5
            bad = pool.submit(requests.post, server.url + "/models/bad/predict", data=poison)
            rest = list(pool.map(lambda f: requests.post(server.url + "/predict", data=f.read_bytes()), files))
            assert [r.status_code for r in rest] == [200] * len(files)  # unharmed
            assert bad.result().status_code == 500
            assert bad.result().json()["kind"] == "worker_lost"
        stats = requests.get(server.url + "/stats").json()
        assert stats["workers_restarted"] == 2
        assert stats["answered"] == 2 * len(files)
        trace = requests.post(server.url + "/predict?trace=1", data=JPEG).json()["trace"]
        assert sum(s["ms"] for s in trace["spans"]) == pytest.approx(trace["total_ms"], rel=0.02)
        assert [s["name"] for s in trace["spans"]].count("broker_wait") == 2
        while not all(w["ready"] for w in workers_of(server)):
            time.sleep(0.05)
        pids = [w["pid"] for w in workers_of(server)]
        assert requests.post(server.url + "/models/digits/reload").status_code == 200
        assert requests.patch(server.url + "/settings", json={"workers": 0}).status_code == 400
        assert requests.patch(server.url + "/settings", json={"workers": 1, "max_batch": 2}).status_code == 200
        rows = [requests.post(server.url + "/predict", data=f.read_bytes()).json() for f in files[:10]]
        assert [r["label"] for r in rows] == [p.label for p in found[:10]]
        assert [w["pid"] for w in workers_of(server)] == pids[:1]
    assert not any(map(alive, pids))


def test_kills_of_workers_and_of_redis_lose_no_accepted_job(saved, classifier, files, redis_server):
    config = ServeConfig(
        models=(f"digits={saved}",), port=0, workers=2, max_batch=2, broker=redis_server.url, deadline_s=120.0
    )
    found = predict(classifier, files, quiet=True)
    count = 240
    with serve(config=config) as server:
        answers, lock = [], threading.Lock()
        session = threading.local()

        def one(i):
            if not hasattr(session, "s"):
                session.s = requests.Session()
            time.sleep(0.03)
            got = session.s.post(server.url + "/predict", data=files[i % len(files)].read_bytes(), timeout=120)
            with lock:
                answers.append((i, got.status_code, got.json().get("label"), got.text[:100]))

        with ThreadPoolExecutor(8) as pool:
            jobs = [pool.submit(one, i) for i in range(count)]
            while len(answers) < 40:
                time.sleep(0.01)
            os.kill(workers_of(server)[0]["pid"], signal.SIGKILL)
            while len(answers) < 100:
                time.sleep(0.01)
            redis_server.kill()
            time.sleep(0.5)
            redis_server.start()
            for job in jobs:
                job.result()
        assert len(answers) == count  # each once
        assert sorted(i for i, *_ in answers) == list(range(count))
        assert [a for a in answers if a[1] != 200] == []
        assert all(label == found[i % len(files)].label for i, _, label, _ in answers)
        stats = requests.get(server.url + "/stats").json()
        assert stats["answered"] == count
        assert stats["workers_restarted"] == 1
        assert stats["queues"]["on_the_way"] == 0
        print({k: stats[k] for k in ("redelivered", "duplicates")})


COMMAND = [sys.executable, "-m", "lynceus.cli.__main__", "serve", "--port", "0"]


@contextlib.contextmanager
def started(args, folder):
    """A server as its own process, as the command line starts it."""
    process = subprocess.Popen([*COMMAND, *args], stdout=subprocess.PIPE, text=True, cwd=folder)
    try:
        line = process.stdout.readline()
        process.url = next(word for word in line.split() if word.startswith("http://"))
        process.port = urlsplit(process.url).port
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def test_sigterm_answers_what_is_there_and_ends(toys_folder):
    raw = encode(picture(8, 8), "PNG")
    with started(["slow=python:serve_toys:slow", "--max-batch", "1"], toys_folder) as server:
        requests.post(server.url + "/predict", data=raw)
        with ThreadPoolExecutor(10) as pool:
            jobs = [pool.submit(requests.post, server.url + "/predict", data=raw) for _ in range(10)]
            time.sleep(0.25)
            server.send_signal(signal.SIGTERM)
            time.sleep(0.1)
            with contextlib.suppress(requests.ConnectionError):
                assert requests.post(server.url + "/predict", data=raw).status_code == 503
            assert [j.result().status_code for j in jobs] == [200] * 10
        assert server.wait(10) == 0


def test_ctrl_c_while_a_worker_loads_is_one_line(saved, tmp_path):
    command = [*COMMAND, f"m={saved}", "--workers", "1"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=tmp_path, start_new_session=True)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    while not children.read_text().split():
        assert process.poll() is None
        time.sleep(0.01)
    (worker,) = map(int, children.read_text().split())
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 130
    assert said == "lynceus serve: stopped before it served.\n"
    assert not alive(worker)


def test_workers_answer_as_offline_and_do_not_outlive_their_parent(saved, classifier, files, tmp_path):
    with started([f"m={saved}", "--workers", "1"], tmp_path) as server:
        found = predict(classifier, files[:10], quiet=True)
        rows = [requests.post(server.url + "/predict", data=f.read_bytes()).json() for f in files[:10]]
        assert max(abs(np.array(r["scores"]) - p.scores.numpy()).max() for r, p in zip(rows, found)) < 1e-5
        pids = [w["pid"] for w in workers_of(server)]
        assert all(map(alive, pids))
        server.kill()  # the parent has no chance to say anything
        limit = time.monotonic() + 10
        while any(map(alive, pids)) and time.monotonic() < limit:
            time.sleep(0.02)
        assert not any(map(alive, pids))
