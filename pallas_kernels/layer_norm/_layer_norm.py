"""Layer normalisation, with the sum before it."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from fnml.pallas_kernels._implementation import Choice, Implementation, choose, refuse, run
from fnml.pallas_kernels.layer_norm import _lax
from fnml.pallas_kernels.layer_norm._reference import reference
from fnml.pallas_kernels.native import norm_backward, norm_forward
from fnml.pallas_kernels.rms_norm._blocks import refusals, worth

Outputs = tuple[Any, ...]


def _tpu() -> Any:
    from fnml.pallas_kernels.layer_norm import _tpu

    return _tpu


def _gpu() -> Any:
    from fnml.pallas_kernels.layer_norm import _gpu

    return _gpu


def _forward_rows(
    body: Callable[[], Any],
    x: jax.Array,
    scale: jax.Array,
    bias: jax.Array | None,
    residual: jax.Array | None,
    *,
    eps: float,
    interpret: Any,
) -> Outputs:
    rows = x.reshape(-1, x.shape[-1])
    added = None if residual is None else residual.reshape(rows.shape)
    out = body().forward(rows, scale, bias, added, eps, interpret=interpret)
    return tuple(part.reshape(x.shape) for part in out)


def _backward_rows(
    body: Callable[[], Any],
    total: jax.Array,
    scale: jax.Array,
    bias: jax.Array | None,
    grad: jax.Array,
    grad_total: jax.Array | None,
    *,
    eps: float,
    interpret: Any,
) -> Outputs:
    rows = total.reshape(-1, total.shape[-1])
    more = None if grad_total is None else grad_total.reshape(rows.shape)
    grad_x, *vectors = body().backward(
        rows, scale, bias, grad.reshape(rows.shape), more, eps, interpret=interpret
    )
    return grad_x.reshape(total.shape), *vectors


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _layer_norm(
    x: jax.Array,
    scale: jax.Array,
    bias: jax.Array | None,
    residual: jax.Array | None,
    eps: float,
    choice: Choice,
) -> Outputs:
    return _forward(x, scale, bias, residual, eps, choice)[0]


def _forward(
    x: jax.Array,
    scale: jax.Array,
    bias: jax.Array | None,
    residual: jax.Array | None,
    eps: float,
    choice: Choice,
) -> tuple[Outputs, tuple[jax.Array, jax.Array, jax.Array | None]]:
    bodies: dict[str, Callable[..., Any]] = {
        "lax": functools.partial(_lax.forward, eps=eps),
        "native": functools.partial(norm_forward, eps=eps, centred=True),
        "tpu": functools.partial(_forward_rows, _tpu, eps=eps),
        "cuda": functools.partial(_forward_rows, _gpu, eps=eps),
    }
    out, total = run(choice, bodies, x, scale, bias, residual)
    if residual is None:
        return (out,), (x, scale, bias)
    return (out, total), (total, scale, bias)


def _backward(
    eps: float,
    choice: Choice,
    saved: tuple[jax.Array, jax.Array, jax.Array | None],
    grads: Outputs,
) -> tuple[jax.Array, jax.Array, jax.Array | None, jax.Array | None]:
    bodies: dict[str, Callable[..., Any]] = {
        "lax": functools.partial(_lax.backward, eps=eps),
        "native": functools.partial(norm_backward, eps=eps, centred=True),
        "tpu": functools.partial(_backward_rows, _tpu, eps=eps),
        "cuda": functools.partial(_backward_rows, _gpu, eps=eps),
    }
    fused = len(grads) == 2
    grad, *vectors = run(choice, bodies, *saved, grads[0], grads[1] if fused else None)
    grad_scale, grad_bias = vectors
    return grad, grad_scale, grad_bias, grad if fused else None


_layer_norm.defvjp(_forward, _backward)


def layer_norm(
    x: jax.Array,
    scale: jax.Array,
    bias: jax.Array | None = None,
    residual: jax.Array | None = None,
    *,
    eps: float = 1e-5,
    implementation: Implementation = "auto",
    interpret: Any = None,
) -> Any:
    """Return ``y = (x - mean) / sqrt(var + eps) * scale + bias`` over the last axis of x [..., D].

    With a ``residual`` like ``x``, return ``(y, x + residual)``, where y normalises the sum: one
    pass over memory where two would write the sum and read it again. ``scale`` and ``bias`` are
    [D] floats. Computed in at least float32, returned in the dtype of ``x``.

    ``"auto"`` runs a kernel on TPUs and Hopper GPUs, on CPUs within
    :func:`fnml.pallas_kernels.native_kernels` one in C++, and what XLA fuses elsewhere. Where a
    kernel may run there is no forward mode (``jax.jvp``): pass ``"lax"`` or ``"reference"`` for it.

    Law: ``layer_norm(x, s, b, r) == (layer_norm(x + r, s, b), x + r)`` and, for a number c and to
    rounding, ``layer_norm(x + c, ...) == layer_norm(x, ...)``.

    Source: Ba, Kiros and Hinton 2016, arXiv:1607.06450, equations 3 and 4.

    Args:
      implementation: see :data:`fnml.pallas_kernels.Implementation`.
      interpret: runs a Pallas body in its interpreter: ``"tpu"``, ``"cuda"`` or an interpreter's
        parameters.

    Raises:
      ValueError: shapes or dtypes do not fit together; all faults are listed.
      NotImplementedError: the chosen implementation has no body for this call.

    >>> import jax.numpy as jnp
    >>> layer_norm(jnp.array([1.0, 3.0]), jnp.ones(2), jnp.zeros(2), eps=0.0).tolist()
    [-1.0, 1.0]
    """
    faults = []
    if x.ndim < 1 or not jnp.issubdtype(x.dtype, jnp.floating):
        faults.append(f"x is {x.dtype} {x.shape}, expected floats [..., D]")
    else:
        faults += [
            f"{name} has shape {vector.shape}, expected {x.shape[-1:]} for x {x.shape}"
            for name, vector in (("scale", scale), ("bias", bias))
            if vector is not None and vector.shape != x.shape[-1:]
        ]
    if residual is not None and (residual.shape, residual.dtype) != (x.shape, x.dtype):
        faults.append(
            f"residual is {residual.dtype} {residual.shape}, expected {x.dtype} {x.shape} like x"
        )
    refuse("layer_norm", faults)
    choice = choose("layer_norm", implementation, refusals(x), interpret=interpret, worth=worth(x))
    if choice.only == "reference":
        out, total = reference(x, scale, bias, residual, eps)
    elif choice.only == "lax" or choice == Choice():
        out, total = _lax.forward(x, scale, bias, residual, eps)
    else:
        outputs = _layer_norm(x, scale, bias, residual, eps, choice)
        return outputs[0] if residual is None else outputs
    return out if residual is None else (out, total)
