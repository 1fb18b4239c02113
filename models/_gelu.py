"""The Gaussian error linear unit."""

import math

import jax


def gelu(x: jax.Array) -> jax.Array:
    """Return GELU of ``x`` in its tanh form, for any shape.

    ``0.5 * x * (1 + tanh(u))`` with ``u = sqrt(2 / pi) * (x + 0.044715 * x**3)`` is written
    ``x * sigmoid(2 * u)``, the same function; it is faster than the erf form on a CPU
    and differs from it by at most 5e-4.

    Source: Hendrycks and Gimpel 2016, arXiv:1606.08415, section 2.

    >>> import jax.numpy as jnp
    >>> gelu(jnp.array([0.0, 1.0])).round(4).tolist()
    [0.0, 0.8411999940872192]
    """
    inner = math.sqrt(8 / math.pi) * (x + 0.044715 * (x * x * x))
    return x * jax.nn.sigmoid(inner)
