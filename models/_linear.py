"""The linear layer, in the form that is fast on every backend."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from fnml.core import ShapeError, divided
from fnml.models._floats import refuse_integers
from fnml.pallas_kernels import QuantizedMatrix
from fnml.pallas_kernels.native import (
    active,
    faults_of,
    has_tiles,
    linear_forward,
    linear_input_gradient,
    linear_kernel_gradient,
    on_cpu,
)

_LEAST_IN_CPP = {"rows": 64, "inner": 64, "columns": 2}
"""The sizes from which all three products are faster in C++ than XLA's, measured on two cores with
AVX-512: with fewer rows copying the kernel costs more than it gains. At 64 rows, on one thread and
matrix tiles, 64 x 128 takes 0.7 and 128 x 128 0.6 to 0.7 of the time of XLA's products, and without
tiles as long as these. Kernels of 2 to 32 columns, never on tiles, take 0.7 to 0.9 of it at 64 rows
and 0.5 to 0.6 at 256 and more; one column takes 1.5 to 3.5 times as long."""

_MOST_IN_CPP = 2**18
"""The numbers of a kernel up to which they are without matrix tiles: of 256 x 704 the kernel's gradient
takes the time of XLA's, of 768 x 768 more, and a BERT's forward pass, whose kernels come from memory,
gains nothing. On tiles all sizes gain."""


def _dot(
    a: jax.Array, b: jax.Array, over: tuple[tuple[int, ...], tuple[int, ...]], dtype: Any
) -> jax.Array:
    return lax.dot_general(a, b, (over, ((), ())), preferred_element_type=dtype)


def _plus(rows: jax.Array, bias: jax.Array | None) -> jax.Array:
    if bias is None:
        return rows
    return rows + jnp.expand_dims(bias.astype(rows.dtype), tuple(range(rows.ndim - 1)))


# One pair of matrix products forward and backward, each reading its operands as they lie in
# memory: the transposes that autodiff would insert cost a third of a GPT step on a CPU. Forward, x
# keeps its shape: a TPU fuses what is before and after with the product, but not through a reshape.
# Backward, rows are flattened, or a CPU would transpose them.
@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _linear(
    x: jax.Array, kernel: jax.Array, bias: jax.Array | None, out_dtype: Any, keep: bool
) -> jax.Array:
    over = (x.ndim - 1,), (0,)
    return _plus(_dot(x, kernel.astype(x.dtype), over, out_dtype), bias)  # [..., F]


def _forward(
    x: jax.Array, kernel: jax.Array, bias: jax.Array | None, out_dtype: Any, keep: bool
) -> tuple[jax.Array, tuple[jax.Array, jax.Array, jax.Array | None]]:
    return _linear(x, kernel, bias, out_dtype, keep), (x, kernel, bias)


def _backward(
    out_dtype: Any,
    keep: bool,
    residuals: tuple[jax.Array, jax.Array, jax.Array | None],
    grad: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    x, kernel, bias = residuals
    shape = x.shape
    if not keep:
        x, grad = x.reshape(-1, shape[-1]), grad.reshape(-1, grad.shape[-1])
    rows = tuple(range(x.ndim - 1))
    grad_bias = None if bias is None else lax.reduce_sum(grad, rows).astype(bias.dtype)
    grad = grad.astype(x.dtype)
    # [..., F] x [D, F] -> [..., D]
    grad_x = _dot(grad, kernel.astype(x.dtype), ((x.ndim - 1,), (1,)), x.dtype)
    grad_kernel = _dot(x, grad, (rows, rows), kernel.dtype)  # [..., D] x [..., F] -> [D, F]
    return grad_x.reshape(shape), grad_kernel, grad_bias


_linear.defvjp(_forward, _backward)


Biases = tuple[jax.Array | None, ...]
Kernels = tuple[jax.Array, ...]


# The same in C++, for float32 rows and all layers that read them: the rows are copied for the
# products once, the gradients of x are added up, and biases added and their gradients summed, on the way.
@jax.custom_vjp
def _native(x: jax.Array, kernels: Kernels, biases: Biases) -> tuple[jax.Array, ...]:
    def plain(x: jax.Array, kernels: Kernels, biases: Biases) -> tuple[jax.Array, ...]:
        return tuple(
            _plus(_dot(x, kernel, ((1,), (0,)), x.dtype), bias)
            for kernel, bias in zip(kernels, biases, strict=True)
        )

    out: tuple[jax.Array, ...] = on_cpu(linear_forward, plain, x, kernels, biases)
    return out


def _native_forward(
    x: jax.Array, kernels: Kernels, biases: Biases
) -> tuple[tuple[jax.Array, ...], tuple[jax.Array, Kernels, Biases]]:
    return _native(x, kernels, biases), (x, kernels, biases)


def _native_backward(
    residuals: tuple[jax.Array, Kernels, Biases], grads: tuple[jax.Array, ...]
) -> tuple[jax.Array, Kernels, Biases]:
    x, kernels, biases = residuals
    biased = [bias is not None for bias in biases]

    def plain_input(kernels: Kernels, grads: tuple[jax.Array, ...]) -> jax.Array:
        terms = [
            _dot(grad, kernel, ((1,), (1,)), grad.dtype)
            for kernel, grad in zip(kernels, grads, strict=True)
        ]
        return functools.reduce(jnp.add, terms)

    def plain_kernel(x: jax.Array, grads: tuple[jax.Array, ...]) -> tuple[Kernels, Biases]:
        sums = [grad.sum(0) if has else None for grad, has in zip(grads, biased, strict=True)]
        return tuple(_dot(x, grad, ((0,), (0,)), x.dtype) for grad in grads), tuple(sums)

    grad_x = on_cpu(linear_input_gradient, plain_input, kernels, grads)
    native_kernel = functools.partial(linear_kernel_gradient, biased=biased)
    return grad_x, *on_cpu(native_kernel, plain_kernel, x, grads)


_native.defvjp(_native_forward, _native_backward)


def _in_cpp(
    rows: jax.Array, kernel: jax.Array, bias: jax.Array | None, out_dtype: jnp.dtype
) -> bool:
    """Tell whether C++ takes ``rows`` [N, D] times the kernel [D, F]: it can, and it is faster."""
    least = _LEAST_IN_CPP
    return (
        active()
        and not faults_of(x=rows, kernel=kernel)
        and out_dtype == jnp.float32
        and (bias is None or bias.dtype == jnp.float32)
        and rows.shape[0] >= least["rows"]
        and kernel.shape[0] >= least["inner"]
        and kernel.shape[1] >= least["columns"]
        and (kernel.size <= _MOST_IN_CPP or has_tiles())
    )


def _check(x: jax.Array, kernel: jax.Array | QuantizedMatrix, bias: jax.Array | None) -> None:
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

    Within :func:`fnml.pallas_kernels.native_kernels` float32 products run in C++ on a CPU: of middle
    size, or of any from there on where the processor has matrix tiles.

    Law: ``linear(x, w, b)[i] == linear(x[i], w, b)`` to rounding.

    Raises:
      ShapeError: the sizes do not fit, or ``x`` holds integers.

    >>> import jax.numpy as jnp
    >>> linear(jnp.ones((2, 5, 3)), jnp.ones((3, 4)), jnp.zeros(4)).shape
    (2, 5, 4)
    """
    _check(x, kernel, bias)
    # A compiler that divides the program would gather a sequence to make it a part of the rows.
    keep = divided() and not isinstance(kernel, QuantizedMatrix)
    rows, dtype = x if keep else x.reshape(-1, x.shape[-1]), jnp.dtype(out_dtype or x.dtype)
    if isinstance(kernel, QuantizedMatrix):
        rows = _plus(kernel.multiply(rows, out_dtype=dtype), bias)
    elif not keep and _in_cpp(rows, kernel, bias, dtype):
        (rows,) = _native(rows, (kernel,), (bias,))
    else:
        rows = _linear(x if x.ndim > 1 else rows, kernel, bias, dtype, keep)
    return rows.reshape(*x.shape[:-1], kernel.shape[1])


def linears(
    x: jax.Array,
    kernels: Sequence[jax.Array | QuantizedMatrix],
    biases: Sequence[jax.Array | None] | None = None,
) -> tuple[jax.Array, ...]:
    """Return ``linear(x, kernel, bias)`` for layers that read the same ``x`` [..., D], in its dtype.

    A transformer's queries, keys and values, or the gate and the values of a gated activation.
    Within :func:`fnml.pallas_kernels.native_kernels`, where all of them run in C++, they are one
    call: the rows are copied for the products once, and the gradients of ``x`` are added up in it.

    Law: ``linears(x, ws, bs)[i] == linear(x, ws[i], bs[i])`` bitwise, the gradients to rounding.

    Raises:
      ShapeError: see :func:`linear`; or there are not as many biases as kernels.

    >>> import jax.numpy as jnp
    >>> [y.shape for y in linears(jnp.ones((2, 5, 3)), [jnp.ones((3, 4)), jnp.ones((3, 6))])]
    [(2, 5, 4), (2, 5, 6)]
    """
    biases = [None] * len(kernels) if biases is None else biases
    if len(biases) != len(kernels):
        raise ShapeError(
            f"linears got {len(kernels)} kernels and {len(biases)} biases: expected one for each, "
            "or None for none at all"
        )
    layers = list(zip(kernels, biases, strict=True))
    for kernel, bias in layers:
        _check(x, kernel, bias)
    rows = x.reshape(-1, x.shape[-1])
    together = [
        (kernel, bias)
        for kernel, bias in layers
        if not isinstance(kernel, QuantizedMatrix) and _in_cpp(rows, kernel, bias, x.dtype)
    ]
    if divided() or not 1 < len(layers) == len(together):
        return tuple(linear(x, kernel, bias) for kernel, bias in layers)
    results = _native(rows, *zip(*together, strict=True))
    return tuple(y.reshape(*x.shape[:-1], y.shape[-1]) for y in results)
