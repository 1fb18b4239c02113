"""The linear layer, in the form that is fast on every backend."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from fnml.core import ShapeError, divided
from fnml.models._floats import refuse_integers
from fnml.pallas_kernels import QuantizedMatrix


def _dot(
    a: jax.Array, b: jax.Array, over: tuple[tuple[int, ...], tuple[int, ...]], dtype: Any
) -> jax.Array:
    return lax.dot_general(a, b, (over, ((), ())), preferred_element_type=dtype)


# One pair of matrix products forward and backward, each reading its operands as they lie in
# memory: the transposes that autodiff would insert cost a third of a GPT step on a CPU.
@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _linear(x: jax.Array, kernel: jax.Array, out_dtype: Any) -> jax.Array:
    over = (x.ndim - 1,), (0,)
    return _dot(x, kernel.astype(x.dtype), over, out_dtype)  # [..., D] x [D, F] -> [..., F]


def _forward(
    x: jax.Array, kernel: jax.Array, out_dtype: Any
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _linear(x, kernel, out_dtype), (x, kernel)


def _backward(
    out_dtype: Any, residuals: tuple[jax.Array, jax.Array], grad: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x, kernel = residuals
    grad = grad.astype(x.dtype)
    rows = tuple(range(x.ndim - 1))
    # [..., F] x [D, F] -> [..., D]
    grad_x = _dot(grad, kernel.astype(x.dtype), ((x.ndim - 1,), (1,)), x.dtype)
    grad_kernel = _dot(x, grad, (rows, rows), kernel.dtype)  # [..., D] x [..., F] -> [D, F]
    return grad_x, grad_kernel


_linear.defvjp(_forward, _backward)


def linear(
    x: jax.Array,
    kernel: jax.Array | QuantizedMatrix,
    bias: jax.Array | None = None,
    *,
    out_dtype: Any = None,
) -> jax.Array:
    """Return ``x @ kernel + bias`` for ``x`` [..., D], ``kernel`` [D, F], ``bias`` [F].

    The product is taken in the dtype of ``x``, to which the kernel is cast, and [..., F] comes
    out in that dtype unless ``out_dtype`` names another (float32 logits from bfloat16). The
    kernel's gradient is summed and returned in the kernel's own dtype, so bfloat16 activations
    over float32 parameters lose nothing in the sum over the batch. It has a custom VJP, so
    there is no forward mode (``jax.jvp``); reverse over reverse works.

    Law: ``linear(x, w, b)[i] == linear(x[i], w, b)`` to rounding.

    Raises:
      ShapeError: the sizes do not fit, or ``x`` holds integers.

    >>> import jax.numpy as jnp
    >>> linear(jnp.ones((2, 5, 3)), jnp.ones((3, 4)), jnp.zeros(4)).shape
    (2, 5, 4)
    """
    if kernel.ndim != 2 or x.ndim < 1 or x.shape[-1] != kernel.shape[0]:
        raise ShapeError(
            f"linear got x {x.shape} and a kernel {kernel.shape}: "
            "expected x [..., D] and a kernel [D, F]"
        )
    refuse_integers("linear", x)
    if bias is not None and bias.shape != kernel.shape[1:]:
        raise ShapeError(
            f"linear got a bias {bias.shape} and a kernel {kernel.shape}: expected a bias [F]"
        )
    # A compiler that divides the program would gather a sequence to make it a part of the rows.
    keep = divided() and not isinstance(kernel, QuantizedMatrix)
    rows, dtype = x if keep else x.reshape(-1, x.shape[-1]), jnp.dtype(out_dtype or x.dtype)
    if isinstance(kernel, QuantizedMatrix):
        rows = kernel.multiply(rows, out_dtype=dtype)
    else:
        rows = _linear(rows, kernel, dtype)
    if bias is not None:
        rows = rows + jnp.expand_dims(bias.astype(rows.dtype), tuple(range(rows.ndim - 1)))
    return rows.reshape(*x.shape[:-1], kernel.shape[1])
