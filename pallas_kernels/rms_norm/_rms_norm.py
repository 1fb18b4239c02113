"""Root-mean-square normalisation, with the sum before it."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from fnml.pallas_kernels._implementation import Choice, Implementation, choose, refuse, run
from fnml.pallas_kernels.rms_norm import _lax, _native
from fnml.pallas_kernels.rms_norm._blocks import refusals, worth
from fnml.pallas_kernels.rms_norm._reference import reference

Outputs = tuple[Any, ...]


def _tpu() -> Any:
    from fnml.pallas_kernels.rms_norm import _tpu

    return _tpu


def _gpu() -> Any:
    from fnml.pallas_kernels.rms_norm import _gpu

    return _gpu


def _forward_rows(
    body: Callable[[], Any],
    x: jax.Array,
    scale: jax.Array,
    residual: jax.Array | None,
    *,
    eps: float,
    interpret: Any,
) -> Outputs:
    rows = x.reshape(-1, x.shape[-1])
    added = None if residual is None else residual.reshape(rows.shape)
    out = body().forward(rows, scale, added, eps, interpret=interpret)
    return tuple(part.reshape(x.shape) for part in out)


def _backward_rows(
    body: Callable[[], Any],
    total: jax.Array,
    scale: jax.Array,
    grad: jax.Array,
    grad_total: jax.Array | None,
    *,
    eps: float,
    interpret: Any,
) -> Outputs:
    rows = total.reshape(-1, total.shape[-1])
    more = None if grad_total is None else grad_total.reshape(rows.shape)
    grad_x, grad_scale = body().backward(
        rows, scale, grad.reshape(rows.shape), more, eps, interpret=interpret
    )
    return grad_x.reshape(total.shape), grad_scale


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _rms_norm(
    x: jax.Array, scale: jax.Array, residual: jax.Array | None, eps: float, choice: Choice
) -> Outputs:
    return _forward(x, scale, residual, eps, choice)[0]


def _forward(
    x: jax.Array, scale: jax.Array, residual: jax.Array | None, eps: float, choice: Choice
) -> tuple[Outputs, tuple[jax.Array, jax.Array]]:
    bodies: dict[str, Callable[..., Any]] = {
        "lax": functools.partial(_lax.forward, eps=eps),
        "native": functools.partial(_native.forward, eps=eps),
        "tpu": functools.partial(_forward_rows, _tpu, eps=eps),
        "cuda": functools.partial(_forward_rows, _gpu, eps=eps),
    }
    out, total = run(choice, bodies, x, scale, residual)
    if residual is None:
        return (out,), (x, scale)
    return (out, total), (total, scale)


def _backward(
    eps: float, choice: Choice, saved: tuple[jax.Array, jax.Array], grads: Outputs
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    bodies: dict[str, Callable[..., Any]] = {
        "lax": functools.partial(_lax.backward, eps=eps),
        "native": functools.partial(_native.backward, eps=eps),
        "tpu": functools.partial(_backward_rows, _tpu, eps=eps),
        "cuda": functools.partial(_backward_rows, _gpu, eps=eps),
    }
    fused = len(grads) == 2
    grad, grad_scale = run(choice, bodies, *saved, grads[0], grads[1] if fused else None)
    return grad, grad_scale, grad if fused else None


_rms_norm.defvjp(_forward, _backward)


def rms_norm(
    x: jax.Array,
    scale: jax.Array,
    residual: jax.Array | None = None,
    *,
    eps: float = 1e-6,
    implementation: Implementation = "auto",
    interpret: Any = None,
) -> Any:
    """Return ``y = x / sqrt(mean(x**2) + eps) * scale`` over the last axis of ``x`` [..., D].

    With a ``residual`` like ``x``, return ``(y, x + residual)``, where y normalises the sum: one
    pass over memory where two would write the sum and read it again. ``scale`` is [D] floats.
    Computed in at least float32, returned in the dtype of ``x``.

    ``"auto"`` runs a kernel on TPUs and Hopper GPUs, on CPUs within
    :func:`fnml.pallas_kernels.native_kernels` one in C++, and what XLA fuses elsewhere. Where a
    kernel may run there is no forward mode (``jax.jvp``): pass ``"lax"`` or ``"reference"`` for it.

    Law: ``rms_norm(x, s, r) == (rms_norm(x + r, s), x + r)`` and, for c > 0 and up to ``eps``,
    ``rms_norm(c * x, s) == rms_norm(x, s)``.

    Source: Zhang and Sennrich 2019, arXiv:1910.07467, equation 4.

    Args:
      implementation: see :data:`fnml.pallas_kernels.Implementation`.
      interpret: runs a Pallas body in its interpreter: ``"tpu"``, ``"cuda"`` or an interpreter's
        parameters.

    Raises:
      ValueError: shapes or dtypes do not fit together; all faults are listed.
      NotImplementedError: the chosen implementation has no body for this call.

    >>> import jax.numpy as jnp
    >>> y, total = rms_norm(jnp.array([2.0, -3.0]), jnp.ones(2), jnp.array([0.0, 1.0]), eps=0.0)
    >>> y.tolist(), total.tolist()
    ([1.0, -1.0], [2.0, -2.0])
    """
    faults = []
    if x.ndim < 1 or not jnp.issubdtype(x.dtype, jnp.floating):
        faults.append(f"x is {x.dtype} {x.shape}, expected floats [..., D]")
    elif scale.shape != x.shape[-1:]:
        faults.append(f"scale has shape {scale.shape}, expected {x.shape[-1:]} for x {x.shape}")
    if residual is not None and (residual.shape, residual.dtype) != (x.shape, x.dtype):
        faults.append(
            f"residual is {residual.dtype} {residual.shape}, expected {x.dtype} {x.shape} like x"
        )
    refuse("rms_norm", faults)
    choice = choose("rms_norm", implementation, refusals(x), interpret=interpret, worth=worth(x))
    if choice.only == "reference":
        out, total = reference(x, scale, residual, eps)
    elif choice.only == "lax" or choice == Choice():
        out, total = _lax.forward(x, scale, residual, eps)
    else:
        outputs = _rms_norm(x, scale, residual, eps, choice)
        return outputs[0] if residual is None else outputs
    return out if residual is None else (out, total)
