"""A batch closes when it is full or its oldest member has waited; it holds one key only; nothing is lost."""

import threading
import time
from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st

from lynceus.serve.batcher import Batcher


@dataclass
class Member:
    key: str
    number: int
    ready: int = field(default_factory=time.monotonic_ns)


def put(batcher, *members):
    batcher.expect(len(members))
    for m in members:
        batcher.put(m)


def test_full_batches_go_at_once():
    b = Batcher(3, 60.0, eager=False)
    put(b, *(Member("a", i) for i in range(7)))
    assert [m.number for m in b.take()] == [0, 1, 2]
    assert [m.number for m in b.take()] == [3, 4, 5]
    assert len(b) == 1


def test_the_wait_counts_from_the_oldest():
    b = Batcher(100, 0.15, eager=False)
    begun = time.monotonic()
    stop = threading.Event()

    def feed():
        for i in range(1000):
            put(b, Member("a", i))
            if stop.wait(0.02):
                return

    thread = threading.Thread(target=feed)
    thread.start()
    first = b.take()
    waited = time.monotonic() - begun
    stop.set()
    thread.join()
    assert first[0].number == 0
    assert waited >= 0.15  # and though a newer one kept coming, it did end
    assert len(first) > 1


def test_eager_does_not_wait_for_nobody():
    b = Batcher(8, 60.0)
    b.expect(3)
    b.put(Member("a", 0))
    b.put(Member("a", 1))
    taken = []
    thread = threading.Thread(target=lambda: taken.append(b.take()))
    thread.start()
    time.sleep(0.05)
    assert not taken  # one is still on its way
    b.forget()
    thread.join(5)
    assert [m.number for m in taken[0]] == [0, 1]


def test_new_limits_hold_for_those_who_wait():
    b = Batcher(8, 60.0, eager=False)
    put(b, Member("a", 0), Member("a", 1))
    b.change(2, 60.0, False)
    assert len(b.take()) == 2


def test_closing_gives_out_the_rest():
    b = Batcher(8, 60.0, eager=False)
    put(b, Member("a", 0), Member("b", 1))
    b.close()
    assert sorted(m.number for g in (b.take(), b.take()) for m in g) == [0, 1]
    assert b.take() is None


@given(keys=st.lists(st.sampled_from("abc"), max_size=60), most=st.integers(1, 9), takers=st.integers(1, 3))
@settings(max_examples=60, deadline=None)
def test_invariant(keys, most, takers):
    b = Batcher(most, 0.001, eager=False)
    members = [Member(k, i) for i, k in enumerate(keys)]
    groups, lock = [], threading.Lock()

    def take():
        while (group := b.take()) is not None:
            with lock:
                groups.append(group)

    threads = [threading.Thread(target=take) for _ in range(takers)]
    for t in threads:
        t.start()
    put(b, *members)
    b.close()
    for t in threads:
        t.join(10)
    assert sorted(m.number for g in groups for m in g) == list(range(len(keys)))
    for group in groups:
        assert len(group) <= most
        assert len({m.key for m in group}) == 1
        assert [m.number for m in group] == sorted(m.number for m in group)
