"""Attention with all scores of a short sequence at once, as a textbook writes it.

What TPUs and GPUs run where no kernel does: there each block costs calls and copies of its own.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from fnml.pallas_kernels._dtypes import wide
from fnml.pallas_kernels._varying import zeros
from fnml.pallas_kernels.attention._tiles import (
    Extras,
    Plan,
    both,
    cap,
    in_window,
    kept,
    through_cap,
)


class _Weights(NamedTuple):
    """The weights [B, H, T, S] before dropout, the scores behind them, and what is kept."""

    weights: jax.Array
    capped: jax.Array
    keep: jax.Array | None


def _weights(plan: Plan, q: jax.Array, k: jax.Array, extras: Extras) -> _Weights:
    (B, T, H, _), S, sums = q.shape, k.shape[1], wide(q.dtype)
    scores = jnp.einsum("bthd,bshd->bhts", q, k, preferred_element_type=sums)
    capped = scores = cap(plan, scores * plan.scale)
    if extras.bias is not None:
        scores = scores + jnp.broadcast_to(extras.bias.astype(sums), scores.shape)
    query, key = (jnp.arange(n, dtype=jnp.int32)[None, None] for n in (T, S))
    query, key = query[..., None], key[:, :, None]
    seen = in_window(plan, query, key)
    if extras.q_segments is not None and extras.k_segments is not None:
        own, other = extras.q_segments[:, None, :, None], extras.k_segments[:, None, None]
        seen = both(seen, own == other)
    seen = both(seen, extras.mask)
    if seen is not None:
        scores = jnp.where(seen, scores, -jnp.inf)
    top = scores.max(-1, keepdims=True)
    if extras.may_hide_all:
        top = jnp.where(top == -jnp.inf, 0, top)
    weights = jnp.exp(scores - top)
    total = weights.sum(-1, keepdims=True)
    if extras.may_hide_all:
        total = jnp.where(total == 0, 1, total)
    keep = None
    if extras.seed is not None:
        head = jnp.arange(B * H, dtype=jnp.int32).reshape(B, H, 1, 1)
        keep = kept(plan, extras.seed, head, query, key)
    return _Weights(weights / total, capped, keep)


def _dropped(plan: Plan, x: jax.Array, keep: jax.Array | None) -> jax.Array:
    return x if keep is None else jnp.where(keep, x * (1 / (1 - plan.rate)), 0)


def _of_heads(x: jax.Array, H: int) -> jax.Array:
    """Repeat [B, S, K, D] to [B, S, H, D], a copy for each query head."""
    return x if x.shape[2] == H else jnp.repeat(x, H // x.shape[2], axis=2)


def _of_groups(x: jax.Array, K: int) -> jax.Array:
    """Undo :func:`_of_heads` for a gradient: sum [B, S, H, D] to [B, S, K, D]."""
    B, S, H, D = x.shape
    return x if K == H else x.reshape(B, S, K, H // K, D).sum(3)


def forward(
    plan: Plan, q: jax.Array, k: jax.Array, v: jax.Array, extras: Extras
) -> tuple[jax.Array, jax.Array]:
    """Return the output [B, T, H, D], and zeros [B, H, T] that :func:`backward` does not read."""
    (B, T, H, _), sums = q.shape, wide(q.dtype)
    weights, _, keep = _weights(plan, q, _of_heads(k, H), extras)
    used = _dropped(plan, weights, keep).astype(q.dtype)
    out = jnp.einsum("bhts,bshd->bthd", used, _of_heads(v, H), preferred_element_type=sums)
    return out.astype(q.dtype), zeros((B, H, T), sums, q)


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
    """Return the gradients of q, k, v and the bias."""
    H, K, dtype, sums = q.shape[2], k.shape[2], q.dtype, wide(q.dtype)
    k, v = _of_heads(k, H), _of_heads(v, H)
    # The forward pass's own terms: in one program XLA finds that it has them already.
    weights, capped, keep = _weights(plan, q, k, extras)
    used = _dropped(plan, weights, keep).astype(dtype)
    grad_v = jnp.einsum("bhts,bthd->bshd", used, grad, preferred_element_type=sums)
    slope = jnp.einsum("bthd,bshd->bhts", grad, v, preferred_element_type=sums)
    slope = _dropped(plan, slope, keep)
    slope = weights * (slope - (weights * slope).sum(-1, keepdims=True))
    grad_bias = None
    if extras.bias is not None:
        over = [axis for axis, size in enumerate(extras.bias.shape) if size == 1]
        grad_bias = slope.sum(over, keepdims=True)
    slope = (through_cap(plan, capped, slope) * plan.scale).astype(dtype)
    grad_q = jnp.einsum("bhts,bshd->bthd", slope, k, preferred_element_type=sums)
    grad_k = jnp.einsum("bhts,bthd->bshd", slope, q, preferred_element_type=sums)
    grad_k, grad_v = (_of_groups(x, K).astype(dtype) for x in (grad_k, grad_v))
    return grad_q.astype(dtype), grad_k, grad_v, grad_bias
