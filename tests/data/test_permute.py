"""Laws of the keyed permutation and of the random bits keyed by position."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fnml.core import DataError
from fnml.data import permute, random_bits

KEYS = st.integers(0, 2**64 - 1)


def test_bijection_for_every_small_n():
    for n in range(1, 260):
        for key in (0, 1, 2**64 - 1):
            assert np.array_equal(np.sort(permute(np.arange(n), n, key)), np.arange(n)), (n, key)


@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 200_000), key=KEYS)
def test_bijection(n, key):
    assert np.array_equal(np.sort(permute(np.arange(n), n, key)), np.arange(n))


@settings(max_examples=60, deadline=None)
@given(n=st.integers(1000, 2**62), key=KEYS, start=st.integers(0, 2**62))
def test_injective_and_in_range_for_huge_n(n, key, start):
    start %= n - 500
    image = permute(np.arange(start, start + 500), n, key)
    assert image.min() >= 0 and image.max() < n
    assert len(np.unique(image)) == 500


@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 2**40), key=KEYS, data=st.data())
def test_each_index_is_evaluated_alone(n, key, data):
    indices = np.array(data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=20)))
    whole = permute(indices, n, key)
    alone = [int(permute(indices[i : i + 1], n, key)[0]) for i in range(len(indices))]
    assert whole.tolist() == alone


@settings(max_examples=30, deadline=None)
@given(n=st.integers(1, 5000), keys=st.lists(KEYS, min_size=1, max_size=5))
def test_an_array_of_keys_is_one_key_for_each_index(n, keys):
    indices = np.arange(n)
    which = indices % len(keys)
    mixed = permute(indices, n, np.array(keys, np.uint64)[which])
    for i, key in enumerate(keys):
        assert np.array_equal(mixed[which == i], permute(indices[which == i], n, key))


def test_keys_give_different_orders():
    orders = {permute(np.arange(50), 50, key).tobytes() for key in range(2000)}
    assert len(orders) == 2000


def chi_square_z(counts):
    """The standardised chi-square statistic of counts against uniform: about N(0, 1)."""
    expected = counts.sum() / counts.size
    freedom = counts.size - 1
    return ((counts - expected) ** 2 / expected).sum() / math.sqrt(2 * freedom) - math.sqrt(
        freedom / 2
    )


# Over 20 fixed draws |z| stays below 4 for a random shuffle (two-sided 6e-5 each); the draws
# are deterministic, so this either always or never fails.
@pytest.mark.parametrize("n", [2, 3, 5, 7, 16, 30, 97])
def test_every_index_goes_everywhere_equally_often(n):
    trials = 4000
    images = np.stack([permute(np.arange(n), n, key) for key in range(trials)])
    counts = np.zeros((n, n))
    for column in range(n):
        counts[column] = np.bincount(images[:, column], minlength=n)
    # Rows and columns both sum to `trials`, so the sum of n^2 terms has the mean n (n - 1);
    # scaled to (n - 1)^2, it is a chi-square of that many degrees of freedom.
    statistic = ((counts - trials / n) ** 2 / (trials / n)).sum() * (n - 1) / n
    freedom = (n - 1) ** 2
    assert abs(statistic - freedom) / math.sqrt(2 * freedom) < 4


@pytest.mark.parametrize("n", [3, 4, 5, 6])
def test_every_order_is_equally_likely(n):
    trials = 100_000
    keys = np.arange(trials, dtype=np.uint64)
    images = np.stack([permute(np.full(trials, i), n, keys) for i in range(n)], axis=1)
    orders = np.array(list(itertools.permutations(range(n))))
    weights = n ** np.arange(n)
    counts = np.bincount(images @ weights, minlength=n**n)[orders @ weights].astype(float)
    assert counts.sum() == trials
    assert abs(chi_square_z(counts)) < 4


@pytest.mark.parametrize("n", [30, 100, 257, 600, 1797, 16_384, 17_000])
def test_neighbours_land_independently(n):
    """The distance of two examples' places is uniform modulo n, also at the grid's width."""
    side = math.isqrt(n - 1) + 1
    columns = -(-n // side)
    trials = 600_000 // n
    images = [permute(np.arange(n), n, key) for key in range(trials)]
    for lag in (1, 2, columns, columns + 1):
        counts = sum(
            np.bincount((image - np.roll(image, lag)) % n, minlength=n) for image in images
        )
        assert counts[0] == 0
        assert abs(chi_square_z(counts[1:].astype(float))) < 4


def test_the_order_is_pinned():
    """A saved position means these examples: changing the permutation needs a new version."""
    assert permute(np.arange(10), 10, 0).tolist() == [0, 3, 5, 7, 9, 6, 2, 8, 1, 4]
    assert permute(np.arange(5), 10_000, 2**63).tolist() == [8980, 1914, 8898, 6063, 1065]
    assert permute(np.arange(5), 60_000, 2**63).tolist() == [55776, 47716, 23119, 14983, 16093]
    assert permute(np.array([2**40 - 1]), 2**40, 7).tolist() == [343577104840]
    assert random_bits(1, np.arange(2)).tolist() == [736442933886495122, 12100477452831230990]


@pytest.mark.parametrize("n", [10_000, 60_000])
def test_epochs_are_independent(n):
    """Cells of (place under one key, place under the next) fill like a random table."""
    for key in range(4):
        a, b = permute(np.arange(n), n, key), permute(np.arange(n), n, key + 1)
        cells = np.bincount((a * 16 // n) * 16 + b * 16 // n, minlength=256).astype(float)
        expected = n / 256
        statistic = ((cells - expected) ** 2 / expected).sum()
        assert abs(statistic - 225) / math.sqrt(450) < 4


@pytest.mark.parametrize(
    ("indices", "n", "message"),
    [
        ([0, 5], 5, "index 5 .entry 1 of 2. is out of range"),
        ([-1], 5, "index -1"),
        ([0.5], 5, "integer"),
        ([[0]], 5, "one-dimensional"),
        ([0], 0, "n is 0"),
        ([0], 2**62 + 1, "expected 1 to"),
    ],
)
def test_refusals(indices, n, message):
    with pytest.raises(DataError, match=message):
        permute(np.array(indices), n, 0)


def test_random_bits_are_keyed_by_position_alone():
    positions = np.array([5, 2**50, 5, 0])
    bits = random_bits(3, positions)
    assert bits.dtype == np.uint64 and bits[0] == bits[2]
    assert [random_bits(3, positions[i : i + 1])[0] for i in range(4)] == bits.tolist()
    assert not np.any(random_bits(4, positions) == bits)


def test_random_bits_look_random():
    bits = random_bits(11, np.arange(50_000))
    ones = (bits[:, None] >> np.arange(64, dtype=np.uint64)) & np.uint64(1)
    # Each is 64 binomial means with standard deviation 0.0022.
    assert np.abs(ones.mean(0) - 0.5).max() < 0.01
    assert np.abs((ones[1:] == ones[:-1]).mean(0) - 0.5).max() < 0.01
