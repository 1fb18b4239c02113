"""Layer normalisation."""

from typing import Any

import jax

from fnml import pallas_kernels
from fnml.models._broadcast import check_last


def layer_norm(
    x: jax.Array,
    scale: jax.Array,
    bias: jax.Array | None = None,
    residual: jax.Array | None = None,
    *,
    eps: float = 1e-5,
) -> Any:
    """Return ``(x - mean) / sqrt(var + eps) * scale + bias`` over the last axis of ``x`` [..., D].

    ``scale`` and ``bias`` are [D]. Computed in at least float32, returned in the dtype of ``x``.
    With a ``residual`` like ``x``, the sum is normalised, and ``(y, x + residual)`` comes back. On
    a TPU large inputs go through :func:`fnml.pallas_kernels.layer_norm`.

    Law: ``layer_norm(x + c, ...) == layer_norm(x, ...)`` for a number c, to rounding.

    Source: Ba, Kiros and Hinton 2016, arXiv:1607.06450, equations 3 and 4.

    Raises:
      ShapeError: ``scale`` or ``bias`` is not [D].

    >>> import jax.numpy as jnp
    >>> layer_norm(jnp.array([1.0, 3.0]), jnp.ones(2), jnp.zeros(2), eps=0.0).tolist()
    [-1.0, 1.0]
    """
    check_last("layer_norm scale", scale, x)
    if bias is not None:
        check_last("layer_norm bias", bias, x)
    return pallas_kernels.layer_norm(x, scale, bias, residual, eps=eps)
