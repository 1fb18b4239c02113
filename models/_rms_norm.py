"""Root-mean-square normalisation."""

from typing import Any

import jax

from fnml import pallas_kernels
from fnml.models._broadcast import check_last


def rms_norm(
    x: jax.Array, scale: jax.Array, residual: jax.Array | None = None, *, eps: float = 1e-6
) -> Any:
    """Return ``x / sqrt(mean(x**2) + eps) * scale`` over the last axis of ``x`` [..., D].

    ``scale`` is [D]. Computed in at least float32, returned in the dtype of ``x``. With a
    ``residual`` like ``x``, the sum is normalised, and ``(y, x + residual)`` comes back. On a TPU
    large inputs go through :func:`fnml.pallas_kernels.rms_norm`.

    Law: ``rms_norm(c * x, scale) == rms_norm(x, scale)`` for c > 0, up to ``eps``.

    Source: Zhang and Sennrich 2019, arXiv:1910.07467, equation 4.

    Raises:
      ShapeError: ``scale`` is not [D].

    >>> import jax.numpy as jnp
    >>> rms_norm(jnp.array([2.0, -2.0]), jnp.ones(2), eps=0.0).tolist()
    [1.0, -1.0]
    """
    check_last("rms_norm scale", scale, x)
    return pallas_kernels.rms_norm(x, scale, residual, eps=eps)
