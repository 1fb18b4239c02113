"""Root-mean-square normalisation."""

import jax
import jax.numpy as jnp
from jax import lax

from fnml.models._broadcast import along_last
from fnml.models._wide import wide


def rms_norm(x: jax.Array, scale: jax.Array, *, eps: float = 1e-6) -> jax.Array:
    """Return ``x / sqrt(mean(x**2) + eps) * scale`` over the last axis of ``x`` [..., D].

    ``scale`` is [D]. Computed in at least float32, returned in the dtype of ``x``.

    Law: ``rms_norm(c * x, scale) == rms_norm(x, scale)`` for c > 0, up to ``eps``.

    Source: Zhang and Sennrich 2019, arXiv:1910.07467, equation 4.

    Raises:
      ShapeError: ``scale`` is not [D].

    >>> import jax.numpy as jnp
    >>> rms_norm(jnp.array([2.0, -2.0]), jnp.ones(2), eps=0.0).tolist()
    [1.0, -1.0]
    """
    full = x.astype(wide(x.dtype))
    inverse = lax.rsqrt(jnp.mean(full * full, -1, keepdims=True) + eps)
    return (full * inverse * along_last("rms_norm scale", scale, full)).astype(x.dtype)
