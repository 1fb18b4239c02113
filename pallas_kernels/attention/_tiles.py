"""The maths of one tile of scores, shared by every body of the kernel."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

HIDDEN = -(2**31)
"""The segment of a key that no query sees."""


class Plan(NamedTuple):
    """What is known of a call while tracing; hashable.

    A query at position t sees the keys in [t - left, t + right]; ``None`` for no bound.
    """

    scale: float
    left: int | None = None
    right: int | None = None
    soft_cap: float | None = None
    rate: float = 0.0


class Extras(NamedTuple):
    """The optional arrays of a call.

    Attributes:
      q_segments: int32 [B, T]; ``k_segments``: int32 [B, S]. A query sees keys of its segment.
      bias: [B | 1, H | 1, T | 1, S | 1], added to the scores.
      mask: bool, of such a shape too; False hides a key from a query.
      seed: uint32 [2], of dropout.
    """

    q_segments: jax.Array | None = None
    k_segments: jax.Array | None = None
    bias: jax.Array | None = None
    mask: jax.Array | None = None
    seed: jax.Array | None = None

    @property
    def may_hide_all(self) -> bool:
        """Whether a query may be left without any key."""
        return any(x is not None for x in (self.q_segments, self.bias, self.mask))


def in_window(plan: Plan, query: jax.Array, key: jax.Array) -> jax.Array | None:
    """Return which keys lie in reach of which queries, from positions that broadcast."""
    reach = None
    if plan.right is not None:
        reach = key <= (query + plan.right if plan.right else query)
    if plan.left is not None:
        after = key >= query - plan.left
        reach = after if reach is None else reach & after
    return reach


def both(a: jax.Array | None, b: jax.Array | None) -> jax.Array | None:
    """Combine two conditions of which either may be absent."""
    return b if a is None else a if b is None else a & b


def cap(plan: Plan, scores: jax.Array) -> jax.Array:
    """Bound scores smoothly to (-soft_cap, soft_cap)."""
    if plan.soft_cap is None:
        return scores
    return plan.soft_cap * jnp.tanh(scores * (1 / plan.soft_cap))


def through_cap(plan: Plan, capped: jax.Array, slope: jax.Array) -> jax.Array:
    """Multiply slopes by the derivative of :func:`cap`, from its value."""
    if plan.soft_cap is None:
        return slope
    ratio = capped * (1 / plan.soft_cap)
    return slope * (1 - ratio * ratio)


def kept(plan: Plan, seed: Any, head: Any, query: jax.Array, key: jax.Array) -> jax.Array:
    """Return which weights dropout keeps; the same bits in every body and every tiling.

    A hash of the seed's two int32 words, the head (counted through the batch) and the two
    positions; ``query`` and ``key`` broadcast against each other. The finalizer of MurmurHash3
    mixes 32 bits in five operations, all of which every backend has for int32 vectors.
    """
    row = _mix(_mix(query * _ODD[0] + seed[0]) ^ (head * _ODD[1] + seed[1]))
    bits = _mix(row + key * _ODD[2])
    return lax.shift_right_logical(bits, jnp.int32(8)) >= jnp.int32(round(plan.rate * 2**24))


def _int32(word: int) -> int:
    return word - (1 << 32) if word >= 1 << 31 else word


_ODD = tuple(_int32(word) for word in (0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D))


def _mix(x: jax.Array) -> jax.Array:
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        x = (x ^ lax.shift_right_logical(x, jnp.int32(shift))) * jnp.int32(_int32(factor))
    return x ^ lax.shift_right_logical(x, jnp.int32(16))
