"""The form that XLA fuses into one pass: the default wherever no kernel runs."""

import jax
import jax.numpy as jnp
from jax import lax

from fnml.pallas_kernels._dtypes import wide


def normalise(x: jax.Array, scale: jax.Array, bias: jax.Array | None, eps: float) -> jax.Array:
    """Normalise ``x`` [..., D] in at least float32; the result has the dtype of ``x``."""
    dtype = wide(x.dtype)

    def along(vector: jax.Array) -> jax.Array:
        return vector.astype(dtype).reshape((1,) * (x.ndim - 1) + vector.shape)

    full = x.astype(dtype)
    centred = full - jnp.mean(full, -1, keepdims=True)
    inverse = lax.rsqrt(jnp.mean(centred * centred, -1, keepdims=True) + eps)
    out = centred * inverse * along(scale)
    if bias is not None:
        out = out + along(bias)
    return out.astype(x.dtype)


def forward(
    x: jax.Array,
    scale: jax.Array,
    bias: jax.Array | None,
    residual: jax.Array | None,
    eps: float,
) -> tuple[jax.Array, jax.Array]:
    """Return the normalised sum and the sum."""
    total = x if residual is None else x + residual
    return normalise(total, scale, bias, eps), total


def backward(
    total: jax.Array,
    scale: jax.Array,
    bias: jax.Array | None,
    grad: jax.Array,
    grad_total: jax.Array | None,
    eps: float,
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Return the gradients of the sum, the scale and the bias."""
    # Derived again from the sum: in one program XLA finds that it has the mean already.
    _, vjp = jax.vjp(lambda x, scale, bias: normalise(x, scale, bias, eps), total, scale, bias)
    grad_x, grad_scale, grad_bias = vjp(grad)
    return grad_x if grad_total is None else grad_total + grad_x, grad_scale, grad_bias
