import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fnml.core import ShapeError
from fnml.models import dropout, embed, gelu, swiglu

X = np.linspace(-6, 6, 101)


def test_gelu_is_the_tanh_form_and_near_the_erf_form():
    got = gelu(jnp.asarray(X, jnp.float32))
    tanh = 0.5 * X * (1 + np.tanh(math.sqrt(2 / math.pi) * (X + 0.044715 * X**3)))
    erf = np.array([0.5 * x * (1 + math.erf(x / math.sqrt(2))) for x in X])
    np.testing.assert_allclose(got, tanh, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(got, erf, atol=5e-4)


def test_swiglu_equals_numpy():
    gate, up = X, np.flip(X) + 1
    got = swiglu(jnp.asarray(gate, jnp.float32), jnp.asarray(up, jnp.float32))
    np.testing.assert_allclose(got, gate / (1 + np.exp(-gate)) * up, rtol=1e-5, atol=1e-6)


def test_gelu_keeps_bfloat16_under_strict_promotion():
    assert gelu(jnp.ones(3, jnp.bfloat16)).dtype == jnp.bfloat16


def test_dropout_drops_the_share_and_keeps_the_mean():
    x = jnp.ones((200, 200))
    y = dropout(x, 0.25, jax.random.key(0))
    # 40,000 draws: five standard deviations are 0.011.
    assert abs(float((y == 0).mean()) - 0.25) < 0.011
    np.testing.assert_allclose(np.unique(y), [0.0, 4 / 3], rtol=1e-6)
    assert dropout(x, 0.25, None) is x
    assert dropout(x, 0.0, jax.random.key(0)) is x
    assert dropout(x.astype(jnp.bfloat16), 0.25, jax.random.key(0)).dtype == jnp.bfloat16


def test_dropout_draws_by_key_and_passes_the_gradient_of_what_it_kept():
    x = jnp.ones((10, 10))
    a, b, c = (dropout(x, 0.5, jax.random.key(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(a, b)
    assert (a != c).any()
    grad = jax.grad(lambda x: dropout(x, 0.5, jax.random.key(0)).sum())(x)
    np.testing.assert_array_equal(grad, a)


def test_embed_looks_up_and_sums_gradients_of_repeated_tokens():
    table = jnp.asarray(np.random.default_rng(0).normal(size=(5, 3)), jnp.float32)
    tokens = jnp.asarray([[4, 0, 4], [1, 4, 0]])
    np.testing.assert_array_equal(embed(tokens, table), np.asarray(table)[np.asarray(tokens)])
    grad = jax.grad(lambda table: embed(tokens, table).sum())(table)
    np.testing.assert_array_equal(grad, np.array([2, 1, 0, 0, 3.0])[:, None] * np.ones((1, 3)))


@pytest.mark.parametrize("token", [-1, 5, 1000])
def test_a_token_outside_the_vocabulary_gives_nan(token):
    out = embed(jnp.asarray([0, token]), jnp.ones((5, 3)))
    assert np.isfinite(out[0]).all()
    assert np.isnan(out[1]).all()


def test_embed_refuses_floats():
    with pytest.raises(ShapeError, match="expected integers"):
        embed(jnp.zeros(3), jnp.ones((5, 3)))
