"""One sheet for all brokers: order, acknowledgement, delivery again, many consumers, other processes, kills."""

import errno
import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from serve_kit import encode, picture

from lynceus.core.errors import AdviceError
from lynceus.serve import Pipeline, ServeConfig
from lynceus.serve.brokers import Broker, DownError, FullError, open_broker
from lynceus.serve.brokers.memory import MemoryBroker
from lynceus.serve.engine import Job
from lynceus.serve.links import pack_job, unpack_answer
from lynceus.serve.spans import Trace
from lynceus.serve.worker import Consumer

KINDS = ("memory", "shared", "redis", "file")


@pytest.fixture(params=KINDS)
def broker(request, tmp_path):
    address = {"memory": "memory", "shared": "shared", "file": f"file:{tmp_path / 'log'}"}.get(request.param)
    if address is None:
        address = request.getfixturevalue("redis_server").url
    made = open_broker(address, capacity_mb=16, slots=256)
    yield made
    made.close()


def bodies(count, seed=0):
    r = np.random.default_rng(seed)
    return [b"%d|" % i + r.bytes(int(r.choice([0, 10, 70_000, 200_000]))) for i in range(count)]


def test_the_protocol_holds(broker):
    assert isinstance(broker, Broker)


def test_order_and_acknowledgement(broker):
    sent = bodies(12)
    broker.publish("jobs", sent[:5])
    broker.publish("jobs", sent[5:])
    assert broker.depth("jobs") == (12, 0)
    got = []
    while len(got) < 12:
        got += broker.consume("jobs", "a", count=5, wait_s=1)
    assert [d.body for d in got] == sent
    assert {d.attempt for d in got} == {1}
    assert broker.depth("jobs") == (0, 12)
    assert broker.consume("jobs", "b", count=5, wait_s=0.01) == []
    broker.ack("jobs", [d.key for d in got])
    broker.ack("jobs", [got[0].key])  # twice is once
    assert broker.depth("jobs") == (0, 0)
    assert broker.release("jobs", "a") == 0


def test_topics_are_apart(broker):
    broker.publish("replies", [b"r"])
    assert broker.consume("jobs", "a", wait_s=0.01) == []
    assert broker.consume("replies", "a", wait_s=1)[0].body == b"r"


def test_what_a_lost_consumer_held_comes_again(broker):
    broker.publish("jobs", [b"1", b"2", b"3"])
    held = broker.consume("jobs", "dead", count=2, wait_s=1)
    broker.ack("jobs", [held[0].key])
    assert broker.release("jobs", "dead") == 1
    assert broker.release("jobs", "dead") == 0
    got = []
    while len(got) < 2:
        got += broker.consume("jobs", "alive", count=5, wait_s=1)
    assert {(d.body, d.attempt) for d in got} == {(b"2", 2), (b"3", 1)}


def test_many_at_once_lose_and_double_nothing(broker):
    sent = {b"%d-%d" % (p, i) + bytes(100 * (i % 7)) for p in range(3) for i in range(60)}
    got, lock = [], threading.Lock()
    begun = time.monotonic()

    def publish(p):
        for body in sorted(b for b in sent if b.startswith(b"%d-" % p)):
            while True:
                try:
                    broker.publish("jobs", [body])
                    break
                except FullError:
                    time.sleep(0.001)

    def consume(name):
        while time.monotonic() - begun < 20:
            found = broker.consume("jobs", name, count=4, wait_s=0.05)
            broker.ack("jobs", [d.key for d in found])
            with lock:
                got.extend(d.body for d in found)
                if len(got) >= len(sent):
                    return

    threads = [threading.Thread(target=publish, args=(p,)) for p in range(3)]
    threads += [threading.Thread(target=consume, args=(f"c{c}",)) for c in range(3)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len(got) == len(sent)
    assert set(got) == sent
    assert broker.depth("jobs") == (0, 0)


def test_a_waiting_consumer_is_woken(broker):
    broker.consume("jobs", "a", wait_s=0.01)
    found = []
    thread = threading.Thread(target=lambda: found.extend(broker.consume("jobs", "a", wait_s=10)))
    begun = time.monotonic()
    thread.start()
    time.sleep(0.1)
    broker.publish("jobs", [b"x"])
    thread.join()
    assert [d.body for d in found] == [b"x"]
    assert time.monotonic() - begun < 5


@pytest.mark.parametrize("kind", ["memory", "shared"])
def test_memory_is_bounded(kind):
    broker = open_broker(kind, capacity_mb=8, slots=16)
    for _ in range(16):
        broker.publish("jobs", [bytes(1000)])
    with pytest.raises(FullError):
        broker.publish("jobs", [bytes(1000)])
    held = broker.consume("jobs", "a", count=16, wait_s=1)
    assert len(held) == 16
    broker.ack("jobs", [d.key for d in held])
    for _ in range(40):  # the same room again and again
        broker.publish("jobs", [bytes(900_000)])
        broker.ack("jobs", [broker.consume("jobs", "a", wait_s=1)[0].key])
    if kind == "shared":
        with pytest.raises(FullError):
            broker.publish("jobs", [bytes(9_000_000)])
        broker.publish("jobs", [b"small"])
    broker.close()


HOLDER = """
import sys, time
from lynceus.serve.brokers import open_broker
broker = open_broker(sys.argv[1])
held = []
while len(held) < int(sys.argv[2]):
    held += broker.consume("jobs", "other", count=4, wait_s=1)
broker.publish("replies", [d.body[::-1] for d in held[:2]])
print("held", flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("kind", ["shared", "redis", "file"])
def test_a_killed_process_loses_nothing(kind, request, tmp_path):
    address = {"shared": "shared", "file": f"file:{tmp_path / 'log'}"}.get(kind)
    broker = open_broker(address or request.getfixturevalue("redis_server").url, capacity_mb=16, slots=64)
    sent = bodies(8, seed=3)
    broker.publish("jobs", sent)
    other = subprocess.Popen(
        [sys.executable, "-c", HOLDER, broker.address, "6"], stdout=subprocess.PIPE, text=True, env=dict(os.environ)
    )
    assert other.stdout.readline() == "held\n"
    replies = []
    while len(replies) < 2:
        replies += broker.consume("replies", "front", count=2, wait_s=1)
    assert [d.body[::-1] for d in replies] == sent[:2]
    other.send_signal(signal.SIGKILL)
    other.wait()
    assert broker.release("jobs", "other") >= 6
    got = []
    while len(got) < 8:
        got += broker.consume("jobs", "me", count=8, wait_s=1)
    assert sorted(d.body for d in got) == sorted(sent)
    broker.close()


def test_redis_killed_with_its_data_kept_loses_nothing(redis_server):
    broker = open_broker(redis_server.url)
    broker.publish("jobs", [b"1", b"2", b"3"])
    held = broker.consume("jobs", "a", count=1, wait_s=1)
    redis_server.kill()
    with pytest.raises(DownError):
        broker.publish("jobs", [b"lost"])
    with pytest.raises(DownError):
        broker.consume("jobs", "a", wait_s=0.1)
    redis_server.start()
    broker.ack("jobs", [held[0].key])
    got = []
    while len(got) < 2:
        got += broker.consume("jobs", "a", count=5, wait_s=1)
    assert [d.body for d in got] == [b"2", b"3"]
    broker.forget()
    broker.close()


def test_redis_hands_out_again_what_a_broken_connection_swallowed(redis_server):
    broker = open_broker(redis_server.url + "?namespace=n")
    broker.publish("jobs", [b"1", b"2", b"3"])
    assert [d.body for d in broker.consume("jobs", "a", count=1, wait_s=1)] == [b"1"]
    import redis

    # the server hands out the second, and its answer is lost on the way
    redis.Redis(port=redis_server.port).xreadgroup("lynceus", "a", {"lynceus:n:jobs": ">"}, count=1)
    redis_server.kill()
    with pytest.raises(DownError):
        broker.consume("jobs", "a", wait_s=0.1)
    redis_server.start()
    got = []
    while len(got) < 2:
        got += broker.consume("jobs", "a", count=5, wait_s=1)
    assert [d.body for d in got] == [b"2", b"3"]
    broker.ack("jobs", [d.key for d in got])
    assert broker.depth("jobs") == (0, 1)
    broker.close()


def test_redis_gives_a_silent_consumers_messages_to_another(redis_server):
    address = redis_server.url + "?namespace=n&lease_ms=200"
    one, two = open_broker(address), open_broker(address)
    one.publish("jobs", [b"x", b"y"])
    assert len(one.consume("jobs", "silent", count=2, wait_s=1)) == 2
    time.sleep(0.15)
    one.touch("jobs", "silent")
    time.sleep(0.1)
    assert two.consume("jobs", "other", count=2, wait_s=0.01) == []  # it gave a sign
    time.sleep(0.3)
    got = two.consume("jobs", "other", count=2, wait_s=1)
    assert sorted(d.body for d in got) == [b"x", b"y"]
    assert all(d.attempt > 1 for d in got)


def test_redis_looks_for_silent_consumers_in_every_topic(redis_server):
    broker = open_broker(redis_server.url + "?namespace=n&lease_ms=4000")
    for topic in ("jobs", "suspects"):
        broker.publish(topic, [b"x"])
        assert len(broker.consume(topic, "silent", wait_s=1)) == 1
    import redis

    client = redis.Redis(port=redis_server.port)
    for topic in ("jobs", "suspects"):  # as if it had been silent for five seconds
        key = f"lynceus:n:{topic}"
        identity = client.xpending_range(key, "lynceus", "-", "+", 1)[0]["message_id"]
        client.xclaim(key, "lynceus", "silent", 0, [identity], idle=5000, justid=True)
    other = open_broker(broker.address)
    assert [d.body for d in other.consume("jobs", "other", wait_s=0.01)] == [b"x"]
    assert [d.body for d in other.consume("suspects", "other", wait_s=0.01)] == [b"x"]
    other.close()
    broker.close()


def test_a_log_outlives_its_process_and_a_torn_end(tmp_path):
    address = f"file:{tmp_path}"
    one = open_broker(address)
    one.publish("jobs", [b"1", b"2", b"3"])
    done = one.consume("jobs", "a", count=1, wait_s=1)
    one.ack("jobs", [done[0].key])
    one.close()
    with open(tmp_path / "jobs.log", "ab") as log:
        log.write(b"\x40\x00\x00\x00\x00")  # a record that was being written when the power went
    two = open_broker(address)
    assert [d.body for d in two.consume("jobs", "b", count=5, wait_s=1)] == [b"2", b"3"]
    two.publish("jobs", [b"4"])
    assert [d.body for d in two.consume("jobs", "b", count=5, wait_s=1)] == [b"4"]
    two.close()


def test_a_flipped_bit_on_disk_loses_that_message_only(tmp_path):
    broker = open_broker(f"file:{tmp_path}")
    broker.publish("jobs", [b"first" * 10, b"second" * 10])
    with open(tmp_path / "jobs.log", "r+b") as log:
        log.seek(20)
        log.write(b"X")
    got = []
    while not got:
        got = broker.consume("jobs", "a", count=5, wait_s=1)
    assert [d.body for d in got] == [b"second" * 10]
    broker.close()


def test_a_log_goes_on_behind_a_torn_event(tmp_path):
    broker = open_broker(f"file:{tmp_path}")
    broker.publish("jobs", [b"1", b"2"])
    first = broker.consume("jobs", "a", count=1, wait_s=1)
    with open(tmp_path / "jobs.events", "ab") as events:
        events.write(b"\x54\x00\x00")  # one that was being written when the power went
    broker.ack("jobs", [first[0].key])
    assert [d.body for d in broker.consume("jobs", "a", count=5, wait_s=1)] == [b"2"]
    assert broker.depth("jobs") == (0, 1)
    broker.close()


def test_a_full_disk_is_told_and_the_log_goes_on_when_there_is_room(tmp_path, monkeypatch):
    broker = open_broker(f"file:{tmp_path}")
    broker.publish("jobs", [b"1"])
    held = broker.consume("jobs", "a", count=1, wait_s=1)
    real, room = os.write, [5]

    def write(file, data):
        if not room[0]:
            raise OSError(errno.ENOSPC, "No space left on device")
        count = real(file, bytes(data)[: room[0]])
        room[0] -= count
        return count

    monkeypatch.setattr(os, "write", write)
    with pytest.raises(FullError, match="No space left"):
        broker.publish("jobs", [b"2" * 100])
    room[0] = 5
    with pytest.raises(DownError, match="No space left"):
        broker.ack("jobs", [held[0].key])
    monkeypatch.undo()
    assert broker.depth("jobs") == (0, 1)
    broker.ack("jobs", [held[0].key])
    broker.publish("jobs", [b"3"])
    assert [d.body for d in broker.consume("jobs", "a", count=5, wait_s=1)] == [b"3"]
    broker.close()


@pytest.mark.parametrize("address", ["reddis://x", "file:", "file:/proc/none", "redis://127.0.0.1:1/0"])
def test_mistakes_are_answered(address):
    with pytest.raises(AdviceError):
        open_broker(address)


def test_answers_that_do_not_fit_together_go_one_by_one(classifier):
    class Narrow(MemoryBroker):
        refused = 0

        def publish(self, topic, bodies):
            if topic == "replies" and len(bodies) > 1:
                self.refused += 1
                raise FullError("one at a time")
            super().publish(topic, bodies)

    broker, pipeline = Narrow(slots=64), Pipeline(ServeConfig(max_batch=8), classifier)
    model = pipeline.registry.find()
    late = time.monotonic_ns() + 60 * 10**9
    jobs = []
    for i in range(40):
        job = Job(encode(picture(40, 50, i)), model, Trace(id=str(i)), late, print, False)
        job.key = f"k{i}"
        jobs.append(pack_job(job, time.monotonic_ns()))
    broker.publish("jobs", jobs)
    consumer = Consumer(broker, pipeline, "one")
    found = []
    limit = time.monotonic() + 30
    while len(found) < 40 and time.monotonic() < limit:
        taken = broker.consume("replies", "front", count=64, wait_s=0.1)
        found += [unpack_answer(d.body, time.monotonic_ns())[0] for d in taken]
        broker.ack("replies", [d.key for d in taken])
    consumer.close()
    assert sorted(found) == sorted(f"k{i}" for i in range(40))
    assert broker.depth("jobs") == (0, 0)
    assert broker.refused > 0
