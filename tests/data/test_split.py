"""Subset is indexing; split is disjoint, complete and deterministic."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fnml.core import DataError
from fnml.data import ArraySource, Batches, Subset, split


def numbered(n):
    return ArraySource({"i": np.arange(n), "x": np.arange(n, dtype=np.float32) / 7})


@settings(max_examples=80, deadline=None)
@given(n=st.integers(2, 300), seed=st.integers(0, 2**63 - 1), data=st.data())
def test_split_is_disjoint_complete_and_repeatable(n, seed, data):
    count = data.draw(st.integers(1, n - 1))
    train, held = split(numbered(n), count, seed)
    assert len(held) == count
    whole = np.concatenate([train.indices, held.indices])
    assert np.array_equal(np.sort(whole), np.arange(n))
    assert np.all(np.diff(train.indices) > 0) and np.all(np.diff(held.indices) > 0)
    again = split(numbered(n), count, seed)
    for part, other in zip((train, held), again, strict=True):
        assert np.array_equal(part.indices, other.indices)
        assert part.fingerprint == other.fingerprint
    assert train.fingerprint != held.fingerprint


def test_seeds_give_different_splits_and_every_example_its_chance():
    parts = [split(numbered(40), 0.25, seed)[1].indices for seed in range(400)]
    assert len({part.tobytes() for part in parts}) == 400
    counts = np.bincount(np.concatenate(parts), minlength=40)
    # 100 expected, standard deviation 8.7: five of them.
    assert np.abs(counts - 100).max() < 44


def test_a_fraction_is_rounded_to_a_count():
    assert [len(split(numbered(10), f)[1]) for f in (0.1, 0.26, 0.94)] == [1, 3, 9]


@pytest.mark.parametrize("held_out", [0, 10, 11, -1, 0.0, 1.0, 0.01, float("nan"), float("inf")])
def test_an_empty_part_is_refused(held_out):
    with pytest.raises(DataError, match=r"of 10 examples: expected 1 to 9"):
        split(numbered(10), held_out)


@settings(max_examples=40, deadline=None)
@given(
    indices=st.lists(st.integers(0, 9), min_size=1, max_size=20),
    data=st.data(),
)
def test_subset_is_indexing(indices, data):
    source, kept = numbered(10), np.array(indices)
    subset = Subset(source, kept)
    inner = np.array(data.draw(st.lists(st.integers(0, len(indices) - 1))), np.int64)
    assert len(subset) == len(indices)
    for name, value in subset.gather(inner).items():
        assert value.tobytes() == source.gather(kept[inner])[name].tobytes()
    nested = Subset(subset, np.arange(len(indices))[::-1])
    assert np.array_equal(nested.gather(np.array([0]))["i"], kept[-1:])


def test_subset_is_fixed_and_recognised_exactly():
    kept = np.arange(100_000) % 10
    subset = Subset(numbered(10), kept)
    before = subset.fingerprint
    changed = kept.copy()
    changed[54_321] = (changed[54_321] + 1) % 10
    assert Subset(numbered(10), changed).fingerprint != before
    kept[:] = 0
    assert subset.gather(np.array([7]))["i"].tolist() == [7]
    with pytest.raises(ValueError, match="read-only"):
        subset.indices[0] = 3
    other = ArraySource({"i": np.arange(10)})
    assert Subset(other, subset.indices).fingerprint != before


@pytest.mark.parametrize("indices", [[], [10], [-1], [0.5], [[1]]])
def test_bad_indices_are_refused(indices):
    with pytest.raises(DataError, match="Subset"):
        Subset(numbered(10), np.array(indices))
    with pytest.raises(DataError, match="Subset"):
        Subset(numbered(10), np.arange(5)).gather(np.array([5]))


def test_a_held_out_example_never_trains():
    train, held = split(numbered(30), 0.3, seed=4)
    seen = Batches(train, 7).take(0, 30)["i"]
    assert set(seen.ravel().tolist()) == set(train.indices.tolist())
    assert not set(seen.ravel().tolist()) & set(held.indices.tolist())
