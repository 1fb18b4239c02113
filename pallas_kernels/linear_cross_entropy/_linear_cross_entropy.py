"""The public function: checks, the choice of a body, and the derivative."""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from fnml.pallas_kernels._dtypes import wide
from fnml.pallas_kernels._implementation import (
    Bodies,
    Choice,
    Implementation,
    choose,
    refuse,
    run,
)
from fnml.pallas_kernels.linear_cross_entropy import _lax, _reference
from fnml.pallas_kernels.linear_cross_entropy._blocks import WORTH, lax_chunk
from fnml.pallas_kernels.linear_cross_entropy._support import refusals
from fnml.pallas_kernels.linear_cross_entropy._tiles import Plan


def linear_cross_entropy(
    x: jax.Array,
    w: jax.Array,
    labels: jax.Array,
    *,
    weights: jax.Array | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    chunk: int | None = None,
    implementation: Implementation = "auto",
    interpret: Any = None,
) -> tuple[jax.Array, jax.Array]:
    """Return the summed cross entropy of ``softmax(x @ w)`` and the weight summed over.

    The mean is ``total / weight``; totals and weights of parts of a batch add up exactly. The
    logits [N, V] of all N tokens are never in memory at once: they are made chunk by chunk, and
    with them the gradient, which the backward pass only scales. With smoothing ``s`` the target is
    ``1 - s`` on the label plus ``s / V`` on every class; a z-loss ``z`` adds ``z * log(Z) ** 2``
    with Z the softmax' denominator.

    Args:
      x: floats [..., D].
      w: [D, V] of the dtype of ``x``.
      labels: integers [...] in [0, V).
      weights: [...], the weight of each label, 0 to leave it out, even if its ``x`` is NaN;
        ``None`` for 1.
      label_smoothing: ``s`` in [0, 1).
      z_loss: ``z``, 0 or more.
      chunk: how many tokens' logits the lax body holds at once; ``None`` for about 32 MiB of them.
      implementation: see :data:`fnml.pallas_kernels.Implementation`.
      interpret: as in :func:`fnml.pallas_kernels.attention`.

    Returns:
      The total and the weight, both float32 scalars (float64 for float64). Logits and sums are at
      least float32. Both are differentiable, by ``weights`` too; all but the reference in reverse
      mode only.

    Law: the result is the reference's to rounding, for every ``chunk``.

    Source: the gradient in the forward pass: Hsu et al. 2024, Liger Kernel, arXiv:2410.10989,
    section 3.2; z-loss: Chowdhery et al. 2022, PaLM, arXiv:2204.02311, section 5.

    Raises:
      ValueError: shapes, dtypes or options do not fit together; all of it is named.
      NotImplementedError: the implementation asked for cannot do this; the message says why.

    >>> import jax.numpy as jnp
    >>> x, w, labels = jnp.zeros((3, 8)), jnp.ones((8, 4)), jnp.array([0, 1, 2])
    >>> total, weight = linear_cross_entropy(x, w, labels)
    >>> float(total / weight)
    1.3862943649291992
    """
    refuse("linear_cross_entropy", _faults(x, w, labels, weights, label_smoothing, z_loss, chunk))
    D, V = w.shape
    N, dtype = math.prod(labels.shape), wide(x.dtype)
    plan = Plan(V, label_smoothing, z_loss, lax_chunk(N, V) if chunk is None else chunk)
    choice = choose(
        "linear_cross_entropy",
        implementation,
        refusals(x),
        interpret=interpret,
        worth=D <= WORTH and V >= 4096 and N >= 256,
    )
    flat = x.reshape(N, D)
    if weights is None:
        each, weight = jnp.ones((N,), dtype), jnp.asarray(N, dtype)
    else:
        each = weights.reshape(N).astype(dtype)
        weight = each.sum()
        flat = jnp.where(each[:, None] == 0, jnp.zeros_like(flat), flat)
    if N == 0:
        return jnp.zeros((), dtype), weight
    operands = (plan, flat, w, labels.reshape(N).astype(jnp.int32), each)
    if choice.only == "reference":
        return _reference.total(*operands), weight
    return _total(choice, *operands), weight


def _faults(
    x: jax.Array,
    w: jax.Array,
    labels: jax.Array,
    weights: jax.Array | None,
    label_smoothing: float,
    z_loss: float,
    chunk: int | None,
) -> list[str]:
    faults = []
    if not (
        x.ndim >= 1
        and w.ndim == 2
        and x.shape[-1] == w.shape[0]
        and x.dtype == w.dtype
        and jnp.issubdtype(x.dtype, jnp.floating)
    ):
        faults.append(
            f"x {x.dtype} {x.shape} and w {w.dtype} {w.shape}: expected one floating dtype, "
            "x [..., D] and w [D, V]"
        )
    if labels.shape != x.shape[:-1] or not jnp.issubdtype(labels.dtype, jnp.integer):
        faults.append(f"labels {labels.dtype} {labels.shape}: expected integers {x.shape[:-1]}")
    if weights is not None and weights.shape != x.shape[:-1]:
        faults.append(f"weights {weights.shape}: expected {x.shape[:-1]}")
    if not 0 <= label_smoothing < 1:
        faults.append(f"label_smoothing={label_smoothing}: expected 0 or more, and below 1")
    if z_loss < 0:
        faults.append(f"z_loss={z_loss}: expected 0 or more")
    if chunk is not None and chunk < 1:
        faults.append(f"chunk={chunk}: expected 1 or more tokens")
    return faults


def _run(choice: Choice, plan: Plan, name: str, *operands: jax.Array) -> Any:
    """Run ``losses`` or ``losses_and_grads`` in the chosen body."""

    def tpu(*operands: Any, interpret: Any) -> Any:
        from fnml.pallas_kernels.linear_cross_entropy import _tpu

        return getattr(_tpu, name)(plan, *operands, interpret=interpret)

    def cuda(*operands: Any, interpret: Any) -> Any:
        from fnml.pallas_kernels.linear_cross_entropy import _gpu

        return getattr(_gpu, name)(plan, *operands, interpret=interpret)

    bodies: Bodies = {"lax": partial(getattr(_lax, name), plan), "tpu": tpu, "cuda": cuda}
    return run(choice, bodies, *operands)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _total(
    choice: Choice,
    plan: Plan,
    x: jax.Array,
    w: jax.Array,
    labels: jax.Array,
    weights: jax.Array,
) -> jax.Array:
    return (_run(choice, plan, "losses", x, w, labels, weights) * weights).sum()


def _forward(choice: Choice, plan: Plan, *operands: jax.Array) -> tuple[jax.Array, tuple]:
    losses, grad_x, grad_w = _run(choice, plan, "losses_and_grads", *operands)
    return (losses * operands[-1]).sum(), (losses, grad_x, grad_w)


def _backward(
    choice: Choice, plan: Plan, residuals: tuple, grad: jax.Array
) -> tuple[jax.Array, jax.Array, None, jax.Array]:
    losses, grad_x, grad_w = residuals

    def scaled(x: jax.Array) -> jax.Array:
        return (x.astype(grad.dtype) * grad).astype(x.dtype)

    return scaled(grad_x), scaled(grad_w), None, losses * grad


_total.defvjp(_forward, _backward)
