"""The profile of a server: spans sum to the time, shares, the queueing estimate, the chain of two models."""

import io
import math
import re
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

pytest.importorskip("fastapi", reason='pip install "lynceus[serve]"')

from lynceus.cli.__main__ import main
from lynceus.core.errors import AdviceError
from lynceus.core.nouns import Check
from lynceus.core.subject import Subject
from lynceus.core.types import Sample
from lynceus.serve import mixes
from lynceus.serve.capacity import Capacity, at_once, erlang_c
from lynceus.serve.chain_curve import GRID, ChainCurve, frame, squares
from lynceus.serve.config import ServeConfig
from lynceus.serve.engine import cores
from lynceus.serve.profile import PARTS, Profile, jpegs, tensors


class Colour(nn.Module):
    owns_pixels = True
    image_size = 64

    def forward(self, image):
        return image.mean((2, 3))


def data(count=3):
    images = torch.randint(0, 256, (count, 3, 40, 50), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return [Sample(image=image) for image in images]


def test_it_is_a_check_and_breaks_a_lone_request_down():
    profile = Profile(sizes=("small", "large"), parts=("alone",), seconds=0.5, pictures=1)
    assert isinstance(profile, Check)
    report = profile(Subject(Colour(), size=64), data())
    small, large = report.rows
    for row in (small, large):
        assert row["spans_over_end_to_end"] == pytest.approx(1, abs=0.02)
        parts = sum(v for k, v in row.items() if k.endswith("_ms") and k not in ("end_to_end_ms", "client_ms"))
        assert parts == pytest.approx(row["end_to_end_ms"], rel=0.02)
        assert row["client_ms"] >= row["end_to_end_ms"]
        assert row["requests"] >= 1
    assert large["preprocessing"] > 0.85  # of a picture of 10 million pixels, before a model that does nothing
    assert large["preprocessing"] > small["preprocessing"]
    assert report.summary["preprocessing share, large"] == large["preprocessing"]
    beside = report.parts[0]
    assert [r["paper"] for r in beside.rows] == ["not known", "about 0.97"]
    assert "timeline_of_a_lone_request.plotly" in report.figures
    assert "barmode" in report.html()


def test_all_parts(tmp_path):
    parts = tuple(p for p in PARTS if p not in ("tuning", "tasks"))
    report = Profile(
        sizes=("small",), clients=(1, 4), crowd=4, seconds=0.3, pictures=2, rates=(0.5,), parts=parts
    ).measure({"colour": Colour()})
    found = {p.name.split(",")[0].split(":")[0]: p for p in report.parts}
    clients = found["Throughput against clients"]
    assert [r["clients"] for r in clients.rows] == [1.0, 4.0]
    assert all(0 <= r["queueing"] <= 1 and r["rejected"] == 0 for r in clients.rows)
    assert all(r["p50_ms"] <= r["p95_ms"] <= r["p99_ms"] for r in clients.rows)
    places = found["Where pictures are brought to size"].rows
    assert [r["preprocessing"] for r in places] == [
        "by the client",
        "picture by picture",
        "batch by batch",
        "by the device",
    ]
    assert places[0]["impact"] == 0
    capacity = found["Capacity"]
    said = capacity.summary
    before = 2 * said["top_per_s"] / (1 + said["top_per_s, after over before"])
    assert capacity.rows[0]["offered_per_s"] == pytest.approx(0.5 * before)
    assert said["places"] == at_once(said["top_per_s"], said["alone_ms"] / 1e3, most=cores())
    assert capacity.rows[0]["estimated mean_ms"] >= capacity.summary["alone_ms"]
    assert report.save(tmp_path).is_file()


@pytest.mark.slow
def test_tuning_step_by_step():
    report = Profile(sizes=("medium",), parts=("tuning",), crowd=4, seconds=0.5).measure("resnet_nano")
    rows = report.parts[0].rows
    assert rows[0]["times, medium"] == 1
    assert [r["step"] for r in rows][-1] == "worker processes instead"
    assert all(r["throughput_per_s, medium"] > 0 for r in rows)


@pytest.mark.slow
def test_the_four_tasks_weigh_their_answers():
    report = Profile(sizes=("small",), parts=("tasks",), seconds=1.0, pictures=2).measure({"colour": Colour()})
    rows = {r["task"]: r for r in report.parts[0].rows}
    assert set(rows) == {"classification", "segmentation", "detection", "depth"}
    assert all(0 < r["preprocessing"] + r["inference"] + r["answer"] <= 1 for r in rows.values())
    assert rows["depth"]["answer_kb"] > 50 > 5 > rows["classification"]["answer_kb"]  # 50,000 numbers beside one


def test_wrong_options_are_said_before_anything_starts():
    for wrong in (
        Profile(parts=("alone", "other")),
        Profile(sizes=()),
        Profile(seconds=0),
        Profile(clients=(0,)),
    ):
        with pytest.raises(AdviceError):
            wrong.measure({"colour": Colour()})
    with pytest.raises(AdviceError, match="Did you mean 'shared'"):
        ChainCurve(links=("shard",))()
    assert main(["profile"]) == 2


def test_sources_are_files_as_they_lie(tmp_path):
    path = tmp_path / "a.jpg"
    path.write_bytes(mixes.photo("small"))
    made = jpegs([Sample(image=torch.zeros(3, 60, 70, dtype=torch.uint8), path=str(path)), *data(2)], 2)
    assert len(made) == 2
    assert made[0] == path.read_bytes()
    from lynceus.serve.decode import decode

    ready = tensors(mixes.given(made), (16, 24))
    assert [tuple(decode(r.body).shape) for r in ready] == [(3, 16, 24)] * 2


# the estimate -----------------------------------------------------------------------------------------
def test_erlang_c_has_its_textbook_values():
    assert erlang_c(1, 0.7) == pytest.approx(0.7)  # M/M/1
    assert erlang_c(2, 1.0) == pytest.approx(1 / 3)
    assert erlang_c(10, 8.0) == pytest.approx(0.409, abs=5e-4)  # tables of Erlang's C
    assert erlang_c(3, 0) == 0
    for wrong in ((0, 0.0), (2, 2.0), (2, -1.0)):
        with pytest.raises(AdviceError):
            erlang_c(*wrong)


@given(places=st.integers(1, 16), load=st.floats(0.05, 0.95), spread=st.sampled_from([0.0, 1.0]))
@settings(deadline=None, max_examples=6)
def test_the_estimate_agrees_with_a_simulated_queue(places, load, spread):
    random = np.random.default_rng(0)
    count, top = 120_000, 100.0
    work = places / top * (random.exponential(size=count) if spread else np.ones(count))
    arrivals = np.cumsum(random.exponential(1 / (load * top), count))
    import heapq

    free = [0.0] * places
    waited = np.empty(count)
    for i, (at, takes) in enumerate(zip(arrivals.tolist(), work.tolist())):
        begin = max(at, heapq.heappop(free))
        waited[i] = begin - at
        heapq.heappush(free, begin + takes)
    estimate = Capacity(top=top, alone=places / top, places=places, spread=spread)
    found = waited[count // 10 :].mean()
    assert estimate.waiting(load * top) == pytest.approx(found, rel=0.25, abs=0.02 * places / top)


def test_places_are_what_is_worked_on_at_once_not_cores():
    for places in (1, 2, 4):
        assert at_once(100.0, places / 100, most=4) == places
    assert at_once(68.0, 0.0164, most=4) == 1  # one thread runs the model, whatever the cores
    assert at_once(10.0, 0.001, most=4) == 1
    assert at_once(1000.0, 0.1, most=4) == 4


def test_the_estimate_plans_machines():
    estimate = Capacity(top=100.0, alone=0.04, places=4)
    rate = estimate.rate_for(0.2)
    assert estimate.percentile(rate, 99) == pytest.approx(0.2, rel=1e-3)
    assert estimate.machines(3.5 * rate, 0.2) == 4
    assert estimate.waiting(100.0) == math.inf
    assert estimate.percentile(0, 99) == 0.04
    assert estimate.latency(1e-9) == pytest.approx(0.04)
    with pytest.raises(AdviceError, match="no number of machines"):
        estimate.machines(10, 0.01)


# the chain --------------------------------------------------------------------------------------------
@given(st.integers(0, GRID * GRID), st.integers(0, 3))
@settings(deadline=None, max_examples=30)
def test_the_detector_finds_the_objects_of_a_generated_frame(objects, seed):
    from PIL import Image

    picture = np.asarray(Image.open(io.BytesIO(frame(objects, seed=seed))).convert("RGB"))
    pixels = torch.from_numpy(picture.copy()).permute(2, 0, 1)[None].float() / 255
    found = squares(pixels)[0]
    assert len(found.boxes) == objects
    light = pixels[0].mean(0)
    for x0, y0, x1, y1 in found.boxes.long().tolist():
        assert light[y0 + 8 : y1 - 8, x0 + 8 : x1 - 8].min() > 0.4
        assert 48 <= x1 - x0 <= 96
        assert 48 <= y1 - y0 <= 96


def test_the_chain_is_measured_for_each_link():
    report = ChainCurve(objects=(0, 9), links=("fused", "memory"), clients=2, seconds=0.3, server=ServeConfig(port=0))()
    assert [r["objects"] for r in report.rows] == [0, 9]
    for row in report.rows:
        assert row["fused, frames_per_s"] > 0
        assert row["memory, frames_per_s"] > 0
    assert "0: " in report.answer
    assert "frames_by_objects.plotly" in report.figures


def test_the_redis_of_a_chain_ends_with_the_one_that_started_it():
    code = "import time\nfrom lynceus.serve.chain_curve import redis_server\n"
    code += "with redis_server() as url: print(url, flush=True); time.sleep(60)"
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    port = int(re.search(r":(\d+)/", parent.stdout.readline())[1])
    socket.create_connection(("127.0.0.1", port)).close()
    parent.kill()
    parent.communicate()
    limit = time.monotonic() + 10
    refused = False
    while not refused and time.monotonic() < limit:
        try:
            socket.create_connection(("127.0.0.1", port)).close()
        except ConnectionError:
            refused = True
    assert refused


@pytest.mark.slow
def test_the_chain_through_brokers_in_memory_and_on_disk():
    report = ChainCurve(objects=(9,), links=("shared", "redis", "file"), clients=4, seconds=1.0)()
    row = report.rows[0]
    assert row["shared, frames_per_s"] > 0
    assert row["file, frames_per_s"] > 0
    assert report.summary["shared over file, 9 and more objects"] > 0
    with pytest.raises(AdviceError, match="objects"):
        frame(26)


def test_the_verb(tmp_path, capsys):
    code = main(f"profile resnet_nano --parts alone --sizes small --seconds 0.4 --out {tmp_path}".split())
    assert code == 0
    said = capsys.readouterr().out
    assert "preprocessing share, small" in said
    assert "Beside the paper" in said
    assert (tmp_path / "report.html").is_file()
