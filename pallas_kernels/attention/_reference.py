"""Attention as the textbook writes it, with a T x S array."""

import jax
import jax.numpy as jnp

from fnml.pallas_kernels._dtypes import wide
from fnml.pallas_kernels.attention._tiles import Extras, Plan, both, cap, in_window, kept


def attention(plan: Plan, q: jax.Array, k: jax.Array, v: jax.Array, extras: Extras) -> jax.Array:
    """Return the output [B, T, H, D]; every derivative works, forward mode too."""
    B, T, H, _ = q.shape
    S, sums = k.shape[1], wide(q.dtype)
    k, v = (jnp.repeat(x, H // k.shape[2], axis=2) for x in (k, v))
    scores = jnp.einsum("bthd,bshd->bhts", q, k, preferred_element_type=sums) * plan.scale
    scores = cap(plan, scores)
    if extras.bias is not None:
        scores = scores + jnp.broadcast_to(extras.bias.astype(sums), scores.shape)
    query, key = jnp.arange(T)[:, None], jnp.arange(S)[None, :]
    seen = in_window(plan, query, key)
    seen = None if seen is None else seen[None, None]
    if extras.q_segments is not None and extras.k_segments is not None:
        same = extras.q_segments[:, None, :, None] == extras.k_segments[:, None, None, :]
        seen = same if seen is None else seen & same
    if (seen := both(seen, extras.mask)) is not None:
        scores = jnp.where(seen, scores, -jnp.inf)
    top = jax.lax.stop_gradient(scores.max(-1, keepdims=True))
    weights = jnp.exp(scores - jnp.where(top == -jnp.inf, 0, top))
    total = weights.sum(-1, keepdims=True)
    weights = weights / jnp.where(total == 0, 1, total)
    if extras.seed is not None:
        head = jnp.arange(B * H, dtype=jnp.int32).reshape(B, H, 1, 1)
        query, key = (x.astype(jnp.int32)[None, None] for x in (query, key))
        keep = kept(plan, extras.seed, head, query, key)
        weights = jnp.where(keep, weights / (1 - plan.rate), 0)
    out = jnp.einsum("bhts,bshd->bthd", weights.astype(q.dtype), v, preferred_element_type=sums)
    return out.astype(q.dtype)
