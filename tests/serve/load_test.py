"""The load generator against servers whose behaviour is known: schedule, omission, mixes, the bend of a curve."""

import asyncio
import json
import re
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lynceus.cli.__main__ import main
from lynceus.core.errors import AdviceError
from lynceus.serve import mixes
from lynceus.serve.knee import Search, knee
from lynceus.serve.load import UNSENT, Load, Request, run
from lynceus.serve.wire import TIMED_OUT

SMALL = [Request(body=b"x" * 100, kind="a"), Request(body=b"y" * 1000, kind="b")]


@contextmanager
def stub(answer):
    """A server on a thread; `answer(number, head, body)` gives the raw answer or an awaitable of it, None: hang up."""
    seen = {"requests": 0, "connections": 0, "heads": []}
    ready, loop = threading.Event(), asyncio.new_event_loop()

    async def handle(reader, writer):
        seen["connections"] += 1
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = int(re.search(rb"content-length: (\d+)", head, re.IGNORECASE)[1])
                body = await reader.readexactly(length)
                number = seen["requests"]
                seen["requests"] += 1
                seen["heads"].append(head)
                said = answer(number, head, body)
                said = await said if asyncio.iscoroutine(said) else said
                if said is None:
                    break
                writer.write(said)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        writer.close()

    async def serving():
        seen["server"] = await asyncio.start_server(handle, "127.0.0.1", 0, limit=2**22)
        seen["port"] = seen["server"].sockets[0].getsockname()[1]
        ready.set()

    loop.create_task(serving())
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    assert ready.wait(5)
    try:
        yield f"http://127.0.0.1:{seen['port']}/predict", seen
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()


def ok(body=b"{}", more=b""):
    return b"HTTP/1.1 200 OK\r\n" + more + b"Content-Length: %d\r\n\r\n" % len(body) + body


def test_a_closed_loop_keeps_its_connections_and_sends_what_it_was_given():
    bodies = set()

    def answer(number, head, body):
        bodies.add(bytes(body))
        return ok(json.dumps({"n": len(body)}).encode())

    with stub(answer) as (url, seen):
        result = run(url, SMALL, Load(concurrency=3, duration=0.4, warmup=0.1), keep=5, header={"X-API-Key": "k"})
    assert seen["connections"] == 3 + 1  # one that looked whether the server is there
    assert bodies == {r.body for r in SMALL}
    assert len(result) > 10
    assert result.count(200) == len(result)
    assert {json.loads(b)["n"] for b in result.bodies} == {100, 1000}
    assert all(b"X-API-Key: k\r\n" in h and h.startswith(b"POST /predict HTTP/1.1") for h in seen["heads"])
    counts = [int((result.kind == i).sum()) for i in range(2)]
    assert abs(counts[0] - counts[1]) <= 4  # each request once before any comes twice
    assert result.due.min() >= 0.1
    assert result.due.max() < 0.5


def test_an_open_loop_is_poisson_and_seeded():
    load = Load(rate=400, duration=0.6, warmup=0.0, seed=3)
    with stub(lambda *_: ok()) as (url, _):
        one, same, other = (run(url, SMALL, load) for load in (load, load, Load(rate=400, duration=0.6, warmup=0.0)))
        even = run(url, SMALL, Load(rate=100, duration=0.3, warmup=0.0, arrivals="uniform"))
    np.testing.assert_array_equal(np.sort(one.due), np.sort(same.due))
    assert len(one) != len(other) or not np.array_equal(np.sort(one.due), np.sort(other.due))
    assert abs(len(one) - 240) < 5 * 240**0.5
    gaps = np.diff(np.sort(one.due))
    assert 0.8 < gaps.std() / gaps.mean() < 1.2  # exponential gaps have their mean as deviation
    np.testing.assert_allclose(np.diff(np.sort(even.due)), 0.01, rtol=1e-6)


def test_a_stall_counts_for_all_that_fell_due_in_it():
    """Coordinated omission: one stall of 0.6 s is one slow request to a naive clock, and dozens in truth."""
    lock = None

    async def answer(number, head, body):
        nonlocal lock
        lock = lock or asyncio.Lock()
        async with lock:  # one request at a time
            if number == 20:
                await asyncio.sleep(0.6)
        return ok()

    load = Load(rate=100, duration=1.5, warmup=0.0, arrivals="uniform", connections=1)
    with stub(answer) as (url, _):
        result = run(url, SMALL, load)
    assert len(result) == result.count(200) == 149
    assert (result.latency() > 0.1).sum() >= 45  # due in the first half second of the stall
    assert (result.latency(corrected=False) > 0.1).sum() < 10
    assert result.lag > 0.05
    assert "after they were due" in " ".join(result.report().notes)


def test_unanswered_requests_count_with_the_time_they_waited():
    async def answer(number, head, body):
        await asyncio.sleep(30)

    load = Load(rate=20, duration=0.5, warmup=0.0, arrivals="uniform", timeout=0.4, connections=2)
    with stub(answer) as (url, _):
        result = run(url, SMALL, load)
    assert result.count(TIMED_OUT) >= 2
    assert result.count(TIMED_OUT, UNSENT) == len(result) == 10
    assert result.throughput == 0
    assert result.percentile(50)[0] >= 0.35
    assert len(result.latency(corrected=False)) == 0
    assert "unanswered in time" in result.report().notes[0]


def test_rejections_are_counted_apart():
    def answer(number, head, body):
        return b"HTTP/1.1 503 Busy\r\nRetry-After: 1\r\nContent-Length: 0\r\n\r\n" if number % 2 else ok()

    with stub(answer) as (url, _):
        result = run(url, SMALL, Load(concurrency=1, duration=0.3, warmup=0.0))
    said = result.summary()
    assert abs(said["rejected"] - result.count(200)) <= 1
    assert said["failed"] == 0
    assert len(result.latency()) == result.count(200)


@pytest.mark.parametrize(
    "raw",
    [
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n2;x=y\r\nde\r\n0\r\n\r\n",
        b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nabcde",
    ],
    ids=["chunked", "continue"],
)
def test_it_reads_the_forms_of_http(raw):
    with stub(lambda *_: raw) as (url, seen):
        result = run(url, SMALL, Load(concurrency=1, duration=0.2, warmup=0.0), keep=3)
    assert set(result.bodies) == {b"abcde"}
    assert seen["connections"] == 1 + 1


def test_a_server_that_closes_after_each_answer_is_met_with_new_connections():
    with stub(lambda *_: ok(more=b"Connection: close\r\n")) as (url, seen):
        result = run(url, SMALL, Load(concurrency=2, duration=0.3, warmup=0.0))
    assert result.count(200) == len(result) > 2
    assert seen["connections"] >= len(result)


def test_a_lost_connection_is_a_failure_and_the_run_goes_on():
    with stub(lambda number, *_: None if number % 5 == 4 else ok()) as (url, _):
        result = run(url, SMALL, Load(rate=100, duration=0.5, warmup=0.0, arrivals="uniform"))
    assert result.count(200) >= 0.7 * len(result)


def test_processes_share_the_load():
    with stub(lambda *_: ok()) as (url, seen):
        closed = run(url, SMALL, Load(concurrency=3, duration=0.3, warmup=0.0, processes=2))
        assert seen["connections"] == 3 + 1
        opened = run(url, SMALL, Load(rate=200, duration=1.0, warmup=0.0, processes=2))
    assert closed.count(200) == len(closed)
    assert abs(len(opened) - 200) < 5 * 200**0.5


INTERRUPTED = """
import atexit, signal, sys
if "lynceus.serve.load" in sys.orig_argv:
    signal.signal(signal.SIGALRM, lambda *_: None)
    signal.setitimer(signal.ITIMER_REAL, 0.0005, 0.0005)
    atexit.register(signal.setitimer, signal.ITIMER_REAL, 0)
"""


def test_kept_answers_come_whole_from_an_unbuffered_process(monkeypatch, tmp_path):
    # as in containers: stdout is then a raw file, of which a signal cuts a write short
    (tmp_path / "sitecustomize.py").write_text(INTERRUPTED)
    monkeypatch.setenv("PYTHONUNBUFFERED", "1")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    body = json.dumps(list(range(30_000))).encode()
    with stub(lambda *_: ok(body)) as (url, _):
        result = run(url, SMALL, Load(concurrency=1, duration=0.5, warmup=0.0), keep=40)
    assert len(result.bodies) > 1
    assert set(result.bodies) == {body}


def test_load_processes_end_with_the_one_that_started_them():
    code = "import sys\nfrom lynceus.serve.load import *\n"
    code += "run(sys.argv[1], [Request(body=b'x')], Load(concurrency=1, duration=60))"
    with stub(lambda *_: ok()) as (url, seen):
        parent = subprocess.Popen([sys.executable, "-c", code, url])
        while seen["requests"] < 3:
            assert parent.poll() is None
            time.sleep(0.01)
        (child,) = Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text().split()
        parent.kill()
        parent.wait()
        limit = time.monotonic() + 10
        while (left := Path(f"/proc/{child}/stat")).exists() and left.read_text().rpartition(")")[2].split()[0] != "Z":
            assert time.monotonic() < limit
            time.sleep(0.01)


def test_what_is_wrong_is_said_before_anything_is_sent():
    for load in (
        Load(),
        Load(rate=1, concurrency=1),
        Load(rate=-1),
        Load(concurrency=0),
        Load(rate=1, duration=0),
        Load(rate=1, processes=0),
    ):
        with pytest.raises(AdviceError):
            run("http://127.0.0.1:9", SMALL, load)
    with pytest.raises(AdviceError, match="http://HOST"):
        run("https://127.0.0.1:9", SMALL, Load(concurrency=1))
    for url in ("http://127.0.0.1:99999", "http://[::1", "http://127.0.0.1:x"):
        with pytest.raises(AdviceError, match="http://HOST"):
            run(url, SMALL, Load(concurrency=1))
    with pytest.raises(AdviceError, match="at least one request"):
        run("http://127.0.0.1:9", [], Load(concurrency=1))
    with pytest.raises(AdviceError, match="Nothing answers"):
        run("http://127.0.0.1:9", SMALL, Load(concurrency=1, duration=0.2, warmup=0.0))


@given(
    corner=st.integers(2, 8),
    after=st.integers(2, 8),
    top=st.floats(1.0, 1e4),
    noise=st.lists(st.floats(-0.01, 0.01), min_size=20, max_size=20),
)
@settings(deadline=None, max_examples=200)
def test_the_bend_of_a_saturating_curve_is_its_corner(corner, after, top, noise):
    clients = [2.0**i for i in range(corner + after)]
    curve = [min(c / clients[corner - 1], 1.0) * top * (1 + e) for c, e in zip(clients, noise)]
    assert knee(clients, curve) == corner - 1


def test_the_bend_of_curves_without_one():
    assert knee([1], [5]) == 0
    assert knee([1, 2, 4], [5, 5, 5]) == 0
    assert knee([1, 2, 4, 8], [1, 2, 4, 8]) == 3
    with pytest.raises(AdviceError):
        knee([2, 1], [1, 2])
    with pytest.raises(AdviceError):
        knee([1, 2], [1])


def test_the_search_finds_the_clients_of_a_server_with_four_places():
    """Four places of 20 ms each: four clients fill them, more only wait, and above their rate nothing is sustained."""
    places = None

    async def answer(number, head, body):
        nonlocal places
        places = places or asyncio.Semaphore(4)
        async with places:
            await asyncio.sleep(0.02)
        return ok()

    with stub(answer) as (url, _):
        found = Search(seconds=0.4, rates=(0.5, 2.0), timeout=5)(url, SMALL)
    assert found.clients == 4
    assert found.sustained == pytest.approx(0.5 * found.top)
    report = found.report()
    assert report.summary["knee_clients"] == 4
    assert [r["held"] for r in report.rows if r["loop"] == "open"] == ["True", "False"]
    assert "<html" in report.html()


def test_mixes_have_their_shares_and_sizes(imagenet_jpegs):
    from io import BytesIO

    from PIL import Image

    source = [p.read_bytes() for p in imagenet_jpegs[:3]]
    made = mixes.requests({"small": 0.25, "medium": 0.75}, sources=source, count=40)
    assert [sum(r.kind == k for r in made) for k in ("small", "medium")] == [10, 30]
    assert Image.open(BytesIO(made[0].body)).size == (70, 60)
    assert {r.body for r in made if r.kind == "medium"} == set(source)
    large = mixes.photo("large", source=source[0])
    assert Image.open(BytesIO(large)).size == (3564, 2880)
    assert len(large) > 500_000
    assert mixes.photo("small", seed=1) == mixes.photo("small", seed=1) != mixes.photo("small", seed=2)


def test_mixes_say_what_is_wrong():
    assert mixes.parse_mix("small=0.2, large") == {"small": 0.2, "large": 1.0}
    with pytest.raises(AdviceError, match="Did you mean 'medium'"):
        mixes.parse_mix("medum=1")
    with pytest.raises(AdviceError, match="no share"):
        mixes.parse_mix("small=a")
    with pytest.raises(AdviceError, match="share"):
        mixes.requests({"small": -1})
    with pytest.raises(AdviceError, match="no folder"):
        mixes.photos("no/such/folder")


def test_the_verb(tmp_path, capsys):
    with stub(lambda *_: ok()) as (url, seen):
        code = main(
            f"load {url.removesuffix('/predict')} --concurrency 2 --seconds 0.3 --warmup 0 --mix small --key k "
            f"--out {tmp_path}".split()
        )
    assert code == 0
    said = capsys.readouterr().out
    assert "throughput_per_s" in said
    assert "p99_ms" in said
    assert (tmp_path / "report.html").is_file()
    assert seen["heads"][0].startswith(b"POST /predict ")
    assert main(["load", "http://127.0.0.1:9", "--rate", "1", "--concurrency", "1"]) == 2
    assert main(["load", "http://127.0.0.1:9", "--knee", "--rate", "1"]) == 2
    assert main(["load", "http://127.0.0.1:9", "--seconds", "0.1", "--warmup", "0", "--mix", "small"]) == 2
    assert "Nothing answers" in capsys.readouterr().err
