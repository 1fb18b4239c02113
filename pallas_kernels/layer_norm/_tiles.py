"""What one tile of rows computes, in float32, on every kind of accelerator."""

import jax
import jax.numpy as jnp
from jax import lax


def normalised(x: jax.Array, eps: float) -> tuple[jax.Array, jax.Array]:
    """Return the rows less their mean over their deviation [R, D], and 1 / deviation [R, 1]."""
    centred = x - jnp.mean(x, axis=-1, keepdims=True)
    inverse = lax.rsqrt(jnp.mean(centred * centred, axis=-1, keepdims=True) + eps)
    return centred * inverse, inverse


def slopes(
    x: jax.Array, scale: jax.Array, grad: jax.Array, eps: float
) -> tuple[jax.Array, jax.Array]:
    """Return the gradient of x [R, D], and that of the scale row by row [R, D]."""
    unit, inverse = normalised(x, eps)
    inner = grad * jnp.broadcast_to(scale, grad.shape)
    mean = jnp.mean(inner, axis=-1, keepdims=True)
    along = jnp.mean(inner * unit, axis=-1, keepdims=True)
    return (inner - mean - unit * along) * inverse, grad * unit
