"""The body for CPUs, in C++: each direction reads and writes memory once."""

import jax

from fnml.pallas_kernels.native import norm_backward, norm_forward


def forward(
    x: jax.Array, scale: jax.Array, residual: jax.Array | None, eps: float
) -> tuple[jax.Array, jax.Array]:
    """Return the normalised sum and the sum."""
    return norm_forward(x, scale, None, residual, eps=eps, centred=False)


def backward(
    total: jax.Array, scale: jax.Array, grad: jax.Array, grad_total: jax.Array | None, eps: float
) -> tuple[jax.Array, jax.Array]:
    """Return the gradients of the sum and of the scale."""
    out = norm_backward(total, scale, None, grad, grad_total, eps=eps, centred=False)
    return out[:2]
