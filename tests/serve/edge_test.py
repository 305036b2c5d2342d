"""Edge: real processes over TCP answer as the plan does; what is malformed, late or dead is told."""

import json
import os
import pickle
import signal
import socket
import struct
import threading
import time
import warnings
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import lynceus
from lynceus.cli.__main__ import main
from lynceus.core.errors import AdviceError, AdviceWarning
from lynceus.rewrite.split import Device, Plan, Retrain, SplitConfig, split
from lynceus.serve.edge import Cluster, EdgeConfig, deploy, wire
from lynceus.serve.edge.line import Line
from lynceus.tasks.classify import Classify

NAMES = ("pi0", "pi1", "pi2")


@pytest.fixture(scope="module")
def plan():
    torch.manual_seed(0)
    net = {"image_size": (8, 8), "patch_size": 2, "dim": 24, "heads": 6, "depth": 2}
    model = Classify(num_classes=4).build(lynceus.create_model("vit_nano", num_classes=4, **net))
    data = torch.randint(0, 256, (40, 3, 8, 8), dtype=torch.uint8), torch.arange(40) % 4
    config = SplitConfig(rounds=1, retrain=Retrain(steps=2), fusion_steps=20, measure="magnitude")
    return split(model, [Device(name=n) for n in NAMES], data, config=config)


@pytest.fixture(scope="module")
def folder(plan, tmp_path_factory):
    return plan.save(tmp_path_factory.mktemp("plan"))


@pytest.fixture(scope="module")
def cluster(plan, folder):
    with deploy(plan, folder=folder, config=EdgeConfig(deadline=30, patience=60)) as made:
        yield made


def pictures(count=5, seed=0):
    return torch.randint(0, 256, (count, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


# one machine, several processes ------------------------------------------------------------------
def test_the_cluster_answers_as_the_plan_does(cluster, plan):
    for count in (1, 5, 300):
        assert torch.allclose(cluster(pictures(count)), plan(pictures(count)), atol=1e-5)
    x = pictures(3).float() / 255
    assert torch.allclose(cluster(x), plan(x), atol=1e-5)


def test_each_device_is_a_process_on_its_core(cluster):
    rows = cluster.status().rows
    found = {r["process"] for r in rows}
    assert len(found) == 3
    assert os.getpid() not in found
    if hasattr(os, "sched_getaffinity"):
        for row in rows:
            assert os.sched_getaffinity(row["process"]) == {row["core"]}
    assert cluster.shared == (len(os.sched_getaffinity(0)) < 3)


def test_many_clients_ask_at_once(cluster, plan):
    got = {}

    def ask(seed):
        got[seed] = cluster(pictures(4, seed))

    threads = [threading.Thread(target=ask, args=(s,)) for s in range(6)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert all(torch.allclose(got[s], plan(pictures(4, s)), atol=1e-5) for s in range(6))


def test_measured_speeds_make_a_latency_model(cluster, plan):
    known = cluster.calibrated(pictures(2), repeats=3)
    assert all(d.speed != 10e9 and d.speed > 0 for d in known.devices)
    assert all(0 < d.overhead < 1 for d in known.devices)
    timed = cluster.timed(pictures(2), repeats=3, plan=known)
    assert set(timed.device) == set(NAMES)
    assert timed.predicted == known.latency(2)
    assert timed.simulated == cluster.shared


def test_speeds_are_measured_with_all_devices_at_work(cluster, plan, monkeypatch):
    """They share memory and caches; alone, each would look faster than it is in use."""
    asked, said = [], cluster._said

    def listen(kind, payload, names, limit, **shaped):
        asked.append(list(names))
        return said(kind, payload, names, limit, **shaped)

    monkeypatch.setattr(cluster, "_said", listen)
    cluster.calibrated(pictures(2), repeats=3)
    assert asked == ([[n] for n in NAMES] if cluster.shared else [list(NAMES)]) * 3


@pytest.mark.slow  # another process
def test_the_shape_of_a_link_is_in_the_model_not_in_the_overhead(plan):
    only = replace(plan, shares=tuple(replace(s, device="pi0") for s in plan.shares))
    only = only.with_devices(replace(d, delay=0.3) for d in only.devices)
    with deploy(only, config=EdgeConfig(deadline=30, patience=60)) as made:
        known = made.calibrated(pictures(2), repeats=3)
        assert known.devices[0].overhead < 0.3
        assert made.ask(pictures(2)).seconds > 0.6
        assert known.latency(2) > 0.6


def test_the_overhead_of_a_request_counts_in_the_latency_model(plan):
    slower = plan.with_devices(replace(d, overhead=0.25) for d in plan.devices)
    assert slower.latency(2) == pytest.approx(plan.latency(2) + 0.25)
    with pytest.raises(AdviceError, match="overhead cannot be -1"):
        Device(name="pi", overhead=-1)


def test_wrong_images_are_told_before_they_are_sent(cluster):
    with pytest.raises(AdviceError, match=r"takes images \(1 to 256, 3, 8, 8\), not \(2, 3, 9, 9\)"):
        cluster.ask(torch.zeros(2, 3, 9, 9))
    with pytest.raises(AdviceError, match=r"no device in this cluster 'pi7'\. Did you mean 'pi"):
        cluster.ask(pictures(), only=["pi7", "pi"])


# faults ------------------------------------------------------------------------------------------
def without(plan, name, x):
    """The fusion with zeros for one device's features."""
    with torch.no_grad():
        features = plan.net.features(x.float() / 255)
        rows = [torch.zeros_like(f) if i in plan.on(name) else f for i, f in enumerate(features)]
        return plan.net.fusion(torch.cat(rows, 1))


def test_a_dead_device_is_reported_the_rest_answers_and_it_rejoins(cluster, plan):
    x = pictures(6)
    before = next(r["process"] for r in cluster.status().rows if r["device"] == "pi1")
    cluster.kill("pi1")
    answer = cluster.ask(x)
    assert answer.missing == ("pi1",)
    assert torch.allclose(answer.logits, without(plan, "pi1", x), atol=1e-5)
    with pytest.warns(AdviceWarning, match=r"Device pi1 did not answer .* cluster.restart\('pi1'\)"):
        cluster(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cluster(x)  # told once
    status = cluster.status()
    assert "Lost: pi1" in status.answer
    assert any("lost pi1" in n for n in status.notes)
    assert cluster.alive == ["pi0", "pi2"]
    cluster.restart("pi1")
    assert cluster.alive == list(NAMES)
    assert torch.allclose(cluster(x), plan(x), atol=1e-5)
    assert next(r["process"] for r in cluster.status().rows if r["device"] == "pi1") != before


def stop(process):
    """Halts a process, and waits until it stands."""
    os.kill(process, signal.SIGSTOP)
    until = time.monotonic() + 20
    while time.monotonic() < until:
        if (stat := Path(f"/proc/{process}/stat")).is_file() and stat.read_text().rpartition(")")[2].split()[0] == "T":
            return
        time.sleep(0.02)


def test_a_device_that_hangs_misses_the_deadline_only(cluster, plan):
    x, process = pictures(2), next(r["process"] for r in cluster.status().rows if r["device"] == "pi2")
    stop(process)
    try:
        answer = cluster.ask(x, deadline=1.0)
    finally:
        os.kill(process, signal.SIGCONT)
    assert "pi2" in answer.missing
    assert "pi2" in cluster.alive  # late, not lost
    again = cluster.ask(x)  # the late answer of the first request is not taken for that of the second
    assert again.missing == ()
    assert torch.allclose(again.logits, plan(x), atol=1e-5)


def test_silence_is_a_loss(cluster):
    """The heartbeat's rule on a device that was last seen too long ago."""
    node = cluster._nodes["pi0"]
    process = node.process.pid
    stop(process)
    try:
        node.seen = time.monotonic() - 1000
        until = time.monotonic() + 30
        while "pi0" in cluster.alive and time.monotonic() < until:
            time.sleep(0.05)
        assert "pi0" not in cluster.alive
        assert "no sign of life" in node.reason
    finally:
        os.kill(process, signal.SIGCONT)
    with pytest.raises(AdviceError, match="No device answered"):
        cluster.ask(pictures(), only=["pi0"])


def test_strangers_and_garbage_are_turned_away(cluster, plan):
    """Without the token nothing is said; garbage closes its own connection, and the device serves on."""
    address = cluster._nodes["pi2"].line.sock.getpeername()
    assert address[0] == "127.0.0.1"
    for first in (
        struct.pack("!4sBQI", wire.MAGIC, wire.HELLO, 0, 15) + b'{"token": "no"}',
        pickle.dumps({"image": 1}) * 4,
        struct.pack("!4sBQI", wire.MAGIC, wire.HELLO, 0, 2**31),
        b"GET / HTTP/1.1\r\nHost: edge\r\n\r\n",
    ):
        with socket.create_connection(address, timeout=20) as sock:
            sock.sendall(first)
            with suppress(ConnectionResetError):
                assert sock.recv(1) == b""
    told = cluster.ask(pictures(), only=["pi2"])
    assert "pi2" not in told.missing


def test_a_device_says_by_itself_that_it_lives(cluster):
    """Also while it computes: the beats come from a thread of their own."""
    node = cluster._nodes["pi2"]
    with socket.create_connection(node.line.sock.getpeername(), timeout=20) as sock:
        sock.settimeout(None)
        hello = {"token": cluster._token, "beat": 0.02}
        wire.send(sock, wire.Frame(kind=wire.HELLO, payload=json.dumps(hello).encode()))
        assert wire.receive(sock, wait=20).kind == wire.HELLO
        assert [wire.receive(sock, wait=20).kind for _ in range(3)] == [wire.BEAT] * 3


def test_a_bad_request_is_answered_with_its_reason(cluster):
    """Past the cluster's own check: bytes that are no safetensors, and a tensor of another shape."""
    node = cluster._nodes["pi2"]
    with socket.create_connection(node.line.sock.getpeername(), timeout=20) as sock:
        sock.settimeout(None)
        wire.send(sock, wire.Frame(kind=wire.HELLO, payload=json.dumps({"token": cluster._token}).encode()))
        assert wire.receive(sock, wait=20).kind == wire.HELLO
        for payload, said in (
            (pickle.dumps([1, 2]), "no safetensors"),
            (wire.pack({"image": torch.zeros(1, 3, 9, 9)}), r"images are (1 to 256, 3, 8, 8)"),
            (wire.pack({"image": torch.zeros(1, 3, 8, 8, dtype=torch.int64)}), "uint8 or floats"),
            (wire.pack({"other": torch.zeros(1)}), "holds one tensor, image"),
        ):
            wire.send(sock, wire.Frame(kind=wire.ASK, number=7, payload=payload))
            frame = wire.receive(sock, wait=20)
            assert frame.kind == wire.ERROR
            assert frame.number == 7
            assert said in frame.payload.decode()


def test_closing_ends_the_processes(plan, folder):
    only = Plan.load(folder)
    only.shares = tuple(replace(s, device="pi0") for s in only.shares)
    with pytest.raises(AdviceError, match="places its sub-models on pi0, pi1, pi2, this one on pi0, pi0, pi0"):
        Cluster(only, folder)  # the folder's plan is another
    with pytest.raises(AdviceError, match="There is no plan"):
        Cluster(plan, folder.parent / "nothing")
    with deploy(only, config=EdgeConfig(shaped=False, pinned=False)) as made:  # three sub-models in one process
        assert torch.allclose(made(pictures()), plan(pictures()), atol=1e-5)
        processes = [n.process for n in made._nodes.values()]
        made.kill("pi0")
        with pytest.raises(AdviceError, match="No device answered within"):
            made.ask(pictures())
    assert all(p.poll() is not None for p in processes)
    with pytest.raises(AdviceError, match="closed"):
        made.ask(pictures())


# frames ------------------------------------------------------------------------------------------
def pair():
    return socket.socketpair()


def test_frames_arrive_whole():
    a, b = pair()
    with a, b:
        x = {"image": torch.randn(2, 3, 4, 4), "n": torch.tensor([7])}
        threading.Thread(
            target=wire.send, args=(a, wire.Frame(kind=wire.ASK, number=2**40, payload=wire.pack(x)))
        ).start()
        frame = wire.receive(b, wait=10)
        assert (frame.kind, frame.number) == (wire.ASK, 2**40)
        assert all(torch.equal(v, x[k]) for k, v in wire.unpack(frame.payload).items())


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        (b"", "closed the connection"),
        (b"XXXX" + bytes(13), "no frame of lynceus"),
        (struct.pack("!4sBQI", wire.MAGIC, 99, 0, 0), "no frame of lynceus"),
        (struct.pack("!4sBQI", wire.MAGIC, wire.ASK, 0, 2000), "2,000 bytes is above the limit of 1,000"),
        (struct.pack("!4sBQI", wire.MAGIC, wire.ASK, 0, 10) + b"abc", "closed after 3 of 10 bytes"),
    ],
)
def test_broken_frames_are_refused(raw, said):
    a, b = pair()
    with b:
        a.sendall(raw)
        a.close()
        with pytest.raises(wire.WireError, match=said):
            wire.receive(b, wait=5, most=1000)


def test_what_a_full_buffer_does_not_take_follows_whole():
    """The thread that asks does not wait for a device that does not read; nothing comes in between."""
    a, b = pair()
    with a, b:
        lost = []
        line = Line(a, None, lambda sock, why: lost.append(why))
        frames = [wire.Frame(kind=wire.ASK, number=n, payload=bytes([n]) * 3_000_000) for n in range(4)]
        for frame in frames:
            line.say(frame)  # nobody reads yet
        assert [wire.receive(b, wait=20) for _ in frames] == frames
        b.close()
        for n in range(2):
            line.say(wire.Frame(kind=wire.ASK, number=n))
        until = time.monotonic() + 20
        while not lost and time.monotonic() < until:
            time.sleep(0.01)
        assert lost
        line.close()


def test_a_frame_that_stalls_is_given_up():
    a, b = pair()
    with a, b:
        a.sendall(struct.pack("!4sBQI", wire.MAGIC, wire.ASK, 0, 10) + b"abc")
        with pytest.raises(wire.WireError, match="broke off after 3 of 10"):
            wire.receive(b, stall=0.1)
        with pytest.raises(wire.WireError, match="nothing came within"):
            wire.receive(b, wait=0.05)
        with pytest.raises(wire.WireError, match="above the limit"):
            wire.send(a, wire.Frame(kind=wire.ASK, payload=bytes(11)), most=10)


def test_a_shaped_link_waits_for_its_bytes(monkeypatch):
    slept = []
    monkeypatch.setattr(wire.time, "sleep", slept.append)
    wire.Link(rate=1000, delay=0.5).wait(250)
    wire.Link().wait(10**9)
    assert slept == [0.75]


def test_payloads_are_never_unpickled():
    with pytest.raises(wire.WireError, match="no safetensors"):
        wire.unpack(pickle.dumps({"image": torch.zeros(1)}))
    with pytest.raises(wire.WireError, match="no JSON"):
        wire.said(b"\x80\x04")


@pytest.mark.parametrize("wrong", [("--batch", "0"), ("--batch", "257"), ("--repeats", "-1")])
def test_the_command_line_refuses_impossible_numbers(folder, capsys, wrong):
    assert main(["edge", str(folder), "digits", *wrong]) == 2
    assert "--batch is 1 to 256 and --repeats is 0 or more" in capsys.readouterr().err


@pytest.mark.slow  # three more processes
def test_the_command_line_runs_a_plan_and_kills_a_device(folder, tmp_path, capsys):
    argv = ["edge", str(folder), "digits", "--limit", "6", "--batch", "3", "--kill", "pi2", "--repeats", "0"]
    assert main([*argv, "--deadline", "60", "--out", str(tmp_path / "out")]) == 0
    told = capsys.readouterr().out
    assert "Lost: pi2" in told
    assert (tmp_path / "out" / "report.html").is_file()
    assert main(["edge", str(tmp_path), "digits"]) == 2
    assert "no plan.json" in capsys.readouterr().err
