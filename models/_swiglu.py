"""The gated activation of Llama's feed-forward layers."""

import jax


def swiglu(gate: jax.Array, up: jax.Array) -> jax.Array:
    """Return ``gate * sigmoid(gate) * up`` for two arrays of one shape and dtype.

    Source: Shazeer 2020, arXiv:2002.05202, equation 5.

    >>> import jax.numpy as jnp
    >>> swiglu(jnp.array([0.0, 2.0]), jnp.array([3.0, 3.0])).round(3).tolist()
    [0.0, 5.285000324249268]
    """
    return gate * jax.nn.sigmoid(gate) * up
