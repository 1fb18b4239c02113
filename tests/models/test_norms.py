import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from fnml.core import Mean, ShapeError, init
from fnml.models import batch_norm, batch_norm_state, layer_norm, rms_norm

X = np.random.default_rng(0).normal(size=(6, 3, 5)) * 2 + 1
SCALE, BIAS = np.linspace(0.5, 1.5, 5), np.linspace(-1, 1, 5)


def _f32(*arrays):
    return [jnp.asarray(a, jnp.float32) for a in arrays]


def test_rms_norm_equals_numpy():
    want = X / np.sqrt((X**2).mean(-1, keepdims=True) + 1e-6) * SCALE
    np.testing.assert_allclose(rms_norm(*_f32(X, SCALE)), want, rtol=1e-5, atol=1e-6)


def test_layer_norm_equals_numpy():
    centred = X - X.mean(-1, keepdims=True)
    plain = centred / np.sqrt(X.var(-1, keepdims=True) + 1e-5) * SCALE
    np.testing.assert_allclose(layer_norm(*_f32(X, SCALE)), plain, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(
        layer_norm(*_f32(X, SCALE, BIAS)), plain + BIAS, rtol=1e-5, atol=1e-6
    )


def test_batch_norm_equals_numpy_in_training_and_evaluation():
    x, scale, bias = _f32(X, SCALE, BIAS)
    state = init(batch_norm_state(5), jax.random.key(0))
    got, stats = batch_norm(x, scale, bias, state=state, train=True)
    mean, square = X.mean((0, 1)), (X**2).mean((0, 1))
    want = (X - mean) / np.sqrt(X.var((0, 1)) + 1e-5) * SCALE + BIAS
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(stats["mean"].value, mean, rtol=1e-5)
    np.testing.assert_allclose(stats["square"].value, square, rtol=1e-5)
    assert stats["mean"].weight.tolist() == [18.0] * 5
    moments = {"mean": jnp.asarray(mean, jnp.float32), "square": jnp.asarray(square, jnp.float32)}
    got, none = batch_norm(x, scale, bias, state=moments, train=False)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
    assert none == ()


def test_statistics_of_unequal_parts_merge_to_those_of_the_batch():
    x, scale, bias = _f32(X, SCALE, BIAS)

    def stats(x):
        return batch_norm(x, scale, bias, state=None, train=True)[1]

    is_mean = lambda leaf: isinstance(leaf, Mean)
    merged = jax.tree.map(lambda a, b: a + b, stats(x[:1]), stats(x[1:]), is_leaf=is_mean)
    for name, want in stats(x).items():
        np.testing.assert_allclose(merged[name].value, want.value, rtol=1e-5)
        np.testing.assert_array_equal(merged[name].weight, want.weight)


def test_a_variance_that_cancels_below_zero_stays_finite():
    state = {"mean": jnp.full(1, 1000.0), "square": jnp.full(1, 999_999.0)}
    y, _ = batch_norm(jnp.ones((2, 1)), jnp.ones(1), jnp.zeros(1), state=state, train=False)
    assert np.isfinite(y).all()


def test_gradients_in_float64():
    with jax.enable_x64(True):
        x, scale, bias = (jnp.asarray(a, jnp.float64) for a in (X[:3], SCALE, BIAS))

        def train(x, scale, bias):
            return batch_norm(x, scale, bias, state=None, train=True)[0]

        check_grads(rms_norm, (x, scale), order=1)
        check_grads(layer_norm, (x, scale, bias), order=1)
        check_grads(train, (x, scale, bias), order=1)


@pytest.mark.parametrize("norm", [rms_norm, layer_norm])
def test_bfloat16_is_normalised_in_float32(norm):
    x, scale = _f32(X, SCALE)
    got = norm(x.astype(jnp.bfloat16), scale)
    want = norm(x.astype(jnp.bfloat16).astype(jnp.float32), scale)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_array_equal(got, want.astype(jnp.bfloat16))


def test_a_wrong_vector_is_named():
    with pytest.raises(ShapeError, match=r"rms_norm scale has shape \(3,\): expected \(5,\)"):
        rms_norm(jnp.ones((2, 5)), jnp.ones(3))
    with pytest.raises(ShapeError, match="layer_norm bias"):
        layer_norm(jnp.ones((2, 5)), jnp.ones(5), jnp.ones(1))
    state = {"mean": jnp.ones(3), "square": jnp.ones(3)}
    with pytest.raises(ShapeError, match="batch_norm state 'mean'"):
        batch_norm(jnp.ones((2, 5)), jnp.ones(5), jnp.ones(5), state=state, train=False)
