"""Laws of the feed: the same elements, errors where they belong, and no thread left behind."""

import gc
import itertools
import subprocess
import sys
import threading
import time

import chex
import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fnml.core import DataError
from fnml.data import ArraySource, Batches, Feed


def source(n=23):
    return ArraySource(
        {"i": np.arange(n), "x": np.arange(6 * n, dtype=np.float32).reshape(n, 3, 2)}
    )


def feed_threads():
    return [thread for thread in threading.enumerate() if thread.name == "fnml-feed"]


@pytest.fixture(autouse=True)
def no_thread_is_left():
    yield
    assert feed_threads() == []


class Faulty:
    """A source of numbers whose examples ``bad`` cannot be read; it counts what is asked."""

    fingerprint = "faulty"

    def __init__(self, n=64, bad=(), delay=0.0, error=OSError):
        self.n, self.bad, self.delay, self.error = n, set(bad), delay, error
        self.asked = 0

    def __len__(self):
        return self.n

    def gather(self, indices):
        self.asked += len(indices)
        time.sleep(self.delay)
        if self.bad & set(indices.tolist()):
            raise self.error("unreadable record")
        return {"i": indices.copy()}


SIZES = st.lists(st.none() | st.integers(1, 5), max_size=25)


@settings(max_examples=60, deadline=None)
@given(
    sizes=SIZES,
    batch_size=st.integers(1, 30),
    depth=st.integers(1, 4),
    position=st.integers(0, 100),
    place=st.sampled_from([None, jax.device_put]),
)
def test_elements_are_those_of_the_stream(sizes, batch_size, depth, position, place):
    batches = Batches(source(), batch_size, seed=2, position=position)
    with batches.feed(sizes, depth, place) as feed:
        elements = list(feed)
    assert len(elements) == len(sizes)
    for size, element in zip(sizes, elements, strict=True):
        expected = batches.at(position) if size is None else batches.take(position, size)
        position += (size or 1) * batch_size
        assert element.keys() == expected.keys()
        for name, value in expected.items():
            got = np.asarray(element[name])
            # x64 is off, so a placed int64 is an int32.
            value = value if place is None else value.astype(element[name].dtype)
            assert got.shape == value.shape and got.tobytes() == value.tobytes()
            assert isinstance(element[name], np.ndarray if place is None else jax.Array)


@pytest.mark.parametrize("backend", ["cpu", "gpu", "tpu"])
def test_by_default_elements_are_placed_on_accelerators_only(monkeypatch, backend):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    with Batches(source(), 2).feed([None]) as feed:
        assert isinstance(next(feed)["x"], np.ndarray if backend == "cpu" else jax.Array)
    with Batches(source(), 2).feed([None], place=lambda batch: "placed") as feed:
        assert next(feed) == "placed"


def test_elements_share_no_memory_with_each_other_or_the_source():
    batches = Batches(source(), 4)
    with batches.feed([None] * 40) as feed:
        elements = list(feed)
    expected = [batches.at(4 * i)["x"].copy() for i in range(40)]
    for element in elements[::2]:
        element["x"][:] = -1
    for element, value in list(zip(elements, expected, strict=True))[1::2]:
        assert np.array_equal(element["x"], value)


def test_small_batches_are_gathered_many_at_a_time():
    calls = []

    class Counting(Faulty):
        def gather(self, indices):
            calls.append(len(indices))
            return super().gather(indices)

    with Batches(Counting(), 2).feed([None] * 1000) as feed:
        assert sum(1 for _ in feed) == 1000
    assert calls[0] == 2 and sum(calls) == 2000
    assert len(calls) < 100
    calls.clear()
    with Batches(Counting(), 2).feed([50, 60]) as feed:
        assert [element["i"].shape for element in feed] == [(50, 2), (60, 2)]
    assert calls == [100, 120]


def test_a_slow_source_is_asked_for_one_batch_at_a_time():
    slow = Faulty(delay=0.005)
    with Batches(slow, 4).feed(itertools.repeat(None)) as feed:
        for _ in range(12):
            next(feed)
    # 12 taken, two ahead, one in progress; the growth to 2 is undone at once.
    assert slow.asked <= 4 * (12 + 3 + 2)


@pytest.mark.parametrize("depth", [1, 2, 5])
def test_the_thread_stays_depth_groups_ahead(depth):
    elements = 0

    def produce():
        nonlocal elements
        while True:
            elements += 1
            yield [elements]

    with Feed(produce(), depth) as feed:
        for taken in range(1, 6):
            assert next(feed) == taken
            deadline = time.monotonic() + 5
            while elements < taken + depth and time.monotonic() < deadline:
                time.sleep(0.001)
            time.sleep(0.02)
            assert elements == taken + depth


@pytest.mark.parametrize("sizes", [[None] * 40, [3] * 14, [None, 2, None, 4, 1, None] * 4])
@pytest.mark.parametrize("bad", [0, 17, 30, 63])
def test_an_error_comes_after_the_elements_before_it_and_names_the_example(sizes, bad):
    batches = Batches(Faulty(bad=[bad]), 2, seed=1, position=5)
    positions = np.arange(5, 5 + 2 * sum(size or 1 for size in sizes))
    found = batches.indices(positions) == bad
    where = int(positions[np.flatnonzero(found)[0]])
    good, position = 0, 5
    for size in sizes:
        position += 2 * (size or 1)
        if position > where:
            break
        good += 1
    delivered = []
    with pytest.raises(OSError, match="unreadable") as caught, batches.feed(sizes) as feed:
        delivered.extend(feed)
    assert len(delivered) == good
    (note,) = caught.value.__notes__
    assert f"global positions {where} to {where} (source indices {bad})" in note
    assert next(feed, "ended") == "ended"


def test_a_failing_pair_is_named_as_a_range():
    class Pair(Faulty):
        def gather(self, indices):
            if len(indices) > 1:
                raise OSError("only together")
            return {"i": indices}

    with pytest.raises(OSError) as caught, Batches(Pair(), 2, shuffle=False).feed([4]) as feed:
        next(feed)
    assert "positions 0 to 1 (source indices 0, 1)" in caught.value.__notes__[0]


def test_errors_of_map_place_sizes_and_exits_arrive_too():
    def broken(*_):
        raise ZeroDivisionError("broken")

    def sizes():
        yield from [None, None]
        raise LookupError("sizes")

    good = Batches(Faulty(), 2)
    with pytest.raises(ZeroDivisionError), Batches(Faulty(), 2, map=broken).feed([None]) as feed:
        next(feed)
    with pytest.raises(ZeroDivisionError), good.feed([None], place=broken) as feed:
        next(feed)
    with pytest.raises(LookupError), good.feed(sizes()) as feed:
        for count, _ in enumerate(feed, 1):
            assert count <= 2
    assert count == 2
    leaving = Batches(Faulty(bad=range(64), error=SystemExit), 2)
    with pytest.raises(SystemExit), leaving.feed([None]) as feed:
        next(feed)


@pytest.mark.parametrize("bad", [0, -3, 1.0, "2", True])
def test_a_bad_size_is_named(bad):
    with Batches(source(), 2).feed([None, 2, bad]) as feed:
        next(feed), next(feed)
        with pytest.raises(DataError, match=r"entry 2 is .*positive"):
            next(feed)


def test_a_bad_depth_is_refused():
    with pytest.raises(DataError, match="depth is 0"):
        Batches(source(), 2).feed([None], depth=0)


def test_closing_is_idempotent_and_ends_the_feed():
    feed = Batches(source(), 2).feed(itertools.repeat(None), threaded=True)
    next(feed)
    assert len(feed_threads()) == 1
    feed.close()
    feed.close()
    assert feed_threads() == []
    with pytest.raises(StopIteration):
        next(feed)


def test_the_thread_ends_when_the_consumer_raises():
    with (
        pytest.raises(ArithmeticError),
        Batches(source(), 2).feed(itertools.repeat(None), threaded=True) as feed,
    ):
        next(feed)
        raise ArithmeticError
    assert feed_threads() == []


def test_the_thread_ends_when_the_stream_does():
    feed = Batches(source(), 2).feed([None] * 3, threaded=True)
    assert sum(1 for _ in feed) == 3
    assert feed_threads() == []


def test_a_dropped_feed_ends_its_thread():
    feed = Batches(source(), 2).feed(itertools.repeat(None), threaded=True)
    next(feed)
    del feed
    gc.collect()
    assert feed_threads() == []


def test_close_interrupts_a_slow_source_after_one_gather():
    slow = Faulty(delay=0.2)
    feed = Batches(slow, 2).feed(itertools.repeat(None), threaded=True)
    began = time.perf_counter()
    feed.close()
    # One gather of 0.2 s may be under way; the rest is slack for a loaded machine.
    assert time.perf_counter() - began < 5
    assert slow.asked <= 2


def test_waited_counts_blocking_only():
    with Batches(Faulty(delay=0.03), 2).feed([None] * 5) as feed:
        list(feed)
    assert 0.1 < feed.waited < 5
    with Batches(source(), 2).feed([None] * 200, depth=1000, threaded=True) as feed:
        next(feed)
        while feed_threads():
            time.sleep(0.005)
        before = feed.waited
        assert sum(1 for _ in feed) == 199
        assert feed.waited == before


@pytest.mark.parametrize("threaded", [None, False])
def test_a_thread_starts_for_a_slow_source_only_and_never_changes_an_element(threaded):
    with Batches(source(), 2).feed([None] * 50, threaded=threaded) as quick:
        assert len(list(quick)) == 50 and feed_threads() == []
    batches = Batches(Faulty(delay=0.03), 2)
    with batches.feed([None] * 6, threaded=threaded) as slow:
        found = [next(slow), next(slow)]
        assert len(feed_threads()) == (threaded is None)
        found += list(slow)
    assert feed_threads() == []
    expected = [batches.at(2 * i) for i in range(6)]
    for ours, theirs in zip(found, expected, strict=True):
        chex.assert_trees_all_equal(ours, theirs)


SCRIPT = """
import itertools, numpy as np, jax
from fnml.data import ArraySource, Batches
source = ArraySource({"x": np.zeros((1000, 64), np.float32)})
feed = Batches(source, 8).feed(itertools.repeat(None), place=jax.device_put, threaded=True)
print(next(feed)["x"].shape, flush=True)
"""


def test_an_open_feed_does_not_hold_up_or_crash_the_exit():
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "(8, 64)\n", "")
