"""The lax body one head at a time: on a CPU the scores of one head stay in the cache of its core."""

from functools import partial
from typing import Any

import jax
from jax import lax

from fnml.pallas_kernels.attention import _lax, _whole
from fnml.pallas_kernels.attention._blocks import BY_HEAD, BY_HEAD_BLOCK, WORTH
from fnml.pallas_kernels.attention._tiles import Extras, Plan


def forward(
    plan: Plan, q: jax.Array, k: jax.Array, v: jax.Array, extras: Extras
) -> tuple[jax.Array, jax.Array]:
    """Return what :func:`_lax.forward` returns, in the form that is best where it runs.

    On a CPU long sequences go head by head, on TPUs and GPUs all scores of short ones at once (the
    second result is nothing then).
    """
    plain = partial(_lax.forward, plan)
    if _short(plan, q, k):
        whole = partial(_whole.forward, plan)
        return lax.platform_dependent(q, k, v, extras, cpu=plain, default=whole)
    if not _worth(plan, q, k, extras):
        return plain(q, k, v, extras)
    return lax.platform_dependent(q, k, v, extras, cpu=partial(_forward, plan), default=plain)


def backward(
    plan: Plan,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    extras: Extras,
    out: jax.Array,
    log: jax.Array,
    grad: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]:
    """Return what :func:`_lax.backward` returns, in the form of :func:`forward`."""
    plain = partial(_lax.backward, plan)
    operands = (q, k, v, extras, out, log, grad)
    if _short(plan, q, k):
        whole = partial(_whole.backward, plan)
        return lax.platform_dependent(*operands, cpu=plain, default=whole)
    if not _worth(plan, q, k, extras):
        return plain(*operands)
    return lax.platform_dependent(*operands, cpu=partial(_backward, plan), default=plain)


def _short(plan: Plan, q: jax.Array, k: jax.Array) -> bool:
    """Tell whether all scores are so few that blocks of them save a TPU or GPU no memory."""
    return plan.left is None and max(q.shape[1], k.shape[1]) < WORTH


def _worth(plan: Plan, q: jax.Array, k: jax.Array, extras: Extras) -> bool:
    """Tell whether to go head by head: long rows, several heads, nothing that differs by head."""
    several = q.shape[0] * k.shape[2] > 1
    same = extras.bias is None and extras.mask is None and extras.seed is None
    return several and same and plan.left is None and min(q.shape[1], k.shape[1]) >= BY_HEAD


def _split(x: jax.Array, K: int) -> jax.Array:
    """[B, T, H, D] to [B * K, 1, T, H / K, D], a row for each key head."""
    B, T, H, D = x.shape
    return x.reshape(B, T, K, H // K, D).transpose(0, 2, 1, 3, 4).reshape(B * K, 1, T, H // K, D)


def _join(x: jax.Array, B: int) -> jax.Array:
    """Undo :func:`_split`."""
    rows, _, T, G, D = x.shape
    x = x.reshape(B, rows // B, T, G, D).transpose(0, 2, 1, 3, 4)
    return x.reshape(B, T, rows // B * G, D)


def _of_row(extras: Extras, row: jax.Array, K: int) -> Extras:
    """Return the segments of the batch row that the key head belongs to."""

    def take(x: jax.Array | None) -> jax.Array | None:
        return None if x is None else lax.dynamic_slice_in_dim(x, row // K, 1, 0)

    return Extras(take(extras.q_segments), take(extras.k_segments))


def _forward(
    plan: Plan, q: jax.Array, k: jax.Array, v: jax.Array, extras: Extras
) -> tuple[jax.Array, jax.Array]:
    (B, T, H, _), K = q.shape, k.shape[2]

    def head(operands: Any) -> tuple[jax.Array, jax.Array]:
        row, q, k, v = operands
        return _lax.forward(plan, q, k, v, _of_row(extras, row, K), block_size=BY_HEAD_BLOCK)

    rows = lax.iota("int32", B * K)
    out, log = lax.map(head, (rows, *(_split(x, K) for x in (q, k, v))))
    return _join(out, B), log.reshape(B, H, T)


def _backward(
    plan: Plan,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    extras: Extras,
    out: jax.Array,
    log: jax.Array,
    grad: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array, None]:
    (B, T, H, _), K = q.shape, k.shape[2]

    def head(operands: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
        row, q, k, v, out, log, grad = operands
        of_row = _of_row(extras, row, K)
        return _lax.backward(plan, q, k, v, of_row, out, log, grad, block_size=BY_HEAD_BLOCK)[:3]

    logs = log.reshape(B * K, 1, H // K, T)
    split = [_split(x, K) for x in (q, k, v, out)]
    grads = lax.map(head, (lax.iota("int32", B * K), *split, logs, _split(grad, K)))
    back_q, back_k, back_v = (_join(x, B) for x in grads)
    return back_q, back_k, back_v, None
