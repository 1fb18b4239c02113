"""Means that merge: parts give the whole, and what has no weight does not count."""

import functools
import operator

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fnml.core import Mean, Metrics

SIZE = 24
numbers = st.floats(-1e3, 1e3, width=32)
pairs = st.lists(
    st.tuples(numbers, st.sampled_from([0.0, 0.5, 1.0, 3.0])), min_size=SIZE, max_size=SIZE
)


def sum_of(means):
    return functools.reduce(operator.add, means)


def parts(values, weights, cuts):
    """Return the mean of each slice; other weights are 0, so that one shape is compiled once."""
    position = np.arange(SIZE)
    return [
        Mean.of(jnp.array(values), jnp.where((start <= position) & (position < stop), weights, 0))
        for start, stop in zip([0, *cuts], [*cuts, SIZE], strict=True)
    ]


@settings(max_examples=50, deadline=None)
@given(pairs, st.lists(st.integers(0, SIZE), max_size=3).map(sorted))
def test_the_parts_merge_to_the_whole(pairs, cuts):
    values, weights = (np.array(column, np.float32) for column in zip(*pairs, strict=True))
    merged = sum_of(parts(values, weights, cuts))
    whole = Mean.of(jnp.array(values), jnp.array(weights))
    exact = values.astype(np.float64)
    # A float32 sum of n products rounds 2n times, by at most 2**-24 of the absolute total.
    bound = 4 * SIZE * 2.0**-24 * np.sum(np.abs(exact) * weights) + 1e-30
    for mean in (merged, whole):
        # Weights are multiples of 1/2 with a small sum, so their sum is exact in float32.
        assert float(mean.weight) == np.sum(weights)
        assert abs(float(mean.total) - np.sum(exact * weights)) <= bound
        if mean.weight > 0:
            expected = np.average(exact, weights=weights)
            assert abs(float(mean.value) - expected) <= 2 * bound / np.sum(weights)


def test_integers_in_any_split_merge_bit_for_bit():
    # Sums of small integers are exact in float32, so order and split cannot matter.
    values, weights = np.arange(SIZE, dtype=np.int32) - 9, np.arange(SIZE, dtype=np.int32) % 3
    whole = Mean.of(jnp.array(values), jnp.array(weights))
    for cut in range(SIZE + 1):
        chex.assert_trees_all_equal(sum_of(parts(values, weights, [cut])), whole)
    assert whole.total.dtype == whole.weight.dtype == jnp.float32
    assert float(whole.total) == np.sum(values * weights)


def test_without_weights_every_value_counts_once():
    mean = Mean.of(jnp.array([[1.0, 2.0], [3.0, 6.0]], jnp.bfloat16))
    assert (float(mean.total), float(mean.weight), float(mean.value)) == (12.0, 4.0, 3.0)
    assert mean.total.dtype == jnp.float32


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, -jnp.inf])
def test_a_value_of_weight_0_does_not_count_even_if_it_is_not_finite(bad):
    values, weights = jnp.array([1.0, bad, 3.0]), jnp.array([1.0, 0.0, 2.0])
    assert float(Mean.of(values, weights).value) == pytest.approx(7 / 3, rel=1e-6)
    grads = jax.grad(lambda values: Mean.of(values, weights).value)(values)
    np.testing.assert_allclose(grads, np.array([1, 0, 2]) / 3, rtol=1e-6)


def test_a_value_that_counts_shows_when_it_is_nan():
    assert np.isnan(Mean.of(jnp.array([1.0, jnp.nan]), jnp.array([0.0, 1.0])).value)


def test_where_nothing_counts_value_and_gradients_are_0():
    def value(values, weights):
        return Mean.of(values, weights).value

    values, weights = jnp.array([2.0, jnp.nan]), jnp.zeros(2)
    assert float(value(values, weights)) == 0.0
    for grads in jax.grad(value, argnums=(0, 1))(values, weights):
        assert np.all(np.isfinite(grads))
    np.testing.assert_array_equal(jax.grad(value)(values, weights), np.zeros(2))


def test_statistics_merge_elementwise():
    a = Mean(jnp.array([2.0, 9.0]), jnp.array([1.0, 3.0]))
    b = Mean(jnp.array([4.0, 0.0]), jnp.array([1.0, 0.0]))
    np.testing.assert_array_equal((a + b).value, np.array([3.0, 3.0]))


def test_both_are_pytrees_and_pass_through_jit():
    metrics = Metrics(jnp.float32(2), {"loss": Mean.of(jnp.ones(2))}, stats=(Mean.of(jnp.ones(3)),))
    doubled = jax.jit(lambda m: jax.tree.map(lambda x: 2 * x, m))(metrics)
    assert isinstance(doubled.values["loss"], Mean)
    assert float(doubled.stats[0].weight) == 6.0
    assert float(doubled.stats[0].value) == 1.0
    assert Metrics(jnp.float32(1)).values == {}


def test_weights_of_another_shape_are_refused():
    with pytest.raises(ValueError, match="shape"):
        Mean.of(2 * jnp.ones((4, 3)), jnp.ones((4, 1)))
