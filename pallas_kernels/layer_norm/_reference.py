"""The textbook form."""

import jax
import jax.numpy as jnp

from fnml.pallas_kernels._dtypes import wide


def reference(
    x: jax.Array,
    scale: jax.Array,
    bias: jax.Array | None,
    residual: jax.Array | None,
    eps: float,
) -> tuple[jax.Array, jax.Array]:
    """Return the normalised sum and the sum, [..., D] in the dtype of ``x``."""
    total = x if residual is None else x + residual
    full = total.astype(wide(x.dtype))
    mean, variance = full.mean(-1, keepdims=True), full.var(-1, keepdims=True)
    out = (full - mean) / jnp.sqrt(variance + eps)
    out = out * jnp.broadcast_to(scale.astype(full.dtype), full.shape)
    if bias is not None:
        out = out + jnp.broadcast_to(bias.astype(full.dtype), full.shape)
    return out.astype(x.dtype), total
