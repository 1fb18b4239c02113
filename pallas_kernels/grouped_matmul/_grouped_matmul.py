"""Each group of rows times its own matrix."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from fnml.pallas_kernels._implementation import Choice, Implementation, choose, refuse, run
from fnml.pallas_kernels.grouped_matmul import _lax
from fnml.pallas_kernels.grouped_matmul._reference import reference
from fnml.pallas_kernels.grouped_matmul._support import refusals


def _tpu_forward(*operands: jax.Array, interpret: Any) -> jax.Array:
    from fnml.pallas_kernels.grouped_matmul import _tpu

    return _tpu.forward(*operands, interpret=interpret)


def _tpu_backward(*operands: jax.Array, interpret: Any) -> tuple[jax.Array, jax.Array]:
    from fnml.pallas_kernels.grouped_matmul import _tpu

    return _tpu.backward(*operands, interpret=interpret)


def _cuda_forward(*operands: jax.Array, interpret: Any) -> jax.Array:
    from fnml.pallas_kernels.grouped_matmul import _gpu

    return _gpu.forward(*operands, interpret=interpret)


def _cuda_backward(*operands: jax.Array, interpret: Any) -> tuple[jax.Array, jax.Array]:
    from fnml.pallas_kernels.grouped_matmul import _gpu

    return _gpu.backward(*operands, interpret=interpret)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _matmul(x: jax.Array, w: jax.Array, group_sizes: jax.Array, choice: Choice) -> jax.Array:
    bodies: dict[str, Callable[..., Any]] = {
        "lax": _lax.forward,
        "tpu": _tpu_forward,
        "cuda": _cuda_forward,
    }
    return run(choice, bodies, x, w, group_sizes)


def _forward(
    x: jax.Array, w: jax.Array, group_sizes: jax.Array, choice: Choice
) -> tuple[jax.Array, tuple[jax.Array, jax.Array, jax.Array]]:
    return _matmul(x, w, group_sizes, choice), (x, w, group_sizes)


def _backward(
    choice: Choice, saved: tuple[jax.Array, jax.Array, jax.Array], grad: jax.Array
) -> tuple[jax.Array, jax.Array, None]:
    bodies: dict[str, Callable[..., Any]] = {
        "lax": _lax.backward,
        "tpu": _tpu_backward,
        "cuda": _cuda_backward,
    }
    grad_x, grad_w = run(choice, bodies, *saved, grad)
    return grad_x, grad_w, None


_matmul.defvjp(_forward, _backward)


def grouped_matmul(
    x: jax.Array,
    w: jax.Array,
    group_sizes: jax.Array,
    *,
    implementation: Implementation = "auto",
    interpret: Any = None,
) -> jax.Array:
    """Return [N, F]: the first ``group_sizes[0]`` rows of x times ``w[0]``, the next times w[1], ...

    ``x`` is [N, D], ``w`` [E, D, F], ``group_sizes`` integers [E], whose sum is at most N: rows
    beyond it come out as zeros. Groups may be empty. The matrices are cast to the dtype of ``x``,
    which the result has; sums are at least float32, and the gradient of ``w`` has w's own dtype.
    There is no forward mode (``jax.jvp``) but with ``"reference"``.

    Law: equal to ``x[i] @ w[e(i)]`` row by row, to rounding; permuting the groups together with
    their rows and matrices permutes the result.

    Source: Gale et al. 2022, arXiv:2211.15841 (products of blocks, no token dropped).

    Args:
      implementation: see :data:`fnml.pallas_kernels.Implementation`.
      interpret: run a Pallas body in an interpreter, with ``implementation="pallas"``: "tpu",
        "cuda", or an interpreter's parameters.

    Raises:
      ValueError: shapes or dtypes do not fit together; all faults are listed.
      NotImplementedError: the chosen implementation has no body for this call.

    >>> import jax.numpy as jnp
    >>> x, w = jnp.ones((4, 2)), jnp.array([[[1.0], [1.0]], [[3.0], [4.0]]])
    >>> grouped_matmul(x, w, jnp.array([1, 2])).tolist()
    [[2.0], [7.0], [7.0], [0.0]]
    """
    faults = []
    if x.ndim != 2 or not jnp.issubdtype(x.dtype, jnp.floating):
        faults.append(f"x is {x.dtype} {x.shape}, expected floats [N, D]")
    elif w.ndim != 3 or w.shape[1] != x.shape[1] or not jnp.issubdtype(w.dtype, jnp.floating):
        faults.append(f"w is {w.dtype} {w.shape}, expected floats (E, {x.shape[1]}, F)")
    integers = jnp.issubdtype(group_sizes.dtype, jnp.integer)
    if group_sizes.shape != w.shape[:1] or not integers:
        faults.append(
            f"group_sizes are {group_sizes.dtype} {group_sizes.shape}, expected integers "
            f"{w.shape[:1]}"
        )
    refuse("grouped_matmul", faults)
    choice = choose(
        "grouped_matmul",
        implementation,
        refusals(x, w),
        interpret=interpret,
        worth=w.size >= 2**20,
    )
    if choice.only == "reference" or x.shape[0] == 0:
        return reference(x, w, group_sizes)
    return _matmul(x, w, group_sizes, choice)
