"""Batch normalisation on CPUs in C++, with ReLU and what is added before it."""

import jax
import jax.numpy as jnp
import numpy as np

from fnml.pallas_kernels.native._call import call, floats, rows_of

_PARTS = 16


def batch_norm_relu_forward(
    x: jax.Array, scale: jax.Array, bias: jax.Array, residual: jax.Array | None, *, eps: float
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return ``relu(normalised x + residual)`` [..., C], and the mean and variance of x, [C]."""
    rows = rows_of(x)
    added = _none(rows) if residual is None else rows_of(residual)
    out, mean, variance, _ = call(
        "fnml_batch_norm_relu_forward",
        (floats(*rows.shape), floats(*scale.shape), floats(*scale.shape), _partial(rows)),
        rows,
        scale,
        bias,
        added,
        eps=np.float32(eps),
    )
    return out.reshape(x.shape), mean, variance


def batch_norm_relu_backward(
    x: jax.Array,
    scale: jax.Array,
    mean: jax.Array,
    variance: jax.Array,
    out: jax.Array,
    grad: jax.Array,
    *,
    eps: float,
    added: bool,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]:
    """Return the gradients of x, the scale, the bias, and of what was added, if anything was."""
    rows = rows_of(x)
    to_residual = floats(*(rows if added else _none(rows)).shape)
    grad_x, grad_scale, grad_bias, grad_residual, _ = call(
        "fnml_batch_norm_relu_backward",
        (
            floats(*rows.shape),
            floats(*scale.shape),
            floats(*scale.shape),
            to_residual,
            _partial(rows),
        ),
        rows,
        scale,
        mean,
        variance,
        rows_of(out),
        rows_of(grad),
        eps=np.float32(eps),
    )
    shaped = grad_residual.reshape(x.shape) if added else None
    return grad_x.reshape(x.shape), grad_scale, grad_bias, shaped


def _none(rows: jax.Array) -> jax.Array:
    return jnp.zeros((0, rows.shape[1]), rows.dtype)


def _partial(rows: jax.Array) -> jax.ShapeDtypeStruct:
    """Describe what the parts' sums need: as many parts as the shape says, for any threads."""
    parts = min(_PARTS, -(-rows.shape[0] // 256))
    return jax.ShapeDtypeStruct((parts, 2, rows.shape[1]), rows.dtype)
