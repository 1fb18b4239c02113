"""RMSNorm and LayerNorm on CPUs in C++: what :func:`rms_norm` and :func:`layer_norm` share."""

import jax
import jax.numpy as jnp
import numpy as np

from fnml.pallas_kernels.native._call import call, floats, rows_of


def norm_forward(
    x: jax.Array,
    scale: jax.Array,
    bias: jax.Array | None,
    residual: jax.Array | None,
    *,
    eps: float,
    centred: bool,
) -> tuple[jax.Array, jax.Array]:
    """Return the normalised sum and the sum of x [..., D] and the residual."""
    rows, more = rows_of(x), _rows_or_none(residual, x)
    out, total = call(
        "fnml_norm_forward",
        (floats(*rows.shape), floats(*more.shape)),
        rows,
        _vector(scale),
        _vector(bias),
        more,
        eps=np.float32(eps),
        centred=np.int64(centred),
    )
    return out.reshape(x.shape), x if residual is None else total.reshape(x.shape)


def norm_backward(
    total: jax.Array,
    scale: jax.Array,
    bias: jax.Array | None,
    grad: jax.Array,
    grad_total: jax.Array | None,
    *,
    eps: float,
    centred: bool,
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Return the gradients of the sum [..., D], of the scale and of the bias."""
    rows, vector = rows_of(total), _vector(scale)
    grad_x, grad_scale, grad_bias = call(
        "fnml_norm_backward",
        (floats(*rows.shape), floats(*vector.shape), floats(*_vector(bias).shape)),
        rows,
        vector,
        rows_of(grad),
        _rows_or_none(grad_total, total),
        eps=np.float32(eps),
        centred=np.int64(centred),
    )
    # The other bodies' gradients have the dtypes of the vectors.
    return (
        grad_x.reshape(total.shape),
        grad_scale.astype(scale.dtype),
        None if bias is None else grad_bias.astype(bias.dtype),
    )


def _rows_or_none(x: jax.Array | None, like: jax.Array) -> jax.Array:
    """Return rows, or no rows for an array that is not there."""
    return jnp.zeros((0, like.shape[-1]), like.dtype) if x is None else rows_of(x)


def _vector(x: jax.Array | None) -> jax.Array:
    return jnp.zeros(0, jnp.float32) if x is None else x.astype(jnp.float32)
