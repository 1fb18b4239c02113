"""The linear layer's three matrix products on CPUs in C++."""

import jax
import jax.numpy as jnp

from fnml.pallas_kernels.native._call import call, floats
from fnml.pallas_kernels.native._scope import in_use


def linear_forward(x: jax.Array, kernel: jax.Array, bias: jax.Array | None) -> jax.Array:
    """Return x [N, D] times the kernel [D, F], plus the bias [F]."""
    result = floats(x.shape[0], kernel.shape[1])
    given = jnp.zeros(0, jnp.float32) if bias is None else bias
    out: jax.Array = call("fnml_linear_forward", result, x, kernel, given, tiles=in_use().tiles)
    return out


def linear_input_gradient(kernel: jax.Array, grad: jax.Array) -> jax.Array:
    """Return the gradient [N, D] of x from that of the result, [N, F]."""
    result = floats(grad.shape[0], kernel.shape[0])
    out: jax.Array = call("fnml_linear_input_gradient", result, kernel, grad, tiles=in_use().tiles)
    return out


def linear_kernel_gradient(
    x: jax.Array, grad: jax.Array, *, bias: bool
) -> tuple[jax.Array, jax.Array | None]:
    """Return the gradients [D, F] of the kernel and, where there is one, [F] of the bias."""
    width = grad.shape[1]
    results = floats(x.shape[1], width), floats(width if bias else 0)
    kernel_grad, bias_grad = call(
        "fnml_linear_kernel_gradient", results, x, grad, tiles=in_use().tiles
    )
    return kernel_grad, bias_grad if bias else None
