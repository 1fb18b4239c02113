"""Laws of the stream: epochs are permutations, any portion is the same, resume is exact."""

import itertools
import json
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fnml.core import DataError
from fnml.data import ArraySource, Batches, TokenSource, random_bits


def numbered(n):
    return ArraySource({"i": np.arange(n), "x": np.arange(2 * n, dtype=np.float32).reshape(n, 2)})


def stream(batches, count):
    """The next ``count`` examples' source indices, read one batch at a time."""
    rows = itertools.islice(iter(batches), -(-count // batches.batch_size))
    return np.concatenate([batch["i"] for batch in rows])[:count]


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype and a[name].shape == b[name].shape, name
        assert a[name].tobytes() == b[name].tobytes(), name


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 40),
    batch_size=st.integers(1, 100),
    seed=st.integers(0, 2**63 - 1),
    shuffle=st.booleans(),
)
def test_every_epoch_holds_every_example_once(n, batch_size, seed, shuffle):
    batches = Batches(numbered(n), batch_size, seed, shuffle)
    epochs = stream(batches, 4 * n).reshape(4, n)
    for order in epochs:
        assert np.array_equal(np.sort(order), np.arange(n))
    if not shuffle:
        assert np.array_equal(epochs, np.tile(np.arange(n), (4, 1)))


def test_seeds_and_epochs_give_different_orders():
    orders = [
        order.tobytes()
        for seed in range(20)
        for order in stream(Batches(numbered(40), 7, seed), 800).reshape(20, 40)
    ]
    assert len(set(orders)) == 400


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 30),
    batch_size=st.integers(1, 40),
    start=st.integers(0, 2**40),
    count=st.integers(1, 12),
    seed=st.integers(0, 5),
)
def test_the_stream_does_not_depend_on_how_it_is_read(n, batch_size, start, count, seed):
    batches = Batches(numbered(n), batch_size, seed, position=start)
    stacked = batches.take(start, count)
    for i, batch in enumerate(itertools.islice(iter(batches), count)):
        assert_same(batch, batches.at(start + i * batch_size))
        assert_same(batch, {name: value[i] for name, value in stacked.items()})
    other = Batches(numbered(n), 1, seed)
    flat = stacked["i"].ravel()
    assert [int(other.at(start + j)["i"][0]) for j in range(0, len(flat), 7)] == flat[::7].tolist()


def test_resume_at_every_position_is_bitwise():
    n, batch_size = 11, 4
    whole = Batches(numbered(n), batch_size, seed=3)
    expected = stream(whole, 5 * n)
    for begin in range(3 * n):
        resumed = Batches(numbered(n), batch_size, seed=3, position=begin)
        assert np.array_equal(stream(resumed, 2 * n), expected[begin : begin + 2 * n])
    for done in range(9):
        state = json.loads(json.dumps(whole.state(done)))
        again = Batches(numbered(n), batch_size, seed=3, position=999).resume(state)
        assert again.position == done * batch_size
        assert np.array_equal(stream(again, n), expected[done * batch_size :][:n])
        assert again.state(2) == whole.state(done + 2)


def test_resume_keeps_the_map_and_changes_nothing_else():
    batches = Batches(numbered(5), 2, 1, False, 3, lambda batch, positions: batch)
    again = batches.resume(batches.state(1))
    assert again.position == 5
    for field in ("source", "batch_size", "seed", "shuffle", "map"):
        assert getattr(again, field) is getattr(batches, field)


def test_a_foreign_state_is_refused_field_by_field():
    batches = Batches(numbered(8), 4, seed=1)
    foreign = Batches(numbered(9), 2, seed=2, shuffle=False).state(1) | {"version": 99}
    with pytest.raises(DataError) as caught:
        batches.resume(foreign)
    message = str(caught.value)
    for part in (
        "version: the state has 99, this stream 2",
        "batch_size: the state has 2, this stream 4",
        "seed: the state has 2, this stream 1",
        "shuffle: the state has False, this stream True",
        "length: the state has 9, this stream 8",
        "fingerprint: the state has",
    ):
        assert part in message
    assert "position:" not in message


@pytest.mark.parametrize("field", ["version", "batch_size", "seed", "shuffle", "length"])
def test_each_missing_field_is_refused(field):
    batches = Batches(numbered(8), 4)
    state = batches.state(1)
    del state[field]
    with pytest.raises(DataError, match=f"{field}: the state has 'no such field'"):
        batches.resume(state)


@pytest.mark.parametrize("position", [-1, 1.5, "3", None, True, 2**63])
def test_a_position_that_is_none_is_refused(position):
    batches = Batches(numbered(8), 4)
    with pytest.raises(DataError, match="position: the state has"):
        batches.resume(batches.state(1) | {"position": position})


def test_other_content_of_the_same_length_is_refused():
    state = Batches(numbered(8), 4).state(1)
    other = ArraySource({"i": np.arange(8), "x": np.zeros((8, 2), np.float32)})
    with pytest.raises(DataError, match=r"fingerprint.*other content"):
        Batches(other, 4).resume(state)


def test_bad_numbers_are_listed_together():
    with pytest.raises(DataError) as caught:
        Batches(numbered(3), 0, seed=-1, position=1.5)
    for part in ("batch_size is 0", "seed is -1", "position is 1.5"):
        assert part in str(caught.value)


class Odd(NamedTuple):
    """A source that returns whatever it is told to."""

    length: int
    batch: object
    fingerprint: str = "odd"

    def __len__(self):
        return self.length

    def gather(self, indices):
        return self.batch


def test_an_empty_source_is_refused():
    with pytest.raises(DataError, match="Odd is empty"):
        Batches(Odd(0, {}), 1)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({}, "expected a dict"),
        ([np.zeros(2)], "returned list"),
        ({"x": np.zeros(2), "y": np.zeros(3)}, r"asked for 2 examples.*'y' has shape \(3,\)"),
        ({"x": np.float32(1)}, r"'x' has shape \(\)"),
        ({"x": 5}, "'x' has shape None"),
    ],
)
def test_a_source_or_map_that_breaks_its_contract_is_named(batch, message):
    with pytest.raises(DataError, match=f"Odd.gather.*{message}"):
        Batches(Odd(4, batch), 2).at(0)
    mapped = Batches(numbered(4), 2, map=lambda b, positions: batch)
    with pytest.raises(DataError, match=f"map returned|map was.*{message}"):
        mapped.at(0)


def jitter(batch, positions):
    """An augmentation as it should be: keyed by seed and position, and by nothing else."""
    bits = random_bits(17, positions)
    noise = (bits >> np.uint64(40)).astype(np.float32) / np.float32(1 << 24)
    return batch | {"x": batch["x"] + noise[:, None], "position": positions}


def test_a_map_keyed_by_position_does_not_depend_on_portions():
    batches = Batches(numbered(10), 3, map=jitter)
    whole = batches.take(0, 20)
    assert np.array_equal(whole["position"].ravel(), np.arange(60))
    with batches.feed([1, 2, 3, 5, *[1] * 7, 2]) as feed:
        parts = list(feed)
    assert_same({name: np.concatenate([part[name] for part in parts]) for name in whole}, whole)
    for i, batch in enumerate(itertools.islice(iter(batches), 20)):
        assert_same(batch, {name: value[i] for name, value in whole.items()})
    resumed = batches.resume(batches.state(7))
    assert_same(next(iter(resumed)), {name: value[7] for name, value in whole.items()})
    # The same example is drawn another noise in another epoch.
    first, second = whole["x"].reshape(60, 2)[:10], whole["x"].reshape(60, 2)[10:20]
    order = [np.argsort(whole["i"].ravel()[s]) for s in (slice(0, 10), slice(10, 20))]
    assert not np.any(first[order[0]] == second[order[1]])


def test_steps_and_epochs():
    batches = Batches(numbered(1000), 32)
    assert batches.steps_per_epoch == 31.25
    assert batches.steps(1) == 32 and batches.steps(4) == 125 and batches.steps(0.0) == 0
    # In floating point, 0.07 * 100 is above 7.
    assert Batches(numbered(100), 1).steps(0.07) == 7
    assert batches.epochs(125) == 4.0


def test_a_token_stream_reads_every_window():
    source = TokenSource(np.arange(33), window=4)
    batches = Batches(source, 3, seed=5)
    targets = batches.take(0, 8)["targets"].reshape(3, -1)
    for epoch in targets:
        assert np.array_equal(np.sort(epoch), np.arange(1, 33))
