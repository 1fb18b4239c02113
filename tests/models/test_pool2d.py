import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

from fnml.core import ShapeError
from fnml.models import avg_pool2d, global_mean, max_pool2d


def _reduce_window(x, window):
    shape = (1, *window, 1)
    return lax.reduce_window(x, -jnp.inf, lax.max, shape, shape, "VALID")


shapes = st.sampled_from([(1, 3, 7, 2), (2, 4, 6, 1), (2, 5, 3, 3)])
sides = st.sampled_from([(1, 3), (2, 2), (3, 2)])


@settings(max_examples=25, deadline=None)
@given(shape=shapes, window=sides, levels=st.sampled_from([1, 2, 1000]), seed=st.integers(0, 99))
def test_max_and_its_gradient_are_those_of_reduce_window_with_ties(shape, window, levels, seed):
    rng = np.random.default_rng(seed)
    # One or two levels: nearly every window has ties.
    x = jnp.asarray(rng.integers(0, levels, shape), jnp.float32)

    @jax.jit
    def both(x):
        want, vjp_window = jax.vjp(lambda x: _reduce_window(x, window), x)
        got, vjp = jax.vjp(lambda x: max_pool2d(x, window), x)
        grad = jnp.sin(jnp.arange(1.0, 1 + want.size)).reshape(want.shape)
        return (got, vjp(grad)), (want, vjp_window(grad))

    jax.tree.map(np.testing.assert_array_equal, *both(x))


def test_the_first_of_equal_maxima_gets_the_gradient():
    x = jnp.asarray([[1.0, 3.0], [3.0, 3.0]]).reshape(1, 2, 2, 1)
    grad = jax.grad(lambda x: max_pool2d(x).sum())(x)
    assert grad[0, :, :, 0].tolist() == [[0.0, 1.0], [0.0, 0.0]]


def test_nan_reaches_value_and_gradient():
    x = jnp.asarray([[1.0, jnp.nan], [3.0, 2.0]]).reshape(1, 2, 2, 1)
    value, grad = jax.value_and_grad(lambda x: jnp.square(max_pool2d(x)).sum())(x)
    assert np.isnan(value)
    assert np.isnan(grad).any()


def test_max_pool_works_under_jit_vmap_scan_and_checkpoint():
    x = jax.random.normal(jax.random.key(0), (3, 2, 4, 4, 2))

    def loss(x):
        return jnp.sin(max_pool2d(x)).sum()

    want = np.stack([jax.grad(loss)(part) for part in x])
    vmapped = jax.jit(jax.vmap(jax.grad(jax.checkpoint(loss))))(x)
    scanned = lax.scan(lambda _, part: (None, jax.grad(loss)(part)), None, x)[1]
    np.testing.assert_array_equal(vmapped, want)
    np.testing.assert_array_equal(scanned, want)


@settings(max_examples=15, deadline=None)
@given(shape=shapes, window=sides, seed=st.integers(0, 99))
def test_average_equals_numpy(shape, window, seed):
    x = np.random.default_rng(seed).normal(size=shape)
    rows, cols = shape[1] // window[0], shape[2] // window[1]
    want = np.zeros((shape[0], rows, cols, shape[3]))
    for i in range(rows):
        for j in range(cols):
            top, left = i * window[0], j * window[1]
            want[:, i, j] = x[:, top : top + window[0], left : left + window[1]].mean((1, 2))
    got = avg_pool2d(jnp.asarray(x, jnp.float32), window)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def test_global_mean_sums_bfloat16_in_float32():
    x = jnp.full((1, 64, 64, 2), 1.0, jnp.bfloat16).at[0, 0, 0, 0].set(1025.0)
    got = global_mean(x)
    assert got.dtype == jnp.bfloat16
    # 4096 additions in bfloat16 would stop growing at 256.
    assert got.astype(jnp.float32).tolist() == [[1.25, 1.0]]


@pytest.mark.parametrize("pool", [max_pool2d, avg_pool2d])
def test_windows_have_to_fit(pool):
    with pytest.raises(ShapeError, match="fit into the image"):
        pool(jnp.zeros((1, 2, 2, 1)), 3)
    with pytest.raises(ShapeError, match="at least 1 x 1"):
        pool(jnp.zeros((1, 2, 2, 1)), 0)
    with pytest.raises(ShapeError, match=r"\[B, H, W, C\]"):
        pool(jnp.zeros((2, 2, 1)))
