"""The matrix products of linear layers that read the same rows, on CPUs in C++."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from fnml.pallas_kernels.native._call import call, floats
from fnml.pallas_kernels.native._scope import in_use


def linear_forward(
    x: jax.Array, kernels: Sequence[jax.Array], biases: Sequence[jax.Array | None]
) -> tuple[jax.Array, ...]:
    """Return x [N, D] times each kernel [D, F], plus its bias [F]."""
    given = [jnp.zeros(0, jnp.float32) if bias is None else bias for bias in biases]
    results = tuple(floats(x.shape[0], kernel.shape[1]) for kernel in kernels)
    return tuple(call("fnml_linear_forward", results, x, *kernels, *given, tiles=in_use().tiles))


def linear_input_gradient(kernels: Sequence[jax.Array], grads: Sequence[jax.Array]) -> jax.Array:
    """Return the gradient [N, D] of x from those of the results, [N, F] each."""
    result = floats(grads[0].shape[0], kernels[0].shape[0])
    out: jax.Array = call(
        "fnml_linear_input_gradient", result, *kernels, *grads, tiles=in_use().tiles
    )
    return out


def linear_kernel_gradient(
    x: jax.Array, grads: Sequence[jax.Array], *, biased: Sequence[bool]
) -> tuple[tuple[jax.Array, ...], tuple[jax.Array | None, ...]]:
    """Return the gradients of the kernels, [D, F] each, and of those biases, [F], that there are."""
    kernels = [floats(x.shape[1], grad.shape[1]) for grad in grads]
    sums = [floats(grad.shape[1] if has else 0) for grad, has in zip(grads, biased, strict=True)]
    results = call(
        "fnml_linear_kernel_gradient", (*kernels, *sums), x, *grads, tiles=in_use().tiles
    )
    found = zip(results[len(grads) :], biased, strict=True)
    return tuple(results[: len(grads)]), tuple(bias if has else None for bias, has in found)
