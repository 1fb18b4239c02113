"""The layout's arithmetic: one fixed tree of additions, exact weights, named faults."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fnml.core import LayoutError, Mean, Metrics
from fnml.transforms._layout import from_sums, ordered_sum, pairwise, split_batch, to_sums


def numbers(count: int, seed: int = 0) -> np.ndarray:
    """Draw float32 numbers of many magnitudes, so that another order of addition shows."""
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(count, 17)) * 10.0 ** rng.integers(-4, 5, (count, 17))).astype("f4")


def tree_sum(values: np.ndarray) -> np.ndarray:
    """Add float32 rows with NumPy: neighbours first, an odd last one moves up."""
    rows = list(values)
    while len(rows) > 1:
        odd = rows[-1:] if len(rows) % 2 else []
        rows = [rows[i] + rows[i + 1] for i in range(0, len(rows) - 1, 2)] + odd
    return rows[0]


@settings(deadline=None, max_examples=40)
@given(n=st.integers(1, 7), k=st.integers(0, 3), seed=st.integers(0, 9))
def test_pairwise_over_blocks_of_a_power_of_two_is_pairwise_over_all(n, k, seed):
    parts = list(numbers(n << k, seed))
    blocks = [pairwise(parts[i : i + (1 << k)]) for i in range(0, len(parts), 1 << k)]
    np.testing.assert_array_equal(pairwise(blocks), pairwise(parts))


@settings(deadline=None, max_examples=30)
@given(count=st.integers(1, 24), seed=st.integers(0, 9))
def test_pairwise_is_the_tree_written_in_numpy(count, seed):
    parts = numbers(count, seed)
    np.testing.assert_array_equal(pairwise(list(parts)), tree_sum(parts))


@pytest.mark.parametrize("count", [1, 2, 3, 4, 6, 8, 12, 16])
def test_ordered_sum_adds_along_the_tree_and_traces_the_shard_once(count):
    parts = numbers(count)
    traces = []

    def shard(i):
        traces.append(i)
        return {"x": jnp.asarray(parts)[i], "i": i}

    out = jax.jit(lambda: ordered_sum(shard, count))()
    np.testing.assert_array_equal(out["x"], tree_sum(parts))
    assert int(out["i"]) == count * (count - 1) // 2
    assert len(traces) == 1


def test_the_sums_held_at_once_grow_with_the_levels_of_the_tree():
    def temporary(count):
        def shard(i):
            return jnp.full((1 << 16,), i, jnp.float32)

        compiled = jax.jit(lambda: ordered_sum(shard, count)).lower().compile()
        return compiled.memory_analysis().temp_size_in_bytes / (4 << 16)

    # Two sums for each of 5 levels, and no more than a few in flight; not 32.
    assert temporary(32) < 16
    assert temporary(31) >= 31


def test_another_order_of_addition_would_be_noticed():
    parts = numbers(8)
    assert (tree_sum(parts) != np.cumsum(parts, 0, dtype=np.float32)[-1]).any()


def test_ordered_sum_works_with_64_bit_integers_as_the_default():
    with jax.enable_x64(True):
        parts = jnp.arange(12.0)
        assert float(ordered_sum(lambda i: parts[i], 12)) == 66.0
        assert float(ordered_sum(lambda i: parts[i], 8)) == 28.0


def test_a_shard_of_weight_0_contributes_exact_zeros_even_if_its_loss_is_nan():
    metrics = Metrics(jnp.float32(0), {"a": Mean.of(jnp.array([jnp.nan]), jnp.zeros(1))})
    sums = to_sums(jnp.float32(jnp.nan), metrics, {"w": jnp.array([jnp.nan, jnp.inf])})
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(sums))


def test_sums_are_float32_for_narrow_floats_and_float64_stays():
    with jax.enable_x64(True):
        grads = {"half": jnp.ones(2, jnp.bfloat16), "double": jnp.ones(2, jnp.float64)}
        sums = to_sums(jnp.bfloat16(2.0), Metrics(jnp.float32(3.0)), grads)
        assert sums.loss.dtype == sums.grads["half"].dtype == jnp.float32
        assert sums.grads["double"].dtype == jnp.float64
        assert float(sums.loss) == 6.0
        (loss, metrics), back = from_sums(sums, grads)
    assert back["half"].dtype == jnp.bfloat16 and back["double"].dtype == jnp.float64
    assert float(loss) == 2.0 and float(metrics.weight) == 3.0
    np.testing.assert_array_equal(back["double"], 1.0)


def test_split_batch_keeps_the_order_of_the_examples():
    shards = split_batch({"x": np.arange(12).reshape(6, 2), "y": np.arange(6)}, 3)
    assert shards["x"].tolist() == [[[0, 1], [2, 3]], [[4, 5], [6, 7]], [[8, 9], [10, 11]]]
    assert shards["y"].tolist() == [[0, 1], [2, 3], [4, 5]]


@pytest.mark.parametrize(
    ("batch", "words"),
    [
        ({}, ["no arrays"]),
        ({"x": np.zeros((4, 2)), "y": np.zeros(3)}, ["x: 4", "y: 3"]),
        ({"x": np.zeros(4), "s": np.float32(0)}, ["x: 4", "s: None"]),
        ({"x": np.zeros(10)}, ["10 examples", "4 equal shards", "use 5 shards", "multiple of 4"]),
    ],
)
def test_split_batch_names_every_fault(batch, words):
    with pytest.raises(LayoutError) as error:
        split_batch(batch, 4)
    assert all(word in str(error.value) for word in words), str(error.value)
