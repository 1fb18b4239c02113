"""widen: a function's own operations, in float64."""

import jax
import jax.numpy as jnp
import numpy as np

from fnml.laws._widen import widen
from fnml.pallas_kernels import attention


def test_a_kernel_with_a_body_for_other_platforms_is_widened_as_it_runs_here():
    q = jax.random.normal(jax.random.key(0), (1, 512, 1, 16))
    assert "pallas_call" in str(jax.make_jaxpr(lambda q: attention(q, q, q))(q))
    wide = jax.jit(widen(lambda q: attention(q, q, q), q))
    with jax.enable_x64(True):
        got = np.asarray(wide(jnp.asarray(q, jnp.float64)))[0, :, 0]
    x = np.asarray(q, np.float64)[0, :, 0]
    weights = np.exp(x @ x.T / 4)
    np.testing.assert_allclose(got, weights @ x / weights.sum(-1, keepdims=True), rtol=1e-9)
