"""The form that XLA fuses into one pass: the default wherever no kernel runs."""

import jax
import jax.numpy as jnp
from jax import lax

from fnml.pallas_kernels._dtypes import wide


def normalise(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """Normalise ``x`` [..., D] in at least float32; the result has the dtype of ``x``."""
    dtype = wide(x.dtype)
    full = x.astype(dtype)
    inverse = lax.rsqrt(jnp.mean(full * full, -1, keepdims=True) + eps)
    scale = scale.astype(dtype).reshape((1,) * (x.ndim - 1) + scale.shape)
    return (full * inverse * scale).astype(x.dtype)


def forward(
    x: jax.Array, scale: jax.Array, residual: jax.Array | None, eps: float
) -> tuple[jax.Array, jax.Array]:
    """Return the normalised sum and the sum."""
    total = x if residual is None else x + residual
    return normalise(total, scale, eps), total


def backward(
    total: jax.Array, scale: jax.Array, grad: jax.Array, grad_total: jax.Array | None, eps: float
) -> tuple[jax.Array, jax.Array]:
    """Return the gradients of the sum and of the scale."""
    # Derived again from the sum: in one program XLA finds that it has the mean already.
    _, vjp = jax.vjp(lambda x, scale: normalise(x, scale, eps), total, scale)
    grad_x, grad_scale = vjp(grad)
    return grad_x if grad_total is None else grad_total + grad_x, grad_scale
