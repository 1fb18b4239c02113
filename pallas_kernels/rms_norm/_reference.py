"""The textbook form."""

import jax
import jax.numpy as jnp

from fnml.pallas_kernels._dtypes import wide


def reference(
    x: jax.Array, scale: jax.Array, residual: jax.Array | None, eps: float
) -> tuple[jax.Array, jax.Array]:
    """Return the normalised sum and the sum, [..., D] in the dtype of ``x``."""
    total = x if residual is None else x + residual
    full = total.astype(wide(x.dtype))
    length = jnp.sqrt(jnp.mean(jnp.square(full), axis=-1, keepdims=True) + eps)
    scale = jnp.broadcast_to(scale.astype(full.dtype), full.shape)
    return (full / length * scale).astype(x.dtype), total
