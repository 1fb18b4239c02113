import jax
import numpy as np
import pytest
from one_op import one_op

from fnml.core import ConfigError
from fnml.interop.onnx import from_onnx

SHAPE = [4000]


def draws(op, inputs=(), outputs=(np.float32,), key=None, opset=15, **attributes):
    imported, params = from_onnx(one_op(op, inputs, outputs, opset, **attributes))
    return np.asarray(imported.apply(params, *inputs, key=key), np.float64)


def near(values, mean, deviation):
    """Compare moments; five standard errors of the mean of so many numbers."""
    margin = 5 * deviation / np.sqrt(values.size)
    assert abs(values.mean() - mean) < margin and abs(values.std() - deviation) < 2 * margin


def test_moments_are_those_asked_for():
    key = jax.random.key(0)
    near(draws("RandomNormal", key=key, shape=SHAPE, mean=2.0, scale=0.5), 2, 0.5)
    near(draws("RandomUniform", key=key, shape=SHAPE, low=-1.0, high=3.0), 1, 4 / 12**0.5)
    x = np.full(SHAPE, 0.3, np.float32)
    near(draws("RandomNormalLike", [x], key=key), 0, 1)
    near(draws("RandomUniformLike", [x], key=key), 0.5, 12**-0.5)
    near(draws("Bernoulli", [x], key=key), 0.3, 0.21**0.5)


def test_multinomial_draws_by_unnormalised_logarithms():
    logits = np.log(np.array([[1, 3], [4, 1]], np.float32)) + 7
    out = draws("Multinomial", [logits], [np.int32], jax.random.key(1), sample_size=4000)
    assert out.shape == (2, 4000)
    near(out[0], 0.75, 0.1875**0.5)
    near(out[1], 0.2, 0.16**0.5)


def test_the_same_key_or_seed_draws_the_same_numbers():
    first, second = jax.random.key(0), jax.random.key(1)
    a, b, c = (draws("RandomNormal", key=k, shape=[8]) for k in (first, first, second))
    np.testing.assert_array_equal(a, b)
    assert not (a == c).any()
    # A seed is the node's own: no key is needed, and another one changes nothing.
    d, e, f = (
        draws("RandomNormal", key=k, shape=[8], seed=s)
        for k, s in ((None, 3.0), (first, 3.0), (None, 4.0))
    )
    np.testing.assert_array_equal(d, e)
    assert not (d == f).any()


def test_without_key_and_seed_the_error_names_the_node():
    with pytest.raises(ConfigError, match=r"node 'node' .RandomNormal. draws random numbers.*key="):
        draws("RandomNormal", shape=[2])
