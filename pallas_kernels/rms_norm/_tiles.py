"""What one tile of rows computes, in float32, on every kind of accelerator."""

import jax
import jax.numpy as jnp
from jax import lax


def normalised(x: jax.Array, eps: float) -> tuple[jax.Array, jax.Array]:
    """Return ``x / rms(x)`` [R, D] and ``1 / rms(x)`` [R, 1] of float32 rows."""
    inverse = lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps)
    return x * inverse, inverse


def slopes(
    x: jax.Array, scale: jax.Array, grad: jax.Array, eps: float
) -> tuple[jax.Array, jax.Array]:
    """Return the gradient of x [R, D], and that of the scale row by row [R, D]."""
    unit, inverse = normalised(x, eps)
    inner = grad * jnp.broadcast_to(scale, grad.shape)
    along = jnp.mean(inner * unit, axis=-1, keepdims=True)
    return (inner - unit * along) * inverse, grad * unit
